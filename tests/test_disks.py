"""Disks that are read-only or fill up while each command writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import toy
from processes import HEADS, digests, recipe
from test_cli import error_of

from lspade_train.cli import main
from lspade_train.models import ModelAdapter

QUICK = {
    "evaluate": [],
    "calibrate": ["--max_disagreement", "0.5"],
    "profile": ["--lengths", "[8]", "--batch_sizes", "[1]", "--repeats", "1"],
    "predict": ["--input", "prompts.jsonl", "--threshold", "3.9"],
}
"""Commands that write, and what makes them short here."""


class Made:
    """A finished fit, evaluated and profiled, with prompts to answer; read-only."""

    def __init__(self, project: toy.Project) -> None:
        self.project, self.home = project, project.home
        prompts = "\n".join(json.dumps(row) for row in toy.questions(40, seed=3))
        (self.home / "prompts.jsonl").write_text(prompts)
        self.recipe = recipe(project, trainer__logger=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.home)
            patch.setenv("WANDB_MODE", "disabled")
            for command in ("fit", "evaluate", "profile"):
                assert main([command, *self.recipe, *QUICK.get(command, [])]) == 0

    def arguments(self, command: str, place: Path) -> list[str]:
        """Arguments of `command`, with its output in `place`."""
        answers, heads = ["--output", place / "answers.jsonl"], ["--heads", place / "heads"]
        output = map(str, answers if command == "predict" else heads)
        return [command, *self.recipe, *QUICK[command], *output]


@pytest.fixture(scope="module")
def made(toy_root, tmp_path_factory):
    return Made(toy.Project(toy_root, tmp_path_factory.mktemp("made")))


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A separate file system with the heads on it; skips without the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    shutil.copytree(made.home / HEADS, place / "heads")
    monkeypatch.chdir(made.home)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def fill(place: Path, *, leave: int) -> None:
    """Fill a disk except for so many bytes."""
    with (place / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(place).free - leave))


@pytest.mark.parametrize("command", QUICK)
def test_an_unwritable_folder_is_reported_before_the_model_is_loaded(
    made, place, capsys, monkeypatch, command
):
    remount(place, "ro")
    monkeypatch.setattr(ModelAdapter, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    message = error_of(capsys, *made.arguments(command, place))
    assert message.startswith(str(place)), message
    assert "cannot be written. Choose a folder that you can write to." in message


def test_fit_reports_an_unwritable_folder_before_the_model_is_loaded(
    made, place, capsys, monkeypatch, tmp_path
):
    remount(place, "ro")
    monkeypatch.setattr(ModelAdapter, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    shutil.copy(made.home / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").symlink_to(place)
    assert "checkpoints/toy cannot be written" in error_of(capsys, "fit", *made.recipe)
    Path("checkpoints").unlink()
    Path("checkpoints").write_text("")
    assert "checkpoints is a file" in error_of(capsys, "fit", *made.recipe)


def test_predict_rejects_a_non_file_output_before_the_model_is_loaded(
    made, place, capsys, monkeypatch
):
    monkeypatch.setattr(ModelAdapter, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (place / "answers.jsonl").mkdir()
    message = error_of(capsys, *made.arguments("predict", place))
    assert "cannot be written. Give another file with --output." in message


def test_predict_creates_the_folder_of_its_output(made, place):
    assert main(made.arguments("predict", place / "new")) == 0
    assert len((place / "new/answers.jsonl").read_text().splitlines()) == 40


WHOLE = {".json": b"}\n", ".png": b"IEND\xaeB`\x82", ".svg": b"</svg>\n", ".html": b"</html>\n"}
"""How whole files end."""


@pytest.mark.parametrize(
    ("command", "leave"),
    [("evaluate", 0), ("evaluate", 400_000), ("calibrate", 0), ("profile", 20_000), ("predict", 0)],
)
def test_a_full_disk_is_named_in_the_error_and_no_file_is_half_written(
    made, place, capsys, command, leave
):
    for figure in (place / "heads/figures").iterdir():
        figure.write_bytes(b"of another time")
    before = digests(place, "**/*")
    fill(place, leave=leave)
    message = error_of(capsys, *made.arguments(command, place))
    assert "is full" in message or "No space left" in message, message
    (place / "filler").unlink()
    after = digests(place, "**/*")
    assert before.keys() <= after.keys()
    new = [path for path, digest in after.items() if before.get(path) != digest]
    assert bool(new) == (leave > 0 or command == "predict")
    for path in {*new} - {"answers.jsonl"}:
        assert (place / path).read_bytes().endswith(WHOLE[Path(path).suffix]), path
