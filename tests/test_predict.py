"""Answers in input order, line by line, whatever individual lines contain."""

import io
import json

import pytest
from test_runtime import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter, load_tokenizer

from lspade_train import tasks
from lspade_train.errors import TaskError
from lspade_train.io.text import lines_of, require_text
from lspade_train.recipe import DataConfig, PromptConfig
from lspade_train.runtime.predict import predict_lines
from lspade_train.tasks.asking import Asker


@pytest.fixture
def runtime(stories):
    adapter = ModelAdapter.from_pretrained(str(stories))
    return ExitRuntime(
        adapter,
        LSpadeHeads(range(1, 5), adapter.hidden_size),
        policy=ExitPolicy.always(3),
        tokenizer=load_tokenizer(str(stories)),
    )


LINES = [
    json.dumps({"id": "x", "prompt": "Once upon a time there was", "choices": ["a", "e"]}),
    "Tom and",
    "",
    "{broken",
    json.dumps({"id": "y", "prompt": ""}),
    json.dumps({"prompt": "Tom", "choices": ["a", "a e"]}),
    json.dumps({"prompt": 3}),
    "The end" * 2000,
    "Lily",
]


def test_answers_come_in_order_and_bad_lines_are_reported_by_number(runtime):
    rows = list(predict_lines(runtime, LINES, window=3))
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [row["line"] for row in rows if "error" in row] == [4, 5, 6, 7, 8]
    assert rows[0]["id"] == "x"
    assert rows[0]["text"] in ("a", "e")
    assert rows[3]["id"] == "y"
    assert "is empty" in rows[3]["error"]
    assert "is the beginning of" in rows[4]["error"]
    assert "context holds" in rows[6]["error"]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("window", [3, 256])
def test_a_resumed_run_gives_exactly_the_remaining_answers(runtime, window):
    whole = list(predict_lines(runtime, LINES, window=window))
    for done in range(len(whole) + 1):
        assert list(predict_lines(runtime, LINES, done=done, window=window)) == whole[done:]


def test_a_resumed_run_counts_no_answer_twice(runtime, monkeypatch):
    counted, decide = [], runtime.decide

    def watched(prompts, *rest, **options):
        counted.append((len(prompts), options["counted"]))
        return decide(prompts, *rest, **options)

    monkeypatch.setattr(runtime, "decide", watched)
    lines = ["Tom", "{broken", "Lily", "The", "end"]
    assert len(list(predict_lines(runtime, lines, done=3, window=4))) == 2
    assert counted == [(3, 2), (1, 0)]  # of the first window, two prompts were answered before


def test_at_most_one_window_of_lines_is_read_ahead(runtime):
    read = []
    lines = (read.append(i) or "Tom" for i in range(100))
    next(iter(predict_lines(runtime, lines, window=4)))
    assert len(read) == 4


# Contents of lines


def one(runtime, line, **settings):
    (row,) = predict_lines(runtime, [line], **settings)
    return row


def test_input_keys_that_clash_with_output_keys_are_echoed_under_another_name(runtime):
    row = {"prompt": "Tom", "error": "mine", "text": "x", "layer": 9, "line": 7, "input_text": 1}
    answer = one(runtime, json.dumps(row))
    assert "error" not in answer
    assert answer["line"] == 1
    assert answer["layer"] == 3
    assert (answer["input_error"], answer["input_layer"], answer["input_line"]) == ("mine", 9, 7)
    assert (answer["input_text"], answer["input_input_text"]) == (1, "x")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "Tom", "id": NaN}', "NaN is not JSON"),
        ('{"prompt": "Tom", "id": 1e999}', "too large a number"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("Tom \udcff", "bytes that are not text"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "Tom", "choices": "ab"}', "Expected"),
        ('{"prompt": "Tom", "choices": ["a", "a"]}', "each once"),
        ('{"prompt": "Tom", "choices": []}', "two or more"),
    ],
)
def test_a_bad_line_gives_an_error_as_plain_json(runtime, line, problem):
    answer = one(runtime, line)
    assert problem in answer["error"]
    json.dumps(answer, allow_nan=False)


# Encoding, the same without its byte-order mark, bytes that are invalid in it.
ENCODINGS = [
    ("utf-8", "utf-8", b"\xe9"),
    ("utf-8-sig", "utf-8", b"\xe9"),
    ("utf-16", "utf-16-le", b"\x00\xd8"),
    ("utf-32", "utf-32-le", b"\xff\xff\xff\x7f"),
]


