"""Whether the installed packages are versions this one supports. Imports none of them.

Its own metadata decides, which is what `pip` reads: the ranges stand in pyproject.toml alone.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from lspade_train.errors import UnsupportedVersionError


@cache
def check_versions() -> None:
    """Refuse a package that is missing or out of range, before something odd happens in it.

    Raises:
        UnsupportedVersionError: names the package, what was found and what is supported.
    """
    from packaging.requirements import Requirement

    try:
        lines = requires("lspade-train") or []
    except PackageNotFoundError:  # a source tree that was never installed says nothing
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
