"""Where rows come from: files, folders and the Hub. Knows nothing of prompts or tokens."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from lspade_train.errors import TaskError
from lspade_train.tasks.base import SPLITS, Record

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A data set whose splits are read when asked for.

    Args:
        name: as the user wrote it.
        hub: whether it came from the Hub.
        revision: commit of a Hub data set; None for local data and where it cannot be told.
        splits: split name -> reader of its rows.
    """

    name: str
    hub: bool
    revision: str | None
    splits: Mapping[str, Callable[[], list[Record]]]


def open_source(
    name: str,
    subset: str | None,
    revision: str | None,
    readers: Mapping[str, Callable[[Path], list[Record]]],
) -> Source:
    """Find a data set: a file, a folder of files, a folder laid out like a Hub one, or a Hub id.

    What exists here goes before the Hub.

    Args:
        name: path or Hub id.
        subset: configuration of a Hub data set.
        revision: commit, branch or tag of a Hub data set; None takes the current commit.
        readers: suffix -> reader of the files that the task reads by itself.

    Raises:
        TaskError: it is not there, cannot be read, or has no such subset or revision.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in readers:
            raise TaskError(
                f"{name} is a file that the task does not read (it reads: "
                f"{', '.join(readers) or 'folders and Hub ids'}). Set --data.dataset."
            )
        return Source(name, False, None, {"train": partial(readers[path.suffix], path)})
    if path.is_dir():
        for suffix, read in readers.items():
            files = {split: path / f"{split}{suffix}" for split in SPLITS}
            splits = {split: partial(read, file) for split, file in files.items() if file.is_file()}
            if splits:
                return Source(name, False, None, splits)
        return Source(name, False, None, _splits(_load_folder(str(path), subset)))
    if path.suffix in readers:
        raise TaskError(_absent(name))
    loaded, commit = _load_hub(name, subset, revision)
    return Source(name, True, commit, _splits(loaded))


def read_jsonl(path: Path, check: Callable[[Record], object]) -> list[Record]:
    """The objects of a JSONL file; empty lines are passed over.

    Args:
        path: the file.
        check: raises ValueError for an object that the task cannot use.

    Raises:
        TaskError: a line is not such an object; names the file and the line.
    """

    def records() -> Iterator[Record]:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, parse_constant=_refuse)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                check(record)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: {error}. Correct the line.") from error
            yield record

    return list(records())


def read_paragraphs(path: Path, column: str) -> list[Record]:
    """The texts of a plain text file; a blank line ends each."""
    texts = (text.strip() for text in re.split(r"\n\s*\n", read_text(path)))
    return [{column: text} for text in texts if text]


def read_text(path: Path) -> str:
    """A UTF-8 file's text.

    Raises:
        TaskError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _splits(loaded: Mapping[Any, Any]) -> dict[str, Callable[[], list[Record]]]:
    return {split: loaded[split].to_list for split in SPLITS if split in loaded}


def _load_folder(path: str, subset: str | None) -> Mapping[Any, Any]:
    import datasets

    try:
        return datasets.load_dataset(path, subset)
    except Exception as error:  # the loader raises whatever its many readers raise
        raise TaskError(_explain(path, subset, error)) from error


# Once per process: the splits of one run come from one commit, whatever happens on the Hub.
@cache
def _load_hub(
    name: str, subset: str | None, revision: str | None
) -> tuple[Mapping[Any, Any], str | None]:
    """A Hub data set and the commit it is of.

    Where the Hub cannot be asked, the copy in the loader's cache is taken: of the commit asked
    for, or the latest where none was.
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
    if commit and found != commit:  # the loader took an older copy without a word
        raise TaskError(_unreachable(name, subset, commit))
    return loaded, found if found and COMMIT.fullmatch(found) else None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that a revision is now; None where the Hub cannot be asked."""
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
    except Exception:  # no network, or no answer: a cached copy may do
        return None


def _explain(name: str, subset: str | None, error: Exception) -> str:
    first, *_ = str(error).splitlines() or [type(error).__name__]
    text = " ".join(str(error).split())
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


def _unreachable(name: str, subset: str | None, revision: str | None) -> str:
    wanted = " ".join([name, *filter(None, [subset, revision and f"at {revision}"])])
    return (
        f"The Hub cannot be reached, and no copy of data set {wanted} is cached here. "
        "Connect once, or set --data.dataset to a folder with the data."
    )


def _absent(name: str) -> str:
    return (
        f"{name} is neither a file or folder here nor a data set on the Hub that you may read. "
        "Correct --data.dataset, or log in with `hf auth login`."
    )