@pytest.mark.parametrize(("first", "rest", "wrong"), ENCODINGS)
def test_invalid_bytes_only_fail_their_own_line_in_every_encoding(first, rest, wrong):
    content = "señor\n\nx".encode(first) + wrong + "\nlast\n".encode(rest)
    lines = list(lines_of(io.BufferedReader(io.BytesIO(content))))
    assert lines[:2] + lines[3:] == ["señor\n", "\n", "last\n"]
    with pytest.raises(ValueError, match="not text"):
        require_text(lines[2])


# The same prompts as in fit


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:\n"
ROWS = [
    {"question": "Is it big", "choices": ["a dog", "a cat"], "answer": "a cat", "id": 5},
    {"question": "Is it red", "choices": ["a ball", "a tree"], "answer": 0},
    {"question": "Is it old", "choices": ["a man", "a boy"], "answer": "a man"},
]
SETTINGS = {
    "plain": {},
    "template": {"template": "{question}\n{choices}\nSo:"},
    "shots": {"shots": 1},
    "chat": {"chat": True, "chat_template": CHAT, "system": "Be brief."},
    "chat and shots": {"chat": True, "chat_template": CHAT, "shots": 2},
    "labels": {"labels": ["a", "e"], "answer_prefix": " "},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_rows_are_rendered_exactly_as_in_fit(stories, tmp_path, settings):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(
        model_id="unused", task="jsonl", dataset=str(path), validation_fraction=0.0,
        test_fraction=0.0, prompt=PromptConfig(**SETTINGS[settings]),
    )  # fmt: skip
    tokenizer = load_tokenizer(str(stories))
    encoded = tasks.encode(config, tasks.load_rows(config, "train"), tokenizer, 4096)
    for prefix in (encoded.prefix, None):
        ask = Asker(config, tokenizer, prefix)
        for example, row in zip(encoded.examples, ROWS, strict=True):
            asked = ask(row)
            assert asked.prompt == tuple(example.input_ids.tolist())
            paths = asked.choices or {}
            assert tuple(path[0] for path in paths.values()) == example.choice_ids
            assert paths[asked.answer or ""][0] == int(example.answer_ids[0])


def arc():
    return Asker(DataConfig(model_id="unused", task="arc_easy"), LETTERS, "")


class Letters:
    """A character tokenizer."""

    unk_token_id = None
    chat_template = None

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def convert_ids_to_tokens(self, ids):
        return [chr(i) for i in ids]


LETTERS = Letters()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "x", "choices": {"label": ["A", "B"], "text": ["i", "j"]}, "answerKey": "B"},
        {"question": "x", "choices": {"label": ["A", "B"], "text": ["i", "j"]}},
        {"question": "x", "choices": ["i", "j"], "answer": "j"},
    ],
)
def test_benchmark_rows_are_accepted_in_native_and_own_data_form(row):
    asked = arc()(row)
    assert "".join(map(chr, asked.prompt)) == "Question: x\nA. i\nB. j\nAnswer:"
    assert asked.answer == ("B" if len(row) == 3 else None)


@pytest.mark.parametrize("row", [{}, {"question": "x"}, {"prompt": "x"}, {"choices": ["a", "b"]}])
def test_a_row_that_does_not_fit_the_task_is_reported_with_the_remedy(row):
    with pytest.raises(TaskError, match=r"--raw|--data\.prompt\.template"):
        arc()(row)


def test_answers_are_scored_for_rows_with_an_answer(runtime):
    given = [one(runtime, json.dumps({"prompt": "Tom", "choices": ["a", "e"]}))["text"]]
    other = "e" if given == ["a"] else "a"
    for answer, right in ((given[0], True), (other, False), (["a", "e"].index(given[0]), True)):
        line = {"prompt": "Tom", "choices": ["a", "e"], "answer": answer}
        assert one(runtime, json.dumps(line))["correct"] is right
    assert "correct" not in one(runtime, '{"prompt": "Tom", "choices": ["a", "e"]}')


@pytest.mark.parametrize(
    ("prompts", "choices", "problem"),
    [
        ("Tom and", None, "prompts are one text; expected a list"),
        (["Tom"], "ae", "choices are one text; expected a list"),
        (["Tom", "Lily"], [["a", "e"], "ae"], "got both"),
    ],
)
def test_a_string_in_place_of_a_list_is_rejected(runtime, prompts, choices, problem):
    with pytest.raises(TaskError, match=problem):
        runtime.decide(prompts, choices)
