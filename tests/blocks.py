"""The fenced code blocks of README and docs, and the commands in them. Runs nothing."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LANGUAGES = {"bash", "python", "yaml", "json", "bibtex"}
TO_RUN = {"bash", "python"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: the fence's info string.
        title: name of the file it shows; "" if none.
        text: the content between the fences.
    """

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = [Block(*groups) for groups in FENCE.findall(page.read_text(encoding="utf-8"))]
    assert len(found) * 2 == len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.M))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command in a bash block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(_plain_quotes(line), comments=True) for line in lines]
    return [command for command in words if command]


def toolkit_command(words: list[str]) -> list[str] | None:
    """The arguments of `lspade-train`, whatever launches it (torchrun, srun); None for others."""
    for place, word in enumerate(words):
        if word in {"lspade-train", "lspade_train"}:
            return words[place + 1 :]
    return None


def _plain_quotes(line: str) -> str:
    """Rewrite bash's `$'...'` quotes as quotes that shlex understands."""
    return re.sub(
        r"\$'([^']*)'", lambda found: shlex.quote(found[1].encode().decode("unicode_escape")), line
    )
