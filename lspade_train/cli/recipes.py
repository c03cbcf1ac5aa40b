"""`recipes`: the recipes that ship with the package, to run by name or to adapt."""

import sys

from lspade_train.cli.shipped import recipes as shipped
from lspade_train.cli.shipped import summary
from lspade_train.errors import RecipeError

RECIPES = """\
usage: lspade-train recipes [NAME]

The recipes that ship with the package, each with what it costs; with NAME, that recipe's text.
Every command takes a name in place of a path.

  lspade-train fit --config quickstart
  lspade-train recipes arc > my_arc.yaml
"""


def recipes(arguments: list[str]) -> int:
    """List the shipped recipes, or print one."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(RECIPES)
        return 2 if len(arguments) > 1 else 0
    known = shipped()
    if not arguments:
        width = max(map(len, known))
        lines = [f"{name:<{width}}  {summary(path)}\n" for name, path in known.items()]
        sys.stdout.write("".join(lines))
        return 0
    (name,) = arguments
    if name not in known:
        raise RecipeError(
            f"No recipe {name!r} ships with lspade-train; it has {', '.join(known)}.\n"
            "lspade-train recipes describes each."
        )
    sys.stdout.write(known[name].read_text(encoding="utf-8"))
    return 0
