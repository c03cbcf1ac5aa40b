"""The files of a heads folder: names, and which are pushed and pulled. Independent of heads."""

from pathlib import Path, PurePosixPath
from typing import Any

from lspade_train.errors import ArtifactError
from lspade_train.io.storage import read_json, write_json

WEIGHTS, CONFIG = "heads.safetensors", "config.json"
CARD, RESULTS, POLICY = "README.md", "results.json", "policy.json"
GATE, TUNED_LENS = "gate.safetensors", "tuned_lens"
DRAFTING = "drafting.json"
FILES = (
    *(CONFIG, WEIGHTS, GATE, POLICY, DRAFTING, RESULTS, "profile.json", CARD, "report.html"),
    *(f"{TUNED_LENS}/{name}" for name in (CONFIG, WEIGHTS)),
)
PICTURES = (".png", ".svg")  # of figures/
PATTERNS = [*FILES, *(f"figures/*{suffix}" for suffix in PICTURES)]


def known_files(folder: Path) -> dict[str, Path]:
    """The files of a heads folder to upload to the Hub, by their paths there."""
    found = [path for pattern in PATTERNS for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def is_known(name: str) -> bool:
    """Whether a path in a repository is one that a heads folder may have."""
    path = PurePosixPath(name)
    return name in FILES or (str(path.parent) == "figures" and path.suffix in PICTURES)


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` as written by evaluate.

    Raises:
        ArtifactError: missing or damaged.
    """
    return read_json(
        folder / RESULTS, ArtifactError, "Write it: lspade-train evaluate --config RECIPE"
    )


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write `results.json`.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    write_json(folder / RESULTS, results, ArtifactError)
