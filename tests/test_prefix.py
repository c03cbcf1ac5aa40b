"""Shared prompt prefixes are run once: how they are found, their exactness, caching and cost."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapters import positions_of, run_all
from test_runtime import mixed_policy, runtime_of
from tiny_models import FAMILIES, LAYERS, VOCAB, tiny

from lspade_train import ExitPolicy, ModelAdapter
from lspade_train.cache.extract import Extraction, extract
from lspade_train.errors import TaskError
from lspade_train.models import known, load_check, prefix, sharing
from lspade_train.models.prefix import length_batches, shared_prefixes
from lspade_train.policies.flops import count_flops, counter, exit_costs, exit_flops
from lspade_train.runtime.batching import Query, collate, shared_batches
from lspade_train.runtime.decide import decide_batch
from lspade_train.tasks import Example

SHARED = 9
LENGTHS = (20, 11, 15, 10, 13, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _short_prefixes_are_worth_it(monkeypatch):
    monkeypatch.setattr(prefix, "LEAST_TOKENS", 3)
    monkeypatch.setattr(prefix, "LEAST_SAVED", 8)


def alike(lengths=LENGTHS, shared=SHARED, seed=1):
    """Prompts of these lengths whose longest common prefix is the shared one."""
    generator = torch.Generator().manual_seed(seed)
    start = [1, *torch.randint(3, VOCAB, (shared - 1,), generator=generator).tolist()]
    return [
        [*start, 3 + row, *torch.randint(3, VOCAB, (n - shared - 1,), generator=generator).tolist()]
        for row, n in enumerate(lengths)
    ]


def batch_of(prompts, shared=SHARED):
    queries = [Query(i, tuple(ids), None) for i, ids in enumerate(prompts)]
    return collate(queries, torch.device("cpu"), shared)


def tokens_run(adapter, work):
    """Tokens that went through the first block, and the result of `work`."""
    seen, run_block = [], adapter.run_block

    def counted(plan, block, hidden):
        seen.append(hidden.shape[0] * hidden.shape[1] if block == 0 else 0)
        return run_block(plan, block, hidden)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapter, "run_block", counted)
        found = work()
    return sum(seen), found


# Finding --------------------------------------------------------------------------------------


def saved(prompts, groups):
    """Tokens saved by a partition of the prompts, each part sharing its longest prefix."""
    total = 0
    for group in groups:
        same = 0
        while all(len(prompts[i]) > same for i in group) and len(
            {prompts[i][same] for i in group}
        ) == 1:  # fmt: skip
            same += 1
        worth = same * (len(group) - 1) - prefix.LEAST_SAVED
        total += worth if same >= prefix.LEAST_TOKENS and worth > 0 else 0
    return total


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for size in range(len(rest) + 1):
        for others in combinations(rest, size):
            for more in partitions([i for i in rest if i not in others]):
                yield [[first, *others], *more]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=9), max_size=5))
def test_the_prefixes_found_save_as_much_as_the_best_partition(prompts):
    starts = [prompt[:-1] for prompt in prompts]
    found = shared_prefixes(prompts)
    assert sorted(i for _, group in found for i in group) == list(range(len(prompts)))
    for count, group in found:
        assert len({tuple(starts[i][:count]) for i in group}) <= 1 or not count
        assert all(len(starts[i]) >= count for i in group)
    best = max(saved(starts, groups) for groups in partitions(list(range(len(prompts)))))
    got = sum(count * (len(g) - 1) - prefix.LEAST_SAVED for count, g in found if count)
    assert got == best


def test_a_prompt_without_the_prefix_does_not_affect_the_others():
    prompts = [*alike(), [5, 6, 7, 8]]
    assert shared_prefixes(prompts) == [(SHARED, [0, 1, 2, 3, 4, 5]), (0, [6])]


def test_tokens_from_the_first_answer_position_on_are_not_shared():
    prompts = alike()
    assert shared_prefixes(prompts, [4, 20, 20, 20, 20, 20]) == [
        (SHARED, [1, 2, 3, 4, 5]),
        (0, [0]),
    ]


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(1, 900))
def test_batches_hold_every_prompt_once_within_the_budget_with_little_padding(lengths, tokens):
    batches = list(length_batches(lengths, tokens, most=7))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert longest * len(batch) <= tokens or len(batch) == 1
        assert len(batch) <= 7
        # The last prompt is the one that reaches the padding limit.
        assert sum(longest - lengths[i] for i in batch[:-1]) <= prefix.PADDING


# Exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_after_a_shared_prefix_match_the_model_even_with_dropped_rows(family):
    model = tiny(family)
    adapter, batch = ModelAdapter(model), batch_of(alike())
    expected = model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions_of(batch.mask),
        use_cache=False,
    ).logits[:, SHARED:]  # fmt: skip
    plan, real = adapter.plan(batch.ids, batch.mask, shared=SHARED), batch.mask[:, SHARED:].bool()
    torch.testing.assert_close(
        adapter.unembed(run_all(adapter, plan))[real], expected[real], **CLOSE
    )
    keep = torch.tensor([0, 3])
    few = replace(plan.select(keep), hidden=adapter.run_block(plan, 0, plan.hidden)[keep])
    hidden = few.hidden
    for block in range(1, LAYERS):
        hidden = adapter.run_block(few, block, hidden)
    left = real[keep]
    torch.testing.assert_close(adapter.unembed(hidden)[left], expected[keep][left], **CLOSE)


@pytest.mark.parametrize("decoder", ["spade", "l-spade"])
def test_exits_after_a_shared_prefix_match_those_of_full_prompts(decoder):
    model, prompts = tiny("gemma2"), alike()
    policy = mixed_policy(model, prompts, decoder=decoder)
    probe = runtime_of(model, policy).probe
    whole, behind = (decide_batch(probe, batch_of(prompts, shared)) for shared in (0, SHARED))
    assert len(set(whole.layers.tolist())) > 1
    assert behind.layers.tolist() == whole.layers.tolist()
    torch.testing.assert_close(behind.logits, whole.logits, **CLOSE)
    torch.testing.assert_close(behind.entropy, whole.entropy, **CLOSE)


def test_extraction_runs_the_prefix_once_and_keeps_states_and_order(monkeypatch):
    adapter, prompts = ModelAdapter(tiny("mistral")), [*alike(), [1, 5, 6, 7]]
    # Several answer positions, none of which may fall into the shared prefix.
    examples = [
        Example(np.array(ids, dtype=np.int32), np.array([len(ids) - 2, len(ids) - 1]), None, (), i)
        for i, ids in enumerate(prompts)
    ]
    what = Extraction((0, 1, 3), "original", "hidden", 64, 0, ("",), False)
    adapter.check()
    sharing.prefix_refusal(adapter, 1)
    ran, found = tokens_run(adapter, lambda: extract(adapter, examples, what, 1000))
    monkeypatch.setattr(sharing, "shared_prefixes", lambda prompts, _: [(0, range(len(prompts)))])
    expected = extract(adapter, examples, what, 1000)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)
    # The prefix (it ends before the shortest prompt's answers), the rows, the prompt without it.
    assert ran == SHARED - 1 + len(LENGTHS) * (max(LENGTHS) - SHARED + 1) + 4


def test_length_dependent_rotary_angles_are_not_shared_beyond_their_limit():
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "partial_rotary_factor": 1.0}
    rope = {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4} | factors
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    adapter = ModelAdapter(model)
    assert sharing.prefix_refusal(adapter, 16) is None
    assert "over 16 tokens, and a prompt has 20" in sharing.prefix_refusal(adapter, 20)
    queries = [Query(i, tuple(ids), None) for i, ids in enumerate(alike())]
    assert [batch.shared for batch in shared_batches(queries, 1000, adapter)] == [0]
    assert "16 tokens" in sharing.sharing_told(adapter, alike())
    short = [Query(i, tuple(ids[:12]), None) for i, ids in enumerate(alike())]
    assert [batch.shared for batch in shared_batches(short, 1000, adapter)] == [SHARED]


def test_a_model_that_cannot_continue_a_prefix_runs_full_prompts(monkeypatch):
    model, prompts = tiny("llama"), alike()
    adapter = ModelAdapter(model)
    real = load_check._run

    def wrong(adapter, plan, hidden):
        whole, fewer = real(adapter, plan, hidden)
        return (whole + 1, fewer + 1) if hidden.shape[1] == 2 else (whole, fewer)

    monkeypatch.setattr(load_check, "_run", wrong)
    assert "does not continue" in sharing.prefix_refusal(adapter, 20)
    assert sharing.shared_groups(adapter, prompts) == [(0, [0, 1, 2, 3, 4, 5])]
    runtime = runtime_of(model, ExitPolicy.never())
    for start in (None, prompts[0][:SHARED]):
        runtime.decide(prompts, prefix=start)
    assert [key[:-1] for key in adapter.refresh()._prefixes] == [(3, 4, 5)]  # the probe's


# Caching --------------------------------------------------------------------------------------


def test_a_given_prefix_is_run_once_across_single_prompt_calls():
    model, prompts = tiny("llama"), alike((20, 14))
    runtime, start = runtime_of(model, ExitPolicy.never()), prompts[0][:SHARED]
    whole = [runtime.decide([prompt])[0].token_id for prompt in prompts]
    first, one = tokens_run(runtime.adapter, lambda: runtime.decide(prompts[:1], prefix=start))
    again, other = tokens_run(runtime.adapter, lambda: runtime.decide(prompts[1:], prefix=start))
    assert [one[0].token_id, other[0].token_id] == whole
    assert again == 14 - SHARED < first


def test_prompts_of_one_call_share_their_common_prefix():
    model, prompts = tiny("llama"), alike()
    runtime = runtime_of(model, ExitPolicy.never())
    runtime.decide(prompts)  # the probe of the model, and the prefix
    ran, together = tokens_run(runtime.adapter, lambda: runtime.decide(prompts))
    assert ran == len(prompts) * (max(LENGTHS) - SHARED)
    assert [d.token_id for d in together] == [runtime.decide([p])[0].token_id for p in prompts]


def test_changing_a_weight_drops_the_cached_prefixes():
    model, prompts = tiny("llama"), alike()
    runtime = runtime_of(model, ExitPolicy.never())
    runtime.decide(prompts)
    assert len(runtime.adapter.refresh()._prefixes) == 2  # including the probe's
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    assert not runtime.adapter.refresh()._prefixes
    fresh = runtime_of(model, ExitPolicy.never())
    alone = torch.cat([decide_batch(fresh.probe, batch_of([ids], 0)).logits for ids in prompts])
    behind = decide_batch(fresh.probe, batch_of(prompts)).logits
    torch.testing.assert_close(behind, alone, **CLOSE)


def test_cached_prefixes_are_bounded_in_bytes_keeping_recent_ones(monkeypatch):
    adapter = ModelAdapter(tiny("llama"))
    size = 2 * LAYERS * 2 * 8 * 4  # keys and values of 2 heads of 8 numbers, of one token
    monkeypatch.setattr(known, "PREFIX_BYTES", 10 * size)
    for tokens in ((3, 4, 5), (5, 6, 7, 8), (3, 4, 5), (9, 9, 9, 9)):
        adapter.start_cache(*tokens)
    kept = adapter.refresh()._prefixes
    assert [key[:-1] for key in kept] == [(3, 4, 5), (9, 9, 9, 9)]
    adapter.start_cache(*range(3, 15))  # larger than the whole cache, and in use
    assert [key[:-1] for key in adapter.refresh()._prefixes] == [tuple(range(3, 15))]


def test_a_prompt_that_does_not_start_with_the_prefix_is_rejected():
    runtime = runtime_of(tiny("llama"), ExitPolicy.never())
    with pytest.raises(TaskError, match=r"Prompt 2 of 2 does not begin with the prefix"):
        runtime.decide([[1, 5, 6], [1, 6, 6]], prefix=[1, 5])
    with pytest.raises(TaskError, match="of two kinds"):
        runtime.decide([[1, 5, 6]], prefix="text")


# Cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt"])
def test_the_formula_matches_the_counter_for_a_run_after_a_prefix(family):
    model, prompts = tiny(family), alike((20, 20, 20))
    runtime = runtime_of(model, ExitPolicy.always(2))
    decide_batch(runtime.probe, batch_of(prompts))  # the prefix is counted separately
    with counter() as found:
        decide_batch(runtime.probe, batch_of(prompts))
    counts = count_flops(model, runtime.heads)
    got = exit_flops(counts, [20] * 3, [2], runtime.policy, shared=SHARED).sum()
    assert float(got) == pytest.approx(found.get_total_flops(), rel=0.01)
    runtime.adapter.refresh()._prefixes.clear()
    with counter() as found:
        runtime.adapter.start_cache(*prompts[0][:SHARED])
    assert float(counts.reach(torch.tensor([SHARED]))[0, -1]) == pytest.approx(
        found.get_total_flops(), rel=0.01
    )


def test_savings_are_relative_to_a_model_that_also_shares_the_prefix():
    counts = count_flops(tiny("llama"), runtime_of(tiny("llama"), ExitPolicy.always(2)).heads)
    policy, tokens = ExitPolicy.always(2), torch.tensor([20])
    cost = float(exit_costs(counts, tokens, [2], policy, shared=SHARED))
    paid = float(exit_flops(counts, tokens, [2], policy, shared=SHARED))
    assert cost == pytest.approx(paid / float(counts.full(tokens, SHARED)))
    assert paid / float(counts.full(tokens)) < cost < 1
