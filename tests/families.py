"""The table of model families and features, each cell computed on a tiny random model.

`python tests/families.py` prints it, `--write` updates docs/models.md; a test compares the two.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from test_adapters import padded_batch, positions_of, run_all
from test_prefix import SHARED, alike
from test_prefix import batch_of as prefix_batch
from test_runtime import batch_of, prompts_of, runtime_of
from test_spade import naive_spade
from tiny_models import FAMILIES, LAYERS, tiny
from transformers import PreTrainedModel

from lspade_train import ExitPolicy, ModelAdapter, spade_logits
from lspade_train.models import prefix_refusal
from lspade_train.runtime.decide import decide_batch

PAGE = Path(__file__).resolve().parents[1] / "docs/models.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to rounding."""
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def replay(model: PreTrainedModel) -> bool:
    """Blocks run one by one give the model's logits bit for bit."""
    adapter, (ids, mask) = ModelAdapter.of(model), padded_batch("left")
    expected = model(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).logits
    got = adapter.model_unembed(run_all(adapter, adapter.plan(ids, mask)))
    return torch.equal(got[mask.bool()], expected[mask.bool()])


def spade(model: PreTrainedModel) -> bool:
    """The sweep over all layers equals the model's own two-token forward."""
    prompt = padded_batch("left")[0][0]
    got = spade_logits(model, prompt[None], layers=range(LAYERS))[0]
    return close(got, torch.stack([naive_spade(model, prompt, layer) for layer in range(LAYERS)]))


def runtime(model: PreTrainedModel) -> bool:
    """Without an exit the model's logits bit for bit; with a forced exit SPADE's."""
    batch = batch_of(prompts_of())
    expected = model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions_of(batch.mask),
        use_cache=False, logits_to_keep=1,
    ).logits[:, -1]  # fmt: skip
    through = decide_batch(runtime_of(model, ExitPolicy.never()).probe, batch).logits
    left = decide_batch(runtime_of(model, ExitPolicy.always(2)).probe, batch).logits
    answer = spade_logits(model, batch.ids, batch.mask, layers=[2])[:, 0]
    return torch.equal(through, expected) and close(left, answer)


def generate(model: PreTrainedModel) -> bool:
    """Without an exit, the tokens of the model's own greedy generation."""
    model.generation_config.eos_token_id = None
    ids, mask = padded_batch("left")
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
    )[:, ids.shape[1] :]
    prompts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    found = runtime_of(model, ExitPolicy.never()).generate(prompts, 4)
    return [list(one.token_ids) for one in found] == expected.tolist()


def padding(model: PreTrainedModel) -> bool:
    """SPADE's answer is the same with left padding, right padding and none."""
    left, right = (spade_logits(model, *padded_batch(side)) for side in ("left", "right"))
    ids, mask = padded_batch("right")
    prompts = (row[real.bool()] for row, real in zip(ids, mask, strict=True))
    alone = torch.cat([spade_logits(model, prompt[None]) for prompt in prompts])
    return close(left, alone) and close(right, alone)


def prefix(model: PreTrainedModel) -> bool:
    """Rows after a shared prefix longer than every window give the model's logits."""
    adapter, batch = ModelAdapter.of(model), prefix_batch(alike())
    expected = model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions_of(batch.mask),
        use_cache=False,
    ).logits[:, SHARED:]  # fmt: skip
    got = adapter.unembed(run_all(adapter, adapter.plan(batch.ids, batch.mask, shared=SHARED)))
    real = batch.mask[:, SHARED:].bool()
    return prefix_refusal(adapter, batch.ids.shape[1]) is None and close(got[real], expected[real])


def positions(model: PreTrainedModel) -> str:
    """Whether `positions` changes SPADE: with ALiBi or learned positions it has no effect."""
    batch = padded_batch("left")
    original, compact = (
        spade_logits(model, *batch, positions=kind) for kind in ("original", "compact")
    )
    return "no effect" if torch.equal(original, compact) else "yes"


FEATURES: dict[str, Callable[[PreTrainedModel], bool | str]] = {
    "replay": replay,
    "SPADE": spade,
    "`positions`": positions,
    "runtime": runtime,
    "generate": generate,
    "padding": padding,
    "shared prefix": prefix,
}


@torch.no_grad()
def row(family: str) -> list[str]:
    """One family's cells."""
    model = tiny(family)
    found = [feature(model) for feature in FEATURES.values()]
    found.append(replay(tiny(family, dtype=torch.bfloat16)))  # its load-time check passes too
    return [f"`{family}`", *({True: "yes", False: "no"}.get(cell, str(cell)) for cell in found)]


def table(families: Sequence[str] = FAMILIES) -> str:
    """The block between the page's markers, for all or some of the families."""
    head = ["family", *FEATURES, "bf16"]
    lines = [head, ["---"] * len(head), *map(row, families)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def between_markers(text: str) -> str:
    """The text of a page between its markers."""
    return text.split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = table()
    if "--write" in sys.argv:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(before + BEGIN + found + END + after, encoding="utf-8")
    else:
        sys.stdout.write(found)
