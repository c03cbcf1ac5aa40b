"""The FLOPs formula against PyTorch's counter on real runs, and against a hand count."""

from dataclasses import replace

import pytest
import torch
from test_runtime import batch_of, mixed_policy, prompts_of, runtime_of
from tiny_models import LAYERS, VOCAB, WIDTH, crossed, tiny

from lspade_train.models import ModelAdapter
from lspade_train.policies.flops import (
    cost_parts,
    count_flops,
    counter,
    exit_costs,
    exit_flops,
    paid_flops,
)
from lspade_train.policies.policy import ExitPolicy
from lspade_train.runtime.decide import decide_batch


def counted(runtime, batch):
    decide_batch(runtime.probe, batch)  # the start token's constants are not charged
    with counter() as found:
        outcome = decide_batch(runtime.probe, batch)
    return outcome, found.get_total_flops()


@pytest.mark.parametrize("decoder", ["spade", ("l-spade", "spade")])
def test_each_prompt_pays_for_its_own_exit(decoder):
    runtime = runtime_of(tiny("llama"), ExitPolicy(layers=(1, 2), threshold=0.5, decoder=decoder))
    counts, lengths = count_flops(runtime.adapter, runtime.heads), torch.tensor([9, 4, 7])
    paid = paid_flops(counts, lengths, torch.tensor([2, LAYERS, 1]), runtime.policy)
    table = exit_flops(counts, lengths, [1, 2, LAYERS], runtime.policy)
    torch.testing.assert_close(paid, table[torch.arange(3), torch.tensor([1, 2, 0])])


@pytest.mark.parametrize(("family", "decoder"), crossed(["spade", "l-spade", "logit_lens"]))
def test_the_formula_matches_the_counter_on_a_real_run(family, decoder):
    model, prompts = tiny(family), prompts_of([9, 4, 7, 9, 6, 8])
    policy = mixed_policy(model, prompts, decoder=decoder)
    runtime = runtime_of(model, policy)
    outcome, expected = counted(runtime, batch_of(prompts))
    assert len(set(outcome.layers.tolist())) > 1
    counts = count_flops(model, runtime.heads)
    table = exit_flops(counts, [9] * 6, range(LAYERS + 1), policy)  # every row is padded to 9
    got = float(table.gather(1, outcome.layers[:, None]).sum())
    assert got == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_choices_scope_is_charged_only_for_its_choices(family):
    model = tiny(family)
    policy = ExitPolicy.always(2, scope="choices")
    runtime = runtime_of(model, policy)
    _, expected = counted(runtime, batch_of(prompts_of([6, 6]), {"a": 5, "b": 6, "c": 7}))
    counts = count_flops(model, runtime.heads)
    got = float(exit_flops(counts, [6, 6], [2], policy, choices=3).sum())
    assert got == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("decoder", ["spade", "l-spade", "logit_lens"])
@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_the_parts_of_a_policy_without_threshold_sum_to_its_cost_with_one(scope, decoder):
    model, tokens, layers = tiny("llama"), [9, 30], (1, 3)
    policy = ExitPolicy(layers=layers, scope=scope, decoder=decoder)
    counts = count_flops(model, runtime_of(model, policy).heads)
    parts = cost_parts(counts, tokens, policy, choices=torch.tensor([3, 3]))
    ends = [*layers, LAYERS]
    checked = exit_flops(counts, tokens, ends, replace(policy, threshold=0.1), choices=3)
    torch.testing.assert_close(torch.from_numpy(parts.stops()), checked)
    free = exit_flops(counts, tokens, layers, policy, choices=3, checks=())
    torch.testing.assert_close(torch.from_numpy(parts.without_checks()), free)
    assert (parts.stops()[:, -1] > parts.plain).all() or scope == "choices"


def test_the_formula_for_a_llama_matches_a_hand_count():
    tokens, inner, heads, head_dim, groups = 50, 48, 4, 8, 2
    linear = 2 * WIDTH * (2 * heads * head_dim + 2 * groups * head_dim + 3 * inner)
    block = tokens * linear + 4 * tokens**2 * heads * head_dim
    expected = LAYERS * block + 2 * WIDTH * VOCAB
    counted = float(count_flops(tiny("llama")).full(torch.tensor([tokens])))
    # Older transformers (such as 5.16) compute the rotary angles by a product that is counted too.
    assert counted in {expected, expected + 2 * tokens * head_dim // 2}


def test_costs_rise_with_the_exit_layer_and_no_exit_still_pays_for_checks():
    model = tiny("llama")
    policy = ExitPolicy(layers=(1, 2, 3), threshold=0.1)
    counts = count_flops(model, runtime_of(model, policy).heads)
    costs = exit_costs(counts, [8, 40], [1, 2, 3, LAYERS], policy)
    assert (costs.diff(dim=1) > 0).all()
    assert (costs[:, -1] > 1).all()
    free = exit_costs(counts, [8, 40], [LAYERS], policy, checks=())
    torch.testing.assert_close(free, torch.ones_like(free))


def test_a_model_not_yet_checked_costs_the_same():
    adapter = ModelAdapter(tiny("llama"), check=False)
    first, second = count_flops(adapter), count_flops(adapter)
    assert torch.equal(first.full(torch.tensor([9])), second.full(torch.tensor([9])))
