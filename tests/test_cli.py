"""The commands as a user meets them: what they print, write, refuse and leave behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from lspade_train.cli import COMMANDS, main
from lspade_train.models import ModelAdapter
from lspade_train.probes.heads import LSpadeHeads

CODE = "import sys; from lspade_train.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _quiet_place(request, monkeypatch):
    """Relative outputs land in the test's own folder; W&B is off unless a test asks for it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    if "project" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("project").home)


def run(*arguments):
    """A real process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def refused(capsys, *arguments):
    """Run in this process; the one named error on standard error, stripped of its prefix."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: "), printed
    assert len(printed.splitlines()) <= 2, printed
    assert "Traceback" not in printed
    return printed.removeprefix("error: ")


def code_of(arguments):
    """The exit code, however it comes."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def left_behind(project):
    """Finished caches, heads and temporary files below the test's folder."""
    patterns = ("**/manifest.json", "**/heads.safetensors", "**/config.json", "**/*.tmp")
    return [path for pattern in patterns for path in project.home.glob(pattern)]


@pytest.fixture(scope="module")
def fitted(evaluated_once, tmp_path_factory):
    """A finished fit with its cache and results."""
    return evaluated_once.copy(tmp_path_factory.mktemp("fitted")).project


def heads_of(project, name="toy"):
    return project.home / "checkpoints" / name


# What cannot be used: exit code 1, two lines at most, nothing half-written


