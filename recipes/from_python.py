"""From a frozen model to early answers without the command line, offline, in about a minute.

    python recipes/from_python.py

The equivalent of `fit`, `calibrate` and `predict`, as in a notebook: SPADE without training, heads
fitted with Lightning, a policy with its guarantee, the runtime. Only `--output` is written.
"""

import sys
from pathlib import Path

from jsonargparse import auto_cli
from lightning.pytorch import Trainer, seed_everything

from lspade_train import ExitRuntime, LSpadeHeads, calibrate, spade_logits
from lspade_train.artifacts.export import ExportHeads
from lspade_train.recipe import DataConfig, HeadConfig, Recipe
from lspade_train.training.datamodule import HiddenStateDataModule
from lspade_train.training.module import LSpadeModule

PROMPT = "hall is A\nattic is B\nring in box\nbox at attic\nsam has key\nkey in bag\nbag at hall\n"


def from_python(
    model: str = "checkpoints/tiny-world",
    data: str = "recipes/quickstart/data",
    output: Path = Path("checkpoints/from_python"),
    *,
    epochs: int = 10,
    limit: int | None = None,
    max_accuracy_drop: float = 0.01,
) -> None:
    """Fit, calibrate and answer.

    Args:
        model: Hub id or folder of the frozen model.
        data: JSONL data for the `jsonl` task.
        output: folder for the heads and their policy.
        epochs: passes over the training split.
        limit: rows used per split; None uses all.
        max_accuracy_drop: accuracy that the policy may lose, at 95% confidence.
    """
    seed_everything(0, verbose=False)
    recipe = Recipe(
        name=output.name,
        data=DataConfig(model_id=model, task="jsonl", dataset=data, mode="memory", limit=limit),
        model=HeadConfig(lr=3e-3),
    )
    states = HiddenStateDataModule(recipe.data, recipe.model.layers)
    frozen, tokenizer = states.adapter.model, states.tokenizer

    # SPADE: only the start token and the answer position go through the blocks above a layer.
    tokens = tokenizer([f"{PROMPT}which holds box"], return_tensors="pt")
    best = spade_logits(frozen, tokens["input_ids"], tokens["attention_mask"])[0].argmax(-1)
    _say("SPADE's answer by layer:", " ".join(tokenizer.convert_ids_to_tokens(best.tolist())))

    # L-SPADE: one linear map per layer, distilled from SPADE.
    trainer = Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[ExportHeads(output, recipe)],
    )
    trainer.fit(LSpadeModule(recipe.model), states)
    heads = LSpadeHeads.from_pretrained(output).bind(frozen)
    _say("KL to SPADE, mean over layers:", f"{trainer.logged_metrics['val/kl/mean']:.3f} nats")

    # The policy that saves most among those that pass the test, and a runtime that uses it.
    found = calibrate(states, heads, max_accuracy_drop=max_accuracy_drop, scope="choices")
    found.policy.save(output)
    _say("FLOPs saved on validation:", f"{found.calibration.chosen.compute_saved:.1%}")
    runtime = ExitRuntime(frozen, heads, policy=found.policy, tokenizer=tokenizer)
    questions = [f"{PROMPT}which holds {thing}" for thing in ("box", "ring", "sam")]
    for answer in runtime.decide(questions, choices=["A", "B"]):
        _say(f"answer {answer.text} from layer {answer.layer},", f"entropy {answer.entropy:.3f}")


def _say(*words: str) -> None:
    sys.stdout.write(" ".join(words) + "\n")


if __name__ == "__main__":
    auto_cli(from_python)
