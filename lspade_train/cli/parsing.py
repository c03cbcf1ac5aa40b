"""Recipes from YAML and `--dotted.key VALUE`, by jsonargparse. Independent of commands."""

import copy
import json
import re
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
)

from lspade_train.cli.again import without_options
from lspade_train.cli.keys import (
    HELP_TRAINER,
    KEYS,
    is_known,
    near,
    near_key,
    plain_trainer_keys,
    wording,
)
from lspade_train.cli.recipe_file import RecipeFile, read_recipe
from lspade_train.cli.shipped import is_shipped, locate
from lspade_train.errors import RecipeError, UnsupportedModelError
from lspade_train.io.hub_names import near_model, settle_hub
from lspade_train.recipe import Recipe, check_layers

KEY_FAULT = re.compile(r'Parser key "([\w.]+)"')
GIVEN = re.compile(r"(?:Got value|Given value): (.*)")
BELOW = re.compile(r"NestedArg\(key='([\w.]+)', val=(.*)\)")
"""A key inside one that takes a Lightning class, such as `trainer.logger.save_dir`."""
MISSING = re.compile(r"Option '([\w.]+)' is required")
STRAY = re.compile(r"Unrecognized arguments: (.*)")


@dataclass(frozen=True)
class Parsed:
    """A recipe and the command's own options.

    Attributes:
        recipe: the typed recipe; `trainer` contains the given values, for the record.
        options: the command's own options by name.
        trainer: Lightning's arguments with classes instantiated; empty if not requested.
        arguments: the command line as given.
        recipes: the arguments of --config, as given.
    """

    recipe: Recipe
    options: Namespace
    trainer: dict[str, Any]
    arguments: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, ...]:
        """The command's own options, as typed, which other commands may not have."""
        return tuple(f"--{name}" for name in vars(self.options))


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Shows types and defaults, and keeps the description's line breaks."""


class CommandParser(ArgumentParser):
    """A command's parser; Lightning's arguments are only added when needed."""

    with_trainer: bool = False


