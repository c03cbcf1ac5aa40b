"""`lspade-train`: dispatch, help and exit codes. Imports nothing heavy until a command runs."""

import difflib
import errno
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from lspade_train.cli.signals import TERMINATED, Terminated, sigterm
from lspade_train.errors import LSpadeError, PeerError
from lspade_train.requirements import check_versions

COMMANDS = {
    "init": "create a recipe from a data file",
    "check": "preview a recipe: prompt, baseline accuracy, label balance, disk, time",
    "fit": "train the heads (building the cache if needed) into checkpoints/NAME/",
    "validate": "report loss, KL, agreement and accuracy of the heads on validation",
    "test": "report loss, KL, agreement and accuracy of the heads on the test split",
    "cache": "run the frozen model once, store hidden states and SPADE targets; resumes",
    "evaluate": "measure every lens at every layer: results.json, figures, report.html",
    "compare": "show results of several heads folders in one table and one figure",
    "inspect": "show one prompt layer by layer: the likeliest tokens, coloured by entropy",
    "calibrate": "select an exit policy on validation, within a given loss of accuracy",
    "predict": "answer prompts with early exit; writes JSONL with exit layer and entropy",
    "audit": "report how a policy does in production: disagreement, exit layers, alarm",
    "profile": "measure time, memory and FLOPs against the full model on this machine",
    "push": "upload heads, policy, results and model card to the Hugging Face Hub",
    "pull": "download heads from the Hub and verify them",
    "recipes": "list the built-in recipes, or print one",
    "info": "describe a heads folder, a cache or a model",
    "completion": "print a completion script for bash or zsh",
}

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}

# Lightning's warnings that require no action here.
NOTICES = ("exists and is not empty", "tensorboardX", "many workers", "LeafSpec", "GPU available")

LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
"""Logger of a single message: that a process was lost, before the others are terminated."""

HELP = """\
usage: lspade-train COMMAND --config RECIPE [--dotted.key VALUE ...]

Early exit for frozen language models with linear heads (L-SPADE): train, calibrate, serve.
All commands take the same recipe: a YAML file or the name of a built-in recipe. Any of its
keys can be overridden on the command line, as in --data.model_id or --trainer.max_epochs.

commands:
{commands}

A first run (lspade-train recipes says what each recipe costs):
  lspade-train fit --config pythia
  lspade-train evaluate --config pythia

lspade-train help COMMAND explains a command and lists the recipe's keys; -V prints the version.
Exit codes: 0 done, 1 a named error, 2 wrong usage, 130 interrupted, 143 terminated (SIGTERM);
after the last two the same command resumes where it stopped (fit: with --ckpt_path last).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: arguments without the program's name; None means the process's own.

    Returns:
        0 for success, 1 for a named error (one or two lines on standard error), 2 for wrong usage,
        130 if interrupted, 143 if terminated.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    _print_any_text()
    if argv and argv[0] == "help":
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] not in COMMANDS:
        return _without_command(argv)
    _quiet()
    try:
        with sigterm.caught():
            check_versions()
            module = importlib.import_module(f"lspade_train.cli.{argv[0]}")
            return int(getattr(module, argv[0])(argv[1:]) or 0)
    except LSpadeError as error:
        return _told(error)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except BrokenPipeError:  # the reader of a pipe exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, RuntimeError) as error:
        return _machine_trouble(error)


def _without_command(argv: Sequence[str]) -> int:
    """Print help, the version, or an error for a mistyped command."""
    if not argv or argv[0] in {"-h", "--help"}:
        sys.stdout.write(_help())
        return 0 if argv else 2
    if argv[0] in {"-V", "--version"}:
        from lspade_train import __version__

        sys.stdout.write(f"lspade-train {__version__}\n")
        return 0
    nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "see lspade-train --help"
    sys.stderr.write(f"lspade-train: unknown command {argv[0]!r}; {hint}\n")
    return 2


def _is_first() -> bool:
    """Whether this process reports for its run; each launcher uses its own rank variable."""
    counts = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return all(os.environ.get(count, "0") == "0" for count in counts)


def _print_any_text() -> None:
    """Print `?` for characters that the terminal's encoding cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _stopped(stop: KeyboardInterrupt) -> int:
    """Print how to resume: the command's own advice, or running it again."""
    terminated = isinstance(stop, Terminated)
    if _is_first():
        what = "terminated" if terminated else "interrupted"
        how = stop.args[0] if stop.args else "run the same command again to resume"
        sys.stderr.write(f"{what}; {how}\n")
    return TERMINATED if terminated else 130


def _told(error: LSpadeError) -> int:
    if not isinstance(error, PeerError):  # rank 0 reports it
        sys.stderr.write(f"error: {error}\n")
    return 1


def _machine_trouble(error: OSError | RuntimeError) -> int:
    """Report failed writes and lack of memory; anything else is a bug, and raised."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, to avoid importing torch
        from lspade_train.io.storage import first_line

        what = f"{first_line(error):.150}"
        remedy = (
            "Lower --data.tokens_per_batch or --data.batch_size; for large heads set "
            "--model.layer_groups 2 or --model.form low_rank."
        )
    elif isinstance(error, OSError) and error.errno in DISK_TROUBLE:
        what = f"{error.strerror} ({error.filename or 'while writing'})."
        remedy = "Free disk space or choose a writable folder, then run the command again."
    else:
        raise error
    sys.stderr.write(f"error: {what}\n{remedy}\n")
    return 1


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def _quiet() -> None:
    """Show only our own messages: libraries' notices are for their developers."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lspade_train").setLevel(logging.INFO if _is_first() else logging.ERROR)
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.distributed",
        "pytorch.trainer.connectors.signal_connector",
    ):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    launcher = logging.getLogger(LAUNCHER)
    launcher.handlers, launcher.propagate = [logging.StreamHandler()], False
    launcher.addFilter(_name_lost_process)
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=f".*{notice}.*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bar over a GGUF file's tensors
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _name_lost_process(record: logging.LogRecord) -> bool:
    record.msg = (
        "error: A worker process exited unexpectedly; the other processes were stopped.\n"
        "Completed work is kept: run the same command again to resume "
        "(fit: with --ckpt_path last)."
    )
    return True
