"""Hooks of mkdocs: what the theme does not do by itself."""

import re
import shutil
from pathlib import Path
from typing import Any

TAG = re.compile(r"(<(?:script|style|title)\b.*?</(?:script|style|title)>|<[^>]*>)", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w.-]*")


def on_post_page(output: str, **_: Any) -> str:
    """Keep `--option` on one line: a browser would break it after its hyphens."""
    parts = TAG.split(output)  # text and tags in turn
    parts[::2] = [OPTION.sub(r'<span class="whole">\g<0></span>', text) for text in parts[::2]]
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Copy the pages' Markdown beside their HTML, since llms.txt links to it."""
    for page in Path(config["docs_dir"]).glob("*.md"):
        shutil.copy(page, config["site_dir"])
