"""What every test shares: no network, seeded randomness, and the developers' data where present."""

import os
from collections import Counter
from pathlib import Path

# Before any Hugging Face import: a test never asks the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import pytest_socket
import torch
from tiny_models import FAMILIES, KINDS

# Tiny matrices: threads cost more than they give, and bit-for-bit claims want one order of sums.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start; Lightning looks there

SHARED = Path(__file__).resolve().parents[2] / "shared"


MANY = 2 * len(KINDS)
"""Families that a test has more than where it runs for all of them."""


def _is_varied(item) -> bool:
    return hasattr(item, "callspec")


def pytest_runtest_setup():
    """Refuse every connection but loopback."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "localhost", "::1"], allow_unix_socket=True)


@pytest.hookimpl(tryfirst=True)  # before the markers are selected by
def pytest_collection_modifyitems(items):
    """Mark what uses the developers' data, and say why it is skipped where that is absent.

    A test that runs for every family runs for one of each kind by default, and is slow for the
    rest: tests/test_families.py goes through all of them by default.
    """
    families = [(item, item.callspec.params.get("family")) for item in items if _is_varied(item)]
    variants = Counter(item.function for item, family in families if family in FAMILIES)
    for item, family in families:
        if variants[item.function] > MANY and family not in KINDS:
            item.add_marker("slow")
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is kept under the home of whoever runs the tests."""
    os.environ["LSPADE_CACHE"] = str(tmp_path_factory.mktemp("user-cache"))


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
def toy_root(tmp_path_factory) -> Path:
    """A tiny saved model with its tokenizer, questions and texts; read only."""
    import toy

    root = tmp_path_factory.mktemp("toy")
    toy.save_model(root / "model")
    toy.write_data(root / "data")
    toy.write_texts(root / "texts")
    return root


@pytest.fixture
def project(toy_root: Path, tmp_path: Path):
    """That model and data, with a folder of the test's own for caches and heads."""
    import toy

    return toy.Project(toy_root, tmp_path)


@pytest.fixture(scope="session")
def evaluated_once(toy_root: Path, tmp_path_factory):
    """A toy project fitted and evaluated; read only: a test that writes takes a `copy`."""
    from results import evaluate_toy

    home = tmp_path_factory.mktemp("evaluated-once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(home)
        return evaluate_toy(toy_root, home)
