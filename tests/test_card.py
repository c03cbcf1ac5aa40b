"""The model card: valid metadata, numbers from the folder's own files, code that runs."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import toy
from huggingface_hub import ModelCard, ModelCardData
from test_seconds import seconds_of

from lspade_train.artifacts.card import KEEP, card, ranges, write_card
from lspade_train.cli import main
from lspade_train.errors import ArtifactError
from lspade_train.probes.heads import LSpadeHeads


@pytest.fixture(scope="module")
def made(evaluated_once, tmp_path_factory):
    """Cards after fit, after evaluate and after calibrate, and the finished folder; read-only."""
    mine = evaluated_once.copy(tmp_path_factory.mktemp("made"))
    recipe = str(mine.project.home / "recipe.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mine.project.home)
        assert main(["calibrate", "--config", recipe, "--max_disagreement", "0.5"]) == 0
    return mine.project, mine.cards | {"calibrate": (mine.folder / "README.md").read_text()}


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the finished folder, to modify."""
    project, _ = made
    source, place = project.home / "checkpoints/toy", tmp_path / "toy"
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("training", "logs", "cache"))
    return place


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def from_the_hub(folder):
    """The same heads as if model and data came from the Hub."""
    config = json.loads((folder / "config.json").read_text())
    config["base_model"] |= {"model_id": "org/base-7b", "revision": "a" * 40}
    config["training"]["data"] |= {"dataset": "allenai/ai2_arc", "subset": "ARC-Easy"}
    (folder / "config.json").write_text(json.dumps(config))


# Metadata


def test_the_metadata_has_the_fields_the_hub_expects_of_an_adapter(folder):
    from_the_hub(folder)
    data = ModelCard(card(folder, repo="someone/heads", license="apache-2.0")).data
    assert data.library_name == "lspade-train"
    assert data.base_model == "org/base-7b"
    assert data.base_model_relation == "adapter"
    assert data.datasets == ["allenai/ai2_arc"]
    assert data.pipeline_tag == "text-generation"
    assert data.license == "apache-2.0"
    assert "early-exit" in data.tags


def test_the_metadata_round_trips_through_the_hub_clients_classes(folder):
    from_the_hub(folder)
    written = ModelCard(card(folder, repo="someone/heads"))
    again = ModelCardData(**written.data.to_dict())
    assert again.to_dict() == written.data.to_dict()
    assert again.model_name == "heads"


def test_model_index_holds_the_measured_numbers(folder):
    results = json.loads((folder / "results.json").read_text())
    chosen = json.loads((folder / "policy.json").read_text())["calibration"]["chosen"]
    found = {
        (result.dataset_split, result.metric_name): result.metric_value
        for result in ModelCard(card(folder)).data.eval_results
    }
    accuracy = results["lenses"]["l_spade"]["accuracy"][-1]
    assert found["test", "L-SPADE accuracy, layer 3"] == pytest.approx(accuracy, abs=1e-4)
    name = "FLOPs saved with the exit policy, on the selection rows (optimistic)"
    saved = found["validation", name]
    assert saved == pytest.approx(chosen["compute_saved"], abs=1e-4)


def test_model_index_omits_results_measured_on_other_data(folder):
    change(folder / "results.json", dataset="someone/other-questions")
    splits = {result.dataset_split for result in ModelCard(card(folder)).data.eval_results}
    assert splits == {"validation"}


def test_a_local_base_model_is_not_listed_as_a_hub_id_or_path(folder):
    text = card(folder, repo="someone/heads")
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.datasets is None
    assert 'from_pretrained("path/to/model"' in text
    config = json.loads((folder / "config.json").read_text())
    assert config["base_model"]["model_id"].startswith("/")
    assert str(Path(config["base_model"]["model_id"]).parent) not in text
    assert "/tmp" not in text


def test_the_licence_is_unknown_unless_given_and_then_kept(folder):
    write_card(folder)
    assert ModelCard((folder / "README.md").read_text()).data.license == "unknown"
    write_card(folder, license="mit")
    write_card(folder)
    assert ModelCard((folder / "README.md").read_text()).data.license == "mit"


# Content


def test_the_card_grows_with_each_measurement(made):
    _, cards = made
    assert "KL to the target (nats)" in cards["fit"]
    assert "None yet: `lspade-train calibrate`" in cards["fit"]
    assert "logit lens | tuned lens | L-SPADE | SPADE" in cards["evaluate"]
    assert "![every lens by layer](figures/accuracy_by_layer.png)" in cards["evaluate"]
    assert "None yet: `lspade-train calibrate`" in cards["evaluate"]
    assert "None yet: `lspade-train calibrate`" not in cards["calibrate"]
    assert "logit lens | tuned lens | L-SPADE | SPADE" in cards["calibrate"]