def other_model(project, kind):
    """A folder with a model that is no decoder."""
    folder = project.home / kind
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 64}
    if kind == "bert":
        heads = {"num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(**sizes, **heads)).save_pretrained(folder)
    else:
        model = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5ForConditionalGeneration(model).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def rows(project, *changed):
    """A data folder whose third training row is changed."""
    data = toy.questions(6)
    for change in changed:
        change(data)
    for split in ("train", "validation"):
        toy.write_jsonl(project.home / f"rows/{split}.jsonl", data)
    return project.home / "rows"


def poisoned(project):
    """A model that gives NaN for one word only, and data with that word."""
    model = toy.save_model(project.home / "poisoned-model", poisoned=True)
    data = rows(project, lambda d: d[2].update(prompt=f"w1 {toy.POISON} ? :"))
    return {"data__model_id": model, "data__dataset": data}


def nan_everywhere(project):
    folder = toy.save_model(project.home / "nan-model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return {"data__model_id": folder}


def answers(*choices):
    return lambda d: d[0].update(choices=list(choices), answer=0)


REFUSED = {
    "an unknown key": (lambda p: {"data__colour": 1}, r"colour"),
    "an unknown key of the trainer": (lambda p: {"trainer__colour": 1}, r"colour"),
    "an unknown key at the top": (lambda p: {"colour": 1}, r"colour"),
    "a value of the wrong type": (lambda p: {"data__batch_size": "many"}, r"data\.batch_size"),
    "a value that is none of the choices": (lambda p: {"data__mode": "tape"}, r"data\.mode"),
    "a missing model folder": (
        lambda p: {"data__model_id": p.home / "nowhere"},
        r"nowhere.*\n.*data\.model_id",
    ),
    "a folder without a model": (lambda p: {"data__model_id": p.data}, r"data.*\n.*data\.model_id"),
    "an encoder": (lambda p: {"data__model_id": other_model(p, "bert")}, r"decoder"),
    "an encoder-decoder": (lambda p: {"data__model_id": other_model(p, "t5")}, r"decoder"),
    "an unknown task": (
        lambda p: {"data__task": "sudoku"},
        r"Unknown task 'sudoku'.*arc_easy.*jsonl",
    ),
    "missing data": (
        lambda p: {"data__dataset": p.home / "no.jsonl"},
        r"no\.jsonl.*--data\.dataset",
    ),
    "no data at all": (lambda p: {"data__dataset": None}, r"--data\.dataset"),
    "data without the needed column": (
        lambda p: {"data__dataset": rows(p, lambda d: d[2].pop("prompt"))},
        r"line 3: needs text under 'prompt' or 'question'",
    ),
    "text without the needed column": (
        lambda p: {"data__task": "text", "data__dataset": p.texts, "data__text__column": "body"},
        r"'body'.*data\.text\.column",
    ),
    "a choice that is not one token": (
        lambda p: {"data__dataset": rows(p, answers("A", "w1 w2"))},
        r"' w1 w2' is 2 tokens \['w1', 'w2'\]",
    ),
    "an empty split": (
        lambda p: {"data__dataset": rows(p, lambda d: d.clear())},
        r"train split of .* is empty",
    ),
    "a limit of none": (lambda p: {"data__limit": 0}, r"--data\.limit"),
    "a layer out of range": (lambda p: {"model__layers": [1, 4]}, r"Layer 4 .* from 0 to 3"),
    "a negative layer": (lambda p: {"model__layers": [-1]}, r"Layer -1 .* from 0 to 3"),
    "no layer": (lambda p: {"model__layers": []}, r"out of range"),
    "a prompt longer than the context": (
        lambda p: {"data__dataset": rows(p, lambda d: d[2].update(prompt="w1 " * 70))},
        r"context of 64 tokens; the first is row 3 with 71.*\n.*--data\.overlong skip",
    ),
    "NaN for one word": (poisoned, r"NaN or Inf.*\n.*--data\.dtype"),
    "NaN everywhere": (nan_everywhere, r"NaN"),
    "a batch size of none": (lambda p: {"data__batch_size": 0}, r"data\.batch_size is 0"),
    "a name that is a path": (lambda p: {"name": "../up"}, r"plain folder name"),
    "a form that is unknown": (lambda p: {"model__form": "cubic"}, r"model\.form"),
    "a template with an unknown field": (
        lambda p: {"data__prompt__template": "{riddle}"},
        r"riddle",
    ),
    "a device that is not here": (lambda p: {"data__device": "warp"}, r"data\.device"),
    "a rank of none": (lambda p: {"model__form": "low_rank", "model__rank": 0}, r"model\.rank"),
    "a shard size of none": (lambda p: {"data__shard_mb": 0}, r"data\.shard_mb"),
    "a top-k of none": (lambda p: {"data__targets": "topk", "data__topk": 0}, r"data\.topk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fit_refuses(project, capsys, case):
    change, message = REFUSED[case]
    recipe = project.recipe(**{k: plain(v) for k, v in change(project).items()})
    given = set(left_behind(project))
    printed = refused(capsys, "fit", "--config", recipe)
    assert re.search(message, printed), printed
    assert set(left_behind(project)) == given


def plain(value):
    return str(value) if isinstance(value, Path) else value


def test_a_missing_recipe_is_named(capsys, tmp_path):
    assert "none.yaml" in refused(capsys, "fit", "--config", tmp_path / "none.yaml")


def test_a_recipe_that_is_not_yaml_is_named(capsys, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("data: [1, {")
    assert "cannot be used" in refused(capsys, "fit", "--config", path)


def test_a_missing_checkpoint_is_named(project, capsys):
    recipe = project.recipe()
    message = refused(capsys, "fit", "--config", recipe, "--ckpt_path", "no.ckpt")
    assert message.startswith("no.ckpt does not exist. Look in checkpoints/toy/training")


def test_a_checkpoint_that_is_none_is_named(project, capsys):
    (project.home / "bad.ckpt").write_bytes(b"not a checkpoint")
    message = refused(capsys, "fit", "--config", project.recipe(), "--ckpt_path", "bad.ckpt")
    assert message.startswith("bad.ckpt is damaged or no checkpoint")


def test_a_checkpoint_of_other_heads_is_named(fitted, project, capsys):
    recipe = project.recipe(data__cache_dir=str(fitted.cache), model__form="bias")
    last = heads_of(fitted) / "training/last.ckpt"
    message = refused(capsys, "fit", "--config", recipe, "--ckpt_path", last)
    assert "holds other heads" in message
    assert "model.layers, model.form and model.rank" in message


def test_a_setting_that_the_trainer_refuses_is_named(project, capsys):
    recipe = project.recipe(trainer__max_epochs=-7)
    assert "max_epochs" in refused(capsys, "fit", "--config", recipe)


@pytest.mark.parametrize("command", ["evaluate", "validate", "test"])
def test_heads_that_are_not_there_are_named(project, capsys, command):
    message = refused(capsys, command, "--config", project.recipe())
    assert "checkpoints/toy" in message
    assert "lspade-train fit" in message


@pytest.mark.parametrize("command", ["evaluate", "validate", "test"])
def test_heads_used_with_another_model_are_refused(fitted, project, capsys, command):
    model = toy.save_model(project.home / "other", seed=5)
    recipe = project.recipe(data__model_id=str(model))
    message = refused(capsys, command, "--config", recipe, "--heads", heads_of(fitted))
    assert "These heads were trained for" in message
    assert not list(project.cache.glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"data__positions": "compact"}, "positions"),
        ({"data__dtype": "bfloat16"}, "dtype"),
        ({"data__prompt__template": "{prompt} :"}, "template"),
        ({"model__layers": [2]}, "layers"),
        ({"data__targets": "logits"}, "targets"),
    ],
)
def test_a_cache_of_another_recipe_is_refused(fitted, project, capsys, change, field):
    recipe = project.recipe(data__cache_dir=str(fitted.cache), **change)
    message = refused(capsys, "fit", "--config", recipe)
    assert f"another {field}:" in message
    assert "--overwrite" in message
    assert not (project.home / "checkpoints/toy/config.json").exists()


def test_a_cache_of_another_model_is_refused(fitted, project, capsys):
    model = toy.save_model(project.home / "other", seed=5)
    recipe = project.recipe(data__cache_dir=str(fitted.cache), data__model_id=str(model))
    assert "another model_weights:" in refused(capsys, "fit", "--config", recipe)


def damage(project, how):
    shard = next(project.cache.glob("train/shard-*"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content if how == "flip" else content[:-9])


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_shard_is_refused_by_fit_and_by_verify_and_cured_by_overwrite(
    project, capsys, how
):
    recipe = project.recipe()
    assert main(["cache", "--config", str(recipe)]) == 0
    assert main(["cache", "--verify", str(project.cache)]) == 0
    damage(project, how)
    for command in (["fit", "--config", recipe], ["cache", f"--verify={project.cache}"]):
        message = refused(capsys, *command)
        assert "shard-00000.safetensors" in message
        assert "lspade-train cache --config RECIPE.yaml --overwrite" in message
    assert not heads_of(project).exists()
    assert main(["cache", "--config", str(recipe), "--overwrite"]) == 0
    assert main(["cache", "--verify", str(project.cache / "train")]) == 0


def test_verify_of_a_folder_without_a_cache_is_refused(tmp_path, capsys):
    assert "No finished cache" in refused(capsys, "cache", "--verify", tmp_path)


def test_a_split_that_is_not_there_is_refused(fitted, project, capsys):
    recipe = project.recipe()
    assert "holdout" in refused(capsys, "cache", "--config", recipe, "--splits", "[holdout]")
    message = refused(
        capsys, "evaluate", "--config", recipe, "--split", "holdout", "--heads", heads_of(fitted)
    )
    assert "train, validation, test" in message


@pytest.mark.parametrize("mode", ["memory", "online"])
def test_cache_refuses_a_mode_that_stores_nothing(project, capsys, mode):
    message = refused(capsys, "cache", "--config", project.recipe(data__mode=mode))
    assert "Set data.mode to disk" in message


def mounted(place, size):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small tmpfs")


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("cache", {}),
        ("heads", {"trainer__enable_checkpointing": False}),
        ("checkpoint", {}),
    ],
)
def test_a_full_disk_is_a_named_error(fitted, project, capsys, what, settings):
    place = project.home / "full"
    mounted(place, "16k")
    try:
        if what == "cache":
            recipe = project.recipe(data__cache_dir=str(place))
        else:
            (project.home / "checkpoints").symlink_to(place)
            recipe = project.recipe(
                data__cache_dir=str(fitted.cache), trainer__logger=False, **settings
            )
        message = refused(capsys, "fit", "--config", recipe)
        assert re.search(r"GB free|is full|No space left", message), message
        assert not list(place.rglob("manifest.json"))
        assert not list(place.rglob("heads.safetensors"))
        assert not list(place.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_process_prints_the_error_and_nothing_else(project):
    done = run("fit", "--config", project.recipe(data__model_id=str(project.home / "nowhere")))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: No model could be loaded")
    assert len(done.stderr.splitlines()) == 2


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["fit"],
        ["fit", "--colour", "1"],
        ["evaluate", "--split", "test"],
        ["info"],
        ["info", "a", "b"],
        ["cache", "--verify"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_two(arguments, capsys):
    assert code_of(arguments) == 2
    printed = capsys.readouterr()
    assert "lspade-train" in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_an_unknown_option_beside_a_recipe_is_wrong_usage(project, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(project.recipe()), "--colour", "1"])
    assert stop.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert code_of([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: lspade-train {command}" in printed
    assert len(printed.splitlines()) > 5


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in {"fit", "validate", "test"}])
def test_help_of_commands_without_training_does_not_wait_for_torch(command):
    code = (
        "import sys\nfrom lspade_train.cli import main\n"
        f"try: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
        "print('loaded', *{n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("loaded ")[-1].split()
    assert not {"torch", "lightning", "transformers", "datasets"} & set(loaded)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lspade-train 0.")


# What works


def test_fit_writes_a_complete_heads_folder(fitted):
    folder = heads_of(fitted)
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["layers"] == [1, 2, 3]
    assert config["base_model"]["model_id"] == str(fitted.model)
    training = config["training"]
    assert training["steps"] == 6
    assert training["recipe"]["data"]["task"] == "jsonl"
    manifest = json.loads((fitted.cache / "train/manifest.json").read_text())
    assert training["caches"]["train"] == manifest["digest"]
    assert "val/kl/layer_03" in training["metrics"]
    assert LSpadeHeads.from_pretrained(folder).layers == (1, 2, 3)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: lspade-train")


def test_a_second_fit_reuses_the_cache_runs_no_forward_and_gives_the_same_heads(
    fitted, project, caplog, monkeypatch
):
    def forbidden(*_, **__):
        raise AssertionError("the model ran")

    for name in ("plan", "plan_step", "run_block", "check"):
        monkeypatch.setattr(ModelAdapter, name, forbidden)
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    with caplog.at_level("INFO", "lspade_train"):
        assert main(["fit", "--config", str(recipe)]) == 0
    for split in ("train", "validation"):
        assert f"{split}: reusing {fitted.cache / split} (" in caplog.text
    one, two = (heads_of(p) / "heads.safetensors" for p in (fitted, project))
    assert one.read_bytes() == two.read_bytes()


def test_a_device_that_is_too_small_is_a_named_error(fitted, project, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")

    monkeypatch.setattr("lspade_train.training.module.LSpadeModule.training_step", full)
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    assert main(["fit", "--config", str(recipe)]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert told == ["error: CUDA out of memory. Tried to allocate 20.00 GiB."]


def test_a_fit_that_was_stopped_goes_on_to_the_same_heads(fitted, project):
    settings = {"data__cache_dir": str(fitted.cache), "name": "whole"}
    whole = project.recipe(trainer__max_epochs=3, **settings)
    assert main(["fit", "--config", str(whole)]) == 0
    settings["name"] = "part"
    # The schedule is of three epochs, also for the run that is cut short.
    part = project.recipe(trainer__max_epochs=3, **settings)

    from lspade_train.training.module import LSpadeModule

    step = LSpadeModule.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == 7:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LSpadeModule, "training_step", stop)
        assert code_of(["fit", "--config", str(part)]) == 130
    assert not (heads_of(project, "part") / "heads.safetensors").exists()
    last = heads_of(project, "part") / "training/last.ckpt"
    assert main(["fit", "--config", str(part), "--ckpt_path", str(last)]) == 0
    one, two = (heads_of(project, name) / "heads.safetensors" for name in ("whole", "part"))
    assert one.read_bytes() == two.read_bytes()


def test_evaluate_measures_test_or_the_split_asked_for_and_prints_what_it_writes(
    fitted, project, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    written = heads_of(fitted) / "results.json"
    results = json.loads(written.read_text())
    assert (results["split"], results["n"]) == ("test", 12)
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    arguments = ["--heads", str(heads_of(fitted)), "--split", "validation"]
    assert main(["evaluate", "--config", str(recipe), *arguments]) == 0
    printed, results = capsys.readouterr().out, json.loads(written.read_text())
    assert (results["split"], results["n"]) == ("validation", 20)
    assert results["layers"] == [1, 2, 3]
    assert list(results["lenses"]) == ["logit_lens", "tuned_lens", "l_spade", "spade"]
    assert "n = 20" in printed
    assert f"accuracy {results['full_model']['accuracy']:.3f}" in printed
    shown = set(printed.replace("│", " ").split())
    for lens in results["lenses"].values():
        for metric in ("accuracy", "agrees_model"):
            assert {f"{value:.3f}" for value in lens[metric]} <= shown
    assert set(results["lenses"]["spade"]["agrees_spade"]) == {1.0}


def test_validate_and_test_run_on_their_splits(fitted, project, capsys):
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    for command, stage in (("validate", "val"), ("test", "test")):
        code = main([command, "--config", str(recipe), "--heads", str(heads_of(fitted))])
        assert code == 0
        assert f"{stage}/kl/layer_03" in capsys.readouterr().out


def test_cache_builds_the_splits_that_it_is_asked_for(project, caplog):
    recipe = project.recipe()
    with caplog.at_level("INFO", "lspade_train"):
        assert main(["cache", "--config", str(recipe), "--splits", "[test]"]) == 0
    assert [path.name for path in project.cache.iterdir()] == ["test"]
    assert "test: caching 12 rows x " in caplog.text


VALUES = [
    {"data__positions": "compact"},
    {"data__targets": "logits"},
    {"data__targets": "topk", "data__topk": 8},
    {"data__mode": "memory"},
    {"data__mode": "online"},
    {"data__dtype": "float32"},
    {"data__dtype": "bfloat16"},
    {"data__dtype": "float16"},
    {"data__overlong": "skip"},
    {"data__device": "cpu"},
    {"data__limit": 20},
    {"data__shard_mb": 0.01, "data__tokens_per_batch": 50},
    {"data__prompt__shots": 1, "data__overlong": "skip"},
    {"model__layers": [0, 2]},
    {"model__form": "low_rank", "model__rank": 2},
    {"model__form": "bias"},
    {"model__target": "final"},
    {"model__weight_decay": 0.0, "model__warmup": 0.0, "model__lr": 0.1},
    {"seed_everything": 7},
    {"trainer__logger": False},
    {"trainer__logger": True},
    {"trainer__precision": "bf16-true"},
    {"trainer__fast_dev_run": True},
]


@pytest.mark.parametrize("change", VALUES, ids=str)
def test_every_value_of_every_option_fits_and_evaluates(project, monkeypatch, change):
    # No option changes how figures are drawn (test_plots does that), and drawing is what is slow.
    monkeypatch.setattr("lspade_train.reporting.plots.write_figures", lambda results, folder: [])
    recipe = project.recipe(trainer__max_epochs=1, **change)
    assert main(["fit", "--config", str(recipe)]) == 0
    if "trainer__fast_dev_run" in change:
        assert not (heads_of(project) / "heads.safetensors").exists()
    elif "model__target" not in change:
        assert main(["evaluate", "--config", str(recipe)]) == 0
        assert (heads_of(project) / "results.json").exists()


def test_overrides_go_before_the_recipe(project):
    recipe = project.recipe()
    changes = ["--model.layers", "[2]", "--trainer.max_epochs=1"]
    assert main(["fit", "--config", str(recipe), *changes]) == 0
    config = json.loads((heads_of(project) / "config.json").read_text())
    assert config["layers"] == [2]
    assert config["training"]["recipe"]["trainer"]["max_epochs"] == 1


def test_a_recipe_fits_in_a_real_process_and_its_heads_are_those_of_this_one(fitted, project):
    recipe = project.recipe(data__cache_dir=str(project.cache))
    done = run("fit", "--config", recipe)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "train: caching 48 rows" in lines[0]
    assert lines[-1] == "next:  lspade-train evaluate --config RECIPE.yaml"
    assert len(lines) < 10, done.stderr
    one, two = (load_file(heads_of(p) / "heads.safetensors") for p in (fitted, project))
    assert all(torch.equal(one[name], two[name]) for name in one)


# info


def test_info_on_heads_names_model_task_and_layers(fitted, capsys):
    assert main(["info", str(heads_of(fitted))]) == 0
    printed = capsys.readouterr().out
    assert str(fitted.model) in printed
    assert "full, layers 1-3" in printed
    assert "jsonl" in printed


def test_info_on_a_cache_lists_each_split(fitted, capsys):
    assert main(["info", str(fitted.cache)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^rows +48$", printed, re.M)
    assert str(fitted.cache / "validation") in printed
    assert main(["info", str(fitted.cache / "train")]) == 0


def test_info_on_a_model_runs_its_check(project, capsys):
    assert main(["info", str(project.model)]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert "passed" in printed


def test_info_on_nothing_is_a_named_error(tmp_path, capsys):
    assert "nowhere" in refused(capsys, "info", tmp_path / "nowhere")


def test_info_on_heads_and_caches_loads_no_lightning(fitted):
    paths = [str(heads_of(fitted)), str(fitted.cache)]
    code = (
        "import sys\nfrom lspade_train.cli import main\n"
        f"for path in {paths}: main(['info', path])\n"
        "print('loaded', *{n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("loaded ")[-1].split()
    assert not {"lightning", "datasets", "wandb"} & set(loaded)
