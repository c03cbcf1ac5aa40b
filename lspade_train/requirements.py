"""Checks that the installed packages' versions are supported, without importing them.

The supported ranges are read from this package's metadata: pyproject.toml is their only source.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from lspade_train.errors import UnsupportedVersionError


@cache
def check_versions() -> None:
    """Refuse a package that is missing or out of range, before it fails in obscure ways.

    Raises:
        UnsupportedVersionError: a package is missing or out of range.
    """
    from packaging.requirements import Requirement

    try:
        lines = requires("lspade-train") or []
    except PackageNotFoundError:  # a source tree that was never installed has no metadata
        return
    for need in map(Requirement, lines):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = _version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            raise UnsupportedVersionError(
                f"lspade-train {version('lspade-train')} needs {need.name}{need.specifier}; "
                f"{'it is not installed' if found is None else f'{found} is installed'}.\n"
                f'Install one in that range: pip install "{need.name}{need.specifier}"'
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