def test_the_table_has_every_lens_and_layer_of_the_results(folder):
    results, text = json.loads((folder / "results.json").read_text()), card(folder)
    for place, layer in enumerate(results["layers"]):
        cells = [f"{lens['accuracy'][place]:.3f}" for lens in results["lenses"].values()]
        row = next(line for line in text.splitlines() if line.startswith(f"| {layer} |"))
        assert all(cell in row for cell in cells)


def test_intervals_appear_next_to_their_numbers(folder):
    results = json.loads((folder / "results.json").read_text())
    for place, lens in enumerate(results["lenses"].values()):
        lens["accuracy"] = [0.5] * 3
        lens["accuracy_interval"] = [[0.4, 0.6 + place / 10]] * 3
    (folder / "results.json").write_text(json.dumps(results | {"interval": {"level": 0.9}}))
    assert "| 1 | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.700] | 0.500 [0.400, 0.800] |" in card(
        folder
    )
    assert "90% bootstrap interval" in card(folder)


def test_without_labels_the_table_compares_with_the_model(folder):
    results = json.loads((folder / "results.json").read_text())
    results |= {"n_labelled": 0, "full_model": {"accuracy": None, "entropy": 1.0}}
    for lens in results["lenses"].values():
        lens["accuracy"] = None
    (folder / "results.json").write_text(json.dumps(results))
    text = card(folder)
    assert "Agreement with the full model, `jsonl`, test split" in text
    assert "not with correct answers" in text
    metrics = [result.metric_type for result in ModelCard(text).data.eval_results]
    assert metrics[0] == "agrees_model"


CHOSEN = {
    "accuracy": 0.9,
    "drop": 0.004,
    "disagreement": 0.01,
    "mean_exit_layer": 2.5,
    "compute_saved": 0.25,
}


@pytest.mark.parametrize(
    ("risk", "words"),
    [
        ("accuracy_drop", "The accuracy is at most 2 percentage points below the full model's"),
        ("disagreement", "At most 2% of the answers differ from the full model's"),
    ],
)
def test_the_policy_is_shown_with_its_guarantee(folder, risk, words):
    record = {"risk": risk, "budget": 0.02, "confidence": 0.9, "n": 1234, "chosen": CHOSEN}
    plain = {"measure": "entropy", "decoder": "spade", "gate_digest": None}
    change(folder / "policy.json", layers=[1, 2, 3], threshold=0.25, calibration=record, **plain)
    text = card(folder)
    assert "first of layers 1-3 where the entropy" in text
    assert "at or under 0.25 nats" in text
    assert (
        f"{words}, with 90% confidence for prompts from the same distribution as the 1,234 rows"
        in text
    )
    where = "validation split: rows used for selection (optimistic)"
    row = f"| {where} | 0.900 | +0.004 | 0.010 | 2.50 | 25.0% |"
    assert row in text


def test_a_policy_chosen_by_time_states_batch_shape_and_hardware(folder):
    record = {"risk": "disagreement", "budget": 0.1, "confidence": 0.9, "n": 9}
    record |= {"chosen": CHOSEN | {"time_saved": 0.1}, "seconds": seconds_of().to_json()}
    change(folder / "policy.json", threshold=0.25, calibration=record)
    assert "a predicted 10.0% at 2 x 16 tokens, on abacus, 1 thread, float32." in card(folder)


def test_the_policys_test_results_appear_beside_its_calibration(folder):
    record = {"risk": "disagreement", "budget": 0.1, "confidence": 0.9, "n": 9, "chosen": CHOSEN}
    change(folder / "policy.json", threshold=0.25, calibration=record)
    on_test = CHOSEN | {"accuracy": None, "drop": None, "compute_saved": 0.2}
    change(folder / "results.json", exits={"policy": {"row": on_test}})
    assert "| test split | - | - | 0.010 | 2.50 | 20.0% |" in card(folder)


def test_results_on_held_out_and_on_selection_rows_are_shown_separately(folder):
    rows = {"split": "validation", "part": "calibration"}
    record = {"risk": "disagreement", "budget": 0.1, "confidence": 0.9, "n": 9, "chosen": CHOSEN}
    change(folder / "policy.json", threshold=0.25, calibration=record | {"rows": rows})
    policy = {"row": CHOSEN | {"compute_saved": 0.2}, "chosen_on_these_rows": False}
    held_out = {"split": "validation", "part": "held_out", "exits": {"policy": policy}}
    change(folder / "results.json", **held_out)
    text = card(folder)
    assert "| validation split, held-out half | 0.900 | +0.004 | 0.010 | 2.50 | 20.0% |" in text
    assert "calibration half: rows used for selection (optimistic) | 0.900 |" in text
    saved = {
        result.metric_name: result.metric_value
        for result in ModelCard(text).data.eval_results
        if result.metric_type == "compute_saved"
    }
    assert saved == {
        "FLOPs saved with the exit policy": 0.2,
        "FLOPs saved with the exit policy, on the selection rows (optimistic)": 0.25,
    }


