"""Generation behind an exit, against `model.generate` and against a naive two-region oracle."""

import pytest
import torch
from test_adapters import padded_batch
from test_runtime import mixed_policy, prompts_of, random_heads, runtime_of
from tiny_models import FAMILIES, LAYERS, crossed, tiny

from lspade_train.errors import NumericsError, PolicyError, TaskError
from lspade_train.policies.policy import ExitPolicy
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.sampling import Sampling

NEW = 8


def endless(family):
    """A tiny model that never ends a text by itself, so that every token is compared."""
    model = tiny(family)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_without_an_exit_it_is_the_models_own_generation(family):
    model, prompts = endless(family), prompts_of()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[:, width:]
    found = runtime_of(model, ExitPolicy.never()).generate(prompts, NEW)
    assert [one.token_ids for one in found] == [tuple(row) for row in expected.tolist()]
    assert not any(one.exited for one in found)


def by_hand(runtime, prompt, layer, count):
    """Two forwards per token and no cache: blocks 1..l over everything, the rest over the answer.

    The rest sees the start token and h^l of the prompt's last token and of each generated one.
    """
    adapter, ids, last = runtime.adapter, list(prompt), len(prompt) - 1
    for _ in range(count):
        whole = torch.tensor([ids])
        plan = adapter.plan(whole)
        hidden = plan.hidden
        for block in range(layer):
            hidden = adapter.run_block(plan, block, hidden)
        few = torch.tensor([[0, *range(last, len(ids))]])
        short = adapter.plan_cached(whole[:, few[0]], torch.ones_like(few), few, None)
        hidden = hidden[:, few[0]]
        for block in range(layer, adapter.num_layers):
            hidden = adapter.run_block(short, block, hidden)
        ids.append(int(adapter.unembed(hidden[:, -1]).argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("decoder_at", [0, 2])
def test_after_a_start_token_alone_nothing_is_left_out(decoder_at):
    model = endless("llama")
    alone, longer = [1], prompts_of([5])[0]
    full = runtime_of(model, ExitPolicy.never()).generate([alone], NEW)
    for prompts in ([alone], [alone, longer]):
        found = runtime_of(model, ExitPolicy.always(decoder_at)).generate(prompts, NEW)
        assert found[0].token_ids == full[0].token_ids


@pytest.mark.parametrize(("family", "layer"), crossed([1, 0, 2, 3]))
@torch.no_grad()
def test_behind_an_exit_upper_blocks_see_the_start_and_the_answer_alone(family, layer):
    prompts = prompts_of([7, 3, 5])
    runtime = runtime_of(endless(family), ExitPolicy.always(layer))
    found = runtime.generate(prompts, NEW)
    assert [one.token_ids for one in found] == [by_hand(runtime, p, layer, NEW) for p in prompts]
    assert {one.layer for one in found} == {layer}


@pytest.mark.parametrize("decoder", ["spade", "l-spade", "logit_lens"])
def test_the_first_token_is_the_decision(decoder):
    model, prompts = endless("llama"), prompts_of()
    runtime = runtime_of(model, mixed_policy(model, prompts, decoder=decoder))
    decisions, found = runtime.decide(prompts), runtime.generate(prompts, 3)
    assert len({one.layer for one in found}) > 1
    assert [one.token_ids[0] for one in found] == [d.token_id for d in decisions]
    assert [one.layer for one in found] == [d.layer for d in decisions]
    assert [one.entropy for one in found] == pytest.approx([d.entropy for d in decisions])


def test_prompts_in_a_batch_generate_what_they_generate_alone():
    model, prompts = endless("gemma2"), prompts_of()
    runtime = runtime_of(model, mixed_policy(model, prompts))
    alone = [runtime.generate([prompt], NEW)[0].token_ids for prompt in prompts]
    assert [one.token_ids for one in runtime.generate(prompts, NEW)] == alone


def test_compact_positions_count_from_the_start_token():
    model = endless("llama")
    compact = runtime_of(model, ExitPolicy.always(1, positions="compact"))
    short = prompts_of([2])  # its own positions are compact already
    plain = runtime_of(model, ExitPolicy.always(1)).generate(short, NEW)
    assert compact.generate(short, NEW)[0].token_ids == plain[0].token_ids
    assert (
        compact.decide(prompts_of())[0].token_id
        == compact.generate(prompts_of(), 1)[0].token_ids[0]
    )


@pytest.mark.parametrize("layer", [1, None])
def test_a_row_stops_after_its_end_token_and_the_others_continue(layer):
    model, prompts = endless("llama"), prompts_of()
    policy = ExitPolicy.never() if layer is None else ExitPolicy.always(layer)
    runtime = runtime_of(model, policy)
    free = [one.token_ids for one in runtime.generate(prompts, NEW)]
    end = free[0][2]
    model.generation_config.eos_token_id = [end, 2]
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    cut = [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in cut]
    assert len(set(map(len, cut))) > 1
    assert [one.token_ids for one in runtime.generate(prompts, NEW)] == cut


def test_tokens_are_handed_out_as_they_come():
    heard: dict[int, list[int]] = {}
    runtime = runtime_of(endless("llama"), ExitPolicy.always(2))
    found = runtime.generate(
        prompts_of(), NEW, on_token=lambda i, token: heard.setdefault(i, []).append(token)
    )
    assert {i: tuple(tokens) for i, tokens in heard.items()} == {
        i: one.token_ids for i, one in enumerate(found)
    }


def test_an_earlier_exit_holds_fewer_keys_and_values():
    model, prompts = endless("llama"), prompts_of([20, 20])
    sizes = []
    for layer in (0, 1, 2, 3):
        sizes.append(
            runtime_of(model, ExitPolicy.always(layer)).generate(prompts, 3)[0].cache_bytes
        )
    sizes.append(runtime_of(model, ExitPolicy.never()).generate(prompts, 3)[0].cache_bytes)
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 numbers in fp32
    # Below: 20 prompt tokens and 2 answers fed. Above: start token, last prompt token, 2 answers.
    assert sizes == [per_token * (22 * layer + 4 * (LAYERS - layer)) for layer in range(LAYERS + 1)]


def test_sampling_follows_the_distribution_and_its_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    draw = Sampling(0.7, 1.0, torch.Generator().manual_seed(0)).pick(logits)
    shares = torch.bincount(draw, minlength=4) / 4000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), rtol=0, atol=0.025)
    again = Sampling(0.7, 1.0, torch.Generator().manual_seed(0)).pick(logits)
    assert torch.equal(draw, again)


