"""`push` and `pull`: heads to and from the Hugging Face Hub."""

import logging
import sys
from typing import Any

from lspade_train.cli.options import heads_given, heads_option
from lspade_train.cli.parsing import command_parser, parse

log = logging.getLogger(__name__)

PUSH = """\
Upload a heads folder to the Hugging Face Hub in a single atomic commit: heads.safetensors,
config.json, policy.json, results.json, profile.json, figures/, report.html and README.md, the
model card, which is regenerated from them. No other files of the folder are uploaded.
The card states the licence that you give; none is inherited from the base model.
Log in first, with a write token: hf auth login.

  lspade-train push --config recipes/arc.yaml --repo someone/arc-heads --license apache-2.0
  lspade-train push --config recipes/arc.yaml --repo someone/arc-heads --dry_run
  lspade-train push --config recipes/arc.yaml --repo s3://bucket/arc   (any URL of fsspec's)"""


def push(arguments: list[str]) -> int:
    """Upload the heads folder."""
    parser = command_parser("push", PUSH)
    add = parser.add_argument
    flag: dict[str, Any] = {"type": bool, "default": False, "nargs": "?", "const": True}
    add(
        "--repo",
        type=str,
        default=None,
        help="org/name on the Hub, created if it is missing; or a URL",
    )
    heads_option(parser)
    add("--license", type=str, default=None, help="the heads' licence, as the Hub names it: mit")
    add("--branch", type=str, default=None, help="branch, created if missing; default: main")
    add("--message", type=str, default=None, help="commit message")
    add("--private", **flag, help="make a new repository private")
    add("--create_pr", **flag, help="open a pull request instead of committing")
    add("--dry_run", **flag, help="show files, sizes and card; send nothing")
    parsed = parse(parser, arguments, early=lambda _: None)  # push needs no model
    options = parsed.options
    if options.repo is None:
        sys.stderr.write(
            f"usage: {parser.usage}\n{parser.prog}: give the repository or URL with --repo\n"
        )
        return 2

    from lspade_train.artifacts import folder as artifact
    from lspade_train.artifacts.card import NO_LICENCE, card
    from lspade_train.io.fetch import check_name
    from lspade_train.io.layout import CARD, known_files

    folder = heads_given(parsed)
    for text in artifact.machine_paths(folder):
        log.warning("a local path will become public: %s", text)
    if options.dry_run:
        check_name(options.repo)
        artifact.check_folder(folder)
        text = card(folder, repo=options.repo, license=options.license)
        sizes = {name: path.stat().st_size for name, path in known_files(folder).items()}
        _show(sizes | {CARD: len(text.encode())}, options.repo)
        sys.stdout.write(f"\n{text}")
        return 0
    wanted = ("license", "private", "branch", "create_pr", "message")
    address = artifact.push(
        folder, options.repo, **{name: getattr(options, name) for name in wanted}
    )
    if f"license: {NO_LICENCE}" in (folder / CARD).read_text(encoding="utf-8"):
        log.warning("the card states no licence; give one with --license")
    sys.stdout.write(f"{address}\n")
    return 0


def _show(sizes: dict[str, int], repo: str) -> None:
    """Print what would be uploaded."""
    for name, size in sizes.items():
        sys.stdout.write(f"{size:>14,}  {name}\n")
    sys.stdout.write(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files to {repo}\n")
