"""The toy world's questions, its committed splits, and the model trained on it."""

from __future__ import annotations

import json
import logging
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
MODEL = ROOT / "checkpoints" / "tiny-world"


@pytest.fixture(scope="module", autouse=True)
def _scripts_on_the_path():
    """The quickstart's files import one another by name, as scripts do."""
    sys.path.insert(0, str(QUICKSTART))
    yield
    sys.path.remove(str(QUICKSTART))


def read(family, split):
    lines = (QUICKSTART / family / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def solve(prompt):
    """The answer found by following the facts, independently of the generator's code."""
    *facts, asked = [line.split() for line in prompt.split("\n")]
    link = {first: last for first, relation, last in facts if relation != "is"}
    letter = {first: last for first, relation, last in facts if relation == "is"}
    name = asked[-1]
    while name in link:
        name = link[name]
    if asked[0] == "does":
        return "yes" if asked[1] == name else "no"
    return letter[name] if asked[0] == "which" else name


def hops(prompt):
    *facts, asked = [line.split() for line in prompt.split("\n")]
    link = {first: last for first, relation, last in facts if relation != "is"}
    name, count = asked[-1], 0
    while name in link:
        name, count = link[name], count + 1
    return count


FILES = [
    (family, split) for family in ("data", "data_open") for split in ("train", "validation", "test")
]


def test_the_rows_are_determined_by_the_seed():
    from world import rows

    first, again, other = (list(rows("test", 20, ("yes_no",), seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_the_committed_data_matches_the_generator(tmp_path):
    subprocess.run([sys.executable, QUICKSTART / "world.py", "--output", tmp_path], check=True)
    for family, split in FILES:
        name = f"{family}/{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes(), name


def test_no_world_is_in_two_splits():
    owner = {}
    for family, split in FILES:
        for row in read(family, split):
            facts = frozenset(line for line in row["prompt"].split("\n")[:-1] if " is " not in line)
            assert owner.setdefault(facts, split) == split


@pytest.mark.parametrize(("family", "split"), FILES)
def test_following_the_facts_gives_every_answer_and_difficulty(family, split):
    for row in read(family, split):
        assert solve(row["prompt"]) == row["answer"]
        assert row["group"] == f"hops: {hops(row['prompt'])}"


def test_the_test_split_has_both_kinds_at_every_difficulty():
    rows = read("data", "test")
    cells = {(row["kind"], row["group"]) for row in rows}
    assert len(rows) == 2000
    assert cells == {(k, f"hops: {h}") for k in ("multiple_choice", "yes_no") for h in (1, 2, 3)}


def test_every_choice_and_every_word_is_a_single_known_token():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for family in ("data", "data_open"):
        for row in read(family, "test")[:100]:
            ids = tokenizer(row["prompt"])["input_ids"]
            assert len(ids) == 1 + len(row["prompt"].split())
            assert tokenizer.unk_token_id not in ids
            for choice in row["choices"]:
                assert len(tokenizer(choice, add_special_tokens=False)["input_ids"]) == 1


def test_packed_questions_get_the_same_answers_as_alone():
    from packing import layout
    from world import ask, make_world

    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rng = random.Random(0)
    world = make_world(rng, "test")
    facts = " ".join(world.told)
    questions = [ask(world, kind, 1, rng).text for kind in ("yes_no", "multiple_choice", "open")]
    ids = tokenizer(" ".join([facts, *questions]), return_tensors="pt")["input_ids"]
    packed = layout(1 + len(facts.split()), [len(question.split()) for question in questions])
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=packed["mask"], position_ids=packed["position_ids"]
        ).logits[0, packed["ends"]]
        for row, question in zip(logits, questions, strict=True):
            alone = model(**tokenizer(f"{facts} {question}", return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-3, rtol=1e-3)


def test_the_shipped_model_is_small_and_answers_the_test_split():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 8 * 2**20
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    assert sum(weight.numel() for weight in model.parameters()) <= 3_000_000
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    right = 0
    rows = read("data", "test")[:120]
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1]
        ids = [tokenizer.convert_tokens_to_ids(choice) for choice in row["choices"]]
        right += row["choices"][logits[ids].argmax()] == row["answer"]
    assert right / len(rows) >= 0.95


@pytest.mark.slow
def test_pretraining_runs_end_to_end_with_one_step_per_stage(tmp_path, monkeypatch, capsys):
    short = ["--max_steps", "1", "--questions", "2"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *short, "--output", str(tmp_path)])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    runpy.run_path(str(QUICKSTART / "pretrain.py"), run_name="__main__")
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
