"""Fine-tunes a model so that its own head reads every layer, and saves it as an ordinary one.

Independent of L-SPADE heads, policies and results.
"""

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn.functional import kl_div
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lspade_train.errors import NumericsError
from lspade_train.models.structure import find_decoder
from lspade_train.models.unembedding import find_unembedding
from lspade_train.tasks import Encoded
from lspade_train.training.losses import cross_entropy
from lspade_train.training.numerics import chunk_memory, wide
from lspade_train.training.targets import StoredLogits

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a model is fine-tuned.

    Attributes:
        weight: weight of the own head's loss beside the KL to the original model.
        epochs: passes over the training rows.
        batch_size: rows per step.
        lr: learning rate of AdamW, which falls to zero by a cosine.
        rank: LoRA's rank; its alpha is twice that.
        seed: seed of LoRA's initial values and of the shuffling.
    """

    weight: float
    epochs: int
    batch_size: int
    lr: float
    rank: int
    seed: int


class OwnHead(LightningModule):
    """LoRA in all blocks, trained so that norm and head of the model read every layer.

    With p^l the softmax of the final norm and head applied to `h_a^l`, the loss of a row is

        weight * mean over l = 1..L-1 of CE(p^L, p^l) + KL(p of the original model || p^L)

    where p^L of the first term has no gradient. Norm and head themselves are not trained.

    Args:
        base: the model; LoRA is added in place.
        tuning: rank, loss and optimiser.
    """

    def __init__(self, base: PreTrainedModel, tuning: Tuning) -> None:
        from peft import LoraConfig, get_peft_model  # an optional dependency

        super().__init__()
        self.tuning = tuning
        self.unembed = find_unembedding(base, find_decoder(base)[0])
        config = LoraConfig(
            r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model: Any = get_peft_model(base, config)
        self.sums, self.epoch = torch.zeros(3), [0.0, 0.0]

    @cached_property
    def _memory(self) -> Tensor:
        return chunk_memory(self.unembed)

    def losses(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The own head's cross-entropy, and the KL to the original model: means, in nats.

        Args:
            batch: from `collate`.
        """
        kept = {"logits_to_keep": 1, "use_cache": False}
        with torch.no_grad(), self.model.disable_adapter():
            original = _log_softmax(self.model(**batch, **kept).logits[:, -1])
        found = self.model(**batch, **kept, output_hidden_states=True)
        logits = found.logits[:, -1]
        target = StoredLogits(logits.detach())
        # The first state is the embeddings', and the last one has passed the final norm.
        own = [
            cross_entropy(hidden[:, -1], target, self.unembed, memory=lambda: self._memory).mean()
            for hidden in found.hidden_states[1:-1]
        ]
        kl = kl_div(_log_softmax(logits), original, log_target=True, reduction="batchmean")
        return torch.stack(own).mean(), kl

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """The weighted sum of both losses.

        Raises:
            NumericsError: it is not finite.
        """
        own, kl = self.losses(batch)
        loss = self.tuning.weight * own + kl
        if not torch.isfinite(loss):
            raise NumericsError(
                f"The loss is {float(loss)} at step {self.global_step}; expected a finite number.\n"
                "Lower --lr."
            )
        self.sums += torch.stack([own.detach(), kl.detach(), torch.ones_like(kl)]).cpu()
        return loss

    def on_train_epoch_end(self) -> None:
        """Print the epoch's means."""
        self.epoch = (self.sums[:2] / self.sums[2]).tolist()
        self.sums = torch.zeros(3)
        own, kl = self.epoch
        sys.stderr.write(
            f"weight {self.tuning.weight:g}, epoch {self.current_epoch + 1} of "
            f"{self.tuning.epochs}: own head {own:.4f} nats, KL to the original {kl:.4f}\n"
        )

    def configure_optimizers(self) -> Any:
        """AdamW on LoRA's matrices, without decay."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.tuning.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(wide(logits.dtype)).log_softmax(-1)


def prompts(encoded: Encoded) -> list[Tensor]:
    """Token ids of every prompt, each up to its answer position."""
    return [
        torch.from_numpy(example.input_ids[: int(last) + 1]).long()
        for example in encoded.examples
        for last in example.positions
    ]


def collate(rows: Sequence[Tensor]) -> Batch:
    """Prompts padded on the left: the answer position is the last of every row."""

    def padded(parts: list[Tensor]) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_side="left")

    mask = padded([torch.ones_like(row) for row in rows])
    return {
        "input_ids": padded(list(rows)),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def fine_tune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tensor],
    tuning: Tuning,
    folder: Path,
) -> dict[str, Any]:
    """Train, merge LoRA into the weights, and save model and tokenizer.

    Args:
        base: the model to change.
        tokenizer: its tokenizer.
        rows: token ids of the training prompts.
        tuning: loss and optimiser.
        folder: folder to save into.

    Returns:
        The last epoch's mean losses in nats, and the CPU seconds.
    """
    began = time.process_time()
    seed_everything(tuning.seed, verbose=False)
    module = OwnHead(base, tuning)
    trainer = Trainer(
        max_epochs=tuning.epochs, accelerator=base.device.type, devices=1, gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )  # fmt: skip
    order = torch.Generator().manual_seed(tuning.seed)
    dataset: Any = list(rows)  # a list is a data set
    loader = DataLoader(
        dataset, tuning.batch_size, shuffle=True, collate_fn=collate, generator=order
    )
    with warnings.catch_warnings():
        # On purpose: a model in evaluation mode has no dropout.
        warnings.filterwarnings("ignore", message=".*eval mode.*")
        trainer.fit(module, loader)
    own, kl = module.epoch
    module.model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = round(time.process_time() - began, 1)
    return {"own_head": own, "kl": kl, "cpu_seconds": seconds}
