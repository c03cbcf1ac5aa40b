"""`cache`: build, resume, rebuild or verify the cached states."""

import logging
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lspade_train.cli.parsing import Parsed, command_parser, find_model, parse, refusals_named
from lspade_train.cli.signals import sigterm
from lspade_train.io.text import byte_size
from lspade_train.recipe import DataConfig

log = logging.getLogger(__name__)

CACHE = """\
Run the frozen model once over the task and store its hidden states and, unless model.target is
final, SPADE targets; missing SPADE targets can be added to an existing cache later.
The size is printed before anything runs. An interrupted run resumes and produces identical files.
fit and evaluate build a missing cache themselves.
--trainer.devices and --trainer.num_nodes distribute the shards over processes.

  lspade-train cache --config recipes/arc.yaml
  lspade-train cache --verify DIR     compare every file with its checksum (needs no recipe)
  lspade-train cache --verify s3://bucket/path    the same for a cache at a URL"""


def cache(arguments: list[str]) -> int:
    """Build the caches of a recipe, or verify one."""
    if arguments and arguments[0].split("=")[0] == "--verify":
        return _verify(arguments)
    parser = command_parser("cache", CACHE, with_trainer=True)
    parser.add_argument(
        "--splits",
        type=list[str],
        default=["train", "validation"],
        help="splits to cache: train, validation, test",
    )
    parser.add_argument(
        "--overwrite", type=bool, default=False, nargs="?", const=True, help="rebuild from scratch"
    )
    parsed = parse(parser, arguments, early=_check_splits)

    from lspade_train.tasks import require_splits
    from lspade_train.training.datamodule import HiddenStateDataModule

    recipe = parsed.recipe
    asked: list[Any] = parsed.options.splits
    data = HiddenStateDataModule(
        _launched(recipe.data, parsed.trainer),
        recipe.model.layers,
        seed=recipe.seed_everything,
        name=recipe.name,
        overwrite=parsed.options.overwrite,
        spade=recipe.model.target != "final",
    )
    require_splits(recipe.data, asked)
    for split in asked:
        data.states(split)
        log.info("%s: complete in %s", split, data.folder(split))
    return 0


def _check_splits(parsed: Parsed) -> None:
    """Check that the model exists, and that the requested splits can be stored."""
    find_model(parsed)

    from lspade_train.errors import RecipeError
    from lspade_train.tasks import SPLITS

    asked: list[Any] = parsed.options.splits
    wrong = [split for split in asked if split not in SPLITS]
    if wrong or not asked:
        named = f"No split {wrong[0]!r}" if wrong else "--splits is empty"
        raise RecipeError(f"{named}; expected some of {', '.join(SPLITS)}.")
    mode = parsed.recipe.data.mode
    if mode != "disk":
        raise RecipeError(f"data.mode is {mode}: that mode stores nothing. Set data.mode to disk.")


def _launched(config: DataConfig, trainer: dict[str, Any]) -> DataConfig:
    """Start the processes that `trainer.*` requests; returns the data section for this device.

    Uses Fabric rather than `Trainer.predict`: it starts processes like the Trainer (devices, nodes,
    SLURM, torchrun) and does not touch the frozen model, whereas the Trainer would cast it to
    `trainer.precision` and run it under autocast, although `data.dtype` determines a cache's bytes.
    What remains is a loop over shards, which `fit` also runs, inside its own Trainer.
    """
    from lightning.fabric import Fabric

    asked: dict[str, Any] = {
        name: trainer[name] for name in ("accelerator", "devices", "num_nodes") if name in trainer
    }
    if config.device_map is not None or config.device != "auto":
        asked = {"accelerator": "cpu", "devices": 1} | asked
    with refusals_named():
        fabric = Fabric(**asked)
        sigterm.launcher = fabric.strategy.launcher
        fabric.launch()
    return replace(config, device=str(fabric.device)) if config.device == "auto" else config


def _verify(arguments: list[str]) -> int:
    rest = arguments[0].split("=", 1)[1:] + arguments[1:]
    if len(rest) != 1:
        sys.stderr.write(
            "usage: lspade-train cache --verify DIR\n"
            "DIR, a folder or a URL, holds manifest.json, or one folder per split\n"
        )
        return 2

    from lspade_train.errors import CacheError
    from lspade_train.io.remote import is_remote

    if not is_remote(rest[0]) and not Path(rest[0]).is_dir():
        raise CacheError(
            f"There is no folder {rest[0]}. Build a cache: lspade-train cache --config RECIPE.yaml"
        )

    from lspade_train.cache import Manifest, verify
    from lspade_train.io.progress import track

    for folder in _split_folders(rest[0]):
        manifest = Manifest.read(folder)
        watch = partial(track, name=str(folder), total=len(manifest.files) + 1, unit="files")
        verify(folder, manifest, track=watch)
        log.info(
            "%s: %d files, %s rows, %s: all checksums OK",
            folder, len(manifest.files), f"{manifest.rows:,}", byte_size(manifest.bytes),
        )  # fmt: skip
    return 0


def _split_folders(place: str) -> list[Path]:
    """The split caches in a folder, or the mirrors of those at a URL."""
    from lspade_train.cache import split_folders
    from lspade_train.cache.manifest import FILES, MANIFEST
    from lspade_train.errors import CacheError
    from lspade_train.io.remote import Mirror, is_remote
    from lspade_train.tasks import SPLITS

    if not is_remote(place):
        return split_folders(Path(place))
    urls = [f"{place.rstrip('/')}/{part}" for part in ("", *SPLITS)]
    found = [Mirror(url, FILES, CacheError).fetch() for url in urls]
    finished = [folder for folder in found if (folder / MANIFEST).exists()]
    if not finished:
        raise CacheError(
            f"No finished cache in {place} (no {MANIFEST}). "
            "Build one: lspade-train cache --config RECIPE.yaml"
        )
    return finished
