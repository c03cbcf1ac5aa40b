"""Multi-token answers: where they diverge, how they are cached, and who decides each step."""

import json
import random

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from test_runtime import mixed_policy, prompts_of, random_heads, runtime_of
from tiny_models import FAMILIES, LAYERS, WIDTH, tiny

from lspade_train import ExitPolicy, ExitRuntime, LSpadeHeads, tasks
from lspade_train.errors import TaskError
from lspade_train.models.labels import Fork, conflict
from lspade_train.policies.cached_exits import exit_table
from lspade_train.policies.flops import count_flops, counter, exit_flops
from lspade_train.recipe import DataConfig, PromptConfig
from lspade_train.runtime.predict import predict_lines
from lspade_train.tasks.asking import Asker

TRIE = {"a": (5, 9, 11), "b": (5, 9, 12), "c": (5, 10), "d": (6, 7, 8), "e": (13,)}
"""Labels of which one is decided at once, one in two steps and two in three."""
NESTED = ["w1 w2 A", "w1 w2 B", "w1 C", "w3 w4"]


def rows_of(choices, count=24):
    draw = random.Random(3)
    words = [draw.choices(toy.WORDS[:-1], k=draw.randint(2, 20)) for _ in range(count)]
    return [
        {"prompt": " ".join([*ws, "?", ":"]), "choices": choices, "answer": draw.choice(choices)}
        for ws in words
    ]


def config_of(folder, rows, **prompt):
    path = toy.write_jsonl(folder / "train.jsonl", rows)
    return DataConfig(
        model_id="unused", task="jsonl", dataset=str(path), validation_fraction=0.0,
        test_fraction=0.0, prompt=PromptConfig(**prompt),
    )  # fmt: skip


def encode(folder, rows, limit=64, **prompt):
    config = config_of(folder, rows, **prompt)
    return tasks.encode(config, tasks.load_rows(config, "train"), toy.tokenizer(), limit)


def ids(text):
    return toy.tokenizer()(text)["input_ids"]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=9))
def test_every_label_is_reached_by_its_own_tokens_with_a_choice_at_each_step(lists):
    paths = {str(n): tuple(tokens) for n, tokens in enumerate(lists)}
    alike = any(
        a != b and paths[b][: len(paths[a])] == paths[a] for a in paths for b in paths
    )  # fmt: skip
    assert (conflict([*paths], paths) is not None) == alike
    if alike:
        return
    for label, path in paths.items():
        fork, read = Fork.of(paths), ()
        while fork is not None:
            assert len(fork.options) > 1
            read += fork.shared
            token = path[len(read)]
            assert label in fork.options[token]
            read, fork = (*read, token), fork.behind(token)
        assert path[: len(read)] == read
        assert [other for other, way in paths.items() if way[: len(read)] == read] == [label]


def test_labels_with_different_first_tokens_are_decided_at_the_first(tmp_path):
    rows = rows_of(["A w1 w2", "B w1", "C"], 4)
    encoded = encode(tmp_path, rows)
    assert len(encoded.examples) == 4
    for example, row in zip(encoded.examples, rows, strict=True):
        assert example.input_ids.tolist() == ids(row["prompt"])
        assert example.choice_ids == tuple(ids("A B C")[1:])
        assert example.answer_ids.tolist() == ids(row["answer"])[1:2]
    assert "decided at the first in which they differ ('A w1 w2' is" in encoded.labels


def test_a_prefix_shared_by_all_labels_is_appended_to_the_prompt(tmp_path):
    rows = rows_of(["w1 w2 A", "w1 w2 B C"], 4)
    for example, row in zip(encode(tmp_path, rows).examples, rows, strict=True):
        assert example.input_ids.tolist() == ids(row["prompt"] + " w1 w2")
        assert example.choice_ids == tuple(ids("A B")[1:])


def test_labels_with_a_common_prefix_give_one_row_per_step_to_the_answer(tmp_path):
    (row,) = rows_of(NESTED, 1)
    row["answer"] = NESTED[1]
    encoded = encode(tmp_path, [row])
    steps = [
        (e.input_ids.tolist(), e.choice_ids, int(e.answer_ids[0]), e.row) for e in encoded.examples
    ]
    w1, w2, w3, a, b, c = ids("w1 w2 w3 A B C")[1:]
    asked = ids(row["prompt"])
    assert steps == [
        (asked, (w1, w3), w1, 0),
        ([*asked, w1], (w2, c), w2, 0),
        ([*asked, w1, w2], (a, b), b, 0),
    ]
    assert "1 rows take 3 steps" in encoded.labels


