"""An ordinary run prints only its own messages: no library's warnings get through."""

import os
import re
import subprocess
import sys

import pytest

from lspade_train.models.recorder import cache_name

FOREIGN = re.compile(r"Warning|site-packages|wandb:|Tip|💡|\[rank|INFO|v_num|it/s|deprecat", re.I)
STRICT = ("-W", "error", "-W", "ignore::ResourceWarning")
"""Python hides ResourceWarning by default; W&B leaves its temporary folders to it."""
COMMANDS = {
    "fit": [],
    "fit again": ["--model.target", "both", "--trainer.devices", "1"],
    "validate": [],
    "test": [],
    "calibrate": ["--max_disagreement", "0.5"],
    "evaluate": [],
    "inspect w1": [],
    "predict": ["--input", "data/test.jsonl", "--output", "answers.jsonl"],
    "profile": ["--lengths", "[8]", "--batch_sizes", "[1]"],
}


def test_keys_and_values_are_passed_under_the_decoders_argument_name():
    # Some versions accept either name with a warning, others only one.
    def before(input_ids, past_key_values=None): ...

    def renamed(input_ids, cache=None): ...

    assert [cache_name(forward) for forward in (before, renamed)] == ["past_key_values", "cache"]


@pytest.mark.slow
def test_no_library_output_reaches_the_terminal(project):
    """Every warning is an error here, W&B is on, and progress is shown."""
    (project.home / "data").symlink_to(project.data)
    recipe = project.recipe(trainer__enable_progress_bar=True, model__target="both")
    environment = {**os.environ, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment.pop("WANDB_SILENT", None)
    for command, options in COMMANDS.items():
        words = [*command.replace(" again", "").split(), "--config", str(recipe), *options]
        done = subprocess.run(
            [sys.executable, *STRICT, "-m", "lspade_train", *words],
            capture_output=True, text=True, env=environment, cwd=project.home, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr)
        for line in [*done.stderr.splitlines(), *done.stdout.splitlines()]:
            assert not FOREIGN.search(line), (command, line)
