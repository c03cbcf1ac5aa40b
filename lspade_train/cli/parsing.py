"""Recipes from YAML and `--dotted.key VALUE`, by jsonargparse. Knows nothing of commands."""

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from lspade_train.cli.shipped import find_recipe, is_shipped, locate
from lspade_train.errors import RecipeError
from lspade_train.recipe import Recipe


@dataclass(frozen=True)
class Parsed:
    """A recipe and the command's own options.

    Attributes:
        recipe: the typed recipe; `trainer` holds what was given, for the record.
        options: the command's own options by name.
        trainer: Lightning's arguments with classes instantiated; empty where not asked for.
    """

    recipe: Recipe
    options: Namespace
    trainer: dict[str, Any]


def command_parser(command: str, description: str, *, with_trainer: bool = False) -> ArgumentParser:
    """A parser for a recipe and its overrides.

    Args:
        command: the command's name.
        description: what `--help` says first.
        with_trainer: type and list Lightning's own arguments (takes seconds to import).
    """
    parser = ArgumentParser(
        prog=f"lspade-train {command}",
        usage=f"lspade-train {command} --config RECIPE [--dotted.key VALUE ...]",
        description=description,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="recipe: a YAML file, or a shipped one's name"
    )
    if not with_trainer:
        parser.add_class_arguments(Recipe, None)
        return parser
    from lightning.pytorch import Trainer

    parser.add_class_arguments(Recipe, None, skip={"trainer"})
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Parsed:
    """Parse a command line into a recipe.

    A shipped recipe may be given by name, and finds the data and model that ship with it.

    Raises:
        RecipeError: an unknown key, a missing file, a value of the wrong type.
        SystemExit: 0 for `--help`, 2 for wrong usage.
    """
    arguments = list(_with_paths(arguments))
    try:
        config = parser.parse_args(arguments)
        asked = parser.instantiate_classes(config)
    except ArgumentError as error:
        _refuse(parser, str(error), arguments)
    names = {field.name for field in fields(Recipe)}
    values = {name: asked[name] for name in names if name in asked}
    trainer = values.get("trainer", {})
    if isinstance(trainer, Namespace):
        # Only what was given: Lightning's own defaults are not part of a recipe.
        defaults = parser.get_defaults()["trainer"].as_dict()
        given = config["trainer"].as_dict()
        values["trainer"] = {k: v for k, v in given.items() if v != defaults[k]}
        trainer = {name: trainer[name] for name in values["trainer"]}
    options = Namespace(**{k: v for k, v in vars(asked).items() if k not in {*names, "config"}})
    recipe = Recipe(**values)
    if any(is_shipped(file.absolute) for file in asked["config"] or ()):
        data = recipe.data
        recipe.data = replace(data, model_id=locate(data.model_id), dataset=locate(data.dataset))
    return Parsed(recipe, options, trainer)


def _with_paths(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, with shipped recipes' paths in place of their names."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before == "--config":
            yield find_recipe(word)
        elif word.startswith("--config="):
            yield f"--config={find_recipe(word.removeprefix('--config='))}"
        else:
            yield word


@contextmanager
def refusals_named() -> Generator[None]:
    """Settings that the Trainer refuses are the recipe's mistake."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as cause:
        text = " ".join(str(cause).split())
        raise RecipeError(f"The Trainer refuses: {text[:300]}\nCheck trainer.*.") from cause


def _refuse(parser: ArgumentParser, message: str, arguments: Sequence[str]) -> NoReturn:
    """A recipe's mistake is a named error; a mistake in using the command is wrong usage."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join(lines)
    if "--config" not in " ".join(arguments):
        _usage(parser, f"{lines[0]} Give a recipe: --config arc")
    if "File does not exist" in text:
        path = text.rsplit(": ", 1)[-1].strip("'")
        raise RecipeError(
            f"No recipe {path}. Expected a YAML file, or a name that lspade-train recipes lists; "
            "check --config."
        )
    if "nrecognized" in text and "--" in text and "." not in text.split("--", 1)[1].split("=")[0]:
        _usage(parser, text)
    if "labels" in text and ("True" in text or "False" in text):
        text = "data.prompt.labels: YAML reads a bare yes or no as true or false"
        raise RecipeError(
            f'{text}; expected quoted strings.\nWrite --data.prompt.labels \'["yes", "no"]\''
        )
    raise RecipeError(
        f"The recipe cannot be used: {text[:400]}\n"
        f"{parser.prog} --help lists every key and its type."
    )


def _usage(parser: ArgumentParser, text: str) -> NoReturn:
    sys.stderr.write(f"usage: {parser.usage}\n{parser.prog}: {text}\n")
    raise SystemExit(2)
