"""Heads fitted one layer group at a time: the heads of one fit, with the memory of one group."""

import json
import re
import shutil

import pytest
import torch
import toy
from processes import codes, slurm
from safetensors.torch import load_file

from lspade_train.cli import main
from lspade_train.training.module import LSpadeModule


@pytest.fixture(autouse=True)
def _here(project, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)


@pytest.fixture(scope="module")
def fitted(toy_root, tmp_path_factory):
    """A fit of all three layers at once, with its cache; read-only."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("fitted"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(project.home)
        for form in ("full", "low_rank"):
            recipe = project.recipe(name=form, model__form=form, model__rank=4)
            assert main(["fit", "--config", str(recipe)]) == 0
    return project


def grouped(fitted, project, *options, name="full", form="full", **changes):
    """The exit code of a fit in two groups: layer 1, then layers 2 and 3."""
    settings = {"model__form": form, "model__rank": 4, "model__layer_groups": 2} | changes
    recipe = project.recipe(name=name, data__cache_dir=str(fitted.cache), **settings)
    return main(["fit", "--config", str(recipe), *options])


def heads(project, name="full"):
    return load_file(project.home / "checkpoints" / name / "heads.safetensors")


def trained_layers(monkeypatch):
    """The layers that each step trained."""
    seen, step = [], LSpadeModule.training_step

    def watched(self, batch, batch_idx):
        seen.append(self.heads.layers)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LSpadeModule, "training_step", watched)
    return seen


@pytest.mark.parametrize("form", ["full", "low_rank"])
def test_grouped_fitting_gives_the_heads_and_metrics_of_one_fit(fitted, project, monkeypatch, form):
    seen = trained_layers(monkeypatch)
    assert grouped(fitted, project, name=form, form=form) == 0
    assert seen == [(1,)] * 6 + [(2, 3)] * 6
    for name, value in heads(fitted, form).items():
        torch.testing.assert_close(heads(project, form)[name], value, rtol=1e-3, atol=1e-5)
    one, two = (
        json.loads((p.home / "checkpoints" / form / "config.json").read_text())
        for p in (fitted, project)
    )
    assert two["layers"] == one["layers"] == [1, 2, 3]
    assert two["training"]["metrics"] == pytest.approx(one["training"]["metrics"], rel=1e-3)
    epochs = zip(*(each["training"]["history"] for each in (two, one)), strict=True)
    assert all(mine == pytest.approx(other, rel=1e-3) for mine, other in epochs)
    assert not list(project.home.glob("checkpoints/*/training/group-*"))


def test_one_log_covers_the_layers_of_all_groups(fitted, project):
    assert grouped(fitted, project) == 0
    (log,) = project.home.glob("checkpoints/full/logs/*/metrics.csv")
    header = log.read_text().splitlines()[0].split(",")
    assert {f"val/kl/layer_0{layer}" for layer in (1, 2, 3)} <= set(header)


@pytest.fixture
def stopped(fitted, project, monkeypatch):
    """A fit that was interrupted in the fourth step of its second group."""
    step = LSpadeModule.training_step

    def stop(self, batch, batch_idx):
        if self.heads.layers == (2, 3) and self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LSpadeModule, "training_step", stop)
        assert grouped(fitted, project) == 130
    assert not (project.home / "checkpoints/full/heads.safetensors").exists()
    return project


def test_an_interrupted_fit_keeps_finished_groups_and_gives_the_same_heads(
    fitted, project, stopped, tmp_path_factory, monkeypatch
):
    whole = toy.Project(fitted.model.parent, tmp_path_factory.mktemp("whole"))
    seen = trained_layers(monkeypatch)
    assert grouped(fitted, stopped, "--ckpt_path", "last") == 0
    assert seen == [(2, 3)] * 3  # the second epoch of the second group
    monkeypatch.chdir(whole.home)
    assert grouped(fitted, whole) == 0
    assert all(torch.equal(heads(whole)[name], value) for name, value in heads(stopped).items())


def test_a_fit_interrupted_in_its_first_group_resumes_there(fitted, project, monkeypatch):
    step = LSpadeModule.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LSpadeModule, "training_step", stop)
        assert grouped(fitted, project) == 130
    seen = trained_layers(monkeypatch)
    assert grouped(fitted, project, "--ckpt_path", "last") == 0
    assert seen == [(1,)] * 3 + [(2, 3)] * 6


@pytest.mark.slow
def test_groups_of_another_recipe_are_refitted(fitted, stopped, monkeypatch):
    seen = trained_layers(monkeypatch)
    assert grouped(fitted, stopped, "--ckpt_path", "last", model__lr=0.01) == 0
    assert seen == [(1,)] * 6 + [(2, 3)] * 6


def test_without_a_checkpoint_an_interrupted_fit_starts_over(fitted, stopped, monkeypatch):
    seen = trained_layers(monkeypatch)
    assert grouped(fitted, stopped) == 0
    assert seen == [(1,)] * 6 + [(2, 3)] * 6


def test_finished_groups_are_merged_without_refitting(fitted, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lspade_train.training.callbacks.forget_groups", lambda _: None)
        assert grouped(fitted, stopped, "--ckpt_path", "last") == 0
    expected = heads(stopped)
    (stopped.home / "checkpoints/full/heads.safetensors").unlink()
    assert grouped(fitted, stopped, "--ckpt_path", "last") == 0
    assert all(torch.equal(heads(stopped)[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model__layer_groups": 0}, [], r"model\.layer_groups is 0; expected 1 or more"),
        ({"model__layer_groups": 4}, [], "is 4, and there are 3 layers; expected no more groups"),
        ({}, ["--ckpt_path", "x.ckpt"], "--ckpt_path is x.ckpt, .* expected: last"),
    ],
)
def test_invalid_layer_groups_raise_a_clear_error(
    fitted, project, capsys, changes, options, message
):
    assert grouped(fitted, project, *options, **changes) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error)


@pytest.mark.slow
def test_two_processes_fit_groups_like_one(fitted, project):
    recipe = project.recipe(name="full", data__batch_size=8, model__layer_groups=2)
    shutil.copytree(fitted.cache, project.cache)
    arguments = ["fit", "--config", recipe.name, "--trainer.strategy", "ddp"]
    ended = codes(slurm(project.home, arguments))
    assert ended == [0, 0], (project.home / "err0").read_text()
    for name, value in heads(fitted).items():
        torch.testing.assert_close(heads(project)[name], value, rtol=1e-3, atol=1e-5)
