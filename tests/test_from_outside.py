"""A third-party model family and task, used through the commands without changing the package.

A third-party lens is tested in test_lenses.py, a measure in test_selection.py.
"""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file
from test_adapters import padded_batch, positions_of, run_all
from test_spade import hidden_states, naive_spade
from tiny_models import LAYERS, WIDTH
from wave_model import register, wave

import lspade_train
from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter, spade_logits
from lspade_train.cli import main
from lspade_train.errors import TaskError, UnsupportedModelError
from lspade_train.models import unembedding
from lspade_train.tasks import TASKS, Question, Task, register_task

QUIET = {"trainer__logger": False, "trainer__max_epochs": 1}

# A family -----------------------------------------------------------------------------------------


@pytest.fixture
def wave_project(project, tmp_path):
    """A saved model of the family with the toy tokenizer, and the toy questions."""
    register()
    wave().save_pretrained(tmp_path / "wave")
    toy.tokenizer().save_pretrained(tmp_path / "wave")
    project.model = tmp_path / "wave"
    return project


def test_no_file_of_the_package_names_the_family():
    files = [*Path(lspade_train.__file__).parent.rglob("*.py")]
    assert len(files) > 100
    assert not [file for file in files if "wave_model" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_replay_and_unembedding_of_a_third_party_family_match_its_forward(side):
    model = wave()
    ids, mask = padded_batch(side)
    expected = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    adapter = ModelAdapter(model)
    hidden = run_all(adapter, adapter.plan(ids, mask))
    real = mask.bool()
    torch.testing.assert_close(adapter.unembed(hidden)[real], expected[real])


@torch.no_grad()
def test_spade_of_a_third_party_family_matches_its_two_token_forward():
    model = wave()
    prompt = torch.tensor([1, 9, 30, 12, 40])
    got = spade_logits(model, prompt[None])[0]
    for layer in range(1, LAYERS):
        expected = naive_spade(model, prompt, layer)
        torch.testing.assert_close(got[layer - 1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[-1], model(prompt[None]).logits[0, -1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_runtime_answers_with_spade_or_the_full_model_for_a_third_party_family():
    model, prompts = wave(), [[1, 9, 30, 12], [1, 7, 8]]
    heads = LSpadeHeads(range(1, LAYERS), WIDTH).requires_grad_(False)
    early = ExitRuntime(model, heads, policy=ExitPolicy.always(2)).decide(prompts)
    never = ExitRuntime(model, heads, policy=ExitPolicy(layers=(1, 2), threshold=0.0))
    for prompt, answer, whole in zip(prompts, early, never.decide(prompts), strict=True):
        ids = torch.tensor(prompt)
        assert (answer.layer, answer.token_id) == (2, int(naive_spade(model, ids, 2).argmax()))
        assert (whole.layer, whole.token_id) == (4, int(model(ids[None]).logits[0, -1].argmax()))


@torch.no_grad()
def accuracy_by_hand(model) -> float:
    """Accuracy of the model's own forward on the test split's questions, one by one."""
    tokenizer, rows, right = toy.tokenizer(), toy.questions(12, seed=2), 0
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        scores = model(ids).logits[0, -1][tokenizer.convert_tokens_to_ids(row["choices"])]
        right += row["choices"][int(scores.argmax())] == row["answer"]
    return right / len(rows)


def test_heads_of_a_third_party_family_can_be_fitted_evaluated_and_queried(
    wave_project, monkeypatch, capsys
):
    monkeypatch.chdir(wave_project.home)
    recipe = ["--config", str(wave_project.recipe(**QUIET))]
    for command in ("fit", "evaluate"):
        assert main([command, *recipe]) == 0
    folder = wave_project.home / "checkpoints/toy"
    results = json.loads((folder / "results.json").read_text())
    assert results["full_model"]["accuracy"] == pytest.approx(accuracy_by_hand(wave()))
    asked = toy.write_jsonl(wave_project.home / "in.jsonl", toy.questions(3, seed=2))
    capsys.readouterr()
    assert main(["predict", *recipe, f"--input={asked}", "--threshold=4.158"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["layer"] for answer in answers] == [1, 1, 1]
    (heads, model), prompt = (LSpadeHeads.from_pretrained(folder), wave()), torch.tensor([[1, 9]])
    hidden = hidden_states(model, prompt)[1][0, -1].detach()
    weights = load_file(folder / "heads.safetensors")
    moved = heads.bind(ModelAdapter(model)).logits(hidden, 1)
    by_hand = hidden + hidden @ weights["weight"][0] + weights["bias"][0]
    torch.testing.assert_close(moved, model.lm_head(model.model.norm(by_hand)))


def test_an_unknown_final_norm_name_is_supported_by_one_registration(monkeypatch):
    model = wave(norm="closing")
    with pytest.raises(UnsupportedModelError, match="final norm and head do not give its logits"):
        ModelAdapter(model)
    monkeypatch.setattr(unembedding, "FINAL_NORMS", (*unembedding.FINAL_NORMS, "closing"))
    assert ModelAdapter(model).unembed.norm is model.model.closing


# A task -------------------------------------------------------------------------------------------


def riddle(row, labels) -> Question:
    """A question with two columns of words: which of them is asked for?"""
    left, right = row["left"], row["right"]
    if left == right:
        raise ValueError(f"left and right are both {left!r}")
    return Question(
        fields={"question": f"{left} {right} {row['asked']}"},
        labels=labels,
        answer=labels[[left, right].index(row["asked"])],
    )


RIDDLE = Task(
    name="riddle",
    dataset=None,
    subset=None,
    columns=("left", "right", "asked"),
    template="{question} ? :",
    labels=("A", "B"),
    to_question=riddle,
)


def riddles(count, seed=0) -> list[dict]:
    words = [toy.WORDS[(7 * seed + n) % 40] for n in range(count + 1)]
    return [
        {"left": a, "right": b, "asked": (a, b)[n % 3 == 0], "more": n}
        for n, (a, b) in enumerate(pairwise(words))
    ]


@pytest.fixture
def known(monkeypatch):
    """Register the task."""
    monkeypatch.setattr("lspade_train.tasks.registry.TASKS", {**TASKS})
    return register_task(RIDDLE)


@pytest.fixture
def riddle_project(project, known, tmp_path):
    """A project whose data are riddles, in a folder laid out like a Hub data set."""
    project.data = tmp_path / "riddles"
    for seed, (split, count) in enumerate({"train": 24, "validation": 8, "test": 6}.items()):
        toy.write_jsonl(project.data / f"{split}.jsonl", riddles(count, seed))
    return project


def test_registering_a_taken_name_is_rejected(known):
    with pytest.raises(TaskError, match=r"'riddle' is registered already.*another name"):
        register_task(RIDDLE)


def test_an_unregistered_task_is_rejected_listing_the_registered_ones(project, capsys):
    recipe = str(project.recipe(data__task="riddle"))
    assert main(["cache", "--config", recipe]) == 1
    assert "Unknown task 'riddle'. Set data.task to one of arc_easy" in capsys.readouterr().err


def test_a_third_party_task_can_be_cached_fitted_evaluated_and_queried(
    riddle_project, monkeypatch, capsys
):
    monkeypatch.chdir(riddle_project.home)
    recipe = ["--config", str(riddle_project.recipe(data__task="riddle", **QUIET))]
    for command in ("cache", "fit", "evaluate"):
        assert main([command, *recipe]) == 0
    results = json.loads(Path("checkpoints/toy/results.json").read_text())
    assert (results["split"], results["n"]) == ("test", 6)
    row = riddles(6, seed=2)[1]
    asked = toy.write_jsonl(riddle_project.home / "in.jsonl", [row])
    capsys.readouterr()
    assert main(["predict", *recipe, f"--input={asked}", "--threshold=0"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    expected = _model_answer(riddle_project.model, f"{row['left']} {row['right']} {row['asked']}")
    assert answer["answer"] == expected


@torch.no_grad()
def _model_answer(folder, question) -> str:
    """The likelier of the two labels, by the model's own forward."""
    model = ModelAdapter.from_pretrained(str(folder)).model
    tokenizer = toy.tokenizer()
    ids = tokenizer(f"{question} ? :", return_tensors="pt")["input_ids"]
    scores = model(ids).logits[0, -1][tokenizer.convert_tokens_to_ids(["A", "B"])]
    return "AB"[int(scores.argmax())]


def test_a_row_that_does_not_fit_a_third_party_task_is_named_in_the_error(riddle_project, capsys):
    same = {"left": "w1", "right": "w1", "asked": "w1"}
    toy.write_jsonl(riddle_project.data / "train.jsonl", [*riddles(3), same])
    recipe = str(riddle_project.recipe(data__task="riddle"))
    assert main(["cache", "--config", recipe]) == 1
    message = "train.jsonl, line 4: left and right are both 'w1'"
    assert message in capsys.readouterr().err
