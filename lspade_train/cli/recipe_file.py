"""Checks a recipe's file before parsing: encoding, YAML errors and keys, with line numbers.

Imports nothing heavy, so that a mistake is reported at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lspade_train.cli.keys import (
    SECTIONS,
    is_known,
    near,
    near_key,
    plain_trainer_keys,
    takes_names,
)
from lspade_train.cli.shipped import find_recipe, recipes
from lspade_train.errors import RecipeError
from lspade_train.io.storage import first_line
from lspade_train.io.text import read_text

KINDS = {"scalar": "a single value", "sequence": "a list", "mapping": "keys"}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe that is valid YAML with known keys only.

    Attributes:
        name: the name as given.
        path: path of the file.
        text: its YAML, without empty sections, which keep their defaults.
        plain: the same without values that only Lightning's own classes can check.
        lines: dotted key -> line, from 1.
    """

    name: str
    path: Path
    text: str
    plain: str
    lines: dict[str, int]


def read_recipe(name: str) -> RecipeFile:
    """Read a recipe by its path, or a shipped one by its name.

    Raises:
        RecipeError: no such file, not text, not YAML, or a duplicate or unknown key.
    """
    path = Path(find_recipe(name)).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "file not found"
        names = [*recipes(), *map(str, [*Path().glob("*.yaml"), *Path().glob("recipes/*.yaml")])]
        raise RecipeError(
            f"No recipe {name} ({what}{near(name, names)}). Expected a YAML file, or a name that "
            "lspade-train recipes lists; check --config."
        )
    text = read_text(path, RecipeError)
    node = _compose(path, text)
    lines: dict[str, int] = {}
    empty = list(_check(path, node, "", lines))
    for parent, pair in empty:
        parent.value.remove(pair)
    text = yaml.serialize(node) if empty else text
    for key, section in node.value:
        if key.value == "trainer" and isinstance(section, yaml.MappingNode):
            known = plain_trainer_keys()
            section.value = [pair for pair in section.value if f"trainer.{pair[0].value}" in known]
    return RecipeFile(name, path, text, yaml.serialize(node), lines)


def _compose(path: Path, text: str) -> yaml.MappingNode:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"{path}{line} is not YAML: {error.problem or error.context}. Correct the file."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} is not YAML: {first_line(error)}. Correct the file.") from error
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else KINDS[node.id]
        raise RecipeError(
            f"{path} holds {found}; expected keys, such as name and data. "
            "lspade-train recipes arc prints an example."
        )
    return node


def _check(
    path: Path, node: yaml.MappingNode, place: str, lines: dict[str, int]
) -> Iterator[tuple[yaml.MappingNode, tuple[yaml.Node, yaml.Node]]]:
    """Check the keys of a section and record their lines; yields the empty sections."""
    for key_node, value in list(node.value):
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{path}, line {line}: keys must be strings. Correct the file.")
        key = place + str(key_node.value)
        if key in lines:
            raise RecipeError(
                f"{path}, line {line}: {key} is given a second time (first in line {lines[key]}). "
                "Put all of it into one."
            )
        lines[key] = line
        if not is_known(key):
            raise RecipeError(f"{path}, line {line}: unknown key {key}{near_key(key)}")
        if _is_null(value) and (key in SECTIONS or key == "trainer"):
            yield node, (key_node, value)
        elif isinstance(value, yaml.MappingNode):
            yield from _check(path, value, f"{key}.", lines)
        elif key in SECTIONS or (takes_names(key) and not _is_null(value)):
            raise RecipeError(
                f"{path}, line {line}: {key} holds {KINDS[value.id]}; expected keys below it."
            )


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"
