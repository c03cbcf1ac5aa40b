"""What ships with the package: by name in a clone, and from a wheel outside of it."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from lspade_train.cli import main
from lspade_train.cli.parsing import command_parser, parse

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))


def recipe(*arguments):
    return parse(command_parser("fit", ""), list(arguments), early=lambda _: None).recipe


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The package, built from this tree with its own build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.glob("*.whl")
    return file


def test_every_recipe_is_listed_with_its_description(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    assert all(len(line.split()) > 5 for line in lines)


def test_a_recipe_can_be_printed_as_a_starting_point(capsys):
    assert main(["recipes", "arc"]) == 0
    assert capsys.readouterr().out == (ROOT / "recipes/arc.yaml").read_text()
    assert main(["recipes", "ark"]) == 1
    assert "arc, arc_easy" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", [["--config", "boolq"], ["--config=boolq"]])
def test_a_shipped_recipe_can_be_given_by_name_or_path(spelling):
    by_path = recipe("--config", str(ROOT / "recipes/boolq.yaml"), "--data.limit", "3")
    assert recipe(*spelling, "--data.limit", "3") == by_path


def test_a_users_file_takes_precedence_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("arc").write_text("name: mine\ndata: {model_id: m, task: text}\n")
    assert recipe("--config", "arc").name == "mine"


def test_a_shipped_recipe_finds_its_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = recipe("--config", "quickstart").data
    assert Path(found.model_id).resolve() == ROOT / "checkpoints/tiny-world"
    assert Path(found.dataset).resolve() == ROOT / "recipes/quickstart/data"
    # Outputs stay in the working directory.
    assert found.cache_dir == "checkpoints/quickstart/cache"
    Path("checkpoints/tiny-world").mkdir(parents=True)
    assert recipe("--config", "quickstart").data.model_id == "checkpoints/tiny-world"


def test_a_users_recipe_is_not_modified(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text((ROOT / "recipes/quickstart.yaml").read_text())
    assert recipe("--config", "mine.yaml").data.model_id == "checkpoints/tiny-world"


def test_the_wheel_contains_the_recipes_their_data_and_the_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    held = {name.removeprefix("lspade_train/share/") for name in names if "/share/" in name}
    assert {f"recipes/{name}.yaml" for name in RECIPES} <= held
    assert "recipes/quickstart/data/train.jsonl" in held
    assert "checkpoints/tiny-world/model.safetensors" in held
    assert not [name for name in names if "__pycache__" in name or "checkpoints/quick" in name]
    assert wheel.stat().st_size < 8e6


@pytest.mark.slow
def test_an_installed_wheel_can_fit_a_shipped_recipe_outside_the_clone(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    packages = next((tmp_path / "env/lib").glob("python3*/site-packages"))
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Dependencies come from this environment; the package itself only from the wheel.
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    place = tmp_path / "elsewhere"
    place.mkdir()

    def run(*arguments):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        command = [python, tmp_path / "env/bin/lspade-train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert [line.split()[0] for line in run("recipes").splitlines()] == RECIPES
    short = ["--config", "quickstart", "--data.limit", "64"]
    run("fit", *short, "--trainer.max_epochs", "1")
    assert (place / "checkpoints/quickstart/heads.safetensors").exists()
    assert str(packages) in run("info", "checkpoints/quickstart")  # the model they were fitted for
    run("calibrate", *short)
    assert "threshold" in (place / "checkpoints/quickstart/policy.json").read_text()
