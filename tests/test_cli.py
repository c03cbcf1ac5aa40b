"""The commands as users see them: what they print, write, reject and leave behind."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import pytest
import torch
import toy
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from lspade_train import ExitPolicy
from lspade_train.cli import COMMANDS, main
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.cli.predict import PREDICT
from lspade_train.errors import CacheError
from lspade_train.io.storage import default_cache_root
from lspade_train.io.tracking import start_run
from lspade_train.models import ModelAdapter
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.training.loggers import default_loggers

CODE = "import sys; from lspade_train.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def _quiet_place(request, monkeypatch):
    """Relative outputs go to a per-test folder; W&B is off unless a test enables it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    if "project" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("project").home)


def run(*arguments):
    """A real process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def loaded_by(*commands):
    """Top-level modules loaded by a real process that ran these commands."""
    code = f"""
import sys
from lspade_train.cli import main
for words in {list(commands)}:
    try:
        main(words)
    except SystemExit:
        pass
print("loaded", *{{name.split(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split("loaded ")[-1].split())
    assert "lspade_train" in found
    return found


def error_of(capsys, *arguments):
    """Run in this process; return the one error line on standard error, without its prefix."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: "), printed
    assert len(printed.splitlines()) <= 2, printed
    assert "Traceback" not in printed
    return printed.removeprefix("error: ")


def code_of(arguments):
    """The exit code, whether returned or raised."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def left_behind(project):
    """Finished caches, heads and temporary files in the test's folder."""
    patterns = ("**/manifest.json", "**/heads.safetensors", "**/config.json", "**/*.tmp")
    return [path for pattern in patterns for path in project.home.glob(pattern)]


@pytest.fixture(scope="module")
def fitted(evaluated_once, tmp_path_factory):
    """A finished fit with its cache and results."""
    return evaluated_once.copy(tmp_path_factory.mktemp("fitted")).project


def heads_of(project, name="toy"):
    return project.home / "checkpoints" / name


# Unusable inputs: exit code 1, at most two lines, nothing half-written


def other_model(project, kind):
    """A folder with a model that is not a decoder."""
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
    """A model that gives NaN for one word, and data with that word."""
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
        r"(?s)nowhere.*data\.model_id",
    ),
    "a folder without a model": (
        lambda p: {"data__model_id": p.data},
        r"(?s)data is not a model.*data\.model_id",
    ),
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
    "a choice that begins another": (
        lambda p: {"data__dataset": rows(p, answers("w1", "w1 w2"))},
        r"'w1' is the beginning of 'w1 w2'.*\n.*--data\.prompt\.labels",
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
    "a rank over the width": (
        lambda p: {"model__form": "low_rank", "model__rank": 9999},
        r"model\.rank is 9999.*hidden size is 32; expected at most 32",
    ),
    "a seed below zero": (
        lambda p: {"seed_everything": -1},
        r"seed_everything is -1; expected 0 to",
    ),
    "a label twice": (
        lambda p: {"data__prompt__labels": ["A", "A", "B"]},
        r"data\.prompt\.labels is \['A', 'A', 'B'\]; expected two or more",
    ),
    "a fraction over one": (lambda p: {"data__test_fraction": 1.5}, r"data\.test_fraction is 1\.5"),
    "fractions that leave nothing": (
        lambda p: {"data__test_fraction": 0.5, "data__validation_fraction": 0.5},
        r"less than 1, so that rows are left",
    ),
    "a negative number of shots": (
        lambda p: {"data__prompt__shots": -1},
        r"data\.prompt\.shots is -1",
    ),
    "a column that is not there": (
        lambda p: {"data__columns": {"prompt": "body"}},
        r"line 1: no column 'body' \(found: prompt, choices, answer; see --data\.columns",
    ),
    "a home that nobody has": (
        lambda p: {"data__cache_dir": "~nobody-of-that-name/x"},
        r"data\.cache_dir is ~nobody-of-that-name/x, and no such home directory is known",
    ),
    "a top-k of none": (lambda p: {"data__targets": "topk", "data__topk": 0}, r"data\.topk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fit_rejects_unusable_models_and_data(project, capsys, case):
    change, message = REFUSED[case]
    recipe = project.recipe(**{k: plain(v) for k, v in change(project).items()})
    given = set(left_behind(project))
    printed = error_of(capsys, "fit", "--config", recipe)
    assert re.search(message, printed), printed
    assert set(left_behind(project)) == given


def plain(value):
    return str(value) if isinstance(value, Path) else value


def test_a_missing_recipe_is_named_in_the_error(capsys, tmp_path):
    assert "none.yaml" in error_of(capsys, "fit", "--config", tmp_path / "none.yaml")


def test_a_recipe_that_is_not_yaml_is_named_in_the_error(capsys, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("data: [1, {")
    assert "broken.yaml, line 1 is not YAML" in error_of(capsys, "fit", "--config", path)


def test_a_missing_checkpoint_is_named_in_the_error(project, capsys):
    recipe = project.recipe()
    message = error_of(capsys, "fit", "--config", recipe, "--ckpt_path", "no.ckpt")
    assert message.startswith("no.ckpt does not exist. This fit's own, in checkpoints/toy, is")


def test_an_invalid_checkpoint_is_named_in_the_error(project, capsys):
    (project.home / "bad.ckpt").write_bytes(b"not a checkpoint")
    message = error_of(capsys, "fit", "--config", project.recipe(), "--ckpt_path", "bad.ckpt")
    assert message.startswith("bad.ckpt is damaged or not a checkpoint")


def test_a_checkpoint_of_other_heads_is_named_in_the_error(fitted, project, capsys):
    recipe = project.recipe(data__cache_dir=str(fitted.cache), model__form="bias")
    last = heads_of(fitted) / "training/last.ckpt"
    message = error_of(capsys, "fit", "--config", recipe, "--ckpt_path", last)
    assert "holds other heads" in message
    assert "model.layers, model.form, model.rank and model.target" in message


def test_a_setting_rejected_by_the_trainer_is_named_in_the_error(project, capsys):
    recipe = project.recipe(trainer__max_epochs=-7)
    assert "max_epochs" in error_of(capsys, "fit", "--config", recipe)


@pytest.mark.parametrize("command", ["evaluate", "validate", "test"])
def test_missing_heads_are_named_in_the_error(project, capsys, command):
    message = error_of(capsys, command, "--config", project.recipe())
    assert "checkpoints/toy" in message
    assert "lspade-train fit" in message


@pytest.mark.parametrize("command", ["evaluate", "validate", "test"])
def test_heads_used_with_another_model_are_rejected(fitted, project, capsys, command):
    model = toy.save_model(project.home / "other", seed=5)
    recipe = project.recipe(data__model_id=str(model))
    message = error_of(capsys, command, "--config", recipe, "--heads", heads_of(fitted))
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
def test_a_cache_of_another_recipe_is_rejected(fitted, project, capsys, change, field):
    recipe = project.recipe(data__cache_dir=str(fitted.cache), **change)
    message = error_of(capsys, "fit", "--config", recipe)
    assert f"other settings: {field} is" in message
    assert "--overwrite" in message
    assert not (project.home / "checkpoints/toy/config.json").exists()


def test_a_cache_of_another_model_is_rejected(fitted, project, capsys):
    model = toy.save_model(project.home / "other", seed=5)
    recipe = project.recipe(data__cache_dir=str(fitted.cache), data__model_id=str(model))
    assert "other settings: model_weights is" in error_of(capsys, "fit", "--config", recipe)


def damage(project, how):
    shard = next(project.cache.glob("train/shard-*"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content if how == "flip" else content[:-9])


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_shard_fails_fit_and_verify_and_overwrite_repairs_it(project, capsys, how):
    recipe = project.recipe()
    assert main(["cache", "--config", str(recipe)]) == 0
    assert main(["cache", "--verify", str(project.cache)]) == 0
    damage(project, how)
    for command in (["fit", "--config", recipe], ["cache", f"--verify={project.cache}"]):
        message = error_of(capsys, *command)
        assert "shard-00000.safetensors" in message
        assert "lspade-train cache --config RECIPE.yaml --overwrite" in message
    assert not heads_of(project).exists()
    assert main(["cache", "--config", str(recipe), "--overwrite"]) == 0
    assert main(["cache", "--verify", str(project.cache / "train")]) == 0


def test_verify_of_a_folder_without_a_cache_is_rejected(tmp_path, capsys):
    assert "No finished cache" in error_of(capsys, "cache", "--verify", tmp_path)


def test_a_missing_split_is_rejected(fitted, project, capsys):
    recipe = project.recipe()
    assert "holdout" in error_of(capsys, "cache", "--config", recipe, "--splits", "[holdout]")
    message = error_of(
        capsys, "evaluate", "--config", recipe, "--split", "holdout", "--heads", heads_of(fitted)
    )
    assert "train, validation, test" in message


@pytest.mark.parametrize("mode", ["memory", "online"])
def test_cache_rejects_a_mode_that_stores_nothing(project, capsys, mode):
    message = error_of(capsys, "cache", "--config", project.recipe(data__mode=mode))
    assert "Set data.mode to disk" in message


def mounted(place, size):
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small tmpfs")


@pytest.mark.parametrize(
    ("what", "size", "settings"),
    [
        ("cache", "16k", {}),
        ("heads", "16k", {"trainer__enable_checkpointing": False}),
        ("checkpoint", "16k", {}),
        # Room for a part of it: torch then fails while closing its archive.
        ("checkpoint", "32k", {}),
        ("checkpoint", "64k", {}),
    ],
)
def test_a_full_disk_raises_a_clear_error(fitted, project, capsys, what, size, settings):
    place = project.home / "full"
    mounted(place, size)
    try:
        if what == "cache":
            recipe = project.recipe(data__cache_dir=str(place))
        else:
            (project.home / "checkpoints").symlink_to(place)
            recipe = project.recipe(
                data__cache_dir=str(fitted.cache), trainer__logger=False, **settings
            )
        message = error_of(capsys, "fit", "--config", recipe)
        assert re.search(r"B free|is full|No space left", message), message
        assert not list(place.rglob("manifest.json"))
        assert not list(place.rglob("heads.safetensors"))
        assert not list(place.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_real_process_prints_the_error_and_nothing_else(project):
    done = run("fit", "--config", project.recipe(data__model_id=str(project.home / "nowhere")))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: No model ")
    assert len(done.stderr.splitlines()) == 2


def test_validation_rows_are_checked_before_any_model_is_loaded(project, capsys, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelAdapter, "from_pretrained", forbidden)
    toy.write_jsonl(project.home / "rows/train.jsonl", toy.questions(6))
    data = project.home / "rows"
    recipe = project.recipe(data__dataset=str(data), data__validation_fraction=0)
    assert "no validation split" in error_of(capsys, "fit", "--config", recipe)
    toy.write_jsonl(data / "validation.jsonl", [{"prompt": 3}])
    assert "validation.jsonl, line 1" in error_of(capsys, "fit", "--config", recipe)


# A recipe's text -> the error message. `OK` is a recipe that parses.
OK = "name: t\ndata: {model_id: m, task: jsonl}\n"
RECIPES = {
    "nothing": ("", r"holds nothing; expected keys"),
    "a list": ("- name", r"holds a list; expected keys"),
    "a tab": ("name: t\n\tdata: 1", r"line 2 is not YAML: .*'\\t'"),
    "two documents": (f"{OK}---\n{OK}", r"line 3 is not YAML"),
    "a section twice": (
        f"{OK}model: {{lr: 1}}\nmodel: {{rank: 2}}",
        r"line 4: model is given a sec",
    ),
    "a key twice": ("name: t\nname: u", r"line 2: name is given a second time \(first in line 1\)"),
    "an unknown key": (
        f"{OK}model: {{rnk: 2}}",
        r"line 3: unknown key model\.rnk; did you mean mo",
    ),
    "a key in the wrong place": (
        f"{OK}batch_size: 3",
        r"line 3: .*; did you mean data\.batch_size",
    ),
    "an unknown section": (f"{OK}modle: {{lr: 1}}", r"line 3: .*modle; did you mean model\?"),
    "a section that is a value": (f"{OK}model: 3", r"line 3: model holds a single value"),
    "a key that is a list": (f"{OK}? [a]\n: 1", r"line 3: keys must be strings"),
    "a word for a number": (
        f"{OK}model: {{lr: fast}}",
        r"line 3: model\.lr is fast; expected a numb",
    ),
    "a word of no choice": (
        f"{OK}model: {{form: x}}",
        r"model\.form is x; expected one of full, lo",
    ),
    "bare yes and no": (
        "name: t\ndata: {model_id: m, task: jsonl, prompt: {labels: [yes, no]}}",
        r"data\.prompt\.labels is \[True, False\]; expected a list of texts.*\n.*in quotes",
    ),
    "no task": ("name: t\ndata: {model_id: m}", r"does not set data\.task, which is required"),
    "an empty data section": ("name: t\ndata:\n", r"does not set data\.\w+, which is required"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_an_invalid_recipe_is_rejected_with_file_and_line(case, tmp_path, capsys):
    text, message = RECIPES[case]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    printed = error_of(capsys, "evaluate", "--config", path)
    assert re.search(message, printed), printed
    assert "r.yaml" in printed
    assert not re.search("Parser key|Union|subtypes|Namespace|typing", printed), printed


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("latin-1", r"line 1 is not UTF-8 text \(byte 0xf1\)"), ("utf-16-le", r"not YAML|not UTF-8")],
)
def test_a_recipe_in_another_encoding_is_rejected(encoding, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_bytes(OK.replace("t\n", "señor\n", 1).encode(encoding))
    assert re.search(message, error_of(capsys, "evaluate", "--config", tmp_path / "r.yaml"))


def parsed(path, *arguments):
    arguments = ["--config", str(path), *arguments]
    return parse(command_parser("evaluate", ""), arguments, early=lambda _: None).recipe


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_recipe_with_a_byte_order_mark_is_read(encoding, tmp_path):
    (tmp_path / "r.yaml").write_bytes(OK.replace("t\n", "señor\n", 1).encode(encoding))
    assert parsed(tmp_path / "r.yaml").name == "señor"


def test_empty_sections_keep_their_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "name: t\nmodel:\n  # rank: 3\ntrainer:\ndata:\n  model_id: m\n  task: jsonl\n"
        "  prompt:\n  text:\n  shard_mb: 1e-1\n"
    )
    found = parsed(tmp_path / "r.yaml")
    (tmp_path / "s.yaml").write_text(OK)
    plain = parsed(tmp_path / "s.yaml", "--data.shard_mb=0.1")
    assert found == plain


def test_a_tilde_in_a_path_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/some/home")
    (tmp_path / "r.yaml").write_text(OK)
    found = parsed(tmp_path / "r.yaml", "--data.cache_dir=~/x", "--data.dataset", "~/d").data
    assert (found.cache_dir, found.dataset) == ("/some/home/x", "/some/home/d")


# Command line -> exit code and error message.
LINES = {
    "--data.batch_size many": (
        1,
        r"On the command line: data\.batch_size is many; expected a whole",
    ),
    "--data.batchsize 3": (1, r"Unknown key --data\.batchsize; did you mean data\.batch_size"),
    "--model.layers some": (1, r"model\.layers is some; expected all, or a list of whole numbers"),
    "--data.limit x": (1, r"data\.limit is x; expected a whole number, or null"),
    "--data 3": (1, r"data is invalid; expected a section of keys"),
    "--data.batch_size": (2, r"expected one argument"),
    "--spilt test": (2, r"no option --spilt; did you mean split"),
    "surplus": (2, r"unexpected argument: surplus"),
    "--config": (2, r"a recipe is needed: --config RECIPE"),
}


@pytest.mark.parametrize("line", LINES)
def test_an_invalid_command_line_is_rejected_in_plain_words(line, tmp_path, capsys):
    code, message = LINES[line]
    (tmp_path / "r.yaml").write_text(OK)
    given = ["evaluate", *([] if line == "--config" else ["--config", f"{tmp_path}/r.yaml"])]
    assert code_of([*given, *line.split()]) == code
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert not re.search("Parser key|Union|subtypes|Namespace|Traceback", printed), printed
    assert len(printed.splitlines()) == 2 if code == 2 else len(printed.splitlines()) <= 2


@pytest.mark.parametrize(
    ("name", "near"),
    [("quikstart", "quickstart"), ("arc_esay", "arc_easy"), ("mine.yml", "mine.yaml")],
)
def test_a_missing_recipe_is_reported_with_a_suggestion(name, near, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(OK)
    assert f"did you mean {near}?" in error_of(capsys, "fit", "--config", name)


def test_a_missing_recipe_is_reported_before_anything_heavy_is_imported():
    assert not {"torch", "lightning", "transformers"} & loaded_by(["fit", "--config", "nosuch"])


def test_trainer_keys_have_their_own_help_and_suggestions(project, capsys):
    assert code_of(["fit", "--help"]) == 0
    assert "--trainer.max_epochs" not in capsys.readouterr().out.split("options:")[1]
    assert code_of(["fit", "--help-trainer"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out
    recipe = project.recipe(trainer__max_epoch=1)
    assert "did you mean trainer.max_epochs?" in error_of(capsys, "fit", "--config", recipe)
    given = ["--trainer.max_steps", "many"]
    message = error_of(capsys, "fit", "--config", project.recipe(), *given)
    assert "trainer.max_steps is many; expected a whole number" in message


def test_help_preserves_the_line_breaks_of_examples(capsys):
    assert code_of(["predict", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "\n  lspade-train predict --config arc --input questions.jsonl --output" in printed


@pytest.mark.parametrize("arguments", [["help", "cache"], ["-V"], ["help"]], ids=" ".join)
def test_short_forms_of_help_and_version(arguments, capsys):
    assert code_of(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(("usage: lspade-train", "lspade-train 0."))


def test_an_unencodable_character_in_an_error_does_not_crash_the_command(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(printed, "ascii", write_through=True))
    assert main(["fit", "--config", "señor"]) == 1
    assert printed.getvalue().startswith(b"error: No recipe se?or")


@pytest.mark.parametrize("key", ["model.lr", "trainer.gradient_clip_val", "data.shard_mb"])
def test_an_infinite_number_is_rejected_naming_its_key(key, tmp_path, capsys):
    section, name = key.split(".")
    root = Path(__file__).parents[1]
    data = {"model_id": str(root / "checkpoints" / "tiny-world"), "task": "jsonl"}
    values = {"data": data | {"dataset": str(root / "recipes" / "quickstart" / "data")}}
    values.setdefault(section, {})[name] = float("inf")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "t", **values}))
    message = error_of(capsys, "fit", "--config", tmp_path / "r.yaml")
    assert message.startswith(f"{key} is inf; expected a finite number")


def test_without_a_home_directory_the_configured_cache_folder_is_used(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("LSPADE_CACHE", str(tmp_path))
    assert default_cache_root() == tmp_path
    monkeypatch.delenv("LSPADE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_root() == tmp_path / "lspade-train"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(CacheError, match="Set LSPADE_CACHE"):
        default_cache_root()


# init


def initialised(tmp_path, monkeypatch, rows, model):
    monkeypatch.chdir(tmp_path)
    toy.write_jsonl(tmp_path / "mine.jsonl", rows)
    return main(["init", "mine.jsonl", "--model_id", str(model)])


def labelled(count=60):
    sides = ["A", "B"]
    return [
        {"sentence": f"w{n} w{n + 1}", "label": n % 2, "name": sides[n % 2]} for n in range(count)
    ]


def test_init_writes_a_recipe_that_describes_the_data_and_fits(project, monkeypatch, capsys):
    assert initialised(project.home, monkeypatch, labelled(), project.model) == 0
    printed = capsys.readouterr().err
    assert "Texts under 'sentence', answered by one of 2 labels." in printed
    assert "A 50.0%, B 50.0% (majority baseline 50.0%)" in printed
    assert printed.endswith("next:   lspade-train fit --config mine.yaml\n")
    recipe = parsed(project.home / "mine.yaml").data
    assert recipe.columns == {"question": "sentence", "answer": "label"}
    assert recipe.prompt.labels == ["A", "B"]
    short = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.device=cpu"]
    short += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", "mine.yaml", *short]) == 0
    assert (project.home / "checkpoints/mine/heads.safetensors").exists()


def test_init_does_not_overwrite(project, monkeypatch, capsys):
    (project.home / "mine.yaml").write_text("precious")
    assert initialised(project.home, monkeypatch, labelled(), project.model) == 1
    assert "already exists" in capsys.readouterr().err
    assert (project.home / "mine.yaml").read_text() == "precious"


KINDS = {
    "choices": (
        [{"question": f"q {n}", "choices": ["a", "b"], "answer": n % 2, "subject": f"s{n % 3}"}
         for n in range(60)],
        {"task": "jsonl", "columns": {"group": "subject"}},
    ),
    "text": ([{"body": f"w1 w2 {n}"} for n in range(60)], {"task": "text", "columns": None}),
    "free answers": (
        [{"text": f"w1 {n}", "label": f"w{n}"} for n in range(60)],
        {"task": "jsonl", "columns": {"prompt": "text", "answer": "label"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_init_recognises_each_kind_of_data(kind, tmp_path, monkeypatch):
    rows, expected = KINDS[kind]
    assert initialised(tmp_path, monkeypatch, rows, "org/model") == 0
    recipe = parsed(tmp_path / "mine.yaml")
    assert {name: getattr(recipe.data, name) for name in expected} == expected
    assert recipe.model.scope == ("choices" if kind == "choices" else "vocabulary")


def test_an_answer_with_a_line_break_does_not_break_the_recipe(tmp_path, monkeypatch):
    rows = [{"text": f"w{n}", "label": ["good\n", "bad"][n % 2]} for n in range(60)]
    assert initialised(tmp_path, monkeypatch, rows, "org/model") == 0
    assert parsed(tmp_path / "mine.yaml").data.prompt.labels == ["bad", "good\n"]


def test_init_reports_an_answer_that_no_token_distinguishes(project, monkeypatch, capsys):
    rows = [{"text": f"w{n}", "label": ["w1", "w1 w2"][n % 2]} for n in range(60)]
    assert initialised(project.home, monkeypatch, rows, project.model) == 0
    assert "first:  An answer must have tokens of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "No column holds text"),
        ([{"n": 3}], r"No column holds text in every row \(found: n\)"),
        ([{"text": "w", "label": ["a", "b"]}], r"'label' holds \['a', 'b'\]; expected one text"),
        ([{"text": "w", "label": True}], "'label' holds True; expected one text"),
        (
            [{"text": f"w{n}", "label": n % 5 + 1} for n in range(20)],
            r"'label' holds the whole numbers 1 to 5, .* expected all of 0 to 4",
        ),
    ],
)
def test_init_rejects_columns_that_fit_could_not_use(rows, message, tmp_path, monkeypatch, capsys):
    assert initialised(tmp_path, monkeypatch, rows, "org/model") == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "mine.yaml").exists()


# predict


@pytest.fixture
def asks(fitted, project, capsys):
    """Runs predict on lines of input; returns the exit code, answers and standard error."""

    def run_it(lines, *options):
        (project.home / "in").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
        recipe = project.recipe(data__cache_dir=str(fitted.cache))
        given = ["--config", str(recipe), "--heads", str(heads_of(fitted)), "--input", "in"]
        capsys.readouterr()
        code = main(["predict", *given, "--threshold", "0.1", *options])
        printed = capsys.readouterr()
        return code, [json.loads(line) for line in printed.out.splitlines()], printed.err

    return run_it


def test_predict_reports_the_accuracy_on_rows_with_answers(asks, caplog):
    rows = toy.questions(6)
    with caplog.at_level("INFO", "lspade_train"):
        code, answers, _ = asks("".join(json.dumps(row) + "\n" for row in rows))
    assert code == 0
    right = sum(a["text"] == row["answer"] for a, row in zip(answers, rows, strict=True))
    assert f"accuracy {right / 6:.3f} on 6 with an answer" in caplog.text
    assert [answer["correct"] for answer in answers] == [
        answer["text"] == row["answer"] for answer, row in zip(answers, rows, strict=True)
    ]


def test_predict_counts_bad_lines_and_fails_if_all_are_bad(asks):
    good = json.dumps(toy.questions(1)[0]).encode()
    code, answers, err = asks(good + b'\n\xff\xfe{"prompt"\n')
    assert (code, ["error" in answer for answer in answers]) == (0, [False, True])
    assert err.startswith("error: 1 of 2 lines failed; line 2: ")
    code, answers, err = asks("{broken\n{}\n")
    assert (code, len(answers)) == (1, 2)
    assert err.startswith("error: all 2 lines failed; line 1: ")
    assert len(err.splitlines()) == 1


def test_predict_does_not_overwrite_its_input(fitted, project, asks):
    text = '{"prompt": "w2 w3 ? :"}\n'
    (project.home / "link").symlink_to("in")
    for output in ("in", "./in", "link"):
        code, _, err = asks(text, "--output", output)
        assert code == 1
        assert "is the input itself" in err
        assert (project.home / "in").read_text() == text


def test_raw_prompts_are_not_rendered_with_the_template(fitted, project, asks):
    template = "w1 {prompt}"
    plain = asks('{"prompt": "w2 w3 ? :"}\n')[1]
    assert (
        asks('{"prompt": "w2 w3 ? :"}\n', "--raw", "--data.prompt.template", template)[1] == plain
    )
    rendered = asks('{"prompt": "w2 w3 ? :"}\n', "--data.prompt.template", template)[1]
    by_hand = asks('{"prompt": "w1 w2 w3 ? :"}\n', "--raw")[1]
    assert rendered == by_hand != plain


def test_the_examples_in_predicts_help_run(fitted, project, monkeypatch, capsys):
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    shutil.copytree(heads_of(fitted), heads_of(project))
    ExitPolicy.always(2).save(heads_of(project))
    toy.write_jsonl(project.home / "questions.jsonl", toy.questions(3))
    examples = [line.strip() for line in PREDICT.splitlines() if line.startswith("  ")]
    assert len(examples) == 3
    for example in examples:
        words = shlex.split(example.replace("--config arc", f"--config {recipe}"))
        if "|" in words:
            pipe = words.index("|")
            monkeypatch.setattr(sys, "stdin", io.StringIO(words[1] + "\n"))
            words = words[pipe + 1 :]
        assert main(words[1:]) == 0, example
    assert len((project.home / "answers.jsonl").read_text().splitlines()) == 3


def test_the_heads_record_the_answer_prefix(fitted):
    config = json.loads((heads_of(fitted) / "config.json").read_text())
    manifest = json.loads((fitted.cache / "train/manifest.json").read_text())
    assert config["training"]["data"]["answer_prefix"] == manifest["answer_prefix"]


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fti"],
        ["init"],
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
def test_wrong_usage_exits_with_code_2(arguments, capsys):
    assert code_of(arguments) == 2
    printed = capsys.readouterr()
    assert "lspade-train" in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_an_unknown_option_alongside_a_recipe_exits_with_code_2(project, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(project.recipe()), "--colour", "1"])
    assert stop.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert code_of([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: lspade-train {command}" in printed
    assert len(printed.splitlines()) > 5


def test_no_commands_help_imports_torch():
    asked = [[command, "--help"] for command in COMMANDS]
    assert not {"torch", "lightning", "transformers", "datasets"} & loaded_by(*asked)


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lspade-train 0.")


# Successful runs


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


def test_a_second_fit_reuses_the_cache_without_a_forward_and_gives_equal_heads(
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


def test_running_out_of_device_memory_raises_a_clear_error(fitted, project, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")

    monkeypatch.setattr("lspade_train.training.module.LSpadeModule.training_step", full)
    recipe = project.recipe(data__cache_dir=str(fitted.cache))
    assert main(["fit", "--config", str(recipe)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert lines == ["error: CUDA out of memory. Tried to allocate 20.00 GiB."]


def test_an_interrupted_fit_resumes_to_the_same_heads(fitted, project):
    settings = {"data__cache_dir": str(fitted.cache), "name": "whole"}
    whole = project.recipe(trainer__max_epochs=3, **settings)
    assert main(["fit", "--config", str(whole)]) == 0
    settings["name"] = "part"
    # The schedule spans three epochs in the interrupted run too.
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


def test_evaluate_measures_test_or_the_given_split_and_prints_what_it_writes(
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
    for command, split in (("validate", "validation"), ("test", "test")):
        code = main([command, "--config", str(recipe), "--heads", str(heads_of(fitted))])
        assert code == 0
        printed = capsys.readouterr().out
        assert re.search(r"^ mean( +\d\.\d{3}){4}", printed, re.M), printed
        assert f"toy: {split} split, " in printed


def test_cache_builds_the_requested_splits(project, caplog):
    recipe = project.recipe()
    with caplog.at_level("INFO", "lspade_train"):
        assert main(["cache", "--config", str(recipe), "--splits", "[test]"]) == 0
    assert [path.name for path in project.cache.iterdir()] == ["test"]
    assert "test: caching 12 rows x " in caplog.text


# Each group holds values that can be set together.
VALUES = [
    [
        {"data__positions": "compact"},
        {"data__dtype": "float32"},
        {"data__overlong": "skip"},
        {"model__layers": [0, 2]},
    ],
    [
        {"data__targets": "logits"},
        {"data__dtype": "bfloat16"},
        {"model__form": "low_rank", "model__rank": 2},
        {"trainer__logger": True},
    ],
    [
        {"data__targets": "topk", "data__topk": 8},
        {"data__dtype": "float16"},
        {"data__limit": 20},
        {"model__form": "bias"},
    ],
    [
        {"data__mode": "memory"},
        {"data__device": "cpu"},
        {"data__shard_mb": 0.01, "data__tokens_per_batch": 50},
        {"model__weight_decay": 0.0, "model__warmup": 0.0, "model__lr": 0.1},
    ],
    [
        {"data__mode": "online"},
        {"data__prompt__shots": 1, "data__overlong": "skip"},
        {"seed_everything": 7},
        {"trainer__logger": False},
    ],
    [{"model__target": "final"}],
    [{"trainer__precision": "bf16-true"}],
    [{"trainer__fast_dev_run": True}],
]
TOGETHER = [dict(ChainMap(*group)) for group in VALUES]
ALONE = [pytest.param(value, marks=pytest.mark.slow) for group in VALUES[:5] for value in group]


@pytest.mark.parametrize("change", [*TOGETHER, *ALONE], ids=str)
def test_every_value_of_every_option_fits_and_evaluates(project, change):
    recipe = project.recipe(trainer__max_epochs=1, **change)
    assert main(["fit", "--config", str(recipe)]) == 0
    if "trainer__fast_dev_run" in change:
        assert not (heads_of(project) / "heads.safetensors").exists()
    elif "model__target" not in change:
        assert main(["evaluate", "--config", str(recipe)]) == 0
        assert (heads_of(project) / "results.json").exists()


def test_overrides_take_precedence_over_the_recipe(project):
    recipe = project.recipe()
    changes = ["--model.layers", "[2]", "--trainer.max_epochs=1"]
    assert main(["fit", "--config", str(recipe), *changes]) == 0
    config = json.loads((heads_of(project) / "config.json").read_text())
    assert config["layers"] == [2]
    assert config["training"]["recipe"]["trainer"]["max_epochs"] == 1


@pytest.mark.slow
def test_a_fit_in_a_real_process_gives_the_same_heads_as_in_this_one(fitted, project):
    recipe = project.recipe(data__cache_dir=str(project.cache))
    done = run("fit", "--config", recipe)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "train: caching 48 rows" in lines[0]
    assert done.stdout.splitlines()[-1] == f"next:  lspade-train calibrate --config {recipe}"
    assert len(lines) < 10, done.stderr
    one, two = (load_file(heads_of(p) / "heads.safetensors") for p in (fitted, project))
    assert all(torch.equal(one[name], two[name]) for name in one)


# info


def test_info_on_heads_prints_model_task_and_layers(fitted, capsys):
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


def test_info_on_a_missing_path_raises_a_clear_error(tmp_path, capsys):
    assert "nowhere" in error_of(capsys, "info", tmp_path / "nowhere")


@pytest.mark.slow
def test_info_on_heads_and_caches_does_not_import_lightning(fitted):
    paths = [str(heads_of(fitted)), str(fitted.cache)]
    assert not {"lightning", "datasets", "wandb"} & loaded_by(*(["info", path] for path in paths))


# W&B unreachable


def test_a_run_is_logged_offline_when_wandb_is_unreachable(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    asked = []

    def unreachable(**settings):
        asked.append(settings.get("mode"))
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("no such host\nmore")
        return "run"

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_MODE", "online")
    logger = default_loggers(tmp_path, "name")[1]
    with caplog.at_level("WARNING", "lspade_train"):
        assert logger.experiment == "run"
        assert start_run(dir=tmp_path, project="x") == "run"
    assert asked[1::2] == ["offline", "offline"]
    notice = "W&B: no such host; writing offline, send it with `wandb sync`."
    assert [record.getMessage() for record in caplog.records] == [notice, notice]
