"""Sixty typical mistakes, each typed into a separate process: the error is short and quick.

`python -m pytest tests/test_wrong_inputs.py -m slow -s` prints the table.
"""

import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy

CODE = "import sys; from lspade_train.cli import main; sys.exit(main())"
JARGON = re.compile(
    r"Union subtypes|ArgumentParser|Parser key|Namespace|NestedArg|jsonargparse|Optional\[|<class"
    r"|\bdict\b|\bNoneType\b|object at 0x|Traceback|errno|HTTPSConnectionPool"
)
SECONDS = 5.0
"""Of CPU."""
LONGEST = 4

RECIPE = "--config recipe.yaml"
MISTAKES = {
    # the command itself
    "": 2,
    "ft": 2,
    "Fit --config recipe.yaml": 2,
    "--config recipe.yaml": 2,
    "help ft": 2,
    "-v": 2,
    # the recipe's name
    "fit": 2,
    "fit recipe.yaml": 2,
    "fit --config": 2,
    "fit --config nosuch": 1,
    "fit --config recipe": 1,
    "fit --config recipe.yml": 1,
    "fit --config qickstart": 1,
    "fit --config model": 1,
    "recipes qickstart": 1,
    # the recipe's text
    "fit --config tab.yaml": 1,
    "fit --config list.yaml": 1,
    "fit --config twice.yaml": 1,
    "fit --config colour.yaml": 1,
    "fit --config nested.yaml": 1,
    "fit --config nomodel.yaml": 1,
    "fit --config yes.yaml": 1,
    "fit --config layers.yaml": 1,
    "fit --config latin.yaml": 1,
    # keys and values on the command line
    f"fit {RECIPE} --data.modelid x": 1,
    f"fit {RECIPE} --model_id x": 2,
    f"fit {RECIPE} --data.batch_size many": 1,
    f"fit {RECIPE} --data.batch_size 0": 1,
    f"fit {RECIPE} --data.batch_size": 2,
    f"fit {RECIPE} --data.dtype float8": 1,
    f"fit {RECIPE} --model.layers 1,2": 1,
    f"fit {RECIPE} --model.layers [9]": 1,
    f"fit {RECIPE} --model.form ful": 1,
    f"fit {RECIPE} --model.lr fast": 1,
    f"fit {RECIPE} --model.lr -1": 1,
    f"fit {RECIPE} --trainer.max_epoch 5": 1,
    f"fit {RECIPE} --trainer.max_epochs many": 1,
    f"fit {RECIPE} --trainer.precision fp99": 1,
    f"fit {RECIPE} --seed_everything x": 1,
    f"fit {RECIPE} --verbose": 2,
    f"fit {RECIPE} extra": 2,
    # model and data
    f"fit {RECIPE} --data.model_id nowhere/modle": 1,
    f"fit {RECIPE} --data.model_id modle": 1,
    f"fit {RECIPE} --data.model_id a/b/c/d": 1,
    f"fit {RECIPE} --data.dataset 'my data/set'": 1,
    f"fit {RECIPE} --data.model_id data": 1,
    f"fit {RECIPE} --data.task arcc": 1,
    f"fit {RECIPE} --data.dataset nowhere": 1,
    f"fit {RECIPE} --data.dataset bad.jsonl": 1,
    f"fit {RECIPE} --data.dataset model": 1,
    f"fit {RECIPE} --data.prompt.template '{{question}}'": 1,
    f"fit {RECIPE} --ckpt_path nowhere.ckpt": 1,
    f"fit {RECIPE} --name a/b": 1,
    # other commands
    f"evaluate {RECIPE}": 1,
    f"evaluate {RECIPE} --split tset": 1,
    f"calibrate {RECIPE} --max_accuracy_drop lots": 2,
    f"calibrate {RECIPE}": 1,
    f"predict {RECIPE} --input nowhere.jsonl": 1,
    f"predict {RECIPE} --heads nowhere": 1,
    f"inspect '' {RECIPE}": 1,
    f"inspect hello {RECIPE} --lens logitlens": 1,
    f"cache {RECIPE} --splits [tset]": 1,
    "cache --verify": 2,
    "cache --verify nowhere": 1,
    "info": 2,
    "info nowhere": 1,
    "compare nowhere": 1,
    "push": 2,
    "pull": 2,
    "pull no/such/name": 1,
    "init": 2,
    "init nowhere.jsonl --model_id model": 1,
    "audit nowhere.json": 1,
    "completion fish": 1,
}
FILES = {
    "tab.yaml": b"name: toy\ndata:\n\tmodel_id: model\n",
    "list.yaml": b"- name: toy\n",
    "twice.yaml": b"name: toy\nname: again\ndata: {model_id: model}\n",
    "colour.yaml": b"name: toy\ndata:\n  model_id: model\n  colour: red\n",
    "nested.yaml": b"name: toy\ndata: model\n",
    "nomodel.yaml": b"name: toy\ndata: {task: jsonl}\n",
    "yes.yaml": b"name: toy\ndata: {model_id: model, prompt: {labels: [no, yes]}}\n",
    "layers.yaml": b"name: toy\ndata: {model_id: model}\nmodel: {layers: some}\n",
    "latin.yaml": b"name: caf\xe9\n",
    "bad.jsonl": b'{"prompt": "a", "answer": "A"}\n{"prompt": \n',
}


@pytest.fixture(scope="module")
def place(toy_root, tmp_path_factory) -> Path:
    """A folder with valid and invalid models, data and recipes."""
    home = tmp_path_factory.mktemp("mistakes")
    for name in ("model", "data"):
        (home / name).symlink_to(toy_root / name)
    project = toy.Project(toy_root, home)
    project.model, project.data, project.cache = Path("model"), Path("data"), Path("cache")
    project.recipe()
    for name, content in FILES.items():
        (home / name).write_bytes(content)
    return home


def typed(line: str, place: Path) -> tuple[int, str, float, float]:
    """Exit code, standard error, CPU seconds and wall-clock seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there
    environment.pop("HF_HUB_OFFLINE", None)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-c", CODE, *shlex.split(line)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=place, timeout=120, input=""
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    output = done.stderr if done.stderr.strip() else done.stdout
    return done.returncode, output, cpu, time.monotonic() - began


def test_there_are_sixty_mistakes():
    assert len(MISTAKES) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gives_a_short_and_quick_error(line, place):
    code, output, cpu, clock = typed(line, place)
    lines = output.strip().splitlines()
    print(f"{line[:60]:<60} {code} {len(lines):>2} {cpu:5.1f} {clock:5.1f}  {lines[:1]}")  # noqa: T201
    assert code == MISTAKES[line], output
    assert not JARGON.search(output), output
    assert len(lines) <= LONGEST or output.startswith("usage: "), output
    assert cpu < SECONDS, f"{cpu:.1f} s\n{output}"
