"""A hook of mkdocs: the pages' Markdown lies beside their HTML, since llms.txt links to it."""

import shutil
from pathlib import Path
from typing import Any


def on_post_build(config: Any) -> None:
    """Copy the pages into the site."""
    for page in Path(config["docs_dir"]).glob("*.md"):
        shutil.copy(page, config["site_dir"])
