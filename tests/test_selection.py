"""Calibration from Python: predicted savings match the runtime, and which rows may be used."""

import json
import weakref

import numpy as np
import pytest
import torch
import toy
from results import drawing
from test_seconds import seconds_of
from tiny_models import LAYERS, WIDTH

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, calibrate
from lspade_train.cache import answers
from lspade_train.cli import main
from lspade_train.errors import LSpadeError, PolicyError
from lspade_train.evaluation.exits import measure_policy
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.exit_table import evaluate_policy
from lspade_train.policies.flops import counter
from lspade_train.policies.seconds import Piece, Seconds
from lspade_train.policies.sides import calibration_side, chose, evaluation_side
from lspade_train.probes.measures import MEASURES, Measure, find_measure, register_measure, signal
from lspade_train.recipe import TextConfig
from lspade_train.tasks.held_out import held_out

LOOSE = {"max_disagreement": 0.9}
"""A budget within which the random toy model, whose layers hardly agree, has a policy."""


def heads_of(data) -> LSpadeHeads:
    """Random maps for every layer."""
    heads = LSpadeHeads(data.layers, WIDTH).requires_grad_(False)
    heads.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return heads


@pytest.fixture(scope="module")
def data(toy_root, tmp_path_factory):
    """States of the toy questions, in memory."""
    return toy.Project(toy_root, tmp_path_factory.mktemp("selection")).module(mode="memory")


