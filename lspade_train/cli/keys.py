"""The recipe's keys: their names, their types in words, and suggestions for mistyped ones.

Imports nothing heavy, so that a mistyped key is reported at once.
"""

import ast
import difflib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from lspade_train.recipe import Recipe

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
    dict: "a section of keys",
    list: "a list",
}
PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


def _keys(section: type, place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        found[place + name] = hint
        if is_dataclass(hint):
            found |= _keys(hint, f"{place}{name}.")  # type: ignore[arg-type]
    return found


KEYS: Mapping[str, Any] = _keys(Recipe)
"""Dotted key -> type; a section's type is its dataclass."""

SECTIONS = frozenset(key for key, hint in KEYS.items() if is_dataclass(hint))


HELP_TRAINER = "--help-trainer"


@cache
def trainer_keys() -> Mapping[str, Any]:
    """The arguments of Lightning's Trainer -> their types; None if not only plain values.

    Read from its source, since importing it takes seconds.
    """
    names: dict[str, Any] = {"Optional": Optional, "Union": Union, "Literal": Literal}
    for node in _source("fabric/plugins/precision/precision.py").body:
        if isinstance(node, ast.Assign) and "_PRECISION_INPUT" in ast.unparse(node.targets[0]):
            exec(compile(ast.Module([node], []), "precision", "exec"), names)
    for node in ast.walk(_source("pytorch/trainer/trainer.py")):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args[1:], *node.args.kwonlyargs]
            return {f"trainer.{one.arg}": _hint(one.annotation, names) for one in arguments}
    return {}


def _source(name: str) -> ast.Module:
    found = importlib.util.find_spec("lightning")
    places = [] if found is None else found.submodule_search_locations or []
    texts = [(Path(place) / name).read_text(encoding="utf-8") for place in places]
    return ast.parse("".join(texts))


def _hint(annotation: ast.expr | None, names: Mapping[str, Any]) -> Any:
    try:
        return eval(ast.unparse(annotation), dict(names)) if annotation else None
    except NameError:  # the type includes a Lightning class
        return None


@cache
def plain_trainer_keys() -> Mapping[str, Any]:
    """The Trainer's arguments whose types are known without Lightning."""
    return {key: hint for key, hint in trainer_keys().items() if hint is not None}


def is_known(key: str) -> bool:
    """Whether a recipe has that key; inside a mapping any name is valid, except in `trainer`."""
    if key.startswith("trainer."):
        return ".".join(key.split(".")[:2]).rstrip("+") in trainer_keys()
    parents = [".".join(key.split(".")[:count]) for count in range(1, key.count(".") + 1)]
    return key in KEYS or any(takes_names(parent) for parent in parents)


def takes_names(key: str) -> bool:
    """Whether a key's value is a mapping with arbitrary names."""
    hint = KEYS.get(key)
    return any(get_origin(part) is dict for part in (hint, *get_args(hint)))


def wording(hint: Any) -> str:
    """A type in words, such as `a whole number, or null`."""
    if get_origin(hint) in (Union, UnionType):
        parts = sorted(get_args(hint), key=lambda part: part is NoneType)
        return ", or ".join(wording(part) for part in parts)
    if get_origin(hint) is Literal:
        values = [str(value) for value in get_args(hint)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if get_origin(hint) is list:
        return f"a list of {PLURALS.get(get_args(hint)[0], 'values')}"
    if get_origin(hint) is dict:
        return WORDS[dict]
    if is_dataclass(hint):
        return WORDS[dict]
    return WORDS.get(hint, str(getattr(hint, "__name__", hint)))


def near_key(key: str) -> str:
    """For an unknown key: a similar key, and where all keys are listed."""
    known, option = (
        (trainer_keys(), HELP_TRAINER) if key.startswith("trainer.") else (KEYS, "--help")
    )
    return f"{near(key, known)}\nlspade-train fit {option} lists every key."


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or "" if no name is similar."""
    known = list(known)
    by_last = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    last = name.rsplit(".", 1)[-1]
    found = [by_last[name]] if name in by_last else []
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    found = found or [by_last[k] for k in difflib.get_close_matches(last, by_last, 1, cutoff=0.75)]
    return f"; did you mean {found[0]}?" if found else ""
