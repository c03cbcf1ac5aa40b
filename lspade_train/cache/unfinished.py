"""One file's tensors while they are computed step by step, saved beside it on interruption.

A resumed run continues after the last complete step and ends with the same bytes. This works for
signals that Python can handle (Ctrl-C, SIGTERM); SIGKILL loses the current file.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lspade_train.errors import CacheError
from lspade_train.io.progress import Progress
from lspade_train.io.tensors import file_tag, read_tensors, write_tensors

SUFFIX = ".unfinished"
STEPS = "steps_and_rows"


class Unfinished:
    """The tensors of one file so far; a context manager that saves them if it is interrupted.

    Args:
        path: the file that the complete tensors are written to; None saves nothing.
        tag: everything that determines the file's bytes, including the steps.
        progress: counts the rows.

    Attributes:
        tensors: tensors by name; those of an earlier run, if one was interrupted.
        steps: number of complete steps.
    """

    def __init__(
        self, path: Path | None = None, tag: str = "", progress: Progress | None = None
    ) -> None:
        self._place = None if path is None else path.with_suffix(SUFFIX)
        self._tag = tag
        self._progress = progress or Progress(None, 0)
        self.tensors: dict[str, Tensor] = {}
        self.steps = self._rows = 0
        if self._place is not None and file_tag(self._place) == tag:
            self.tensors = read_tensors(self._place, CacheError)
            self.steps, self._rows = self.tensors.pop(STEPS).tolist()
            self._progress.skip(self._rows)

    def step(self, rows: int) -> None:
        """Count a step whose rows are in `tensors`."""
        self.steps += 1
        self._rows += rows
        self._progress.advance(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._place is None or not self.steps:
            return
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            counts = torch.tensor([self.steps, self._rows])
            write_tensors(self._place, self.tensors | {STEPS: counts}, self._tag, CacheError)
