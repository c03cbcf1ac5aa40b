"""SIGTERM, as schedulers send it: an orderly end with an exit code and a way to go on."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM. Like Ctrl-C: temporary files go, locks are released, what is complete stays."""


@contextmanager
def sigterm_raises() -> Generator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, in place of dying where it stands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_sigterm_to_lightning() -> None:
    """Lightning finishes the step in hand; a handler of ours would cut it in half."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the tidying up
    raise Terminated