def command_parser(command: str, description: str, *, with_trainer: bool = False) -> CommandParser:
    """A parser for a recipe and its overrides.

    Args:
        command: the command's name.
        description: the first text of `--help`.
        with_trainer: parse Lightning's own arguments by type (importing it takes seconds, so this
            is only done once a recipe has been read).
    """
    parser = CommandParser(
        prog=f"lspade-train {command}",
        usage=f"lspade-train {command} --config RECIPE [--dotted.key VALUE ...]",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.with_trainer = with_trainer
    parser.add_argument(
        "--config", action=ActionConfigFile, help="recipe: a YAML file, or a shipped one's name"
    )
    parser.add_class_arguments(Recipe, None, skip={"trainer"})
    return parser


def parse(
    parser: CommandParser,
    arguments: Sequence[str],
    *,
    early: Callable[[Parsed], object] | None = None,
) -> Parsed:
    """Parse a command line into a recipe.

    A shipped recipe may be given by name, and finds the data and model that ship with it.

    Args:
        parser: the command's parser.
        arguments: its command line.
        early: check to run before Lightning is imported, with only plain values of `trainer`; None
            checks that the model exists.

    Raises:
        RecipeError: an unknown key, a missing file, a value of the wrong type.
        UnsupportedModelError: no such model, neither local nor on the Hub.
        SystemExit: 0 for `--help`, 2 for wrong usage.
    """
    if HELP_TRAINER in arguments:
        _show_trainer_help(parser)
    if {"-h", "--help"} & {*arguments}:
        _add_trainer(parser, typed=False)
        parser.parse_args(list(arguments))
    words, files = _with_recipes(parser, arguments)
    if not parser.with_trainer:
        _add_trainer(parser, typed=False)
        parsed = _read(parser, words, arguments, files)
        (early or find_model)(parsed)
        return parsed
    # Most mistakes can be detected without Lightning, which takes seconds to import.
    first = copy.deepcopy(parser)
    for key, hint in plain_trainer_keys().items():
        first.add_argument(f"--{key}", type=hint)
    (early or find_model)(_read(first, _plain(words, files), arguments, files))
    _add_trainer(parser, typed=True)
    return _read(parser, words, arguments, files)


def find_model(parsed: Parsed) -> None:
    """Refuse a recipe whose model does not exist."""
    data = parsed.recipe.data
    settle_hub(data.model_id, data.dataset)
    folder = Path(data.model_id).expanduser()
    # A PEFT adapter's folder has a separate error, which explains how to merge it.
    known = (folder / name for name in ("config.json", "adapter_config.json"))
    if data.gguf_file is None and folder.is_dir() and not any(file.exists() for file in known):
        raise UnsupportedModelError(
            f"{data.model_id} is not a model: it holds no config.json{near_model(data.model_id)}\n"
            "Check data.model_id, or name its file with data.gguf_file."
        )
    blocks = _blocks(folder / "config.json")
    if blocks and isinstance(parsed.recipe.model.layers, list):
        check_layers(parsed.recipe.model.layers, blocks, last=blocks - 1)


def _blocks(config: Path) -> int | None:
    """L, if the file has it under the usual name; None if only the model itself can tell."""
    try:
        found = json.loads(config.read_bytes()).get("num_hidden_layers")
    except (OSError, ValueError, AttributeError):
        return None  # reported by another module
    return found if isinstance(found, int) else None


def _read(
    parser: CommandParser,
    words: Sequence[str],
    arguments: Sequence[str],
    files: Sequence[RecipeFile],
) -> Parsed:
    try:
        config = parser.parse_args(list(words))
        asked = parser.instantiate_classes(config)
    except ArgumentError as error:
        _refuse(parser, str(error), arguments, files)
    names = {field.name for field in fields(Recipe)}
    values = {name: asked[name] for name in names if name in asked}
    trainer = values.get("trainer", {})
    if isinstance(trainer, Namespace):
        # Only the given values: Lightning's own defaults are not part of a recipe.
        defaults = parser.get_defaults()["trainer"].as_dict()
        given = config["trainer"].as_dict()
        values["trainer"] = {k: v for k, v in given.items() if v != defaults[k]}
        trainer = {name: trainer[name] for name in values["trainer"]}
    options = Namespace(**{k: v for k, v in vars(asked).items() if k not in {*names, "config"}})
    recipe = Recipe(**values)
    if any(is_shipped(file.path) for file in files):
        data = recipe.data
        recipe.data = replace(data, model_id=locate(data.model_id), dataset=locate(data.dataset))
    names_given = tuple(file.name for file in files)
    return Parsed(recipe, options, trainer, tuple(arguments), names_given)


def _add_trainer(parser: CommandParser, *, typed: bool) -> None:
    """Add Lightning's arguments: with their types, or as one unchecked mapping."""
    if not typed:
        help_text = (
            f"--trainer.KEY VALUE: Lightning's Trainer arguments ({HELP_TRAINER} lists them)"
        )
        parser.add_argument("--trainer", type=dict[str, Any], default={}, help=help_text)
        return
    from lightning.pytorch import Trainer

    parser.add_class_arguments(Trainer, "trainer", instantiate=False)


def _show_trainer_help(parser: CommandParser) -> NoReturn:
    """Print only Lightning's arguments."""
    from lightning.pytorch import Trainer

    listing = CommandParser(
        prog=parser.prog, usage=f"{parser.prog} --config RECIPE [--trainer.KEY VALUE ...]"
    )
    listing.add_class_arguments(Trainer, "trainer", instantiate=False)
    listing.print_help()
    raise SystemExit(0)


def _with_recipes(
    parser: CommandParser, arguments: Sequence[str]
) -> tuple[list[str], list[RecipeFile]]:
    """The arguments with each recipe's name replaced by its text, and the recipes."""
    words: list[str] = []
    files: list[RecipeFile] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        name = word.removeprefix("--config=")
        if before == "--config" or name != word:
            files.append(read_recipe(name))
            words.append(word.removesuffix(name) + files[-1].text)
        else:
            words.append(word)
            _check_key(word)
    if not files:
        _usage(parser, "a recipe is needed: --config RECIPE, such as --config arc")
    return words, files


def _plain(words: Sequence[str], files: Sequence[RecipeFile]) -> list[str]:
    """The command line and recipes without values that only Lightning's classes can check."""
    bare = {file.text: file.plain for file in files}
    known = {f"--{key}" for key in plain_trainer_keys()}
    kept = without_options(words, lambda key: key.startswith("--trainer") and key not in known)
    texts = [word.removeprefix("--config=") for word in kept]
    return [
        word.removesuffix(text) + bare.get(text, text)
        for word, text in zip(kept, texts, strict=True)
    ]


def _check_key(word: str) -> None:
    """Refuse `--data.colour`: a recipe has no such key."""
    key = word.removeprefix("--").split("=", 1)[0]
    if word.startswith("--") and "." in key and not is_known(key):
        raise RecipeError(f"Unknown key --{key}{near_key(key)}")


@contextmanager
def refusals_named() -> Generator[None]:
    """Report settings that the Trainer refuses as errors of the recipe."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except MisconfigurationException as cause:
        text = " ".join(str(cause).split())
        raise RecipeError(f"The Trainer refuses: {text[:300]}\nCheck trainer.*.") from cause


def _refuse(
    parser: CommandParser, message: str, arguments: Sequence[str], files: Sequence[RecipeFile]
) -> NoReturn:
    """Rephrase a parser's message: which key, where, what was given and what was expected."""
    stray, missing = STRAY.search(message), MISSING.search(message)
    known = [action.dest for action in parser._actions if action.dest != SUPPRESS]
    if stray:
        _stray(parser, stray[1].split()[0], known)
    if missing:
        file = files[-1].path if files else "The recipe"
        raise RecipeError(
            f"{file} does not set {missing[1]}, which is required. Add it, or give it as "
            f"--{missing[1]}."
        )
    keys = KEY_FAULT.findall(message)
    if not keys:
        _usage(parser, " ".join(message.split()))
    key = keys[-1]
    if key not in KEYS and not key.startswith("trainer."):
        _usage(parser, f"--{key} {_wrong(parser, key, message)}")
    wrong = _wrong(parser, key, message)
    raise RecipeError(f"{_place(key, wrong, arguments, files)}: {key} {wrong}")


def _stray(parser: CommandParser, word: str, known: Sequence[str]) -> NoReturn:
    name = word.removeprefix("--").split("=", 1)[0]
    options = [*(name for name in known if "." not in name), *KEYS]
    what = "no option" if word.startswith("-") else "unexpected argument:"
    _usage(parser, f"{what} {word}{near(name, options)}")


def _place(key: str, wrong: str, arguments: Sequence[str], files: Sequence[RecipeFile]) -> str:
    """Where a wrong value was given: on the command line, or in a line of a recipe."""
    found = [f"{file.path}, line {file.lines[key]}" for file in files if key in file.lines]
    words = " ".join(arguments).replace(f"--{key}=", f"--{key} ").split(f"--{key} ")[1:]
    if any(not found or f" {word.split()[0]};" in wrong for word in words if word):
        return "On the command line"
    return found[-1] if found else "In the recipe"


def _wrong(parser: CommandParser, key: str, message: str) -> str:
    """What a key is and should be, such as "is many; expected a whole number"."""
    given = GIVEN.findall(message)
    value = given[-1].strip() if given else "invalid"
    action = next((action for action in parser._actions if action.dest == key), None)
    hint = KEYS.get(key, getattr(action, "_typehint", None))
    choices = getattr(action, "choices", None)
    expected = f"one of {', '.join(map(str, choices))}" if choices else wording(hint)
    advice = ""
    if "str" in str(hint) and ("True" in message or "False" in message):
        advice = (
            '\nYAML reads a bare yes or no as true or false: write it in quotes, as in ["yes"].'
        )
    below = BELOW.fullmatch(value)
    verb = f"is given {below[1]} {below[2]}" if below else f"is {value:.80}"
    return f"{verb}; expected {expected}.{advice}"


def _usage(parser: ArgumentParser, text: str) -> NoReturn:
    sys.stderr.write(f"usage: {parser.usage}\n{parser.prog}: {text}\n")
    raise SystemExit(2)
