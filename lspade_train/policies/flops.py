"""FLOPs of an exit: matrix products counted on the model itself, extrapolated to any prompt.

A block's count is a quadratic in the prompt's length, so three short prompts determine it for all
lengths, in any model family. Independent of how policies are chosen and of wall time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lspade_train.models import ModelAdapter
from lspade_train.policies.exit_table import ExitCosts
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.readers import Readers, answer_head, available, read_by_checks
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import GATED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shared = int | Int[Tensor, " prompts"]
"""Number of leading tokens that are run once for several prompts."""

PROBES = (2, 3, 4)  # prompt lengths to count at: three points determine a parabola


@dataclass(frozen=True)
class FlopCounts:
    """Floating-point operations (two per multiply-add) of one row of one model.

    Attention is counted as T x T, as the kernels are, without a discount for causality.

    Attributes:
        prompt: Newton coefficients over the prompt's length, (L+1, 3): embeddings, then blocks.
        step: a block on a single-token row that attends to the start token and itself, (L,).
        entry: what a family computes around the blocks to begin such a row: OPT-350m's projections.
        norm: final norm of one row, and projection if the family has one.
        token: one token's logit for one row.
        vocab: V.
        maps: each reader's map for one row, by its name, the heads' own first; 0 without one.
        width: d.
    """

    prompt: Float[Tensor, "stages 3"]
    step: Float[Tensor, " blocks"]
    norm: float
    token: float
    vocab: int
    maps: Mapping[str, float]
    width: int
    entry: float = 0.0

    def reach(
        self, tokens: Int[Tensor, " prompts"], shared: Shared = 0
    ) -> Float[Tensor, "prompts stages"]:
        """Operations up to h^0, h^1, ... h^L for prompts of those lengths.

        Args:
            tokens: length of each prompt.
            shared: number of leading tokens that were run before; the rest attends to them, too.
                That earlier run costs as much as a prompt of that length, once for all prompts.
        """
        n = (tokens - shared).double()
        square = (n - 2) * (
            n - 3
        ) / 2 + n * shared / 2  # attention's n x n becomes n x (n + shared)
        basis = torch.stack([torch.ones_like(n), n - 2, square], dim=-1)
        return (basis @ self.prompt.T).cumsum(-1)

    def readout(self, choices: "int | Tensor | None" = None) -> "float | Tensor":
        """Final norm and unembedding of one row over the choices; None: over the vocabulary."""
        return self.norm + self.token * (self.vocab if choices is None else choices)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries."""
        return vars(self) | {"prompt": self.prompt.tolist(), "step": self.step.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        kept: dict[str, Any] = dict(value)
        kept |= {n: torch.tensor(kept[n], dtype=torch.float64) for n in ("prompt", "step")}
        return cls(**kept)

    def full(
        self, tokens: Int[Tensor, " prompts"], shared: Shared = 0
    ) -> Float[Tensor, " prompts"]:
        """The full model, which unembeds the answer position only (`logits_to_keep=1`).

        Args:
            tokens: length of each prompt.
            shared: number of leading tokens that were run before, as servers with prefix caches do.
        """
        return self.reach(tokens, shared)[:, -1] + self.readout()


def counter() -> FlopCounterMode:
    """PyTorch's counter, plus kernels that it does not count: CPU attention, grouped experts."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
        # (rows, in) x (experts, in, out): each row is multiplied by one expert's matrix.
        return 2 * left[0] * left[1] * right[-1]

    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._grouped_mm: grouped,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


@torch.no_grad()
def count_flops(
    model: "PreTrainedModel | ModelAdapter", heads: LSpadeHeads | Readers | None = None
) -> FlopCounts:
    """Count the model's parts on three short prompts; cached while the model is unchanged.

    Args:
        model: the frozen model.
        heads: its heads, with the tuned lens beside them; or readers by name; None: no heads.
    """
    readers = heads if isinstance(heads, dict) else available(heads)
    adapter = ModelAdapter.of(model)
    notes = adapter.refresh().notes
    if "flops" not in notes:
        notes["flops"] = _count_model(adapter)
    return replace(notes["flops"], maps={name: _map_flops(one) for name, one in readers.items()})


def _count_model(adapter: ModelAdapter) -> FlopCounts:
    adapter.check()  # runs the model, once per model, so not while counting
    first, second, third = (_prompt_flops(adapter, tokens) for tokens in PROBES)
    row = torch.zeros(1, adapter.hidden_size, dtype=adapter.dtype, device=adapter.device)
    row = row.to(adapter.unembed.weight.device)
    with counter() as whole:
        adapter.unembed(row)
    token = 2.0 * adapter.unembed.weight.shape[1]
    entry, step = _step_flops(adapter)
    return FlopCounts(
        prompt=torch.stack([first, second - first, third - 2 * second + first], dim=-1),
        step=step,
        norm=whole.get_total_flops() - token * adapter.vocab_size,
        token=token,
        vocab=adapter.vocab_size,
        maps={},
        width=adapter.hidden_size,
        entry=entry,
    )


def cost_parts(
    counts: FlopCounts,
    tokens: Int[Tensor, " prompts"] | Sequence[int],
    policy: ExitPolicy,
    *,
    choices: Int[Tensor, " prompts"] | None = None,
    shared: Shared = 0,
) -> ExitCosts:
    """Operations of each prompt by parts, for any choice of check layers among the policy's.

    Their sums are those of `exit_flops`, which documents what is counted.

    Args:
        counts: counts of the model and its heads.
        tokens: length of each prompt.
        policy: gives layers, scope, readers and decoder; its threshold is not used.
        choices: number of choices of each prompt, for `scope: choices`.
        shared: number of leading tokens that are run once for all, also by the plain model.
    """
    lengths = torch.as_tensor(tokens).cpu()
    price, layers = _Price(counts, policy, choices), policy.layers

    def columns(values: Sequence["float | Tensor"]) -> NDArray[Any]:
        wide = (torch.as_tensor(v, dtype=torch.float64).expand(len(lengths)) for v in values)
        return torch.stack([*wide], dim=1).numpy()

    top = len(counts.step)
    return ExitCosts(
        reach=counts.reach(lengths, shared)[:, [*layers, top]].numpy(),
        check=columns([price.check] * len(layers)),
        answer=columns([price.answer(layer, checked=True) for layer in (*layers, top)]),
        unchecked=columns([price.answer(layer, checked=False) for layer in layers]),
        plain=counts.full(lengths, shared).numpy(),
    )


def exit_flops(
    counts: FlopCounts,
    tokens: Int[Tensor, " prompts"] | Sequence[int],
    layers: Sequence[int],
    policy: ExitPolicy,
    *,
    choices: int | None = None,
    checks: Sequence[int] | None = None,
    shared: Shared = 0,
) -> Float[Tensor, "prompts layers"]:
    """Operations of each prompt for an exit at each layer.

    Counted are the prompt's blocks up to the exit, every check on the way (map, norm, unembedding
    over the policy's scope), the single-token continuation, and the answer's unembedding. The start
    token's keys and values are constants of the model and not counted; those of a shared prefix
    cost as much as a prompt of its length, once, and are not included.

    Args:
        counts: counts of the model and its heads.
        tokens: length of each prompt (the padded length, to price a padded batch).
        layers: exit layers, 0..L; L means no exit.
        policy: determines scope, decoder and check layers.
        choices: number of choices, for `scope: choices`.
        checks: check layers to count instead of the policy's; () counts none (the oracle).
        shared: number of leading tokens that are run once for all prompts.

    Returns:
        float64, on the CPU.
    """
    top = len(counts.step)
    lengths = torch.as_tensor(tokens).cpu()
    price = _Price(counts, policy, choices)
    asked = policy.check_layers if checks is None else checks
    extra = [
        price.check * sum(layer <= exit_layer for layer in asked)
        + price.answer(exit_layer, checked=exit_layer in asked)
        for exit_layer in layers
    ]
    reached = counts.reach(lengths, shared)[:, [min(layer, top) for layer in layers]]
    return reached + torch.tensor(extra, dtype=torch.float64)


def exit_costs(
    counts: FlopCounts,
    tokens: Int[Tensor, " prompts"] | Sequence[int],
    layers: Sequence[int],
    policy: ExitPolicy,
    *,
    choices: int | None = None,
    checks: Sequence[int] | None = None,
    shared: Shared = 0,
) -> Float[Tensor, "prompts layers"]:
    """`exit_flops` as a fraction of the full model's operations for the same prompt.

    A row that never exits costs a little over 1, because of the checks. A shared prefix is shared
    by both: a server that caches prefixes also runs the full model after them.
    """
    flops = exit_flops(
        counts, tokens, layers, policy, choices=choices, checks=checks, shared=shared
    )
    return flops / counts.full(torch.as_tensor(tokens).cpu(), shared)[:, None]


def paid_flops(
    counts: FlopCounts,
    tokens: Int[Tensor, " prompts"] | Sequence[int],
    exits: Int[Tensor, " prompts"],
    policy: ExitPolicy,
    *,
    choices: int | None = None,
) -> Float[Tensor, " prompts"]:
    """`exit_flops` of each prompt at the layer where it left: a check layer, or L."""
    stages = [*policy.check_layers, len(counts.step)]
    costs = exit_flops(counts, tokens, stages, policy, choices=choices)
    place = torch.searchsorted(torch.tensor(stages), exits.cpu())
    return costs.gather(1, place[:, None])[:, 0]


class _Price:
    """Cost of a policy's checks and answers for one row, or for each of several with `choices`."""

    def __init__(
        self, counts: FlopCounts, policy: ExitPolicy, choices: "int | Tensor | None"
    ) -> None:
        self.counts, self.policy = counts, policy
        self.width = choices if policy.scope == "choices" else None
        self.read = read_by_checks(policy, counts.maps)

    @property
    def check(self) -> "float | Tensor":
        """One check: each reader's map, norm and unembedding, and the gate."""
        gate = self.policy.gate if self.policy.measure == GATED else None
        extra = 0.0
        if gate is not None:
            inputs = gate.weight.shape[1] + (0 if gate.hidden is None else self.counts.width)
            extra = 2.0 * inputs
        return sum((self._one(name) for name in self.read), start=extra)

    def answer(self, layer: int, *, checked: bool) -> "float | Tensor":
        """From the exit to the answer's logits; `checked` if a check can be reused."""
        counts = self.counts
        top = layer == len(counts.step)
        decoder = "spade" if top else answer_head(self.policy, layer, counts.maps)
        if decoder == "spade":
            step = 0.0 if top else counts.entry + float(counts.step[layer:].sum())
            return step + counts.readout(self.width)
        return 0.0 if checked and decoder in self.read else self._one(decoder)

    def _one(self, reader: str) -> "float | Tensor":
        return self.counts.maps[reader] + self.counts.readout(self.width)


def _prompt_flops(adapter: ModelAdapter, tokens: int) -> Tensor:
    """Embeddings, then every block, on one prompt of that length."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device=adapter.device)
    with counter() as found:
        plan = adapter.plan(ids)
    counted, hidden = [found.get_total_flops()], plan.hidden
    for block in range(adapter.num_layers):
        with counter() as found:
            hidden = adapter.run_block(plan, block, hidden)
        counted.append(found.get_total_flops())
    return torch.tensor(counted, dtype=torch.float64)


def _step_flops(adapter: ModelAdapter) -> tuple[float, Tensor]:
    """Entry, then every block, of a single-token row."""
    ids = torch.zeros(1, dtype=torch.long, device=adapter.device)
    adapter.plan_step(ids, ids + 1)  # computes the start token's constants, which are not counted
    with counter() as found:
        plan = adapter.plan_step(ids, ids + 1)
    entry = float(found.get_total_flops())
    counted, hidden = [], plan.hidden
    for block in range(adapter.num_layers):
        with counter() as found:
            hidden = adapter.run_block(plan, block, hidden)
        counted.append(found.get_total_flops())
    return entry, torch.tensor(counted, dtype=torch.float64)


def _map_flops(heads: LSpadeHeads | None) -> float:
    if heads is None:
        return 0.0
    row = torch.zeros(1, heads.hidden_size, dtype=heads.bias.dtype, device=heads.bias.device)
    with counter() as found:
        heads.translate(row, heads.layers[0])
    return float(found.get_total_flops())
