"""Heads behind URLs: pushed, pulled, loaded in Python, and given to every command."""

import json
import shutil
from pathlib import Path

import pytest
import s3_server
import torch
from s3_server import BUCKET

from lspade_train import ExitPolicy, LSpadeHeads
from lspade_train.cli import main
from lspade_train.errors import HubError
from lspade_train.io.layout import CONFIG, PATTERNS, known_files
from lspade_train.io.remote import Mirror


@pytest.fixture(scope="module")
def server():
    """An S3-compatible server on this machine."""
    with s3_server.serve() as gate:
        yield gate


@pytest.fixture(scope="module")
def fitted(evaluated_once, tmp_path_factory):
    """A project with heads, a policy, results and figures; read-only."""
    made = evaluated_once.copy(tmp_path_factory.mktemp("fitted"))
    digest = made.results["heads"]["weights_sha256"]
    ExitPolicy(layers=(1, 2, 3), threshold=3.0, heads_digest=digest).save(made.folder)
    return made.project


@pytest.fixture(params=["s3"])
def url(request, tmp_path, monkeypatch):
    """A fresh URL, and a per-test working directory without heads."""
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path / "mirrors"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    if request.param == "file":
        return f"file://{tmp_path}/far/toy"
    s3_server.point_client_at(request.getfixturevalue("server"), monkeypatch)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def push(fitted, url):
    """Push the fitted heads to the URL."""
    folder = str(fitted.home / "checkpoints/toy")
    arguments = ["push", "--config", recipe_of(fitted), "--heads", folder, "--repo", url]
    return lambda *more: main([*arguments, *more])


def recipe_of(project) -> str:
    return str(project.home / "recipe.yaml")


def error_of(capsys, *arguments) -> str:
    """The one error, of two lines, on standard error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert len(message.splitlines()) == 2, message
    return message


@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)
def test_files_pushed_to_a_url_are_pulled_byte_for_byte(fitted, url, push):
    assert push() == 0
    assert main(["pull", url, "--to", "back"]) == 0
    sent = known_files(fitted.home / "checkpoints/toy")
    assert known_files(Path("back")).keys() == sent.keys() >= {"policy.json", "results.json"}
    for name, path in known_files(Path("back")).items():
        assert path.read_bytes() == sent[name].read_bytes()


@pytest.mark.slow
def test_an_interrupted_push_leaves_no_valid_heads_and_resumes(url, push, server, capsys):
    server.cut["PUT heads.safetensors"] = lambda: "403 Forbidden"
    assert push() == 1
    assert "your credentials for it" in capsys.readouterr().err
    first = server.files("PUT")
    assert CONFIG not in first
    with pytest.raises(HubError, match="holds no"):
        LSpadeHeads.from_pretrained(url)
    assert push() == 0
    second = server.files("PUT")
    assert second[-1] == CONFIG
    assert {*first} & {*second} == {"README.md", "heads.safetensors"}  # each push writes its card
    LSpadeHeads.from_pretrained(url)


@pytest.mark.parametrize("url", ["file", "s3"], indirect=True)
def test_heads_and_policy_load_from_a_url_and_pick_up_changes(url, tmp_path):
    heads = LSpadeHeads((1, 3), 8, form="bias")
    for value in (1.0, 2.0):
        with torch.no_grad():
            heads.bias.fill_(value)
        heads.save_pretrained(tmp_path / "made")
        digest = heads.metadata["weights_sha256"]
        ExitPolicy(layers=(1,), threshold=value, heads_digest=digest).save(tmp_path / "made")
        Mirror(url, PATTERNS, HubError, tmp_path / "made").publish()
        assert torch.equal(LSpadeHeads.from_pretrained(url).bias, heads.bias)
        assert ExitPolicy.from_pretrained(url).threshold == value
        assert ExitPolicy.load(url).heads_digest == digest


def test_predict_validate_test_and_inspect_read_heads_behind_a_url(fitted, url, push, capsys):
    push()
    given = ["--config", recipe_of(fitted), "--heads", url]
    Path("prompts.txt").write_text("w1 w2 ? :\n")
    assert main(["predict", *given, "--input", "prompts.txt", "--output", "out.jsonl"]) == 0
    assert json.loads(Path("out.jsonl").read_text())["layer"] in {1, 2, 3, 4}
    assert main(["inspect", "w1 w2 ? :", *given]) == 0
    for command in ("validate", "test"):
        assert main([command, *given]) == 0


@pytest.mark.slow
def test_info_and_compare_read_heads_behind_a_url(fitted, url, push, capsys):
    push()
    capsys.readouterr()
    assert main(["info", url]) == 0
    printed = capsys.readouterr().out
    assert url in printed
    assert "full, layers 1-3" in printed
    assert main(["compare", url, str(fitted.home / "checkpoints/toy")]) == 0
    assert Path("compare.png").exists()


@pytest.mark.slow
def test_info_and_verify_read_a_cache_behind_a_url(project, url, capsys, caplog):
    recipe = str(project.recipe(data__cache_dir=url))
    assert main(["cache", "--config", recipe]) == 0
    shutil.rmtree("mirrors")
    assert main(["info", url]) == 0
    assert f"{url}/validation" in capsys.readouterr().out
    assert not list(Path().rglob("mirrors/*/shard-*"))
    with caplog.at_level("INFO"):
        assert main(["cache", "--verify", url]) == 0
    assert caplog.text.count("all checksums OK") == 2
    assert main(["cache", "--verify", f"{url}/nowhere"]) == 1
    assert f"No finished cache in {url}/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "profile"])
def test_a_command_that_writes_beside_the_heads_rejects_a_url(fitted, url, command, capsys):
    message = error_of(capsys, command, "--config", recipe_of(fitted), "--heads", url)
    assert f"{command} writes into the heads folder" in message
    assert f"lspade-train pull {url} --to DIR" in message


def test_a_url_without_heads_is_named_in_the_error(fitted, url, capsys):
    given = ["--config", recipe_of(fitted), "--heads", url]
    for arguments in (["predict", *given], ["test", *given], ["pull", url], ["info", url]):
        assert f"{url} holds no heads.safetensors" in error_of(capsys, *arguments)


def test_hub_only_options_are_rejected_for_a_url(url, push, capsys):
    assert push("--private") == 1
    assert "has no --private" in capsys.readouterr().err
    with pytest.raises(HubError, match="is a URL, which has no revision 'v1'"):
        LSpadeHeads.from_pretrained(url, revision="v1")