def test_the_answer_prefix_with_the_fewest_steps_is_chosen():
    class Spaced:
        """A character tokenizer in which a space is a separate token."""

        unk_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(character) for character in text] for text in texts]}

        def convert_ids_to_tokens(self, ids):
            return [chr(i) for i in ids]

    # Both prefixes work; the space would be a prefix shared by all, which costs nothing.
    assert tasks.resolve_choices(Spaced(), "x", ["yes", "no"]) == {
        "yes": tuple(map(ord, " yes")),
        "no": tuple(map(ord, " no")),
    }
    assert tasks.resolve_choices(Spaced(), "x", ["y", "n"]) == {"y": (ord("y"),), "n": (ord("n"),)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"choices": ["w1", "w1 w2"], "answer": 0}, "'w1' is the beginning of 'w1 w2'"),
        ({"choices": ["A w1", "A  w1"], "answer": 0}, "'A  w1' is the same tokens as 'A w1'"),
        ({"choices": ["A", "perhaps w1"], "answer": 0}, "is the unknown token"),
        ({"choices": NESTED, "answer": None}, "(?s)Row 1 has no answer.*first tokens differ"),
        ({"choices": None, "answer": "w1 w2"}, "2 tokens .* and an answer without choices is one"),
    ],
)
def test_indistinguishable_labels_are_rejected_with_the_remedy(change, match, tmp_path):
    (row,) = rows_of(["A", "B"], 1)
    row = {key: value for key, value in {**row, **change}.items() if value is not None}
    with pytest.raises(TaskError, match=match):
        encode(tmp_path, [row])


def test_a_row_is_overlong_if_one_of_its_steps_is(tmp_path):
    row = {"prompt": "w1 " * 61 + ":", "choices": NESTED, "answer": NESTED[3]}
    assert len(ids(row["prompt"])) == 63
    assert len(encode(tmp_path, [row]).examples) == 1
    with pytest.raises(TaskError, match="the first is row 1 with 65"):
        encode(tmp_path, [row | {"answer": NESTED[0]}])


def constrained(model, prompt, paths):
    """The answer of greedy constrained decoding by the untouched model, and its tokens."""
    done: tuple[int, ...] = ()
    while True:
        left = {label: path for label, path in paths.items() if path[: len(done)] == done}
        if len(left) == 1:
            return next(iter(left))
        allowed = sorted({path[len(done)] for path in left.values()})
        logits = model(input_ids=torch.tensor([[*prompt, *done]]), use_cache=False).logits[0, -1]
        done = (*done, allowed[int(logits[allowed].argmax())])


@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_exits_the_answer_is_the_models_constrained_decoding(family, scope):
    model, prompts = tiny(family), prompts_of([7, 3, 5, 6, 2, 7, 9, 4])
    shorter = {"a": (5, 9), "b": (5, 10)}  # another list, with a prefix shared by all
    lists = [TRIE, shorter] * 4
    runtime = runtime_of(model, ExitPolicy(layers=(), scope=scope))
    found = runtime.decide(prompts, lists)
    expected = [constrained(model, p, paths) for p, paths in zip(prompts, lists, strict=True)]
    assert [decision.text for decision in found] == expected
    for decision, paths in zip(found, lists, strict=True):
        assert not decision.exited
        assert set(decision.scores) == set(paths)
        assert sum(decision.scores.values()) == pytest.approx(1, abs=1e-5)