@pytest.fixture(scope="module")
def without_test(toy_root, tmp_path_factory):
    """The same with data that has no test split, like BoolQ without test labels."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("shared"))
    folder = toy.write_data(project.home / "data", validation=40)
    (folder / "test.jsonl").unlink()
    return project.module(mode="memory", dataset=str(folder))


@pytest.fixture
def simpson():
    """A third-party measure: the sum of the squared probabilities."""
    name = "simpson"
    yield register_measure(
        Measure(
            name=name,
            function=lambda logits: logits.float().softmax(-1).square().sum(-1),
            lower_is_sure=False,
            bounds=lambda _: (0.0, 1.0),
        )
    )
    del MEASURES[name]


# Savings ---------------------------------------------------------------------------------------


def counted_saving(data, policy) -> float:
    """Savings on the validation rows, counting FLOPs of the runtime's and the model's own runs."""
    examples = data.encoded("validation").examples
    prompts = [[*map(int, example.input_ids)] for example in examples]
    choices = [[*map(int, example.choice_ids)] for example in examples]
    # One prompt at a time: a batch is also charged for its padding.
    runtime = ExitRuntime(data.adapter, heads_of(data), policy=policy, tokens_per_batch=1)
    runtime.decide(prompts, choices)  # the start token's constants are not charged
    with counter() as exits:
        runtime.decide(prompts, choices)
    with counter() as plain, torch.no_grad():
        for ids in prompts:
            data.adapter.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    return 1 - exits.get_total_flops() / plain.get_total_flops()


@pytest.mark.parametrize(
    ("measure", "scope"),
    [("entropy", "vocabulary"), ("margin", "choices"), ("max_prob", "vocabulary")],
)
def test_calibrate_and_evaluate_report_the_savings_pytorch_counts(data, measure, scope):
    heads = heads_of(data)
    found = calibrate(data, heads, measure=measure, scope=scope, **LOOSE)
    side = calibration_side(data)
    measured, _ = measure_policy(side.states(data), data.adapter, heads, found.policy, side)
    row = measured["row"]
    assert found.policy.check_layers
    assert found.calibration.chosen.compute_saved > 0.02
    assert row["compute_saved"] == pytest.approx(found.calibration.chosen.compute_saved, abs=1e-12)
    assert row["compute_saved"] == pytest.approx(counted_saving(data, found.policy), abs=1e-6)


def test_the_savings_of_an_answering_head_match_pytorchs_counter(data):
    found = calibrate(data, heads_of(data), decoder="l-spade", scope="vocabulary", **LOOSE)
    saved = found.calibration.chosen.compute_saved
    assert found.policy.check_layers
    assert saved == pytest.approx(counted_saving(data, found.policy), abs=1e-6)


def test_a_policy_priced_by_time_uses_the_fastest_decoder_and_reports_both_savings(data):
    dear = {"step": (Piece(25.0, 0.0),) * LAYERS, "prompt": (Piece(25.0, 0.0),) * LAYERS}
    cost = seconds_of(batch_size=1, plain=100.0, start=0.0, scope="vocabulary", **dear)
    heads = heads_of(data)
    found = calibrate(data, heads, scope="vocabulary", cost=cost, **LOOSE)
    chosen = found.calibration.chosen
    # SPADE's pass through the upper blocks would take as long as what it skips.
    assert set(found.policy.decoders) == {"l-spade"}
    assert chosen.time_saved > 0.02
    by_flops = evaluate_policy(
        exit_table(data.stored("validation"), data.adapter, heads.bind(data.adapter), found.policy),
        found.policy.threshold,
    )
    assert chosen.compute_saved == pytest.approx(by_flops.compute_saved)
    assert Seconds.from_json(found.policy.calibration["seconds"]) == cost
    spade = calibrate(data, heads, scope="vocabulary", cost=cost, decoder="spade", **LOOSE)
    assert spade.policy.check_layers == ()
    with pytest.raises(PolicyError, match="the policy's scope is choices"):
        calibrate(data, heads, scope="choices", cost=cost, **LOOSE)
    with pytest.raises(PolicyError, match="no check by margin"):
        calibrate(data, heads, scope="vocabulary", cost=cost, measure="margin", **LOOSE)


def test_the_checks_of_a_policy_without_a_threshold_are_priced(data):
    policy = ExitPolicy(layers=data.layers)
    assert policy.check_layers == ()
    costs = exit_table(
        data.stored("validation"), data.adapter, heads_of(data).bind(data.adapter), policy
    ).costs
    assert (costs.check > 0).all()
    assert (costs.stops()[:, -1] > costs.plain).all()


def test_the_table_holds_at_most_two_batches_of_states(data, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK_ROWS", 4)
    dataset, alive, most = data.stored("train"), weakref.WeakSet(), []
    gather = type(dataset).gather

    def watched(self, rows):
        assert len(rows) <= 4
        batch = gather(self, rows)
        alive.add(batch.hidden)
        most.append(len(alive))
        return batch

    monkeypatch.setattr(type(dataset), "gather", watched)
    heads = heads_of(data).bind(data.adapter)
    table = exit_table(dataset, data.adapter, heads, ExitPolicy(layers=data.layers))
    assert len(table) == 48
    assert len(most) == 12
    assert max(most) <= 2


def test_online_data_proposes_from_a_bounded_number_of_training_rows(toy_root, tmp_path):
    online = toy.Project(toy_root, tmp_path).module(mode="online")
    assert len(online.stored("train", 5)) == 5
    found = calibrate(online, heads_of(online), **LOOSE)
    assert found.policy.check_layers


# Selection rows --------------------------------------------------------------------------------


def test_held_out_rows_are_selected_by_their_content_alone():
    rows = toy.questions(400)
    sides = held_out(rows)
    assert held_out(rows[::-1]) == sides[::-1]
    assert held_out(rows[:7]) == sides[:7]
    assert held_out([dict(reversed(row.items())) for row in rows]) == sides
    assert 160 < sum(sides) < 240


def test_without_a_test_split_validation_is_divided_for_choosing_and_measuring(without_test):
    choosing, measuring = calibration_side(without_test), evaluation_side(without_test)
    assert choosing.words == "validation, calibration half"
    assert measuring.words == "validation, held-out half"
    every = without_test.stored("validation")
    halves = [side.states(without_test) for side in (choosing, measuring)]
    assert sum(map(len, halves)) == len(every) == 40
    finals = torch.cat([half.gather(torch.arange(len(half))).final for half in halves])
    whole = every.gather(torch.arange(40)).final
    assert torch.equal(finals.sort(dim=0).values, whole.sort(dim=0).values)
    policy = calibrate(without_test, heads_of(without_test), **LOOSE).policy
    assert policy.calibration["n"] == len(halves[0])
    assert chose(policy, choosing)
    assert not chose(policy, measuring)


def test_with_a_labelled_test_split_all_validation_rows_choose(data):
    assert calibration_side(data).words == "validation"
    assert evaluation_side(data).words == "test"


def test_an_explicitly_named_split_is_measured_in_full_as_selection_rows(without_test):
    side = evaluation_side(without_test, "validation")
    assert len(side.states(without_test)) == 40
    heads = heads_of(without_test)
    policy = calibrate(without_test, heads, **LOOSE).policy
    states = side.states(without_test)
    found, _ = measure_policy(states, without_test.adapter, heads, policy, side)
    assert found["chosen_on_these_rows"]
    assert (
        found["label"]
        == f"policy.json: {policy.measure} over {policy.scope}, on the selection rows (optimistic)"
    )


def test_train_and_validation_rows_count_as_used_and_other_rows_as_held_out(data, without_test):
    policy = calibrate(data, heads_of(data), **LOOSE).policy
    assert chose(policy, evaluation_side(data, "train"))
    assert chose(policy, evaluation_side(data, "validation"))
    assert not chose(policy, evaluation_side(data, "test"))
    assert not chose(policy, evaluation_side(without_test, "validation"))
    assert not chose(ExitPolicy(layers=(1,), threshold=0.1), evaluation_side(data, "validation"))


# Measures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entropy", "margin", "max_prob"])
def test_a_measure_stays_within_its_bounds_and_knows_its_confident_end(name):
    measure, peaked, flat = find_measure(name), torch.tensor([50.0, 0, 0]), torch.zeros(3)
    low, high = measure.bounds(3)
    values = signal(torch.stack([peaked, flat]), name)
    assert ((values >= low - 1e-6) & (values <= high + 1e-6)).all()
    certain, _ = measure.ends(3)
    assert float(values[0]) == pytest.approx(certain, abs=1e-6)
    assert measure.is_sure(values, float(values[0])).tolist() == [True, False]
    assert measure.is_sure(values, float(values[1])).tolist() == [True, True]
    assert not measure.is_sure(torch.tensor([torch.nan]), certain).any()


def test_two_measures_with_the_same_name_are_rejected(simpson):
    with pytest.raises(PolicyError, match="'simpson' is registered already"):
        register_measure(simpson)


def test_a_third_party_measure_appears_wherever_a_policy_is_shown(
    project, simpson, monkeypatch, capsys
):
    monkeypatch.chdir(project.home)
    recipe = str(project.recipe(trainer__max_epochs=1, trainer__logger=False))
    folder = project.home / "checkpoints/toy"
    assert main(["fit", "--config", recipe]) == 0
    loose = ["--max_disagreement=0.9", "--scope=choices", f"--measure={simpson.name}"]
    assert main(["calibrate", "--config", recipe, *loose]) == 0
    assert "simpson ->" in capsys.readouterr().out
    policy = ExitPolicy.load(folder)
    assert (policy.measure, bool(policy.check_layers)) == ("simpson", True)
    with drawing("exits_by_flops"):
        assert main(["evaluate", "--config", recipe]) == 0
    assert "policy.json: simpson over choices" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    row, chosen = results["exits"]["policy"]["row"], policy.calibration["chosen"]
    assert results["exits"]["policy"]["measure"] == "simpson"
    assert row["threshold"] == chosen["threshold"]
    for name in ("figures/exits_by_flops.svg", "report.html", "README.md"):
        assert "simpson" in (folder / name).read_text()
    assert "where the simpson over the choices is\nat or over" in (folder / "README.md").read_text()
    asked = project.home / "in.jsonl"
    toy.write_jsonl(asked, toy.questions(12, seed=2))  # the test split
    out = project.home / "out.jsonl"
    assert main(["predict", "--config", recipe, f"--input={asked}", f"--output={out}"]) == 0
    layers = [json.loads(line)["layer"] for line in out.read_text().splitlines()]
    assert sum(layers) / 12 == pytest.approx(row["mean_exit_layer"])


# Invalid options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"interval": 0}, f"--interval must be between 1 and {LAYERS - 1} .got 0"),
        ({"interval": 9}, "--interval must .*got 9"),
        ({"confidence": 1.5}, "--confidence 1.5 is out of range"),
        ({"max_disagreement": 0.0}, "--max_disagreement 0.0 is out of range"),
        ({"max_accuracy_drop": 0.1, "max_disagreement": 0.1}, "one budget"),
        ({"measure": "luck"}, "measure is 'luck'; expected entropy, margin, max_prob"),
        ({"scope": "everything"}, "scope is 'everything'"),
        ({"decoder": "oracle"}, "decoder is 'oracle'"),
    ],
)
def test_an_out_of_range_option_is_named_in_the_error(data, option, match):
    with pytest.raises(PolicyError, match=match):
        calibrate(data, heads_of(data), **option)


def test_the_choices_scope_requires_rows_with_choices(toy_root, tmp_path):
    project = toy.Project(toy_root, tmp_path)
    text = TextConfig(first_position=2, length=32)
    running = project.module(mode="memory", task="text", dataset=str(project.texts), text=text)
    with pytest.raises(LSpadeError, match="Set --scope vocabulary"):
        calibrate(running, heads_of(running), scope="choices", **LOOSE)


def test_running_text_is_tested_at_one_position_of_each_text(toy_root, tmp_path):
    project = toy.Project(toy_root, tmp_path)
    text = TextConfig(first_position=2, length=32)
    running = project.module(mode="memory", task="text", dataset=str(project.texts), text=text)
    side = calibration_side(running)
    examples = running.encoded("validation").examples
    owner = np.array([n for n, example in enumerate(examples) for _ in example.positions])
    owner = owner[~running.held_out("validation").numpy()]  # without labelled test rows
    whole, tested = side.states(running), side.independent(running)
    every, rows = (part.gather(torch.arange(len(part))).final.numpy() for part in (whole, tested))
    found = [owner[int((every == row).all(1).argmax())] for row in rows]
    assert len(every) == len(owner)
    assert found == sorted(set(owner))
    policy = calibrate(running, heads_of(running), max_disagreement=0.5).policy
    assert policy.calibration["n"] == len(found) < len(owner)


def test_every_nth_layer_is_a_candidate(data):
    found = calibrate(data, heads_of(data), interval=2, **LOOSE)
    assert {layer for row in found.calibration.curve for layer in row.layers} <= {2}


def test_the_papers_rule_excludes_other_options_and_checks_one_threshold(data):
    heads = heads_of(data)
    with pytest.raises(PolicyError, match="give it alone"):
        calibrate(data, heads, paper=True, decoder="spade")
    policy = calibrate(data, heads, paper=True, **LOOSE).policy
    assert policy.measure == "entropy"
    assert policy.decoder == "spade"
    assert policy.threshold is None or isinstance(policy.threshold, float)
