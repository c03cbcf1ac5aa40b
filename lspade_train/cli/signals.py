"""SIGTERM, as schedulers send it: an orderly end with an exit code and a way to go on."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C: temporary files go, locks are released, what is complete stays."""


class Sigterm:
    """What this process does on SIGTERM: end where it stands, or take note and finish its step.

    Attributes:
        launcher: Lightning's; the processes that it started are told, since a scheduler or a user
            may know of the first one only.
        deferred: take note instead of raising `Terminated`.
        noted: it has come.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.launcher: Any = None
        self.deferred = self.noted = False

    @contextmanager
    def caught(self) -> Generator[None]:
        """Raise `Terminated` in the main thread on SIGTERM, in place of dying where it stands."""
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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the tidying
            raise Terminated

    def _release(self) -> list[Any]:
        """The processes started from this one, which nobody watches from here on.

        Lightning's watchman kills this process as soon as one of them has ended in any other way
        than by finishing; at an orderly end they do.
        """
        started: list[Any] = getattr(self.launcher, "procs", [])
        released = started.copy()
        started.clear()
        return released


sigterm = Sigterm()
