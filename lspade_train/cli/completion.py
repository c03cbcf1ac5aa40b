"""`completion`: prints a shell script that completes commands, recipes and options."""

import io
import re
import sys
from contextlib import redirect_stdout, suppress

from lspade_train.cli.keys import trainer_keys
from lspade_train.cli.shipped import recipes
from lspade_train.errors import RecipeError

COMPLETION = """\
usage: lspade-train completion SHELL

Write the completion script of a shell, bash or zsh, to standard output: commands, the recipes that
ship here, and every option. Write it again after an update.

  lspade-train completion bash > ~/.local/share/bash-completion/completions/lspade-train
  lspade-train completion zsh > ~/.zfunc/_lspade-train    (a folder in $fpath)
"""

ZSH = "#compdef lspade-train\nautoload -U +X bashcompinit && bashcompinit\n"
BASH = """\
_lspade_train() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" options=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "@COMMANDS" -- "$current"))
        return
    fi
    if [ "$before" = --config ] || [ "${COMP_WORDS[1]} $COMP_CWORD" = "recipes 2" ]; then
        COMPREPLY=($(compgen -W "@RECIPES" -- "$current") $(compgen -f -- "$current"))
        return
    fi
    case "${COMP_WORDS[1]}" in
@CASES
    esac
    case "$current" in
        --trainer*) options="@TRAINER" ;;
    esac
    COMPREPLY=($(compgen -W "$options" -- "$current"))
}
complete -o default -F _lspade_train lspade-train
"""


def completion(arguments: list[str]) -> int:
    """Write a completion script."""
    if len(arguments) != 1 or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(COMPLETION)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    if arguments[0] not in {"bash", "zsh"}:
        raise RecipeError(
            f"No completion for {arguments[0]!r}; expected bash or zsh.\n"
            "lspade-train completion bash writes that of bash."
        )
    from lspade_train.cli import COMMANDS

    cases = (f'        {name}) options="{" ".join(_options(name))}" ;;' for name in COMMANDS)
    values = {
        "@COMMANDS": " ".join(["help", *COMMANDS]),
        "@RECIPES": " ".join(recipes()),
        "@CASES": "\n".join(cases),
        "@TRAINER": " ".join(sorted(f"--{key}" for key in trainer_keys())),
    }
    text = re.sub("|".join(values), lambda found: values[found[0]], BASH)
    sys.stdout.write((ZSH if arguments[0] == "zsh" else "") + text)
    return 0


def _options(command: str) -> list[str]:
    """A command's options, from its own help."""
    from lspade_train.cli import main

    with redirect_stdout(io.StringIO()) as told, suppress(SystemExit):
        main([command, "--help"])
    return sorted(set(re.findall(r"^ +(--[\w.-]+)", told.getvalue(), re.M)))
