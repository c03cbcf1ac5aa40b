"""How commands end: results in words and one table, and the suggested next command."""

import json
import shlex

import pytest

from lspade_train.cli import main
from lspade_train.cli.again import another, resumed
from lspade_train.evaluation.verdict import judge, near_from
from lspade_train.io.text import byte_size, duration
from lspade_train.reporting.verdict import verdict
from lspade_train.training.module import LSpadeModule


def lens(*accuracy):
    return {"accuracy": list(accuracy), "answer_agrees_model": list(accuracy)}


def results(*, drop=0.004, saved=0.4, budget=0.01, flattered=False, risk="accuracy_drop"):
    """Two layers of four, one lens each, and a policy; the full model is always right."""
    row = {
        "compute_saved": saved, "mean_exit_layer": 2.4, "accuracy": 1 - drop, "drop": drop,
        "drop_interval": [drop - 0.001, drop + 0.001], "disagreement": drop,
        "disagreement_interval": [drop, drop],
    }  # fmt: skip
    policy = {
        "row": row, "chosen_on_these_rows": flattered,
        "promise": budget and {"risk": risk, "budget": budget, "confidence": 0.95},
    }  # fmt: skip
    return {
        "n": 500, "split": "test", "num_layers": 4, "layers": [2, 3], "name": "toy",
        "heads": {"target": "spade"},
        "full_model": {"accuracy": 1.0, "accuracy_interval": [1.0, 1.0], "chance": 0.5},
        "lenses": {"l_spade": lens(0.98, 0.995), "spade": lens(0.98, 1.0)},
        "iso_compute": {
            "lenses": {"l_spade": {"flops": [0.5, 0.75]}, "spade": {"flops": [0.8, 0.9]}},
        },
        "exits": {"policy": policy},
    }  # fmt: skip


def words(found):
    return " ".join(verdict({**found, "verdict": judge(found)}))


def test_the_best_fixed_exit_saves_most_within_the_budget():
    # By hand: layer 2 saves more but loses 2 points; at layer 3 the head costs less than SPADE.
    assert judge(results())["fixed"] == {
        "lens": "l_spade", "layer": 3, "saved": 0.25, "measured": pytest.approx(0.005),
    }  # fmt: skip
    assert judge(results(budget=0.02))["fixed"]["layer"] == 2


@pytest.mark.parametrize(("saved", "as_good"), [(0.4, False), (0.2, True)])
def test_a_fixed_layer_is_called_as_good_when_it_saves_as_much(saved, as_good):
    found = results(saved=saved)
    assert judge(found)["fixed_as_good"] is as_good
    assert ("A fixed exit layer does as well here" in words(found)) is as_good
    assert ("beats every fixed exit layer" in words(found)) is not as_good


@pytest.mark.parametrize(
    ("case", "held", "expected"),
    [
        ({}, True, "The guarantee held on these rows: at most 1.00 points of accuracy"),
        ({"drop": 0.03}, False, "did NOT hold on these rows"),
        ({"drop": 0.0105}, False, "though the interval includes it"),
        ({"flattered": True}, None, "cannot be verified here because the policy was selected"),
        ({"budget": None}, None, "No guarantee"),
        ({"risk": "disagreement"}, True, "at most 1.00% changed answers"),
    ],
)
def test_the_guarantee_held_if_the_measured_risk_is_within_the_budget(case, held, expected):
    found = results(**case)
    assert judge(found)["held"] is held
    assert expected in words(found)


def test_without_labels_an_accuracy_budget_cannot_be_verified():
    found = results()
    found["full_model"] = {"accuracy": None}
    found["exits"]["policy"]["row"] |= {"drop": None, "drop_interval": None, "accuracy": None}
    assert judge(found)["held"] is None
    assert "not every row has a label" in words(found)
    assert "0.40% of the answers are not the full model's" in words(found)


def test_a_policy_that_never_exits_is_reported_to_save_nothing():
    found = results(saved=0.0, drop=0.0)
    found["exits"]["policy"]["row"]["mean_exit_layer"] = 4.0
    assert words(found).startswith("The policy saves nothing: it never exits on these 500 rows")
    assert "guarantee held" not in words(found)


def test_a_policy_priced_by_time_reports_the_time_saved_and_the_hardware():
    found = results()
    assert "of the time" not in words(found)
    found["exits"]["policy"]["row"] |= {"time_saved": 0.125, "timed_as": "8 x 64 tokens on abacus"}
    text = "saves 12.5% of the time (predicted for 8 x 64 tokens on abacus) and 40.0% of the FLOPs"
    assert text in words(found)


