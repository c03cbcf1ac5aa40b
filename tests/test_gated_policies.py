"""Policies with a learned gate and several reading and answering heads: cached rows and runtime."""

import numpy as np
import pytest
import torch
import toy
from test_selection import LOOSE, heads_of
from tiny_models import WIDTH

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, calibrate
from lspade_train.errors import PolicyError
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.designs import with_history
from lspade_train.policies.exit_table import ExitRule, evaluate_policy
from lspade_train.policies.flops import counter


def both_heads(data) -> LSpadeHeads:
    """Random L-SPADE heads with a random tuned lens beside them."""
    lens = LSpadeHeads(data.layers, WIDTH, form="low_rank", rank=2).requires_grad_(False)
    lens.up.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
    lens.metadata = {"training": {"recipe": {"model": {"target": "final"}}}}
    heads = heads_of(data)
    heads.metadata = {"training": {"recipe": {"model": {"target": "spade"}}}}
    return heads.beside(lens)


@pytest.fixture(scope="module")
def data(toy_root, tmp_path_factory):
    """States of the toy questions, in memory."""
    return toy.Project(toy_root, tmp_path_factory.mktemp("gated")).module(mode="memory")


@pytest.fixture(scope="module", params=["choices", "vocabulary"])
def gated(request, data):
    """Bound heads of both kinds, and a gated policy whose layers answer by different decoders."""
    heads = both_heads(data).bind(data.adapter)
    found = calibrate(data, heads, measure="gate", scope=request.param, **LOOSE).policy
    middle = data.layers[: len(found.gate.layers)]
    words = ("l-spade", "tuned_lens", "spade")
    decoders = tuple(words[place % 3] for place in range(len(middle)))
    policy = ExitPolicy(
        layers=middle, measure="gate", scope=request.param, decoder=decoders, gate=found.gate
    )
    doubts = exit_table(data.stored("validation"), data.adapter, heads, policy).confidence
    limits = np.quantile(doubts, 0.3, axis=0) + 1e-4  # a third of the rows exit at each layer
    return heads, policy.at(middle, tuple(map(float, limits)))


def asked(data):
    examples = data.encoded("validation").examples
    return (
        [[*map(int, example.input_ids)] for example in examples],
        [[*map(int, example.choice_ids)] for example in examples],
    )


def test_the_runtime_matches_the_exit_table_of_cached_rows(data, gated):
    heads, policy = gated
    table = exit_table(data.stored("validation"), data.adapter, heads, policy)
    stops = table.exits(policy.threshold)
    layers = [(*policy.layers, data.adapter.num_layers)[place] for place in stops]
    answers = [[*row, full][place] for row, full, place in zip(
        table.answers.tolist(), table.full_answer.tolist(), stops, strict=True
    )]  # fmt: skip
    found = ExitRuntime(data.adapter, heads, policy=policy).decide(*asked(data))
    assert [one.layer for one in found] == layers
    assert [one.token_id for one in found] == answers
    assert len(set(layers)) > 2


def test_the_cost_matches_pytorchs_counter(data, gated):
    heads, policy = gated
    row = evaluate_policy(
        exit_table(data.stored("validation"), data.adapter, heads, policy), policy.threshold
    )
    prompts, choices = asked(data)
    runtime = ExitRuntime(data.adapter, heads, policy=policy, tokens_per_batch=1)
    runtime.decide(prompts, choices)  # the start token's constants are not charged
    with counter() as exits:
        runtime.decide(prompts, choices)
    with counter() as plain, torch.no_grad():
        for ids in prompts:
            data.adapter.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    saved = 1 - exits.get_total_flops() / plain.get_total_flops()
    assert row.compute_saved == pytest.approx(saved, abs=1e-5)


def test_rows_in_a_batch_are_decided_as_they_are_alone(data, gated):
    heads, policy = gated
    prompts, choices = asked(data)
    together = ExitRuntime(data.adapter, heads, policy=policy)
    alone = ExitRuntime(data.adapter, heads, policy=policy, tokens_per_batch=1)
    pairs = zip(together.decide(prompts, choices), alone.decide(prompts, choices), strict=True)
    assert all((a.layer, a.token_id) == (b.layer, b.token_id) for a, b in pairs)


def test_the_search_tries_every_kind_of_policy_and_stays_within_the_budget(data):
    heads = both_heads(data)
    found = calibrate(data, heads, max_disagreement=0.6)
    kinds = {row.name for row in found.calibration.curve}
    assert found.calibration.chosen.disagreement <= 0.6
    assert found.policy.calibration["curve"][0]["name"] in kinds
    fixed = calibrate(data, heads, measure="fixed", max_disagreement=0.95)
    assert {row.layers for row in fixed.calibration.curve} <= {(x,) for x in data.layers}
    saved = fixed.calibration.chosen.compute_saved
    wide = calibrate(data, heads, max_disagreement=0.95).calibration.chosen.compute_saved
    assert wide >= saved


def test_a_policy_is_loaded_with_its_gate(tmp_path, data, gated):
    heads, policy = gated
    policy.save(tmp_path)
    back = ExitPolicy.load(tmp_path)
    expected = ExitRuntime(data.adapter, heads, policy=policy).decide(*asked(data))
    assert ExitRuntime(data.adapter, heads, policy=back).decide(*asked(data)) == expected
    assert back.decoder == policy.decoder
    other = back.gate.save(tmp_path / "copy")
    assert other == back.gate_digest
    (tmp_path / "gate.safetensors").unlink()
    with pytest.raises(PolicyError, match="gate.safetensors does not exist"):
        ExitPolicy.load(tmp_path)


def test_a_gate_of_another_policy_is_rejected(tmp_path, data, gated):
    policy = gated[1]
    policy.save(tmp_path)
    (tmp_path / "policy.json").write_text(
        (tmp_path / "policy.json")
        .read_text()
        .replace(ExitPolicy.load(tmp_path).gate_digest, "0" * 64)
    )
    with pytest.raises(PolicyError, match="does not match the gate in policy.json"):
        ExitPolicy.load(tmp_path)


def test_a_policy_that_reads_both_kinds_of_heads_requires_both(data, gated):
    policy = gated[1]
    heads = both_heads(data).beside(None)
    with pytest.raises(PolicyError, match="--model.target both"):
        ExitRuntime(data.adapter, heads, policy=policy)


def test_a_gated_check_reads_the_previous_layer_without_exiting_there():
    rule = ExitRule(layers=(3, 7), threshold=(0.2, 0.4))
    kept = with_history(rule, (1, 2, 3, 5, 7))
    assert kept == ExitRule(layers=(2, 3, 5, 7), threshold=(0.0, 0.2, 0.0, 0.4))
    assert with_history(ExitRule(layers=(1,), threshold=(0.2,)), (1, 2)).layers == (1,)
