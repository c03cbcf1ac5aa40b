"""Command lines for the user to copy: their own, changed to another command or to resume."""

import shlex
from collections.abc import Callable, Sequence

OF_FIT = ("--ckpt_path", "--trainer")


def another(command: str, arguments: Sequence[str], *, without: Sequence[str] = ()) -> str:
    """Another command on the same recipe with the same overrides.

    Args:
        command: name of the other command.
        arguments: arguments of the current command; those that only `fit` reads are dropped.
        without: options that only the current command has, such as `--plan`.
    """
    kept = without_options(arguments, lambda key: key in without or key.split(".")[0] in OF_FIT)
    return shlex.join(["lspade-train", command, *kept])


def resumed(arguments: Sequence[str], *, from_checkpoint: bool) -> str:
    """The command that resumes a fit, from its last checkpoint if there is one."""
    kept = without_options(arguments, lambda key: key == "--ckpt_path")
    last = ["--ckpt_path", "last"] if from_checkpoint else []
    return shlex.join(["lspade-train", "fit", *kept, *last])


def without_options(arguments: Sequence[str], dropped: Callable[[str], bool]) -> list[str]:
    """The arguments without some options, in both forms, `--key VALUE` and `--key=VALUE`."""
    kept: list[str] = []
    dropping = False
    for word in arguments:
        if word.startswith("--"):
            dropping = dropped(word.split("=", 1)[0])
        if not dropping:
            kept.append(word)
        dropping = dropping and "=" not in word
    return kept
