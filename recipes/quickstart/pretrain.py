"""Trains the tiny-world model: one lookup first, then four, each with its own target.

Trained on the final answer alone, deep models stay at chance here for thousands of steps. So three
blocks first learn one lookup; the last two are then repeated once per further lookup, and the loss
supervises every pair of blocks with the result expected by then. The depth that a question needs is
therefore taught, not discovered. Middle blocks are read through a separate norm and head, which are
discarded afterwards: the model's own head never sees a middle state.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from measure import card, measure
from packing import LOOKUPS, PackedQuestions
from tokenizer import build_tokenizer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from world import HOPS

SEED = 2
FIRST, PER_LOOKUP = 3, 2
BLOCKS = FIRST + PER_LOOKUP * (LOOKUPS - 1)
SPECIAL = 4
MULTIPLE_CHOICE, YES_NO, OPEN, NEXT = "multiple_choice", "yes_no", "open", "next"


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum; it ends at `steps`, or sooner once all accuracies pass `until`.

    `slots` are the questions asked about every world: a kind, how many, the hops to draw from. The
    first two stages use no worlds: `copy` repeats random words, `triples` asks for the last word of
    random triples.
    """

    name: str
    blocks: int
    steps: int
    slots: tuple[tuple[str, int, tuple[int, ...]], ...] | None = None
    worlds: int = 64
    lr: float = 2e-3
    until: float = 2.0
    decay: bool = False


MIXTURE = ((NEXT, 1, (0, *HOPS)), (OPEN, 3, HOPS), (MULTIPLE_CHOICE, 5, HOPS), (YES_NO, 4, HOPS))
STAGES = (
    Stage("copy", FIRST, 500, until=0.95),
    Stage("triples", FIRST, 700, until=0.9),
    Stage("one lookup", FIRST, 500, ((NEXT, 8, (0, 1, 2, 3)),), until=0.97),
    Stage("mixture", BLOCKS, 400, MIXTURE, worlds=32, until=0.985),
    Stage("decay", BLOCKS, 200, MIXTURE, worlds=32, decay=True),
)


class Triples(IterableDataset[dict[str, Tensor]]):
    """Endless batches of random triples given twice; the target is the last word of each."""

    def __init__(self, vocabulary: int, batch_size: int, seed: int, count: int = 8) -> None:
        self.words, self.batch_size, self.count = vocabulary - SPECIAL, batch_size, count
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        n, batch = self.count, self.batch_size
        while True:
            draw = torch.rand(batch, self.words, generator=self.generator).argsort(1)
            told = (draw[:, : 3 * n] + SPECIAL).view(batch, n, 3)
            order = torch.rand(batch, n, generator=self.generator).argsort(1)
            asked = told.gather(1, order[:, :, None].expand(-1, -1, 3))
            start = torch.full((batch, 1), 2)
            ids = torch.cat([start, told.flatten(1), asked.flatten(1)], 1)
            size = ids.shape[1]
            yield {
                "input_ids": ids,
                "targets": asked[:, :, 2:].expand(-1, -1, LOOKUPS),
                "difficulties": torch.ones(batch, n),
                "mask": causal(size),
                "position_ids": torch.arange(size)[None],
                "ends": torch.arange(2 + 3 * n, size, 3),
            }


class Copies(IterableDataset[dict[str, Tensor]]):
    """Endless batches of 5 to 24 random words given twice; predicts the copy but for two words."""

    def __init__(self, vocabulary: int, batch_size: int, seed: int) -> None:
        self.words, self.batch_size = vocabulary - SPECIAL, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            n = int(torch.randint(5, 25, (1,), generator=self.generator))
            draw = torch.rand(self.batch_size, self.words, generator=self.generator).argsort(1)
            told = draw[:, :n] + SPECIAL
            asked = told[:, 2:, None]
            yield {
                "input_ids": torch.cat([told, told], 1),
                "targets": asked.expand(-1, -1, LOOKUPS),
                "difficulties": torch.ones(self.batch_size, n - 2),
                "mask": causal(2 * n),
                "position_ids": torch.arange(2 * n)[None],
                "ends": torch.arange(n + 1, 2 * n - 1),
            }


def causal(size: int) -> Tensor:
    """An additive causal mask (1, 1, size, size)."""
    return torch.full((size, size), torch.finfo().min).triu(1)[None, None]


