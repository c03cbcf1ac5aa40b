"""`lspade-train`: dispatch, help and exit codes. Imports nothing heavy until a command runs."""

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from lspade_train.errors import LSpadeError

COMMANDS = {
    "fit": ("train", "train the heads; builds a missing cache first; export to checkpoints/NAME/"),
    "validate": ("train", "loss, KL, agreement and accuracy of fitted heads on validation"),
    "test": ("train", "the same on the test split"),
    "cache": ("store", "run the frozen model once, write hidden states and SPADE targets; resumes"),
    "evaluate": (
        "measure",
        "every lens at every layer, exits, equal FLOPs, other tasks, ablations",
    ),
    "compare": ("measure", "results of several heads folders in one table and one figure"),
    "calibrate": ("choose", "choose the exit policy on validation, within a risk budget"),
    "predict": ("answer", "prompts in, answers with exit layer and entropy out (JSONL)"),
    "profile": ("gain", "wall time, memory and FLOPs against the full model, on this machine"),
    "info": ("show", "what a heads folder, a cache or a model is"),
}

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}

# What Lightning warns of and nobody here can or need act on.
NOTICES = ("exists and is not empty", "tensorboardX", "many workers", "LeafSpec", "GPU available")

HELP = """\
usage: lspade-train COMMAND --config RECIPE.yaml [--dotted.key VALUE ...]

Train, measure and serve L-SPADE probes: linear heads that tell a frozen language model
when it may stop early. One recipe serves every command; any of its keys can be
overridden on the command line, as in --data.model_id or --trainer.max_epochs.

commands:
{commands}

A first run (costs and needs stand at the top of each recipe):
  lspade-train fit --config recipes/pythia.yaml
  lspade-train evaluate --config recipes/pythia.yaml

lspade-train COMMAND --help explains a command and lists the recipe's keys.
Exit codes: 0 done, 1 a named error, 2 wrong usage.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        0 done, 1 a named error (one or two lines on standard error), 2 wrong usage.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in {"-h", "--help", "help"}:
        sys.stdout.write(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from lspade_train import __version__

        sys.stdout.write(f"lspade-train {__version__}\n")
        return 0
    if argv[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        sys.stderr.write(f"lspade-train: no command {argv[0]!r}; expected one of {known}\n")
        return 2
    _quiet()
    module = importlib.import_module(f"lspade_train.cli.{COMMANDS[argv[0]][0]}")
    try:
        return int(getattr(module, argv[0])(argv[1:]) or 0)
    except LSpadeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return 130
    except BrokenPipeError:  # the reader of a pipe left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _disk_trouble(error)


def _disk_trouble(error: OSError) -> int:
    """A log or a checkpoint that cannot be written is the user's to mend; the rest is a bug."""
    if error.errno not in DISK_TROUBLE:
        raise error
    sys.stderr.write(
        f"error: {error.strerror} ({error.filename or 'while writing'}).\n"
        "Free some space, or choose folders that you can write to, and run it again.\n"
    )
    return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def _quiet() -> None:
    """Our own lines only: libraries' notices are for their developers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    logging.getLogger("lspade_train").setLevel(logging.INFO if first else logging.ERROR)
    for name in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{name}.utilities.rank_zero").setLevel(logging.WARNING)
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=f".*{notice}.*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
