"""Exits priced in seconds: against hand sums, every possible batch, and the measured time."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from test_calibration import realistic
from test_profiling import untouched
from test_runtime import prompts_of, random_heads, runtime_of
from tiny_models import LAYERS, tiny

from lspade_train.errors import PolicyError, RecipeError, UnsupportedModelError
from lspade_train.models import ModelAdapter
from lspade_train.policies.calibration import learn_then_test
from lspade_train.policies.exit_table import evaluate_policy, oracle_saving
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.proposals import chance_wrong, propose
from lspade_train.policies.seconds import Piece, Seconds
from lspade_train.profiling import pieces
from lspade_train.profiling.pieces import time_pieces
from lspade_train.profiling.prediction import confirm

BLOCKS = 4


def seconds_of(**changes) -> Seconds:
    """Invented: a batch of 2 takes 100 in the untouched model, 20 in one block."""
    known = {
        "hardware": "abacus",
        "threads": 1,
        "dtype": "float32",
        "batch_size": 2,
        "prompt_length": 16,
        "scope": "choices",
        "choices": 4,
        "rounds": 5,
        "spread": 0.01,
        "plain": 100.0,
        "start": 8.0,
        "prompt": (Piece(4.0, 8.0),) * BLOCKS,
        "step": (Piece(3.0, 0.5),) * BLOCKS,
        "enter": Piece(2.0, 0.0),
        "answer": Piece(6.0, 1.0),
        "readers": {"l-spade": Piece(0.4, 0.1), "tuned_lens": Piece(0.6, 0.1)},
        "measures": {"entropy": Piece(0.2, 0.1), "gate": Piece(1.0, 0.0)},
    }
    return Seconds(**known | changes)


POLICIES = {
    "spade": ExitPolicy(layers=(1, 3), threshold=0.1),
    "head": ExitPolicy(layers=(1, 3), threshold=0.1, decoder="l-spade"),
    "another head": ExitPolicy(
        layers=(1, 3), threshold=0.1, decoder="tuned_lens", reader="l-spade"
    ),
    "mixed": ExitPolicy(layers=(1, 2, 3), threshold=0.1, decoder=("l-spade", "spade", "spade")),
    "fixed": ExitPolicy.always(2),
}


# Arithmetic ------------------------------------------------------------------------------------


def test_a_fitted_piece_reproduces_the_time_of_the_full_batch():
    assert Piece.through(5.0, 8.0, 4) == Piece(4.0, 1.0)
    assert Piece.through(5.0, 5.0, 1).of(1) == 5.0
    for single in (9.0, 1.0):  # noise: one row slower than four, or more than four times as fast
        piece = Piece.through(single, 8.0, 4)
        assert piece.of(4) == pytest.approx(8.0)
        assert min(piece.once, piece.each) >= 0
    assert Piece(4.0, 1.0).of(0) == 0


def test_a_heads_answer_costs_nothing_above_the_exit():
    costs = seconds_of().costs(POLICIES["head"], 1)
    # Halves of a full batch: planning 8, blocks of 20, checks of 0.6 + 0.4.
    assert costs.stops()[0].tolist() == pytest.approx([4 + 10 + 0.5, 4 + 30 + 1, 4 + 40 + 1 + 4])
    assert costs.without_checks()[0].tolist() == pytest.approx([14.3, 34.3])
    assert costs.plain.tolist() == [50]


def test_spade_pays_for_a_single_token_in_every_block_above():
    costs = seconds_of().costs(POLICIES["spade"], 1)
    up = [1 + 3 * 2 + 4, 1 + 1 * 2 + 4]  # entry, blocks of 4, answer of 8
    assert costs.stops()[0].tolist() == pytest.approx([14.5 + up[0], 35 + up[1], 49])


@pytest.mark.parametrize("name", POLICIES)
def test_batched_savings_are_the_mean_over_every_possible_batch(name):
    policy, seconds = POLICIES[name], seconds_of()
    places = np.array([0, 0, 1, 0] if name == "fixed" else [0, 1, len(policy.layers), 0, 1])
    ends = [(*policy.layers, BLOCKS)[place] for place in places]
    batches = [seconds.batch(policy, list(pair)) for pair in product(ends, repeat=2)]
    saved = seconds.costs(policy, len(places)).saved(places)
    assert saved == pytest.approx(1 - np.mean(batches) / seconds.plain)


def test_rows_that_exit_separately_save_less_than_rows_that_exit_together():
    policy, seconds = POLICIES["spade"], seconds_of()
    together, apart = seconds.batch(policy, [1, 1]), seconds.batch(policy, [1, BLOCKS])
    assert apart > (together + seconds.batch(policy, [BLOCKS, BLOCKS])) / 2


def test_a_batch_without_exits_is_the_sum_of_its_pieces():
    expected = 8 + 4 * 20 + 8
    assert seconds_of().batch(ExitPolicy.never(), [BLOCKS, BLOCKS]) == pytest.approx(expected)


# Choosing --------------------------------------------------------------------------------------


def priced(decoder, **changes):
    """Rows of a model of 9 blocks, priced one prompt at a time."""
    table = realistic(1600, seed=4)
    blocks = table.num_layers
    changes = {"step": (Piece(0.1, 0.0),) * blocks} | changes
    seconds = seconds_of(batch_size=1, plain=98.0, prompt=(Piece(10.0, 0.0),) * blocks, **changes)
    policy = ExitPolicy(layers=table.layers, decoder=decoder)
    costs = seconds.costs(policy, len(table))
    return replace(table, costs=costs, flops=table.costs)


def chosen_of(table):
    half = np.arange(len(table)) < 800
    proposing = table.rows(half)
    rules = propose(proposing, chance_wrong(proposing))
    return learn_then_test([(table.rows(~half), rules)], "disagreement", 0.05)


def test_spade_never_exits_if_single_token_blocks_cost_as_much_as_prompts():
    dear = {"step": (Piece(10.0, 0.0),) * 9}
    found = chosen_of(priced("spade", **dear))
    assert found.chosen.threshold is None
    assert found.chosen.time_saved == found.chosen.compute_saved == 0
    assert "No early exit" in found.reason
    assert "time on this machine" in found.reason
    assert chosen_of(priced("l-spade", **dear)).chosen.time_saved > 0.1
    assert chosen_of(priced("spade")).chosen.time_saved > 0.1


def test_savings_are_ranked_by_time_and_the_flop_savings_are_kept():
    table = priced("l-spade")
    row = evaluate_policy(table.at((4,)), 0.1)
    only_flops = evaluate_policy(replace(table, costs=table.flops, flops=None).at((4,)), 0.1)
    assert row.compute_saved == only_flops.compute_saved
    assert row.saved == row.time_saved != row.compute_saved
    assert only_flops.saved == only_flops.compute_saved
    assert row.efficiency == pytest.approx(row.time_saved / oracle_saving(table.at((4,))))


def test_the_oracle_does_not_exit_if_that_costs_more():
    table = priced("spade", step=(Piece(50.0, 0.0),) * 9)
    assert oracle_saving(table) == 0


# policy.json -----------------------------------------------------------------------------------


def test_the_seconds_round_trip_through_policy_json(tmp_path):
    seconds = seconds_of()
    record = {"cost": "time", "seconds": seconds.to_json()}
    replace(POLICIES["spade"], calibration=record).save(tmp_path)
    loaded = ExitPolicy.load(tmp_path).calibration["seconds"]
    assert Seconds.from_json(loaded) == seconds
    assert {"hardware", "dtype", "threads", "batch_size", "prompt_length"} <= loaded.keys()


@pytest.mark.parametrize("broken", [{"prompt": 3}, {"unheard of": 1}, {"readers": None}])
def test_an_invalid_record_is_rejected_with_the_remedy(broken):
    record = json.loads(json.dumps(seconds_of().to_json() | broken))
    with pytest.raises(PolicyError, match="lspade-train calibrate"):
        Seconds.from_json(record)


# Measuring -------------------------------------------------------------------------------------


def bench(model, **changes):
    known = {"batch_size": 3, "prompt_length": 8, "scope": "vocabulary", "rounds": 1}
    return time_pieces(ModelAdapter(model), untouched(), random_heads(), **known | changes)


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_part_of_a_policy_is_timed(scope, batch_size):
    choices = (3, 4, 5) if scope == "choices" else ()
    found = bench(tiny("llama"), scope=scope, batch_size=batch_size, choices=choices)
    assert len(found.prompt) == len(found.step) == LAYERS
    assert {"l-spade", "logit_lens"} == found.readers.keys()
    assert {"entropy", "margin", "max_prob", "gate"} <= found.measures.keys()
    assert found.choices == (3 if scope == "choices" else None)
    assert (found.dtype, found.batch_size, found.prompt_length) == ("float32", batch_size, 8)
    assert found.plain > 0
    assert all(piece.of(batch_size) > 0 for piece in found.readers.values())


def test_noisy_rounds_are_reported(monkeypatch, caplog):
    monkeypatch.setattr(
        pieces,
        "time_rounds",
        lambda work, *_: {name: [1.0, 1.0, 1.5, 2.0] for name in work} | {"plain": [1.0] * 4},
    )
    bench(tiny("llama"))
    assert "an idle machine" in caplog.text


def test_the_pieces_add_up_to_the_measured_run(monkeypatch):
    runs = {"never": 90.0, "leave": 30.0, "spade": 60.0, "enter": 4.0, "answer": 10.0}

    def invented(work, *_):
        times = dict.fromkeys(work, 1.0)
        times |= {f"{name} 3": value for name, value in runs.items()}
        times |= {f"{name} 1": value / 2 for name, value in runs.items()}
        return {name: [value] for name, value in times.items()} | {"plain": [80.0]}

    monkeypatch.setattr(pieces, "time_rounds", invented)
    found = bench(tiny("llama"))
    assert found.batch(ExitPolicy.never(), [LAYERS] * 3) == pytest.approx(90)
    assert found.batch(ExitPolicy.always(0), [0] * 3) == pytest.approx(60)
    left = found.batch(ExitPolicy.always(0, decoder="logit_lens"), [0] * 3)
    assert left == pytest.approx(30 - 10 + found.readers["logit_lens"].of(3))
    assert sum(piece.of(1) for piece in found.prompt) == pytest.approx(30)


@pytest.mark.parametrize(
    ("changes", "match"), [({"batch_size": 0}, "--batch_size is 0"), ({"prompt_length": 1}, "2 to")]
)
def test_an_invalid_batch_shape_is_rejected(changes, match):
    with pytest.raises(RecipeError, match=match):
        bench(tiny("llama"), **changes)


def test_the_runtimes_own_model_is_rejected_as_a_timing_baseline():
    model = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="own model"):
        time_pieces(
            ModelAdapter(model), model, None, batch_size=1, prompt_length=4, scope="vocabulary"
        )


# Confirming ------------------------------------------------------------------------------------


def test_the_measured_time_is_reported_beside_the_prediction(monkeypatch):
    policy = ExitPolicy.always(2, decoder="l-spade")
    record = {"seconds": seconds_of().to_json(), "chosen": {"time_saved": 0.6}}
    runtime = runtime_of(tiny("llama"), replace(policy, calibration=record))
    ticks = iter([40.0, 100.0, 60.0, 100.0, 50.0, 100.0] * 16)
    monkeypatch.setattr("lspade_train.profiling.prediction.seconds_of", lambda *_: next(ticks))
    found = confirm(runtime, untouched(), prompts=prompts_of([9, 20, 15]), repeats=3)
    predicted = (8 + 2 * 20 + 0.6) / 100  # fixed: the head's input is not available
    assert found.predicted == pytest.approx(predicted)
    assert (found.measured, found.rounds) == (0.5, (0.4, 0.6))
    assert (found.prompts, found.mean_exit_layer, found.expected) == (32, 2, pytest.approx(0.4))
    assert "predicted 0.486 (calibrate: 0.400), measured 0.500 (0.400 to 0.600): -2.8%" in (
        found.words
    )
    assert "Predicted on abacus" in found.words


def test_a_policy_that_was_not_priced_by_time_is_not_confirmed():
    runtime = runtime_of(tiny("llama"), ExitPolicy.never())
    assert confirm(runtime, untouched()) is None
