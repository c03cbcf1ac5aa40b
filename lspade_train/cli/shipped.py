"""Recipes that ship with the package, and the data and model they name. Knows nothing of parsing.

In an installed package they lie in `share/`, laid out as in a clone, which has them at its root.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOT = next((folder for folder in [PACKAGE / "share"] if folder.is_dir()), PACKAGE.parent)
"""What the relative paths of a shipped recipe are relative to, where the user has no such file."""


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
    """The shipped recipe of that name; anything else, and any file of the user's, as it is."""
    known = recipes()
    return name if name not in known or Path(name).is_file() else str(known[name])


def is_shipped(recipe: str | Path) -> bool:
    """Whether a recipe's file is one of those shipped."""
    return Path(recipe).resolve() in {path.resolve() for path in recipes().values()}


def locate(path: str | None) -> str | None:
    """A path of a shipped recipe: the user's own where there is one, else the shipped file's."""
    shipped = ROOT / path if path is not None else ROOT
    if path is None or Path(path).exists() or not shipped.exists():
        return path
    return str(shipped)
