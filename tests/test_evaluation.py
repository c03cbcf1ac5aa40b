"""`evaluate` and `compare`: numbers against brute force, files written, and reduced results."""

import importlib
import json
import math
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from sklearn.metrics import roc_auc_score

from lspade_train import spade_logits
from lspade_train.cli import main
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.evaluation import ablations
from lspade_train.evaluation.comparison import comparable
from lspade_train.evaluation.exits import measure_exits, measure_policy
from lspade_train.evaluation.reliability import reliability
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.evaluation.start_tokens import spade_states
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.exit_table import ExitCosts, ExitTable, evaluate_policy
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.spade import collect_states

QUIET = ["--trainer.logger=false", "--trainer.max_epochs=1"]
LAYERS = [1, 2, 3]


def run(command, recipe, *more):
    assert main([command, "--config", str(recipe), *more]) == 0


def results_of(project, name="toy"):
    """Read the results strictly: NaN, which Python's reader accepts, fails."""

    def refuse(constant):
        raise AssertionError(constant)

    text = (project.home / "checkpoints" / name / "results.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def with_groups(folder: Path) -> Path:
    """The toy questions with a difficulty column."""
    for split, count, seed in (("train", 48, 0), ("validation", 24, 1), ("test", 40, 2)):
        rows = toy.questions(count, seed=seed)
        for place, row in enumerate(rows):
            row["difficulty"] = place % 2 + 1
        toy.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def fitted(toy_root, tmp_path_factory):
    """Heads of both kinds, evaluated with every option on; read-only."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("evaluated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(project.home)
        data = with_groups(project.home / "data")
        recipe = project.recipe(data__dataset=str(data))
        run("fit", recipe, *QUIET)
        run("fit", recipe, *QUIET, "--model.target=final")
        run("calibrate", recipe, "--max_disagreement=0.3")
        text = project.home / "text.yaml"
        project.recipe(
            name="plain_text", data__task="text", data__dataset=str(project.texts),
            data__text__first_position=2, data__text__length=32, data__cache_dir="text_cache",
        ).rename(text)  # fmt: skip
        run("fit", text, *QUIET)
        recipe = project.recipe(data__dataset=str(data))
        run("evaluate", recipe, f"--cross={text}", "--ablations=true")
    return project


@pytest.fixture(scope="module")
def results(fitted):
    return results_of(fitted)


@pytest.fixture(scope="module")
def subject(fitted):
    recipe = parse(command_parser("evaluate", ""), [f"--config={fitted.home / 'recipe.yaml'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(fitted.home)
        return FittedRecipe(recipe.recipe, fitted.home / "checkpoints/toy")


@pytest.fixture(scope="module")
def brute(subject):
    """Every lens's logits by the model's own forward, row by row, and the right answers."""
    adapter, tokenizer = subject.data.adapter, subject.data.tokenizer
    lines = (Path(subject.recipe.data.dataset) / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {"full": [], "spade": [], "logit_lens": [], "l_spade": [], "choices": [], "gold": []}
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        states = collect_states(adapter, ids, None, torch.tensor([[ids.shape[1] - 1]]), LAYERS)
        hidden = states.hidden[0, 0]
        with torch.no_grad():
            found["full"].append(adapter.model(ids).logits[0, -1])
            found["logit_lens"].append(adapter.unembed(hidden))
            found["spade"].append(spade_logits(adapter, ids, layers=LAYERS)[0])
            heads = [
                subject.heads.logits(h, layer) for h, layer in zip(hidden, LAYERS, strict=True)
            ]
        found["l_spade"].append(torch.stack(heads))
        found["choices"].append([tokenizer.convert_tokens_to_ids(c) for c in row["choices"]])
        found["gold"].append(row["choices"].index(row["answer"]))
    return found


# The lenses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", ["logit_lens", "l_spade", "spade"])
def test_accuracy_agreement_and_kl_match_the_models_own_forward(results, brute, lens):
    found, logits = results["lenses"][lens], torch.stack(brute[lens])  # (rows, layers, vocab)
    full, spade = torch.stack(brute["full"])[:, None], torch.stack(brute["spade"])
    pairs = zip(logits, brute["choices"], brute["gold"], strict=True)
    right = torch.stack([row[:, choices].argmax(-1) == gold for row, choices, gold in pairs])
    same = logits.argmax(-1) == full.argmax(-1)

    def kl(target):
        logp = target.log_softmax(-1)
        return (logp.exp() * (logp - logits.log_softmax(-1))).sum(-1).mean(0)

    assert found["accuracy"] == pytest.approx(right.double().mean(0).tolist(), abs=1e-9)
    assert found["agrees_model"] == pytest.approx(same.double().mean(0).tolist(), abs=1e-9)
    assert found["kl_to_model"] == pytest.approx(kl(full).tolist(), abs=1e-5)
    assert found["kl_to_spade"] == pytest.approx(kl(spade).tolist(), abs=1e-5)


def test_auroc_is_computed_from_the_entropy_over_the_vocabulary(results, brute):
    logits = torch.stack(brute["l_spade"])
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    pairs = zip(logits, brute["choices"], brute["gold"], strict=True)
    right = torch.stack([row[:, choices].argmax(-1) == gold for row, choices, gold in pairs])
    expected = [roc_auc_score(r, -e) for r, e in zip(right.T, entropies.T, strict=True)]
    assert results["lenses"]["l_spade"]["auroc"] == pytest.approx(expected, abs=1e-6)


def test_every_lens_is_reported_beside_the_full_model_with_intervals(results):
    assert list(results["lenses"]) == ["logit_lens", "tuned_lens", "l_spade", "spade"]
    assert results["format_version"] == 2
    assert (results["n"], results["n_labelled"], results["layers"]) == (40, 40, LAYERS)
    for lens in results["lenses"].values():
        for metric in ("accuracy", "accuracy_vocabulary", "agrees_model", "answer_agrees_model"):
            for value, (low, high) in zip(lens[metric], lens[f"{metric}_interval"], strict=True):
                assert 0 <= low <= value <= high <= 1
    low, high = results["full_model"]["accuracy_interval"]
    assert low <= results["full_model"]["accuracy"] <= high


def test_curves_and_histograms_count_every_row(results):
    for lens in [*results["lenses"].values()]:
        counted = np.sum([lens["entropy_histogram"][kind] for kind in ("correct", "wrong")], 0)
        assert counted.sum(-1).tolist() == [40] * 3
        correct = np.sum(lens["entropy_histogram"]["correct"], -1) / 40
        assert correct.tolist() == pytest.approx(lens["accuracy"])
        everyone = [risk[-1] for risk in lens["risk"]]
        assert everyone == pytest.approx([1 - a for a in lens["accuracy"]])
    assert results["entropy_edges"][-1] == pytest.approx(math.log(results["vocab_size"]))


def test_groups_partition_the_rows(results):
    groups = results["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"1": 20, "2": 20}
    for lens in results["lenses"]:
        halves = [group["lenses"][lens] for group in groups.values()]
        assert np.mean(halves, 0) == pytest.approx(results["lenses"][lens]["accuracy"])


# Exits and compute -----------------------------------------------------------------------------


def test_the_sweep_matches_the_exit_table_row_by_row(results, subject):
    table = exit_table(
        subject.data.stored("test"), subject.data.adapter, subject.heads,
        ExitPolicy(layers=tuple(LAYERS)),
    )  # fmt: skip
    exits = results["exits"]
    assert [row["threshold"] for row in exits["paper"]] == [0.5, 1.0, 1.5, 2.0]
    for row in [*exits["paper"], *exits["grid"]]:
        expected = evaluate_policy(table, row["threshold"])
        for name in ("accuracy", "drop", "disagreement", "mean_exit_layer", "compute_saved"):
            assert row[name] == pytest.approx(getattr(expected, name), abs=1e-6)
        assert sum(row["exit_counts"]) == 40
        mean = np.dot(row["exit_counts"], exits["exit_layers"]) / 40
        assert row["mean_exit_layer"] == pytest.approx(mean)
        assert row["drop_interval"][0] <= row["drop"] <= row["drop_interval"][1]
    assert exits["never"]["exit_counts"] == [0, 0, 0, 40]
    assert exits["never"]["drop"] == 0


def test_the_calibrated_policy_is_measured_on_the_same_rows(results, fitted):
    policy = ExitPolicy.load(fitted.home / "checkpoints/toy/policy.json")
    found = results["exits"]["policy"]
    assert (found["scope"], tuple(found["layers"])) == (policy.scope, policy.layers)
    assert sum(found["row"]["exit_counts"]) == 40


def test_the_examples_are_the_full_models_most_confident_disagreements(results, brute):
    found, policy = results["examples"], results["exits"]["policy"]["row"]
    assert found["n"] == round(policy["disagreement"] * 40)
    assert len(found["rows"]) == min(found["n"], 8)
    sure = [row["confidence"] for row in found["rows"]]
    assert sure == sorted(sure, reverse=True)
    among = zip(brute["full"], brute["choices"], strict=True)
    known = [float(full[choices].softmax(-1).max()) for full, choices in among]
    for row in found["rows"]:
        assert row["exit"] != row["full_model"]
        assert row["layer"] in results["exits"]["policy"]["layers"]
        assert row["prompt_end"].endswith("? :")
        assert min(abs(row["confidence"] - one) for one in known) < 1e-5


@pytest.mark.parametrize("layers", [(1, 3), (1, 2, 3, 4, 5, 6)])
def test_the_reliability_counts_every_row_once_at_each_layer_shown(layers):
    rng = np.random.default_rng(0)
    n, k = 90, len(layers)
    flat = np.ones((n, k))
    table = ExitTable(
        layers=layers, num_layers=8, bounds=(0.0, 1.0), confidence=rng.random((n, k)),
        answers=rng.integers(0, 2, (n, k)), full_answer=np.ones(n, dtype=int), gold=None,
        costs=ExitCosts(
            reach=np.ones((n, k + 1)), check=flat, answer=np.ones((n, k + 1)), unchecked=flat,
            plain=np.ones(n),
        ),
    )  # fmt: skip
    found = reliability(table, "entropy")
    assert (found["unit"], found["is_doubt"]) == ("nats", False)
    assert len(found["layers"]) == min(k, 4)
    assert found["layers"][-1]["layer"] == layers[-1]
    for one in found["layers"]:
        place = layers.index(one["layer"])
        assert sum(one["rows"]) == n
        assert one["signal"] == sorted(one["signal"])
        lowest = table.confidence[:, place].argsort()[: one["rows"][0]]
        assert one["agreement"][0] == pytest.approx((table.answers[lowest, place] == 1).mean())
        share = np.average(one["agreement"], weights=one["rows"])
        assert share == pytest.approx((table.answers[:, place] == 1).mean())


@pytest.mark.parametrize("measure", ["margin", "max_prob"])
def test_a_policy_with_another_measure_is_evaluated_by_that_measure(subject, measure):
    dataset, adapter = subject.data.stored("test"), subject.data.adapter
    policy = ExitPolicy(layers=(1, 3), measure=measure, threshold=(0.02, 0.0), scope="choices")
    found, _ = measure_policy(dataset, adapter, subject.heads, policy, subject.side)
    assert found["row"]["threshold"] == [0.02, 0.0]
    assert found["row"]["exit_counts"][2] == 0  # every margin is 0 or more


def test_a_policy_for_other_heads_is_left_out_with_a_note(subject):
    policy = ExitPolicy(layers=(1,), threshold=1.0, heads_digest="0" * 64)
    dataset, adapter = subject.data.stored("test"), subject.data.adapter
    found, _ = measure_policy(dataset, adapter, subject.heads, policy, subject.side)
    assert found["row"] is None
    assert "lspade-train calibrate" in found["note"]


def test_exits_on_unlabelled_rows_have_no_accuracy():
    table = ExitTable(
        layers=(1,), num_layers=2, bounds=(0.0, 1.0), confidence=np.array([[0.1], [0.9]]),
        answers=np.array([[1], [2]]), full_answer=np.array([1, 1]), gold=None,
        costs=ExitCosts(
            reach=np.array([[0.5, 1.0]] * 2), check=np.full((2, 1), 0.5),
            answer=np.full((2, 2), 0.5), unchecked=np.ones((2, 1)), plain=np.full(2, 2.0),
        ),
    )  # fmt: skip
    (row,) = measure_exits(table, [0.5])
    assert (row["accuracy"], row["drop"], row["accuracy_interval"]) == (None, None, None)
    assert (row["disagreement"], row["exit_counts"]) == (0.0, [1, 1])


def test_equal_compute_charges_spade_for_its_blocks_and_heads_for_their_map(results):
    iso = results["iso_compute"]
    flops = {name: np.array(lens["flops"]) for name, lens in iso["lenses"].items()}
    assert (flops["logit_lens"] < flops["l_spade"]).all()
    assert flops["l_spade"] == pytest.approx(flops["tuned_lens"])
    assert (flops["logit_lens"] < flops["spade"]).all()
    for lens in flops.values():
        assert (np.diff(lens) > 0).all()
    for name, lens in iso["lenses"].items():
        for budget, value in zip(iso["budgets"], iso["at_budget"][name], strict=True):
            within = [
                a for f, a in zip(lens["flops"], lens["accuracy"], strict=True) if f <= budget
            ]
            assert value == (within[-1] if within else None)


# Other tasks and ablations ---------------------------------------------------------------------


def test_text_is_both_a_row_and_a_column_of_the_cross_task_matrix(results):
    cross = results["cross_task"]
    assert [row["name"] for row in cross["heads"]] == ["toy", "plain_text"]
    assert [task["name"] for task in cross["tasks"]] == ["toy", "plain_text"]
    assert cross["tasks"][0]["full_model"] == results["full_model"]["accuracy"]
    own = cross["cells"][0][0]
    assert own["accuracy"] == results["lenses"]["l_spade"]["accuracy"]
    assert own["paper"] == results["exits"]["paper"]
    other = cross["cells"][1][0]
    assert other["kl_to_spade"] != own["kl_to_spade"]
    assert other["policy"]["threshold"] == cross["heads"][1]["threshold"]


def test_two_recipes_with_the_same_name_are_rejected_first(fitted, capsys, monkeypatch):
    monkeypatch.chdir(fitted.home)
    monkeypatch.setattr("lspade_train.evaluation.run.evaluate_recipe", None)  # not reached
    recipe = str(fitted.home / "recipe.yaml")
    assert main(["evaluate", "--config", recipe, "--cross", recipe]) == 1
    assert "Two recipes are named 'toy'" in capsys.readouterr().err


def test_ablations_change_the_start_the_heads_and_the_rows_one_at_a_time(results):
    found = {
        group: [variant["name"] for variant in variants]
        for group, variants in results["ablations"].items()
    }
    assert found["start"] == ["original", "compact", "no_start", "other_token", "random_vector"]
    assert found["heads"] == ["as_fitted", "target_final", "low_rank", "bias"]
    assert found["rows"] == ["3", "6", "12", "24", "48"]
    lenses, (original, *_) = results["lenses"], results["ablations"]["start"]
    assert original["accuracy"] == lenses["spade"]["accuracy"]
    assert original["kl_to_model"] == pytest.approx(lenses["spade"]["kl_to_model"], abs=1e-5)
    tuned = results["ablations"]["heads"][1]
    assert tuned["kl_to_model"] == lenses["tuned_lens"]["kl_to_model"]
    assert results["ablations"]["rows"][-1]["accuracy"] == lenses["l_spade"]["accuracy"]


def test_finished_ablations_are_not_rerun(fitted, subject, results, monkeypatch):
    kept = fitted.home / "checkpoints/toy/ablations"
    (kept / "rows-12.json").unlink()
    trained = []
    fit = ablations.fit_heads
    monkeypatch.setattr(ablations, "fit_heads", lambda *a: trained.append(len(a[2])) or fit(*a))
    again = ablations.run_ablations(subject)
    assert trained == [12]
    assert again == results["ablations"]


def two_tokens(adapter, start, hidden, layer, positions):
    """`[start, h_a]` through the upper blocks, by the model's own two-token forward."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    plan = adapter.plan_cached(ids, torch.ones_like(ids), positions[None], None)
    state = torch.stack([start, hidden])[None]
    for block in range(layer, adapter.num_layers):
        state = adapter.run_block(plan, block, state)
    return state[0, -1]


@pytest.mark.parametrize("start", ["original", "compact", "other_token"])
def test_a_start_variant_equals_the_two_token_forward_with_that_start(subject, start):
    adapter, dataset = subject.data.adapter, subject.data.stored("test")
    batch = dataset.gather(torch.arange(4))
    found = spade_states(adapter, batch, dataset.layers, start, other=7)
    for row, at in enumerate(batch.position_id.tolist()):
        token = torch.tensor([[7 if start == "other_token" else int(batch.start_id[row])]])
        states = collect_states(adapter, token, None, torch.zeros_like(token), LAYERS)
        positions = torch.tensor([0, 1 if start == "compact" else at])
        for place, layer in enumerate(LAYERS):
            expected = two_tokens(
                adapter, states.hidden[0, 0, place], batch.hidden[row, place], layer, positions
            )
            torch.testing.assert_close(found[row, place], expected, atol=1e-5, rtol=1e-5)


def test_no_start_runs_the_answer_token_alone_and_noise_keeps_the_starts_norm(subject):
    adapter, dataset = subject.data.adapter, subject.data.stored("test")
    batch = dataset.gather(torch.arange(4))
    alone = spade_states(adapter, batch, dataset.layers, "no_start")
    noisy, again, other = (
        spade_states(adapter, batch, dataset.layers, "random_vector", seed=seed)
        for seed in (0, 0, 1)
    )
    ids = torch.zeros(1, 1, dtype=torch.long)
    plan = adapter.plan_cached(ids, torch.ones_like(ids), batch.position_id[:1, None].long(), None)
    state = batch.hidden[:1, 2, None]
    expected = adapter.run_block(plan, 3, state)[0, 0]
    torch.testing.assert_close(alone[0, 2], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(noisy, again)
    assert not torch.allclose(noisy, other)


# Output ----------------------------------------------------------------------------------------


def test_the_printed_numbers_match_results_json(evaluated_once):
    printed, results = evaluated_once.printed, evaluated_once.results
    words = set(printed.split())
    for lens in results["lenses"].values():
        for metric in ("accuracy", "agrees_model"):
            assert {f"{value:.3f}" for value in lens[metric]} <= words
    for row in results["exits"]["paper"]:
        assert {f"{row['accuracy']:.3f}", f"{row['compute_saved']:.1%}"} <= words
    assert "n = 12" in printed
    assert "seed 0" in printed
    assert "95% intervals" in printed
    lines = printed.split("next:")[-1].splitlines()  # after the output of fit
    assert len(lines) <= 40
    wide = ("n = 12", "lspade-train")  # one line each, however long
    assert [line for line in lines if len(line) > 100 and not any(w in line for w in wide)] == []


def test_the_results_record_their_provenance(results):
    assert results["provenance"]["versions"]["torch"] == version("torch")
    assert results["recipe"]["name"] == results["name"] == "toy"
    assert results["heads"]["target"] == "spade"
    assert len(results["heads"]["weights_sha256"]) == 64


def test_evaluate_after_fit_runs_the_model_once_and_is_then_cached(project, monkeypatch):
    monkeypatch.chdir(project.home)
    prompts = []

    def counting(adapter, ids, *rest, **options):
        prompts.append(len(ids))
        return collect_states(adapter, ids, *rest, **options)

    # By name: the package exports a function of the same name as this module.
    extract = importlib.import_module("lspade_train.cache.extract")
    monkeypatch.setattr(extract, "collect_states", counting)
    recipe = project.recipe()
    run("fit", recipe, *QUIET)
    assert sum(prompts) == 48 + 20
    run("evaluate", recipe)
    assert sum(prompts) == 48 + 20 + 12
    run("evaluate", recipe)
    assert sum(prompts) == 48 + 20 + 12


# Reduced results -------------------------------------------------------------------------------


def evaluated(project, *more, data=None, **changes):
    """Fit and evaluate a variation; return the results."""
    if data is not None:
        changes["data__dataset"] = str(data)
    recipe = project.recipe(**changes)
    run("fit", recipe, *QUIET)
    run("evaluate", recipe, *more)
    return results_of(project)


def unlabelled(rows):
    return [{"prompt": row["prompt"], "choices": row["choices"]} for row in rows]


def test_rows_without_labels_have_agreement_and_no_accuracy(project, monkeypatch):
    monkeypatch.chdir(project.home)
    data = toy.write_data(project.home / "data")
    toy.write_jsonl(data / "test.jsonl", unlabelled(toy.questions(12, seed=2)))
    found = evaluated(project, "--split=test", data=data)
    assert found["n_labelled"] == 0
    for lens in found["lenses"].values():
        for name in ("accuracy", "ece", "auroc", "risk", "aurc", "entropy_histogram"):
            assert lens[name] is None
        assert len(lens["agrees_model_interval"]) == 3
    assert found["full_model"]["accuracy"] is None
    assert found["exits"]["paper"][0]["accuracy"] is None
    assert found["iso_compute"]["metric"] == "answer_agrees_model"


def test_one_layer_gives_one_value_per_metric(project, monkeypatch):
    monkeypatch.chdir(project.home)
    found = evaluated(project, model__layers=[2])
    assert found["layers"] == [2]
    assert all(len(lens["accuracy"]) == 1 for lens in found["lenses"].values())


def test_a_single_row_has_no_auroc(project, monkeypatch):
    monkeypatch.chdir(project.home)
    data = toy.write_data(project.home / "data", test=1)
    found = evaluated(project, data=data)
    assert found["n"] == 1
    assert found["lenses"]["spade"]["auroc"] == [None, None, None]


def test_single_split_data_is_evaluated_on_the_requested_split(
    fitted, project, capsys, monkeypatch
):
    monkeypatch.chdir(project.home)
    data = project.home / "only"
    toy.write_jsonl(data / "train.jsonl", toy.questions(12))
    recipe = project.recipe(data__dataset=str(data))
    heads = f"--heads={fitted.home / 'checkpoints/toy'}"
    assert main(["evaluate", "--config", str(recipe), heads]) == 1
    assert "test split" in capsys.readouterr().err.replace("\n", " ")


def test_a_tuned_lens_with_other_layers_is_left_out_with_a_reason(project, monkeypatch, caplog):
    monkeypatch.chdir(project.home)
    run("fit", project.recipe(), *QUIET)
    other = ["--model.target=final", "--model.layers=[1]", "--data.cache_dir=other"]
    run("fit", project.recipe(), *QUIET, *other)
    with caplog.at_level("WARNING", "lspade_train"):
        run("evaluate", project.recipe())
    assert list(results_of(project)["lenses"]) == ["logit_lens", "l_spade", "spade"]
    assert "tuned lens left out: its heads have layers [1]" in caplog.text


def test_nan_from_heads_is_written_as_null_with_a_warning(project, monkeypatch, caplog):
    monkeypatch.chdir(project.home)
    run("fit", project.recipe(), *QUIET)
    folder = project.home / "checkpoints/toy"
    heads = LSpadeHeads.from_pretrained(folder)
    heads.bias[1] = torch.nan
    heads.save_pretrained(folder)
    with caplog.at_level("WARNING", "lspade_train"):
        run("evaluate", project.recipe())
    found = results_of(project)
    assert found["exits"] is None
    assert "no exits measured: Non-finite confidence (nan) for row 0 at layer 2" in caplog.text
    kl = found["lenses"]["l_spade"]["kl_to_spade"]
    assert [value is None for value in kl] == [False, True, False]


def test_heads_lacking_a_layer_of_the_recipe_are_named_in_the_error(fitted, capsys, monkeypatch):
    monkeypatch.chdir(fitted.home)
    arguments = ["--model.layers=[0]", "--data.cache_dir=zero"]
    assert main(["evaluate", f"--config={fitted.home / 'recipe.yaml'}", *arguments]) == 1
    assert "none is in common. Set --model.layers" in capsys.readouterr().err


# compare ---------------------------------------------------------------------------------------


def test_compare_prints_one_row_per_folder_and_draws_one_figure(fitted, capsys, tmp_path):
    folder, copy = fitted.home / "checkpoints/toy", tmp_path / "copy"
    copy.mkdir()
    renamed = results_of(fitted) | {"name": "renamed"}
    (copy / "results.json").write_text(json.dumps(renamed))
    figure = tmp_path / "compare.png"
    capsys.readouterr()
    assert main(["compare", str(folder), str(copy), "--output", str(figure)]) == 0
    printed = capsys.readouterr().out
    mean = np.mean(renamed["lenses"]["l_spade"]["accuracy"])
    for name in ("toy", "renamed"):
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(name)]
        assert f"{mean:.3f}" in line
    assert figure.stat().st_size > 0


def test_folders_of_the_same_recipe_are_labelled_by_path(results):
    same = comparable({"a": results, "b": results})
    assert [one["label"] for one in same] == ["a", "b"]


def test_compare_reports_when_the_rows_differ(results, caplog):
    with caplog.at_level("WARNING", "lspade_train"):
        comparable({"a": results, "b": results | {"split": "validation"}})
    assert "not comparable: split differs (test, validation)" in caplog.text


@pytest.mark.parametrize(
    ("written", "match"), [(None, "results.json"), ({}, "lspade-train evaluate")]
)
def test_compare_rejects_a_folder_without_usable_results(tmp_path, capsys, written, match):
    if written is not None:
        (tmp_path / "results.json").write_text(json.dumps(written))
    assert main(["compare", str(tmp_path)]) == 1
    assert match in capsys.readouterr().err


def test_recipes_of_the_same_model_load_it_once(subject, monkeypatch):
    monkeypatch.chdir(subject.folder.parents[1])
    other = replace(subject.recipe, name="other")
    assert FittedRecipe(other, subject.folder, beside=[subject]).data.adapter is (
        subject.data.adapter
    )
    changed = replace(other, data=replace(other.data, compile=True))
    apart = FittedRecipe(changed, subject.folder, beside=[subject])
    assert apart.data.adapter is not subject.data.adapter
