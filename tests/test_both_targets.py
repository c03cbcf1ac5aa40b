"""`model.target: both`: one fit produces the same heads as two fits, in one folder."""

import json

import pytest
import torch
import toy
from safetensors.torch import load_file

from lspade_train.artifacts.export import FINAL
from lspade_train.cli import main
from lspade_train.errors import ArtifactError
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import HeadConfig
from lspade_train.training.module import LSpadeModule


@pytest.fixture(autouse=True)
def _here(project, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(project.home)


@pytest.fixture(scope="module")
def apart(toy_root, tmp_path_factory):
    """A project whose two kinds of heads were fitted one after the other; read-only."""
    project = toy.Project(toy_root, tmp_path_factory.mktemp("apart"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(project.home)
        for target in ("spade", "final"):
            assert fit(project, model__target=target) == 0
    return project


def fit(project, *options, cache=None, **changes):
    """The exit code of a three-epoch fit of low-rank heads: long enough to reduce the targets."""
    settings = {"model__form": "low_rank", "model__rank": 4, "trainer__max_epochs": 3}
    settings |= {"model__target": "both", "data__cache_dir": str(cache or project.cache)}
    return main(["fit", "--config", str(project.recipe(**settings | changes)), *options])


def folders(project):
    root = project.home / "checkpoints/toy"
    return root, root / "tuned_lens"


def config(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same(project, other, slack=1e-6):
    for one, two in zip(folders(project), folders(other), strict=True):
        expected = load_file(two / "heads.safetensors")
        for name, value in load_file(one / "heads.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=slack)


def test_fitting_both_gives_the_heads_of_two_separate_fits(apart, project):
    assert fit(project, cache=apart.cache) == 0
    assert_same(project, apart)


def test_reducing_the_spade_target_of_a_layer_keeps_its_final_target(project, toy_root, tmp_path):
    alone = toy.Project(toy_root, tmp_path / "alone")
    alone.home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone.home)
        for target in ("spade", "final"):
            assert fit(alone, model__target=target, model__layers=[2]) == 0
    assert fit(project, cache=alone.cache, model__layers=[2]) == 0
    assert_same(project, alone)


@pytest.mark.slow
def test_each_folder_records_the_metrics_of_a_separate_fit(apart, project):
    assert fit(project, cache=apart.cache) == 0
    for one, two in zip(folders(project), folders(apart), strict=True):
        mine, expected = (config(folder)["training"] for folder in (one, two))
        assert mine["metrics"] == pytest.approx(expected["metrics"], abs=1e-6)
        for epoch, other in zip(mine["history"], expected["history"], strict=True):
            assert epoch == pytest.approx(other, abs=1e-6)


def test_the_log_prefixes_the_tuned_lens_metrics_with_final(apart, project):
    assert fit(project, cache=apart.cache, trainer__log_every_n_steps=1) == 0
    (log,) = project.home.glob("checkpoints/toy/logs/*/metrics.csv")
    names = set(log.read_text().splitlines()[0].split(","))
    for stage in ("train", "val"):
        for name in ("loss", "kl", "agreement", "accuracy"):
            assert {f"{stage}/{name}/layer_01", f"{stage}/final/{name}/layer_01"} <= names


def test_loading_the_heads_also_loads_the_tuned_lens(apart, project):
    assert fit(project, cache=apart.cache) == 0
    heads = LSpadeHeads.from_pretrained(folders(project)[0])
    assert (heads.target, heads.tuned_lens.target) == ("spade", "final")


@pytest.mark.slow
def test_fitting_layer_groups_gives_both_kinds_of_heads(apart, project):
    assert fit(project, cache=apart.cache, model__layer_groups=2) == 0
    # A group's targets are not reduced, which changes the last bits; Adam amplifies them.
    assert_same(project, apart, slack=1e-4)
    for one, two in zip(folders(project), folders(apart), strict=True):
        mine, expected = (config(folder)["training"]["metrics"] for folder in (one, two))
        assert mine == pytest.approx(expected, rel=1e-3)


def test_an_interrupted_fit_of_both_resumes_to_the_same_heads(apart, project, monkeypatch):
    step = LSpadeModule.training_step

    def stop(self, batch, batch_idx):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LSpadeModule, "training_step", stop)
        assert fit(project, cache=apart.cache) == 130
    assert fit(project, "--ckpt_path", "last", cache=apart.cache) == 0
    assert_same(project, apart)


def test_a_checkpoint_of_one_target_is_rejected_for_both(apart, project, capsys):
    assert fit(project, cache=apart.cache, model__target="spade") == 0
    assert fit(project, "--ckpt_path", "last", cache=apart.cache) == 1
    assert "holds other heads" in capsys.readouterr().err


def test_validate_measures_both_kinds_of_heads(apart, project):
    assert fit(project, cache=apart.cache) == 0
    recipe = str(project.home / "recipe.yaml")
    assert main(["validate", "--config", recipe]) == 0
    *_, log = sorted(project.home.glob("checkpoints/toy/logs/*/metrics.csv"))
    header, values = (line.split(",") for line in log.read_text().splitlines()[:2])
    found = dict(zip(header, map(float, values), strict=True))
    for folder, place in zip(folders(project), ("/", FINAL), strict=True):
        expected = config(folder)["training"]["metrics"]["val/kl/mean"]
        assert found["val/kl/mean".replace("/", place, 1)] == pytest.approx(expected, rel=1e-5)


def test_validate_with_target_final_measures_the_tuned_lens(apart, project, capsys):
    assert fit(project, cache=apart.cache, model__target="final") == 0
    recipe = str(project.home / "recipe.yaml")
    assert main(["validate", "--config", recipe]) == 0
    *_, log = sorted(project.home.glob("checkpoints/toy/tuned_lens/logs/*/metrics.csv"))
    header, values = (line.split(",") for line in log.read_text().splitlines()[:2])
    found = dict(zip(header, values, strict=True))
    expected = config(folders(project)[1])["training"]["metrics"]["val/kl/mean"]
    assert float(found["val/kl/mean"]) == pytest.approx(expected, rel=1e-5)
    assert main(["evaluate", "--config", recipe]) == 1
    assert "holds a tuned lens and no L-SPADE heads" in capsys.readouterr().err


def test_heads_without_a_tuned_lens_are_rejected_for_both():
    heads = LSpadeHeads([1], 8, form="bias")
    with pytest.raises(ArtifactError, match="no tuned lens beside them"):
        LSpadeModule(HeadConfig(target="both"), heads)