def test_the_probability_of_a_label_is_the_product_over_its_steps():
    model, prompt, paths = tiny("llama"), prompts_of([6])[0], {"a": (5, 9), "b": (5, 10), "c": (6,)}
    runtime = runtime_of(model, ExitPolicy.never())
    first = runtime.decide([prompt], [[5, 6]])[0].scores
    second = runtime.decide([[*prompt, 5]], [[9, 10]])[0].scores
    (found,) = runtime.decide([prompt], paths)
    if found.steps:
        expected = {"a": first["5"] * second["9"], "b": first["5"] * second["10"], "c": first["6"]}
    else:
        expected = {"a": first["5"] / 2, "b": first["5"] / 2, "c": first["6"]}
    assert found.scores == pytest.approx(expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_step_exits_by_the_policy_and_is_counted_in_flops(family):
    model, prompts = tiny(family), prompts_of([6] * 8)
    runtime = runtime_of(model, mixed_policy(model, prompts))
    paths = {str(n): (first, n, n) for first in (5, 6) for n in range(first, 40, 2)}
    runtime.decide(prompts, paths)  # the start token's constants are not charged
    with counter() as spent:
        found = runtime.decide(prompts, paths)
    assert all(len(decision.steps) == 2 for decision in found)
    assert all(decision.layer == max(decision.steps) for decision in found)
    counts = count_flops(model, runtime.heads)
    table = exit_flops(counts, [6, 7], range(LAYERS + 1), runtime.policy)
    charged = sum(
        float(table[step, layer]) for d in found for step, layer in enumerate(d.steps)
    )  # fmt: skip
    assert charged == pytest.approx(spent.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("decoder", ["spade", "l-spade"])
@pytest.mark.parametrize("scope", ["vocabulary", "choices"])
def test_the_runtime_takes_the_same_steps_as_the_cached_rows(scope, decoder, toy_root, tmp_path):
    rows = rows_of(NESTED, 40)
    project = toy.Project(toy_root, tmp_path)
    path = toy.write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    data = project.module(
        mode="memory", dataset=str(path), validation_fraction=0.0, test_fraction=0.0
    )
    states = data.stored("train")
    heads = random_heads(data.layers)
    heads.bind(data.adapter)
    policy = ExitPolicy(layers=(1, 2, 3), scope=scope, decoder=decoder)
    table = exit_table(states, data.adapter, heads, policy)
    below = sorted(table.confidence.flatten())[len(states) // 3 :]
    # Halfway between two entropies, so that rounding changes no exit.
    limit = float(below[0] + below[1]) / 2
    runtime = ExitRuntime(
        data.adapter, heads,
        policy=ExitPolicy(layers=(1, 2, 3), scope=scope, decoder=decoder, threshold=limit),
    )  # fmt: skip
    stops = table.exits((limit,) * 3)
    cached = [
        int(table.full_answer[n] if stop == 3 else table.answers[n, stop])
        for n, stop in enumerate(stops)
    ]
    assert 0 < sum(stop == 3 for stop in stops) < len(stops)
    examples = encode(tmp_path, rows).examples
    paths = {label: tuple(ids(label)[1:]) for label in NESTED}
    found = runtime.decide([ids(row["prompt"]) for row in rows], paths)
    compared = 0
    for number, decision in enumerate(found):
        mine = [n for n, example in enumerate(examples) if example.row == number]
        layers = decision.steps or (decision.layer,)
        # The cached rows end where the answer departs from the right one.
        for n, layer in zip(mine, layers, strict=False):
            assert [1, 2, 3, LAYERS][stops[n]] == layer
            compared += 1
            if cached[n] != int(examples[n].answer_ids[0]):
                assert decision.text != rows[number]["answer"]
                break
        else:
            assert decision.text == rows[number]["answer"]
    assert compared > len(rows)


def test_predict_renders_and_answers_labels_as_fit_does(toy_root, tmp_path):
    rows = rows_of(["w1 A B", "w1 C", "w1 w2"], 5)
    config = config_of(tmp_path, rows)
    tokenizer = toy.tokenizer()
    encoded = encode(tmp_path, rows)
    ask = Asker(config, tokenizer, encoded.prefix)
    for example, row in zip(encoded.examples, rows, strict=True):
        assert ask(row).prompt == tuple(example.input_ids.tolist())
    runtime = ExitRuntime(
        toy.Project(toy_root, tmp_path).module().adapter,
        LSpadeHeads(range(LAYERS), WIDTH),
        policy=ExitPolicy.always(2),
        tokenizer=tokenizer,
    )
    found = list(predict_lines(runtime, map(json.dumps, rows), ask=ask))
    assert all(row["text"] in rows[0]["choices"] and "steps" not in row for row in found)
    assert all(set(row["scores"]) == set(rows[0]["choices"]) for row in found)
    walked = rows_of(["w1 A", "w1 B", "w2 A", "w2 B"], 3)
    ask = Asker(config_of(tmp_path, walked), tokenizer, None)
    found = list(predict_lines(runtime, map(json.dumps, walked), ask=ask))
    assert all(row["steps"] == [2, 2] and row["text"] in walked[0]["choices"] for row in found)
