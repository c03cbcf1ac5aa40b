"""Shared by all tests: no network, seeded randomness, and the developers' data where available.

Imports nothing heavy: with xdist the controller, which only distributes tests, loads it too.
"""

import gc
import inspect
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Before any Hugging Face import: tests never contact the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tiny matrices: threads cost more than they gain, and bitwise comparisons need one summation order.
# Set before torch is imported; subprocesses and Lightning read it too.
os.environ |= dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")

import pytest
import pytest_socket
from filelock import FileLock

SHARED = Path(__file__).resolve().parents[2] / "shared"
WORKER = "PYTEST_XDIST_WORKER" in os.environ


def _is_varied(item) -> bool:
    return hasattr(item, "callspec")


def pytest_runtest_setup():
    """Refuse every connection but loopback."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "localhost", "::1"], allow_unix_socket=True)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Mark tests that use the developers' data, and skip them with a reason where it is absent.

    A test over every family runs for one family of each kind by default; the rest are marked slow.
    """
    import torch
    from tiny_models import FAMILIES, KINDS

    families = [(item, item.callspec.params.get("family")) for item in items if _is_varied(item)]
    variants = Counter(item.function for item, family in families if family in FAMILIES)
    for item, family in families:
        # More than twice the kinds: it is parametrised over all families.
        if variants[item.function] > 2 * len(KINDS) and family not in KINDS:
            item.add_marker("slow")
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_open_wandb_run():
    """Finish a W&B run that is still open before a test; the test would log into it."""
    wandb = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Also applies where torch was imported before this file."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting():
    """Skip fsync (no power cut to survive) and jsonargparse's costly source lookups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(inspect, "stack", _caller)
        yield


def _caller(context: int = 0) -> list[inspect.FrameInfo]:
    """The two innermost frames, without their source."""
    frames = sys._getframe(1), sys._getframe(2)
    return [inspect.FrameInfo(one, "", one.f_lineno, "", None, None) for one in frames]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep nothing in the home directory of whoever runs the tests."""
    os.environ["LSPADE_CACHE"] = str(tmp_path_factory.mktemp("user-cache"))


@pytest.fixture(scope="session", autouse=True)
def _figures_are_drawn_once():
    """Drawing dominates the time of `evaluate`: tests of figures request `results.drawing`."""
    from results import draw_again

    from lspade_train.reporting.plots import static

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "draw", draw_again)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the clone that holds a real model and the real benchmarks."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (developers' models and data), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real pretrained Llama: 260K parameters, 5 blocks, TinyStories."""
    return shared / "models/stories260K/hf"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A named folder, made by the first worker that asks for it and shared by all; read-only."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if WORKER else base

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place = base / f"once-{name}"
        finished = Path(f"{place}.finished")
        with FileLock(f"{place}.lock"):
            if not finished.exists():
                shutil.rmtree(place, ignore_errors=True)  # another worker failed to make it
                place.mkdir()
                make(place)
                finished.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def toy_root(made_once) -> Path:
    """A tiny saved model with its tokenizer, questions and texts; read-only."""
    import toy

    def make(root: Path) -> None:
        toy.save_model(root / "model")
        toy.write_data(root / "data")
        toy.write_texts(root / "texts")

    return made_once("toy", make)


@pytest.fixture
def project(toy_root: Path, tmp_path: Path):
    """That model and data, with a per-test folder for caches and heads."""
    import toy

    return toy.Project(toy_root, tmp_path)


@pytest.fixture(scope="session")
def evaluated_once(toy_root: Path, made_once):
    """A toy project, fitted and evaluated; read-only: tests that write take a `copy`."""
    import toy
    from results import Evaluated, evaluate_toy

    def make(home: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "disabled")
            patch.chdir(home)
            evaluate_toy(toy_root, home)

    return Evaluated(toy.Project(toy_root, made_once("evaluated", make)), toy_root)


def pytest_collection_finish():
    """Freeze what the imports allocated, so that later garbage collections skip it."""
    gc.collect()
    gc.freeze()