def test_top_p_leaves_out_the_tail():
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]]).repeat(500, 1)
    draw = Sampling(1.0, 0.9, torch.Generator().manual_seed(0)).pick(logits)
    assert set(draw.tolist()) == {0, 1}


def test_sampled_text_is_reproducible():
    runtime = runtime_of(endless("llama"), ExitPolicy.always(2))
    one, two = (
        runtime.generate(
            prompts_of(), NEW, temperature=1.0, generator=torch.Generator().manual_seed(7)
        )
        for _ in range(2)
    )
    assert one == two
    assert one != runtime.generate(prompts_of(), NEW)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"max_new_tokens": 0}, PolicyError, "expected 1 or more"),
        ({"max_new_tokens": 2, "temperature": -1}, PolicyError, "temperature -1"),
        ({"max_new_tokens": 2, "top_p": 0.0}, PolicyError, r"top_p 0\.0"),
        ({"max_new_tokens": 60}, TaskError, "7 tokens and 60 new ones; .* holds 64"),
    ],
)
def test_settings_out_of_range_are_one_clear_error(settings, error, match):
    with pytest.raises(error, match=match):
        runtime_of(tiny("llama"), ExitPolicy.never()).generate(prompts_of(), **settings)


def test_a_policy_of_choices_cannot_generate():
    runtime = runtime_of(tiny("llama"), ExitPolicy.always(2, scope="choices"))
    with pytest.raises(PolicyError, match="free text has none"):
        runtime.generate(prompts_of(), 3)


def test_nan_logits_are_one_clear_error():
    model = tiny("llama")
    runtime = ExitRuntime(model, random_heads(), policy=ExitPolicy.always(2))
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN for prompt"):
        runtime.generate(padded_batch("left", (4,))[0].tolist(), 3)