def test_a_model_at_chance_level_is_reported():
    found = results()
    found["full_model"] |= {"accuracy_interval": [0.55, 1.0], "majority": 0.6}
    assert "not shown to be better than chance (100.0% against 60.0%)" in words(found)
    assert "chance" not in words(results())


def test_layers_count_as_near_from_where_no_later_layer_falls_behind():
    found = results()
    assert near_from(found, "l_spade") == 3
    found["lenses"]["l_spade"]["accuracy"] = [1.0, 0.9]
    assert near_from(found, "l_spade") is None


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ("--config a.yaml", "--config a.yaml"),
        ("--config=a.yaml --data.limit 5", "--config=a.yaml --data.limit 5"),
        ("--trainer.max_epochs 2 --config a.yaml --ckpt_path last", "--config a.yaml"),
        ("--config a.yaml --trainer.max_epochs=2 --name b", "--config a.yaml --name b"),
        ("--config 'my recipe.yaml'", "--config 'my recipe.yaml'"),
    ],
)
def test_the_next_command_keeps_the_recipe_and_its_overrides(given, after):
    assert another("evaluate", shlex.split(given)) == f"lspade-train evaluate {after}"


def test_the_resume_command_gives_the_last_checkpoint_once():
    given = ["--config", "a.yaml", "--ckpt_path", "old.ckpt", "--trainer.max_epochs", "3"]
    plain = "lspade-train fit --config a.yaml --trainer.max_epochs 3"
    assert resumed(given, from_checkpoint=True) == f"{plain} --ckpt_path last"
    assert resumed(given, from_checkpoint=False) == plain


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")],
)
def test_durations_are_formatted_in_words(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (26100, "26.1 kB"), (999_999, "1 MB"), (3e12, "3 TB")],
)
def test_sizes_are_formatted_with_three_digits(count, text):
    assert byte_size(count) == text


@pytest.mark.parametrize("epoch", [0, 1])
def test_ctrl_c_prints_a_single_command_that_resumes(epoch, project, monkeypatch, capsys):
    """Before the first full epoch it starts anew, even if an earlier fit left a checkpoint."""
    monkeypatch.chdir(project.home)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    last = project.home / "checkpoints/toy/training/last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"of an earlier fit")
    step, taken = LSpadeModule.training_step, []

    def stop(module, batch, number):
        if module.current_epoch == epoch and number == 1:
            raise KeyboardInterrupt
        return step(module, batch, number)

    def count(module, batch, number):
        taken.append(number)
        return step(module, batch, number)

    recipe = str(project.recipe(trainer__max_epochs=3))
    with monkeypatch.context() as patch:
        patch.setattr(LSpadeModule, "training_step", stop)
        assert main(["fit", "--config", recipe]) == 130
    last_line = capsys.readouterr().err.splitlines()[-1]
    command = last_line.removeprefix("interrupted; resume it with: ")
    assert command == f"lspade-train fit --config {recipe}{' --ckpt_path last' * epoch}"
    monkeypatch.setattr(LSpadeModule, "training_step", count)
    assert main(shlex.split(command)[1:]) == 0
    assert len(taken) == 3 * (3 - epoch)  # three batches per epoch


def test_fit_ends_with_a_table_of_layers_and_the_next_command(project, monkeypatch, capsys):
    monkeypatch.chdir(project.home)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe = str(project.recipe(model__target="both", trainer__max_epochs=1))
    assert main(["fit", "--config", recipe, "--trainer.max_epochs", "1", "--data.limit", "20"]) == 0
    printed = capsys.readouterr().out
    for folder in ("", "tuned_lens/"):
        config = json.loads((project.home / f"checkpoints/toy/{folder}config.json").read_text())
        for name, value in config["training"]["metrics"].items():
            if "/kl/" in name or "/agreement/" in name:
                assert f" {value:.3f} " in printed, name
    assert printed.endswith(f"next:  lspade-train calibrate --config {recipe} --data.limit 20\n")
    heads, took = printed.splitlines()[-2].split("; ")
    assert heads.startswith("heads: checkpoints/toy (")
    assert took.startswith("this run took ")


def test_the_next_command_finds_a_tuned_lens_fitted_alone(project, monkeypatch, capsys):
    monkeypatch.chdir(project.home)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    recipe = str(project.recipe(model__target="final", trainer__max_epochs=1))
    assert main(["fit", "--config", recipe]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next:  lspade-train ")
    assert command == f"calibrate --config {recipe} --heads checkpoints/toy/tuned_lens"
    assert main(shlex.split(command)) == 0