class Pretraining(LightningModule):
    """Cross-entropy of the answer and, with equal weight, of every lookup on the way to it.

    Args:
        model: the model to train.
        auxiliary: norm and head that read the lookups before the last.
        stage: stage of the curriculum.
    """

    def __init__(self, model: LlamaForCausalLM, auxiliary: torch.nn.Module, stage: Stage) -> None:
        super().__init__()
        self.model, self.auxiliary, self.stage = model, auxiliary, stage
        self.accuracy: dict[str, float] = {}
        self.started = time.monotonic()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over the lookups that this stage's blocks make."""
        states = self.states(batch)
        read = [self.auxiliary(state) for state in states[: LOOKUPS - 1]]
        read += [self.model.lm_head(self.model.model.norm(state)) for state in states[len(read) :]]
        logits = torch.stack(read, dim=2)
        targets = batch["targets"][:, :, : len(states)]
        self.record(logits[:, :, -1].argmax(-1) == targets[:, :, -1], batch["difficulties"])
        return functional.cross_entropy(logits.flatten(0, 2), targets.flatten())

    def states(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """The states (batch, questions, width) at the questions' ends after each lookup."""
        base, seen = self.model.model, []
        blocks = range(FIRST - 1, len(base.layers), PER_LOOKUP)

        def keep(_: torch.nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            state = output if isinstance(output, Tensor) else output[0]
            seen.append(state[:, batch["ends"]])

        hooks = [base.layers[block].register_forward_hook(keep) for block in blocks]
        base(
            input_ids=batch["input_ids"],
            attention_mask=batch["mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        )
        for hook in hooks:
            hook.remove()
        return seen

    def record(self, right: Tensor, difficulties: Tensor) -> None:
        """Running accuracy by kind and hops; ends the stage once all of them are good."""
        slots = self.stage.slots or ((self.stage.name, right.shape[1], (1,)),)
        kinds = [kind for kind, count, _ in slots for _ in range(count)]
        for kind, _, hops in slots:
            column = torch.tensor([it == kind for it in kinds])
            for hop in hops:
                chosen = right[(difficulties == hop) & column]
                key, before = f"{kind} {hop}", self.accuracy.get(f"{kind} {hop}", 0.0)
                value = chosen.float().mean().item() if chosen.numel() else before
                self.accuracy[key] = 0.9 * before + 0.1 * value
        if self.global_step % 25 == 0:
            shown = " ".join(f"{key}={value:.2f}" for key, value in self.accuracy.items())
            seconds = time.monotonic() - self.started
            head = f"{self.stage.name} {self.global_step} {seconds:.0f}s"
            print(head, shown, flush=True)  # noqa: T201
        if min(self.accuracy.values()) > self.stage.until:
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a short warm-up, and a linear decay if the stage has one."""
        stage = self.stage
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01
        )

        def factor(step: int) -> float:
            decay = max(0.02, 1 - step / stage.steps) if stage.decay else 1.0
            return min(1.0, (step + 1) / 50) * decay

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def make_model(vocabulary: int, blocks: int) -> LlamaForCausalLM:
    """A fresh Llama of `blocks` blocks, under 3M parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.09,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def grow(model: LlamaForCausalLM, blocks: int) -> LlamaForCausalLM:
    """`model` with its last lookup's blocks repeated until there are `blocks` of them."""
    grown = make_model(model.config.vocab_size, blocks)
    grown.load_state_dict(model.state_dict(), strict=False)
    for index in range(len(model.model.layers), blocks):
        source = grown.model.layers[index - PER_LOOKUP]
        grown.model.layers[index].load_state_dict(source.state_dict())
    return grown


def auxiliary_head(config: LlamaConfig) -> torch.nn.Module:
    """A norm and a head of the same type as the model's."""
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    torch.nn.init.normal_(head.weight, std=config.initializer_range)
    return torch.nn.Sequential(torch.nn.RMSNorm(config.hidden_size, config.rms_norm_eps), head)


def train(module: Pretraining, vocabulary: dict[str, int], seed: int) -> int:
    """Run one stage on the CPU; returns the number of steps."""
    stage = module.stage
    stream: IterableDataset[dict[str, Tensor]]
    if stage.slots is None:
        words = Copies if stage.name == "copy" else Triples
        stream = words(len(vocabulary), stage.worlds, seed)
    else:
        slots = [(kind, hops) for kind, count, hops in stage.slots for _ in range(count)]
        stream = PackedQuestions(slots, vocabulary, stage.worlds, seed)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=stage.steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(stream, batch_size=None))
    return trainer.global_step


def main() -> None:
    """Train every stage, measure, and write a transformers folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parents[2] / "checkpoints" / "tiny-world"
    parser.add_argument("--output", type=Path, default=default, help="folder to write")
    parser.add_argument("--max_steps", type=int, help="most steps in all, for a smoke test")
    parser.add_argument("--questions", type=int, help="questions per kind and hops to measure on")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # matrices this small do not benefit from more
    seed_everything(arguments.seed, verbose=False)
    started = time.monotonic()
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    model = make_model(len(vocabulary), STAGES[0].blocks)
    auxiliary = auxiliary_head(model.config)
    taken: list[int] = []
    for number, stage in enumerate(STAGES):
        model = grow(model, stage.blocks)
        steps = stage.steps
        if arguments.max_steps:
            steps = min(steps, max(1, arguments.max_steps // len(STAGES)))
        module = Pretraining(model, auxiliary, replace(stage, steps=steps))
        taken.append(train(module, vocabulary, arguments.seed * 100 + number))
    questions = arguments.questions or (20 if arguments.max_steps else 2000)
    measured = measure(model, vocabulary, questions)
    training = {
        "seed": arguments.seed,
        "minutes": (time.monotonic() - started) / 60,
        "blocks": BLOCKS,
        "parameters": sum(weight.numel() for weight in model.parameters()) / 1e6,
        "supervised": ", ".join(str(block) for block in range(FIRST, BLOCKS, PER_LOOKUP)),
        "stages": stage_rows(taken),
    }
    model.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=3, pad_token_id=0, max_new_tokens=1
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    text = card(measured, training)
    (arguments.output / "README.md").write_text(text)
    print(text)  # noqa: T201


def stage_rows(taken: Sequence[int]) -> str:
    """The curriculum as rows of the card's table."""
    return "\n".join(
        f"| {stage.name} | {stage.blocks} | {stage.steps} | {steps} | {stage.worlds} | "
        f"{f'{stage.until:.1%}' if stage.until < 1 else 'none'} |"
        for stage, steps in zip(STAGES, taken, strict=True)
    )


def quiet() -> None:
    """Silence Lightning's advice, which does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")


if __name__ == "__main__":
    main()
