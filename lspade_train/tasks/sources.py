"""Where rows come from: files, folders and the Hub. Independent of prompts and tokens."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from lspade_train.errors import TaskError
from lspade_train.io.hub_names import is_hub_id
from lspade_train.io.storage import first_line
from lspade_train.tasks.base import SPLITS, Record, Split

Reader = Callable[[Path], list[Record]]
Reading = Callable[[], list[Record]]

# The same rules for file names as in the Hub's own loader.
SPLIT_WORDS: dict[Split, set[str]] = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A data set whose splits are read on demand.

    Args:
        name: name as given by the user.
        hub: whether it came from the Hub.
        revision: commit of a Hub data set; None for local data or if unknown.
        splits: split name -> reader of its rows.
    """

    name: str
    hub: bool
    revision: str | None
    splits: Mapping[str, Reading]


def open_source(
    name: str,
    subset: str | None,
    revision: str | None,
    readers: Mapping[str, Reader],
    rename: Callable[[Record], Record],
) -> Source:
    """Find a data set: a file, a folder of files, a folder laid out like a Hub one, or a Hub id.

    Local paths take precedence over the Hub.

    Args:
        name: path or Hub id.
        subset: configuration of a Hub data set.
        revision: commit, branch or tag of a Hub data set; None uses the current commit.
        readers: suffix -> reader, for files that the task reads itself.
        rename: gives a row of any other data set the task's column names.

    Raises:
        TaskError: it does not exist, cannot be read, or has no such subset or revision.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in readers:
            raise TaskError(
                f"{name} is a file that the task does not read (it reads "
                f"{', '.join(readers) or 'folders and Hub ids'}). Set --data.dataset."
            )
        return Source(name, False, None, {"train": partial(readers[path.suffix], path)})
    if path.is_dir():
        for suffix, read in readers.items():
            splits = _splits_of_files(path, suffix, read)
            if splits:
                return Source(name, False, None, splits)
        return Source(name, False, None, _splits(name, _load_folder(str(path), subset), rename))
    if path.suffix in readers or not is_hub_id(name):
        raise TaskError(_absent(name))
    loaded, commit = _load_hub(name, subset, revision)
    return Source(name, True, commit, _splits(name, loaded, rename))


def _splits_of_files(folder: Path, suffix: str, read: Reader) -> dict[str, Reading]:
    """The splits of a folder's own files: `train.jsonl`, or those whose names say `train`.

    If no name contains a split, all files are the training split, unless a README.md describes the
    files, as in a Hub data set.
    """
    files = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        exact = folder / f"{split}{suffix}"
        named = [path for path in files if SPLIT_WORDS[split] & set(_words(path.stem))]
        if exact in files or named:
            found[split] = [exact] if exact in files else named
    if not found and files and not (folder / "README.md").exists():
        found = {"train": files}
    return {split: partial(_read_all, paths, read) for split, paths in found.items()}


def _words(stem: str) -> list[str]:
    return re.split(r"[^a-z]+", stem.lower())


def _read_all(paths: list[Path], read: Reader) -> list[Record]:
    return [record for path in paths for record in read(path)]


def _splits(
    name: str, loaded: Mapping[Any, Any], rename: Callable[[Record], Record]
) -> dict[str, Reading]:
    def read(split: str) -> list[Record]:
        try:
            return [rename(_plain(record)) for record in loaded[split].to_list()]
        except ValueError as error:
            raise TaskError(f"Data set {name} has {error}.") from error

    return {split: partial(read, split) for split in SPLITS if split in loaded}


def _plain(record: Record) -> Record:
    """The columns that JSON can represent: no dates, images or NaN, which prompts do not show."""
    return {key: value for key, value in record.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int) or _is_finite(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _load_folder(path: str, subset: str | None) -> Mapping[Any, Any]:
    import datasets

    try:
        return datasets.load_dataset(path, subset)
    except Exception as error:  # the loader's readers may raise any exception
        raise TaskError(_explain(path, subset, error)) from error


# Once per process, so that all splits of a run come from one commit.
@cache
def _load_hub(
    name: str, subset: str | None, revision: str | None
) -> tuple[Mapping[Any, Any], str | None]:
    """A Hub data set and its commit.

    If the Hub cannot be reached, the copy in the loader's cache is used: that of the requested
    commit, or the latest if none was requested.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    commit = _commit(name, revision)
    try:
        if commit:
            builder = datasets.load_dataset_builder(name, subset, revision=commit)
            builder.download_and_prepare()
        else:
            builder = Cache(
                repo_id=name,
                dataset_name=name.split("/")[-1],
                config_name=subset,
                version="0.0.0" if revision else "auto",
                hash=revision or "auto",
            )
        loaded: Any = builder.as_dataset()
    except Exception as error:  # the loader raises whatever its many readers raise
        message = _explain(name, subset, error) if commit else _unreachable(name, subset, revision)
        raise TaskError(message) from error
    found = builder.hash
    if commit and found != commit:  # the loader silently used an older copy
        raise TaskError(_unreachable(name, subset, commit))
    return loaded, found if found and COMMIT.fullmatch(found) else None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision currently resolves to; None if the Hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except RevisionNotFoundError as error:
        raise TaskError(
            f"Data set {name} has no revision {revision!r} on the Hub. "
            "Set --data.dataset_revision to one that is listed there."
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise TaskError(_absent(name)) from error
    except Exception:  # no network or no answer: try a cached copy
        return None


def _explain(name: str, subset: str | None, error: Exception) -> str:
    first = first_line(error)
    text = " ".join(str(error).split())
    place = _unwritable_cache(error)
    if place:
        return (
            f"The datasets library cannot write its cache {place} ({first}). "
            "Set HF_DATASETS_CACHE to a folder that you can write to."
        )
    if Path(name).is_dir() and set(str(Path(name).resolve())) & set("[]*?"):
        return (
            f"The path of {name} holds one of [ ] * ?, which the datasets library takes for a "
            "pattern. Rename the folder, or put JSONL files into it."
        )
    if isinstance(error, ConnectionError):
        return _unreachable(name, subset, None)
    if isinstance(error, ValueError) and "config" in text.lower():
        wanted = f"no subset {subset!r}" if subset else "several subsets"
        listed = re.search(r"\[[^]]*\]", text)
        return (
            f"Data set {name} has {wanted}{f'; it has {listed[0]}' if listed else ''}. "
            "Choose one with --data.subset."
        )
    if isinstance(error, FileNotFoundError) and Path(name).is_dir():
        return f"Folder {name} holds no data files. Set --data.dataset to one that does."
    if isinstance(error, FileNotFoundError):
        return f"{_absent(name)} ({first})"
    if "scripts are no longer supported" in text:
        return (
            f"Data set {name} is a script on the Hub, which is not run. Take the Hub's own "
            "conversion of it with --data.dataset_revision refs/convert/parquet."
        )
    return f"Data set {name} cannot be read: {first}. Check --data.dataset."


def _unwritable_cache(error: Exception) -> Path | None:
    """The loader's cache, if the error is that it cannot be written."""
    from datasets import config

    place = Path(config.HF_DATASETS_CACHE)
    named = str(getattr(error, "filename", None) or "")
    if not isinstance(error, OSError) or not named:
        return None
    inside = named.startswith(str(place)) or str(place).startswith(named)
    return place if inside else None


def _unreachable(name: str, subset: str | None, revision: str | None) -> str:
    wanted = " ".join([name, *filter(None, [subset, revision and f"at {revision}"])])
    return (
        f"The Hub cannot be reached, and no copy of data set {wanted} is cached here. "
        "Connect once, or set --data.dataset to a folder with the data."
    )


def _absent(name: str) -> str:
    return (
        f"{name} is neither a file or folder here nor a data set on the Hub that you can read. "
        "Correct --data.dataset, or log in with `hf auth login`."
    )
