"""Answers in input order, line by line, whatever single lines are like."""

import json

import pytest
from test_runtime import ExitPolicy, ExitRuntime, LSpadeHeads, ModelAdapter, load_tokenizer

from lspade_train.runtime.predict import predict_lines


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
    json.dumps({"prompt": "Tom", "choices": ["elephantine", "a"]}),
    json.dumps({"prompt": 3}),
    "The end" * 2000,
    "Lily",
]


def test_answers_come_in_order_and_bad_lines_by_number(runtime):
    rows = list(predict_lines(runtime, LINES, window=3))
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [row["line"] for row in rows if "error" in row] == [4, 5, 6, 7, 8]
    assert rows[0]["id"] == "x"
    assert rows[0]["text"] in ("a", "e")
    assert rows[3]["id"] == "y"
    assert "is empty" in rows[3]["error"]
    assert "must be one token" in rows[4]["error"]
    assert "context holds" in rows[6]["error"]
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("window", [3, 256])
def test_a_resumed_run_gives_the_rest_to_the_last_digit(runtime, window):
    whole = list(predict_lines(runtime, LINES, window=window))
    for done in range(len(whole) + 1):
        assert list(predict_lines(runtime, LINES, done=done, window=window)) == whole[done:]


def test_no_more_than_a_window_is_read_ahead(runtime):
    read = []
    lines = (read.append(i) or "Tom" for i in range(100))
    next(iter(predict_lines(runtime, lines, window=4)))
    assert len(read) == 4
