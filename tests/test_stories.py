"""The full method on a real model: heads trained on the model's own text come close to SPADE."""

import json
import runpy
from pathlib import Path

import pytest

from lspade_train.cli import main

pytestmark = pytest.mark.slow  # half a minute; test_spade and test_module cover its parts

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.fixture(scope="module")
def results(stories, tmp_path_factory):
    """`results.json` of 192 sampled texts, the last 42 held out, every position from 8 on."""
    folder = tmp_path_factory.mktemp("stories")
    sample_text = runpy.run_path(str(RECIPES / "sample_text.py"))["sample_text"]
    sample_text(str(stories), folder / "texts")
    recipe = [
        f"--config={RECIPES / 'text.yaml'}", "--name=stories", f"--data.model_id={stories}",
        f"--data.dataset={folder / 'texts'}", "--data.subset=null", "--data.cache_dir=cache",
        "--data.text.positions_per_sequence=null",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train = ["--model.lr=3e-3", "--trainer.max_epochs=12", "--trainer.accelerator=cpu"]
        assert (
            main(
                [
                    "fit",
                    *recipe,
                    *train,
                    "--trainer.logger=false",
                    "--trainer.enable_progress_bar=false",
                ]
            )
            == 0
        )
        assert main(["evaluate", *recipe, "--split=validation"]) == 0
    return json.loads((folder / "checkpoints/stories/results.json").read_text())


def test_spade_agrees_with_the_model_more_than_the_logit_lens_at_every_layer(results):
    spade, logit = (results["lenses"][name]["agrees_model"] for name in ("spade", "logit_lens"))
    assert results["layers"] == [1, 2, 3, 4]
    assert all(ours > theirs for ours, theirs in zip(spade, logit, strict=True))


@pytest.mark.parametrize(("place", "bound"), list(enumerate([0.12, 0.15, 0.28, 0.40])))
def test_trained_heads_are_much_closer_to_spade_than_the_logit_lens(results, place, bound):
    ours, theirs = (results["lenses"][name]["kl_to_spade"] for name in ("l_spade", "logit_lens"))
    assert ours[place] <= bound * theirs[place]
