"""Unsupported versions are rejected by name, before anything heavy is imported."""

import pytest

import lspade_train
from lspade_train.cli import main
from lspade_train.errors import UnsupportedVersionError
from lspade_train.requirements import check_versions


@pytest.fixture(autouse=True)
def _asked_anew():
    check_versions.cache_clear()
    yield
    check_versions.cache_clear()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Shadow a package's installed metadata with other metadata, as pip would write it."""

    def install(name, version, *needs):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_the_installed_versions_are_supported():
    check_versions()


def test_an_older_transformers_is_rejected_with_the_install_command(installed, capsys):
    installed("transformers", "4.40.0")
    with pytest.raises(
        UnsupportedVersionError, match=r'4\.40\.0 is installed.\nInst.*pip install "transformers'
    ):
        getattr(lspade_train, "spade_logits")  # noqa: B009  the statement would be optimised away
    assert main(["info", "checkpoints/tiny-world"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: lspade-train ")
    assert "4.40.0 is installed" in printed
    assert len(printed.splitlines()) == 2


def test_help_works_with_any_installed_versions(installed, capsys):
    installed("transformers", "4.40.0")
    assert main(["--help"]) == 0
    assert "usage" in capsys.readouterr().out


def test_a_missing_dependency_is_reported_unless_it_is_an_extra(installed):
    installed("lspade_train", "0.1.0", "no-such-thing>=1", 'nor-this; extra == "wandb"')
    with pytest.raises(
        UnsupportedVersionError, match="needs no-such-thing>=1; it is not installed"
    ):
        check_versions()


def test_a_missing_extra_is_not_an_error(installed):
    installed("lspade_train", "0.1.0", 'nor-this; extra == "wandb"', "torch>=2")
    check_versions()
