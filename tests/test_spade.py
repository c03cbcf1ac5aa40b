"""SPADE against a naive oracle that runs the model's own forward on two tokens."""

import pytest
import torch
from test_adapters import padded_batch, positions_of
from tiny_models import FAMILIES, LAYERS, blocks_of, crossed, tiny

from lspade_train import ModelAdapter, spade_logits
from lspade_train.errors import RecipeError
from lspade_train.probes.spade import collect_states


def hidden_states(model, ids):
    """h^0..h^L of one unpadded prompt, by plain forward hooks."""
    kept = []
    blocks = blocks_of(model)
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    hooks = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    hooks += [b.register_forward_hook(lambda _, __, out: kept.append(first(out))) for b in blocks]
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def naive_spade(model, prompt, layer, *, positions="original", zero_start=False):
    """The model's own two-token forward, with `[h_s^l, h_a^l]` substituted after block l."""
    hidden = hidden_states(model, prompt[None])[layer]
    pair = hidden[:, [0, -1]].clone()
    if zero_start:
        pair[:, 0] = 0
    blocks = blocks_of(model)
    if layer == 0:
        hook = blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: ((pair, *args[1:]), kwargs), with_kwargs=True
        )
    else:
        hook = blocks[layer - 1].register_forward_hook(
            lambda _, __, out: (pair, *out[1:]) if isinstance(out, tuple) else pair
        )
    last = len(prompt) - 1 if positions == "original" else 1
    logits = model(
        input_ids=prompt[None, [0, -1]],
        attention_mask=torch.ones(1, 2, dtype=torch.long),
        position_ids=torch.tensor([[0, last]]),
        use_cache=False,
    ).logits
    hook.remove()
    return logits[0, -1]


@pytest.mark.parametrize(
    ("family", "setting"),
    crossed(
        [("left", "original"), ("right", "compact"), ("left", "compact"), ("right", "original")]
    ),
)
@torch.no_grad()
def test_every_layer_of_every_prompt_equals_the_naive_two_token_forward(family, setting):
    model, (side, positions) = tiny(family), setting
    ids, mask = padded_batch(side)
    got = spade_logits(model, ids, mask, layers=range(LAYERS + 1), positions=positions)
    for row in range(len(ids)):
        prompt = ids[row][mask[row].bool()]
        for layer in range(LAYERS):
            expected = naive_spade(model, prompt, layer, positions=positions)
            torch.testing.assert_close(got[row, layer], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_spade_at_the_last_layer_equals_the_model(family, side):
    model = tiny(family)
    ids, mask = padded_batch(side)
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).logits
    last = [int(row.nonzero().max()) for row in mask]
    expected = logits[torch.arange(len(ids)), last]
    got = spade_logits(model, ids, mask, layers=[LAYERS])[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_start_token_is_attended_to(family):
    model = tiny(family)
    ids, mask = padded_batch("right")
    prompt = ids[0][mask[0].bool()]
    with_start = spade_logits(model, prompt[None], layers=[1])[0, 0]
    without = naive_spade(model, prompt, 1, zero_start=True)
    assert (with_start - without).abs().max() > 1e-3


@torch.no_grad()
def test_prompts_with_different_first_tokens_each_use_their_own():
    model = tiny("llama")
    ids = torch.tensor([[5, 6, 7], [8, 6, 7], [5, 9, 7]])
    together = spade_logits(model, ids)
    alone = torch.cat([spade_logits(model, row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_are_returned_in_the_requested_order():
    model = tiny("llama")
    ids, mask = padded_batch("left")
    every = spade_logits(model, ids, mask, layers=[0, 1, 2, 3, 4])
    torch.testing.assert_close(
        spade_logits(model, ids, mask, layers=[3, 0, 3]), every[:, [3, 0, 3]]
    )
    assert spade_logits(model, ids, mask).shape[1] == LAYERS


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon_alibi"])
@torch.no_grad()
def test_with_alibi_the_two_tokens_are_adjacent_for_any_position_ids(family):
    model, (ids, mask) = tiny(family), padded_batch("left")
    original, compact = (
        spade_logits(model, ids, mask, positions=kind) for kind in ("original", "compact")
    )
    assert torch.equal(original, compact)


@pytest.mark.parametrize(
    "columns", [[[2, 3, 4], [2, 3, 4]], [[2, 3, 4], [3, 4, 5]], [[4, 2, 5], [4, 2, 5]], [[5], [5]]]
)
@torch.no_grad()
def test_states_are_the_plain_forwards_wherever_the_positions_are(columns):
    model = tiny("llama")
    adapter = ModelAdapter(model, check=False)
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    found = collect_states(adapter, ids, None, torch.tensor(columns), (0, 2))
    for row, places in enumerate(columns):
        kept = [hidden[0, places] for hidden in hidden_states(model, ids[row, None])]
        expected = torch.stack([kept[0], kept[2]], 1)
        torch.testing.assert_close(found.hidden[row], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.final[row], kept[-1], rtol=1e-5, atol=1e-5)
    assert found.final.is_contiguous()


@pytest.mark.parametrize("layers", [[-1], [LAYERS + 1], []])
def test_a_layer_out_of_range_raises_a_clear_error(layers):
    with pytest.raises(RecipeError, match=r"layers go from 0 to 4"):
        spade_logits(tiny("llama"), torch.tensor([[1, 5]]), layers=layers)


@torch.no_grad()
def test_on_a_real_model_spade_beats_the_logit_lens_at_every_layer(stories):
    adapter = ModelAdapter.from_pretrained(str(stories))
    start = torch.full((128, 1), 1)
    ids = adapter.model.generate(start, max_new_tokens=60, do_sample=True, pad_token_id=0)
    outputs = adapter.model(ids, output_hidden_states=True)
    full = outputs.logits[:, -1].argmax(-1)
    layers = range(1, adapter.num_layers)
    spade = spade_logits(adapter, ids, layers=layers).argmax(-1).T
    for layer, answers in zip(layers, spade, strict=True):
        logit_lens = adapter.unembed(outputs.hidden_states[layer][:, -1]).argmax(-1)
        assert (answers == full).sum() > (logit_lens == full).sum()
