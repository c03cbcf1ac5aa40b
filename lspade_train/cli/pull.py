"""`pull`: heads from the Hugging Face Hub or a URL into a new folder."""

import argparse
import logging
from pathlib import Path

log = logging.getLogger(__name__)

PULL = """\
Download heads and related files and verify checksums and format (safetensors only). The download
is atomic and never overwrites an existing folder.

  lspade-train pull someone/arc-heads
  lspade-train pull someone/arc-heads --revision v1 --to checkpoints/arc_v1
"""


def pull(arguments: list[str]) -> None:
    """Download a heads folder."""
    parser = argparse.ArgumentParser(
        prog="lspade-train pull",
        usage="lspade-train pull ORG/NAME|URL [--revision REVISION] [--to DIR]",
        description=PULL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repo", metavar="ORG/NAME|URL", help="repository on the Hub, or a URL")
    parser.add_argument("--revision", help="branch, tag or commit; default: main")
    parser.add_argument("--to", metavar="DIR", help="new folder; default: checkpoints/NAME")
    options = parser.parse_args(arguments)

    from lspade_train.io.fetch import check_name

    check_name(options.repo)

    from lspade_train.artifacts import folder as artifact

    folder = Path(options.to or Path("checkpoints") / options.repo.rstrip("/").split("/")[-1])
    artifact.pull(options.repo, folder, options.revision)
    log.info("heads: %s", folder)
    log.info("next:  lspade-train info %s", folder)
