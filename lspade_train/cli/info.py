"""`info`: describe a heads folder, a cache or a model."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

INFO = """\
usage: lspade-train info PATH

Describe a heads folder, a cache or a model. Heads and caches are read from their files alone and
may be URLs; a model (folder, Hub id or GGUF file) is loaded and its load-time check is run.

  lspade-train info checkpoints/arc
  lspade-train info checkpoints/tiny-world
"""


def info(arguments: list[str]) -> int:
    """Describe one path."""
    if len(arguments) != 1 or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(INFO)
        return 0 if arguments and arguments[0] in {"-h", "--help"} else 2

    from lspade_train.io.remote import is_remote

    path = Path(arguments[0])
    if is_remote(arguments[0]):
        _show_remote(arguments[0].rstrip("/"))
    elif (path / "heads.safetensors").exists():
        from lspade_train.artifacts.folder import describe

        _show({"heads folder": str(path), **describe(path)})
    elif any(path.glob("manifest.json")) or any(path.glob("*/manifest.json")):
        _show_cache(path, str(path))
    else:
        _show_model(str(path) if path.exists() else arguments[0])
    return 0


def _show_remote(url: str) -> None:
    """Describe a remote cache, from its manifests alone, or remote heads."""
    from lspade_train.artifacts.folder import describe
    from lspade_train.cache.manifest import MANIFEST
    from lspade_train.errors import CacheError
    from lspade_train.io.fetch import local_folder
    from lspade_train.io.remote import Mirror
    from lspade_train.tasks import SPLITS

    with TemporaryDirectory() as place:
        for part in ("", *SPLITS):
            Mirror(f"{url}/{part}", [MANIFEST], CacheError, Path(place) / part).fetch()
        if any(Path(place).rglob(MANIFEST)):
            _show_cache(Path(place), url)
        else:
            _show({"heads folder": url, **describe(local_folder(url))})


def _show_cache(path: Path, name: str) -> None:
    from lspade_train.cache.manifest import Manifest
    from lspade_train.io.text import byte_size

    for folder in sorted(
        {p.parent for p in [*path.glob("manifest.json"), *path.glob("*/manifest.json")]}
    ):
        manifest = Manifest.read(folder)
        identity = manifest.identity
        _show(
            {
                "cache": f"{name}/{folder.relative_to(path)}".removesuffix("/."),
                "rows": f"{manifest.rows:,} of {manifest.prompts:,} prompts "
                f"({manifest.skipped:,} skipped)",
                "size": f"{byte_size(manifest.bytes)} in {len(manifest.shards)} shards",
                "digest": manifest.digest,
                "answer prefix": repr(manifest.answer_prefix),
                **{k: str(v) for k, v in manifest.provenance.items()},
                **{k: str(v) for k, v in identity.items() if v is not None},
            }
        )


def _show_model(path: str) -> None:
    from lspade_train.io.hub_names import settle_hub

    settle_hub(path, data=path, key="PATH")

    from lspade_train.models import ModelAdapter, prefix_refusal

    file = Path(path)
    adapter = (
        ModelAdapter.from_pretrained(str(file.parent), gguf_file=file.name)
        if file.suffix == ".gguf"
        else ModelAdapter.from_pretrained(path)
    )
    refused = prefix_refusal(adapter, adapter.max_length or 0)
    parameters = sum(p.numel() for p in adapter.model.parameters())
    _show(
        {
            "model": path,
            "class": type(adapter.model).__name__,
            "parameters": f"{parameters:,}",
            "layers": str(adapter.num_layers),
            "hidden size": str(adapter.hidden_size),
            "vocabulary": f"{adapter.vocab_size:,}",
            "context": str(adapter.max_length),
            "revision": str(adapter.revision or "local files"),
            **adapter.identity,
            "shared prefixes": "disabled: " + refused if refused else "computed once",
            "check": "passed: block-by-block replay, unembedding and start-token cache match "
            "the model's output",
        }
    )


def _show(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in rows.items()))
