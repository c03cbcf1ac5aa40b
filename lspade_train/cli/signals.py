"""Handling of SIGTERM, as sent by schedulers: a clean exit that tells how to resume."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C: removes temporary files, releases locks, keeps complete files."""


class Sigterm:
    """What this process does on SIGTERM: exit immediately, or finish the current step first.

    Attributes:
        launcher: Lightning's launcher; SIGTERM is passed on to the processes it started, since a
            scheduler or a user may only know the first one.
        deferred: set `noted` instead of raising `Terminated`.
        noted: whether SIGTERM was received.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.launcher: Any = None
        self.deferred = self.noted = False

    @contextmanager
    def caught(self) -> Generator[None]:
        """Raise `Terminated` in the main thread on SIGTERM, instead of dying at once."""
        self._reset()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._come)
        try:
            yield
        finally:
            self._release()
            signal.signal(signal.SIGTERM, before)

    def _come(self, *_: object) -> None:
        for process in self._release():
            process.terminate()
        self.noted = True
        if not self.deferred:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second must not interrupt cleanup
            raise Terminated

    def _release(self) -> list[Any]:
        """The processes started from this one, which are no longer monitored.

        Lightning's monitor kills this process as soon as one of them fails, as they do in a clean
        exit on SIGTERM.
        """
        started: list[Any] = getattr(self.launcher, "procs", [])
        released = started.copy()
        started.clear()
        return released


sigterm = Sigterm()