def test_per_layer_and_hand_set_policies_are_described(folder):
    plain = {"layers": [1, 2, 3], "measure": "entropy", "decoder": "spade", "gate_digest": None}
    limits = [0.1, 0.2, 0.33333333]
    change(folder / "policy.json", threshold=limits, calibration={}, **plain)
    text = card(folder)
    assert "at or under 0.1, 0.2, 0.3333 nats (layer by layer)" in text
    assert "Guarantee" not in text


def test_the_card_says_why_a_policy_never_exits(folder):
    change(folder / "policy.json", threshold=None, calibration={"reason": "Never: too few rows."})
    assert "The policy never exits early. Never: too few rows." in card(folder)


def test_results_of_other_heads_are_not_shown(folder):
    change(folder / "policy.json", heads_digest="0" * 64, threshold=0.125)
    change(folder / "results.json", heads={"weights_sha256": "0" * 64})
    text = card(folder)
    assert "0.125" not in text
    assert "KL to the target" in text
    assert "`results.json` in this folder is about other heads" in text
    assert "`policy.json` in this folder is about other heads" in text


def test_provenance_reports_the_number_of_steps_actually_taken(folder):
    text = card(folder)
    assert "6 optimiser steps taken, batches of 16" in text
    assert "asked for: 2 epochs" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["weights_sha256"][:16] in text
    assert config["base_model"]["unembedding"][:16] in text


def test_text_below_the_generated_part_is_preserved(folder):
    write_card(folder)
    path = folder / "README.md"
    path.write_text(path.read_text() + "\n## Notes\n\nMine.\n")
    change(folder / "policy.json", threshold=None)
    write_card(folder, license="mit")
    text = path.read_text()
    assert text.endswith(f"{KEEP}\n\n## Notes\n\nMine.\n")
    assert text.count(KEEP) == 1
    write_card(folder)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["---\n[: broken\n---\n", "---\n- a list\n---\n", "no card", ""])
def test_a_readme_that_is_not_a_model_card_is_overwritten(folder, text):
    (folder / "README.md").write_text(text)
    write_card(folder)
    assert ModelCard((folder / "README.md").read_text()).data.library_name == "lspade-train"


def test_heads_without_provenance_also_have_a_card(tmp_path):
    LSpadeHeads([1, 2], 8, form="low_rank", rank=2).save_pretrained(tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "low_rank, rank 2, layers 1-2" in text
    assert "Nothing was measured yet" in text


def test_a_damaged_file_is_named_with_the_remedy(folder):
    (folder / "results.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"results.json is not valid JSON(.|\n)*Delete it"):
        write_card(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("results.json", {"lenses": 3}),
        ("results.json", {"layers": 3}),
        ("results.json", {"full_model": {"accuracy": "high"}}),
        ("results.json", {"heads": [1]}),
        ("policy.json", {"threshold": {"a": 1}, "measure": "entropy"}),
        ("policy.json", {"calibration": {"chosen": {"accuracy": 1}}}),
        ("config.json", {"layers": None}),
        ("config.json", {"training": {"recipe": "arc"}}),
        ("config.json", {"base_model": "llama"}),
    ],
)
def test_json_with_an_unexpected_structure_raises_a_clear_error(folder, name, values):
    change(folder / name, **values)
    with pytest.raises(ArtifactError, match=r"not as lspade-train writes them(.|\n)*evaluate"):
        write_card(folder)


@pytest.mark.parametrize("policy", [True, False])
def test_the_cards_example_code_runs_as_written(made, folder, monkeypatch, policy):
    project, _ = made
    if not policy:
        (folder / "policy.json").unlink()
    monkeypatch.chdir(folder.parent)
    Path("path/to").mkdir(parents=True)
    Path("path/to/model").symlink_to(project.model)
    code = re.search(r"```python\n(.*?)```", card(folder), re.DOTALL)[1]
    statements = ast.parse(code).body
    assert sum(not isinstance(statement, ast.ImportFrom) for statement in statements) == 5
    names: dict = {}
    exec(code.replace('"..."', '"w1 w2 ? :"').replace("\nruntime.", "\nanswers = runtime."), names)
    (answer,) = names["answers"]
    assert answer.text.strip() in {*toy.WORDS, "A", "B"}


def test_consecutive_layers_are_written_as_ranges():
    assert ranges([1, 2, 3, 7]) == "1-3, 7"
    assert ranges([4]) == "4"
    assert ranges([]) == ""
