"""Recipes that ship with the package, with their data and model. Independent of parsing.

An installed package has them in `share/`, with the same layout as at the root of a clone.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOT = next((folder for folder in [PACKAGE / "share"] if folder.is_dir()), PACKAGE.parent)
"""Base of a shipped recipe's relative paths, if the user has no such file."""


def recipes() -> dict[str, Path]:
    """The shipped recipes by name, in alphabetical order."""
    return {path.stem: path for path in sorted(ROOT.glob("recipes/*.yaml"))}


def summary(recipe: Path) -> str:
    """The first sentence of a recipe's header: what it is and what it costs."""
    header: list[str] = []
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line.lstrip("# "))
    return " ".join(header).split(". ")[0].rstrip(".")


def find_recipe(name: str) -> str:
    """The path of the shipped recipe of that name; user files and other names are unchanged."""
    known = recipes()
    return name if name not in known or Path(name).is_file() else str(known[name])


def is_shipped(recipe: str | Path) -> bool:
    """Whether a recipe's file is one of those shipped."""
    return Path(recipe).resolve() in {path.resolve() for path in recipes().values()}


def locate(path: str | None) -> str | None:
    """A path of a shipped recipe: the user's own file if there is one, else the shipped one."""
    shipped = ROOT / path if path is not None else ROOT
    if path is None or Path(path).exists() or not shipped.exists():
        return path
    return str(shipped)
