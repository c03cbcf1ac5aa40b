"""Checking a recipe before an expensive run: against transformers, scipy and counting."""

import logging
from types import SimpleNamespace

import pytest
import torch
import toy
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lspade_train.cli import main
from lspade_train.cli.trainer import WarnAtChance
from lspade_train.errors import RecipeError, TaskError
from lspade_train.evaluation.chance import baseline_accuracies, cached_accuracy, wilson_interval
from lspade_train.evaluation.check import check_recipe
from lspade_train.recipe import HeadConfig, Recipe, TextConfig

TRAIN = 48


def recipe(project, trainer=None, model=None, **settings) -> Recipe:
    return Recipe(
        name="toy",
        data=project.config(**settings),
        trainer=trainer or {"max_epochs": 2, "accelerator": "cpu"},
        model=model or HeadConfig(),
    )


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (113, 200)])
def test_the_interval_is_the_wilson_interval(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high))


def test_the_baselines_are_guessing_and_the_most_frequent_answer():
    answers, counts = torch.tensor([5, 5, 9, 5]), torch.tensor([2, 4, 4, 2])
    assert baseline_accuracies(answers, counts) == (pytest.approx(0.375), 0.75, 5)
    assert baseline_accuracies(answers, torch.tensor([2, 0, 4, 2]))[0] is None


def test_checking_every_row_matches_transformers(project):
    rows = toy.questions(TRAIN)
    model = AutoModelForCausalLM.from_pretrained(project.model)
    tokenizer = AutoTokenizer.from_pretrained(project.model)
    right, mass = 0, 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1]
            ids = tokenizer.convert_tokens_to_ids(row["choices"])
            right += row["choices"][int(logits[ids].argmax())] == row["answer"]
            mass += float(logits.softmax(-1)[ids].sum())
    found = check_recipe(recipe(project), rows=TRAIN)
    assert found.sampled == found.baseline.n == TRAIN
    assert found.baseline.accuracy == pytest.approx(right / TRAIN)
    assert found.on_choices == pytest.approx(mass / TRAIN, abs=1e-5)
    lengths = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    train = found.splits["train"]
    assert (train.tokens, train.longest, train.positions) == (sum(lengths), max(lengths), TRAIN)
    shares = {answer: [row["answer"] for row in rows].count(answer) / TRAIN for answer in "ABC"}
    assert found.balance == pytest.approx(shares)


def test_the_prompt_shown_matches_its_row(project):
    found = check_recipe(recipe(project), rows=1).shown
    row = toy.questions(TRAIN)[found.row]
    assert found.prompt == f"<s> {row['prompt']}"
    assert [*found.answers] == row["choices"]
    assert found.answers[found.right] == row["answer"]


def test_the_disk_estimate_matches_what_fit_and_evaluate_write(project):
    found = check_recipe(recipe(project), rows=4)
    data = project.module()
    written = {}
    for split in ("train", "validation", "test"):
        data.states(split)
        files = data.folder(split).glob("*-*.safetensors")
        written[split] = sum(path.stat().st_size for path in files)
    assert found.cache_bytes == pytest.approx(written["train"] + written["validation"], rel=0.1)
    # With few rows the shards' headers weigh more.
    assert found.test_bytes == pytest.approx(written["test"], rel=0.25)


def test_data_without_training_rows_raise_a_clear_error(project):
    folder = toy.write_data(project.home / "data")
    (folder / "train.jsonl").unlink()
    with pytest.raises(TaskError, match="train"):
        check_recipe(recipe(project, dataset=str(folder)), rows=4)


def test_rows_over_the_context_length_are_counted_without_an_error(project):
    folder = toy.write_data(project.home / "data")
    long = [{"prompt": "w1 " * 4000, "choices": ["A", "B"], "answer": "A"}] * 12
    toy.write_jsonl(folder / "train.jsonl", [*toy.questions(36), *long])
    found = check_recipe(recipe(project, dataset=str(folder)), rows=4)
    assert found.splits["train"].over_context == pytest.approx(12 / 48)
    assert found.splits["validation"].over_context == 0


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 3, "max_steps": 5}, 5),
        ({"max_steps": 7}, 7),
        ({"logger": False}, 6000),
    ],
)
def test_the_number_of_steps_matches_lightning(project, trainer, steps):
    model = HeadConfig(target="both", scope="choices")
    found = check_recipe(recipe(project, trainer | {"accelerator": "cpu"}, model), rows=4)
    assert found.steps == steps


def test_running_text_has_no_chance_level_and_is_shown_up_to_a_position(project):
    text = {"task": "text", "dataset": str(project.texts), "text": TextConfig(length=24)}
    found = check_recipe(recipe(project, **text), rows=3)
    assert found.baseline.chance is None
    assert found.on_choices is None
    assert found.shown.answers


def test_zero_rows_or_zero_time_is_rejected(project):
    with pytest.raises(RecipeError, match=r"--rows is 0"):
        check_recipe(recipe(project), rows=0)


def test_the_command_prints_prompt_accuracy_and_costs_without_writing_files(
    project, capsys, monkeypatch, caplog
):
    monkeypatch.chdir(project.home)
    path = project.recipe()
    before = set(project.home.rglob("*"))
    assert main(["check", f"--config={path}", "--rows=24"]) == 0
    printed = capsys.readouterr().out
    for word in ("[[", "not above chance", "labels", "over the model's context", "of cache"):
        assert word in printed
    assert "Try another prompt" in caplog.text
    assert set(project.home.rglob("*")) == before


def test_fit_warns_only_about_a_model_at_chance(project, caplog):
    data = project.module(mode="memory")
    trainer = SimpleNamespace(datamodule=data, is_global_zero=True)
    caplog.set_level(logging.WARNING)
    WarnAtChance().on_fit_start(trainer, None)
    assert "not above chance" in caplog.text
    assert "lspade-train check" in caplog.text
    caplog.clear()
    rows = data.states("validation")
    best = data.unembed(rows.gather(torch.arange(len(rows))).final)
    choices = rows.labels["choice_ids"].long()
    right = choices.gather(1, best.gather(1, choices).argmax(-1, keepdim=True)).squeeze(1)
    rows.labels["answer_id"] = right.to(rows.labels["answer_id"].dtype)
    assert cached_accuracy(rows, data.unembed).accuracy == 1
    WarnAtChance().on_fit_start(trainer, None)
    assert not caplog.text
