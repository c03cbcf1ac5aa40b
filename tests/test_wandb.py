"""An offline W&B run, read back from its file, has the contents of results.json."""

import json
import struct

import pytest

from lspade_train.cli import main
from lspade_train.integrations.wandb import log_results
from lspade_train.reporting.tables import METRICS, all_tables

wandb = pytest.importorskip("wandb")

BLOCK, HEADER = 32768, 7


def records(path):
    """The records of a run file: LevelDB's log format after a seven-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, whole = path.read_bytes(), HEADER, b""
    while offset + HEADER <= len(data):
        room = BLOCK - offset % BLOCK
        if room < HEADER:
            offset += room
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        whole += data[offset + HEADER : offset + HEADER + length]
        offset += HEADER + length
        if kind in {1, 4}:  # a record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture
def fit_history(project, monkeypatch, capfd):
    """The history of a fit's run, and its output."""
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    monkeypatch.chdir(project.home)
    recipe = project.recipe(model__target="both", trainer__max_epochs=2)
    assert main(["fit", "--config", str(recipe)]) == 0
    wandb.teardown()
    [file] = (project.home / "checkpoints/toy/wandb").glob("offline-run-*/*.wandb")
    found = [values_of(r.history.item) for r in records(file) if r.HasField("history")]
    return found, capfd.readouterr()


def test_a_fit_logs_means_learning_rate_and_a_chart_of_layers_per_epoch(fit_history):
    history, printed = fit_history
    keys = {key for row in history for key in row}
    assert {"train/lr", "train/loss/mean", "val/kl/mean", "val/final/kl/mean"} <= keys
    assert not [key for key in keys if "/layer_" in key]
    curves = {key for key in keys if key.startswith(("train/", "val/")) and "by layer" not in key}
    assert len(curves) == 2 * 2 * 4 + 1  # stages x kinds of heads x metrics, plus the learning rate
    charts = [row for row in history if any("KL (nats) by layer" in key for key in row)]
    assert len(charts) == 2  # one per epoch
    assert "wandb" not in printed.err + printed.out


@pytest.fixture(scope="module")
def logged(evaluated_once, tmp_path_factory):
    """Results, and the history, summary and media folder of the run they were logged to."""
    made = evaluated_once.copy(tmp_path_factory.mktemp("tracked"))
    wandb.teardown()  # another test's settings would override the environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.chdir(made.project.home)
        assert main(["evaluate", "--config", str(made.project.home / "recipe.yaml")]) == 0
    wandb.teardown()  # the service writes the end of the file when it stops
    [run] = (made.folder / "wandb").glob("offline-run-*")
    [file] = run.glob("*.wandb")
    history, summary = [], {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(values_of(record.history.item))
        elif kind == "summary":
            summary |= values_of(record.summary.update)
    return made.results, history, summary, run / "files"


def test_every_metric_of_every_lens_is_logged_by_layer(logged):
    results, history, _, _ = logged
    rows = [row for row in history if "eval/layer" in row]
    assert [row["eval/layer"] for row in rows] == results["layers"]
    for lens, values in results["lenses"].items():
        for metric in METRICS:
            found = [row.get(f"eval/{metric}/{lens}") for row in rows]
            assert found == (values[metric] or [None] * len(rows))


def test_the_full_model_is_in_the_summary(logged):
    results, _, summary, _ = logged
    full = {f"eval/full_model/{m}": results["full_model"].get(m) for m in METRICS}
    for name, value in full.items():
        assert summary.get(name) == value


def test_the_logged_tables_match_the_report(logged):
    results, history, _, files = logged
    media = {key: value for row in history for key, value in row.items()}
    for table in all_tables(results):
        stored = json.loads((files / media[f"tables/{table.name}/path"]).read_text())
        assert tuple(stored["columns"]) == table.columns
        assert [tuple(row) for row in stored["data"]] == list(table.rows)


def test_the_logged_figures_match_the_files(logged):
    _, history, _, files = logged
    media = {key: value for row in history for key, value in row.items()}
    drawn = list((files.parents[2] / "figures").glob("*.png"))
    assert len(drawn) > 8
    for path in drawn:
        stored = files / media[f"figures/{path.stem}/path"]
        assert stored.read_bytes() == path.read_bytes()


def test_nothing_is_logged_if_wandb_is_off(logged, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log_results(logged[0], tmp_path, [])
    assert list(tmp_path.iterdir()) == []
