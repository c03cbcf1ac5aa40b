"""Agreement and savings of greedy decoding with exits at a fixed layer."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from lspade_train.errors import RecipeError
from lspade_train.io.text import byte_size
from lspade_train.policies.policy import ExitPolicy
from lspade_train.profiling.clock import seconds_of
from lspade_train.runtime import ExitRuntime

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """Greedy generation with one exit layer, against the full model's.

    Attributes:
        layer: exit layer of every prompt; L is the full model.
        agreement: fraction of the full model's tokens that are reproduced at the same position.
        first_token: the same for the first token alone, which is the answer of `decide`.
        prefill_seconds: median time to the first token of all prompts.
        cache_bytes: mean size of a prompt's keys and values at the end.
    """

    layer: int
    agreement: float
    first_token: float
    prefill_seconds: float
    cache_bytes: float


def profile_generation(
    runtime: ExitRuntime,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    layers: Sequence[int] | None = None,
    repeats: int = 3,
) -> list[GenerationRow]:
    """Measure agreement and savings of greedy decoding with an exit at each layer.

    Args:
        runtime: model and heads; its policy's decoder and positions are used.
        prompts: token ids, start token first.
        max_new_tokens: most tokens per prompt.
        layers: exit layers, 0..L; None means the heads' layers and L.
        repeats: timed prefills per layer.

    Raises:
        RecipeError: `max_new_tokens` or `repeats` is less than 1.
    """
    for name, value in (("--generate", max_new_tokens), ("--repeats", repeats)):
        if value < 1:
            raise RecipeError(f"{name} is {value}; expected 1 or more.")
    top = runtime.adapter.num_layers
    known = runtime.heads.layers if runtime.heads is not None else ()
    asked = [*known, top] if layers is None else layers
    full = _leaving_at(runtime, top).generate(prompts, max_new_tokens)
    rows: list[GenerationRow] = []
    for layer in asked:
        at = _leaving_at(runtime, layer)
        found = at.generate(prompts, max_new_tokens)
        hits = [
            [a == b for a, b in zip_longest(one.token_ids[: len(all_.token_ids)], all_.token_ids)]
            for one, all_ in zip(found, full, strict=True)
        ]
        times = [
            seconds_of(lambda at=at: at.generate(prompts, 1), runtime.adapter.device)
            for _ in range(repeats)
        ]
        rows.append(
            GenerationRow(
                layer=layer,
                agreement=statistics.mean(hit for row in hits for hit in row),
                first_token=statistics.mean(row[0] for row in hits),
                prefill_seconds=statistics.median(times),
                cache_bytes=statistics.mean(one.cache_bytes for one in found),
            )
        )
    return rows


def generation_table(rows: Sequence[GenerationRow], max_new_tokens: int) -> "Table":
    """The results of `profile_generation`, for a terminal."""
    from rich.table import Table

    titles = ("exit layer", "agreement", "first token", "prefill", "cache per prompt")
    table = Table(*titles, title=f"greedy decoding of {max_new_tokens} tokens")
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(
            str(row.layer),
            f"{row.agreement:.3f}",
            f"{row.first_token:.3f}",
            f"{row.prefill_seconds * 1e3:,.1f} ms",
            byte_size(row.cache_bytes),
        )
    return table


def _leaving_at(runtime: ExitRuntime, layer: int) -> ExitRuntime:
    policy = ExitPolicy.never()
    if layer < runtime.adapter.num_layers:
        asked = runtime.policy
        decoder = asked.decoder
        if not isinstance(decoder, str):  # one for each check layer
            decoder = asked.decoder_at(layer) if layer in asked.layers else "spade"
        policy = ExitPolicy.always(layer, decoder=decoder, positions=asked.positions)
    return ExitRuntime(
        runtime.adapter,
        runtime.heads,
        policy=policy,
        tokens_per_batch=runtime.tokens_per_batch,
    )
