"""Results of several heads folders, checked and labelled for comparison.

Independent of models.
"""

import logging
from typing import Any

from lspade_train.errors import ArtifactError
from lspade_train.evaluation.summary import FORMAT_VERSION

SAME_ROWS = ("task", "dataset", "split", "part", "n")

log = logging.getLogger(__name__)


def comparable(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with a `label`: the recipe's name, or the folder if names are not unique.

    Args:
        results: `results.json` by the name of its folder.

    Raises:
        ArtifactError: one of them has a different format version.
    """
    for folder, one in results.items():
        if one.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{folder}/results.json has format_version {one.get('format_version')!r}; expected "
                f"{FORMAT_VERSION}. Write it again with lspade-train evaluate."
            )
    first, *others = results.values()
    for name in SAME_ROWS:
        if any(other.get(name) != first.get(name) for other in others):
            log.warning(
                "These results are not comparable: %s differs (%s).",
                name, ", ".join(sorted({str(one.get(name)) for one in results.values()})),
            )  # fmt: skip
            break
    names = [one["name"] for one in results.values()]
    unique = len(set(names)) == len(names)
    return [one | {"label": one["name"] if unique else folder} for folder, one in results.items()]
