"""One prompt through one lens: the most likely tokens of every layer at every position.

Independent of terminals, files and recipes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import RecipeError
from lspade_train.models import ModelAdapter
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.lenses import LayerView, Lens
from lspade_train.probes.metrics import entropy, kl_divergence
from lspade_train.probes.spade import collect_states, continue_states
from lspade_train.recipe import PositionIds, check_layers

SPACE, NEWLINE = "·", "⏎"


@dataclass(frozen=True)
class Cell:
    """One layer's answer at one position.

    Attributes:
        tokens: most likely next tokens, best first, with white space made visible.
        probabilities: probabilities of those tokens, 0..1.
        entropy: entropy of the whole distribution, nats.
        kl: KL(full model || lens) in nats.
        agrees: whether the best token is the full model's.
    """

    tokens: tuple[str, ...]
    probabilities: tuple[float, ...]
    entropy: float
    kl: float
    agrees: bool


@dataclass(frozen=True)
class TokenView:
    """Layer x position for one prompt.

    Attributes:
        lens: key of the lens.
        tokens: the prompt's tokens at the positions shown.
        first: index of the first of them in the prompt.
        layers: layers, ascending; the last is L, the full model.
        cells: cells by layer, then by position.
        uniform: ln(vocabulary), the highest possible entropy, nats.
        choices: requested labels; () without any.
        scores: probability of each choice at the answer position, by layer.
    """

    lens: str
    tokens: tuple[str, ...]
    first: int
    layers: tuple[int, ...]
    cells: tuple[tuple[Cell, ...], ...]
    uniform: float
    choices: tuple[str, ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()

    @property
    def answer(self) -> tuple[Cell, ...]:
        """Every layer at the answer position, the prompt's last."""
        return tuple(row[-1] for row in self.cells)


@torch.no_grad()
def inspect_prompt(
    adapter: ModelAdapter,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    lens: Lens,
    layers: Sequence[int],
    *,
    heads: LSpadeHeads | None = None,
    last: int | None = None,
    top_k: int = 5,
    positions: PositionIds = "original",
    choices: Mapping[str, int] | None = None,
) -> TokenView:
    """Read `layers` at the last positions of one prompt; the full model is added on top.

    Args:
        adapter: the frozen model.
        tokenizer: the model's tokenizer.
        ids: the prompt, start token first.
        lens: lens to read with.
        layers: layers below L to read.
        heads: bound heads, for a lens that needs some.
        last: number of positions shown, counted from the prompt's end; None shows all.
        top_k: tokens kept per cell.
        positions: position ids of SPADE's two tokens.
        choices: label -> token, to score against each other at the answer position.

    Raises:
        RecipeError: a layer out of range, or nothing to show.
        ArtifactError: the lens needs heads, and none are given.
    """
    shown = len(ids) if last is None else min(last, len(ids))
    if shown < 1 or top_k < 1:
        raise RecipeError(
            f"{last} positions and {top_k} tokens were asked for; expected 1 or more of each. "
            "Set --last and --top_k."
        )
    asked = sorted(check_layers(layers, adapter.num_layers, last=adapter.num_layers - 1))
    input_ids = torch.tensor([list(ids)], device=adapter.device)
    where = torch.arange(len(ids) - shown, len(ids), device=adapter.device)
    states = collect_states(adapter, input_ids, None, where[None], asked)
    hidden, start = states.hidden[0], states.start_ids.expand(shown)

    @cache
    def continued() -> Tensor:
        return continue_states(
            adapter, hidden, asked, start, states.position_ids[0], positions=positions
        )

    full = adapter.unembed(states.final[0])
    words = _Words(tokenizer)
    read: list[Tensor] = []
    for place, layer in enumerate(asked):
        view = LayerView(
            layer,
            hidden[:, place],
            adapter.unembed,
            heads,
            lambda place=place: adapter.unembed(continued()[:, place]),
        )
        read.append(lens.logits(view))
    read.append(full)
    tokens = list((choices or {}).values())
    return TokenView(
        lens=lens.key,
        tokens=tuple(words(token) for token in list(ids)[len(ids) - shown :]),
        first=len(ids) - shown,
        layers=(*asked, adapter.num_layers),
        cells=tuple(_cells(logits, full, top_k, words) for logits in read),
        uniform=math.log(adapter.vocab_size),
        choices=tuple(choices or ()),
        scores=tuple(tuple(row[-1, tokens].float().softmax(-1).tolist()) for row in read),
    )


def _cells(logits: Tensor, full: Tensor, top_k: int, words: "_Words") -> tuple[Cell, ...]:
    """One layer at every position from its logits, (positions, vocab)."""
    best = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    agrees = best.indices[:, 0] == full.argmax(-1)
    return tuple(
        Cell(tuple(map(words, tokens)), tuple(probabilities), spread, kl, same)
        for tokens, probabilities, spread, kl, same in zip(
            best.indices.tolist(),
            best.values.tolist(),
            entropy(logits).tolist(),
            kl_divergence(full, logits).tolist(),
            agrees.tolist(),
            strict=True,
        )
    )


class _Words:
    """Token id -> text with visible white space, even where decoding alone would drop it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return f"<{token}>"  # an unused row of the unembedding
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if not text or "\ufffd" in text:
            return piece.replace("▁", SPACE)  # part of a character, or white space alone
        if piece[:1] in {"▁", "Ġ"} and not text[:1].isspace():
            text = " " + text
        return text.replace(" ", SPACE).replace("\n", NEWLINE).replace("\t", "⇥")
