"""`LSpadeModule`: all layers' heads trained together by distillation. Independent of the cache.

One step, for a batch of `rows` cached rows:

    batch.of_layers(group)                   the layers that are trained: all, or one group of them
    target final: reduce it once             the same target for every layer
    layer_losses: for each piece of layers   as many as make about one chunk of logits
        heads(hidden)                        (rows, piece, d): h + A h + b, one batched product
        wide_norm                            the final norm, in fp32
        for each chunk of rows x piece       losses: everything is freed with the chunk
            student's logits                 product 1, in a buffer that is reused by all steps
            loss, and W^T (p_s - p_t)        product 2; a third one if the target is not reduced
        autograd through norm and heads      the piece's gradients; its activations are freed
    sum over layers, AdamW                   each head trains as if alone

With `model.target: both` this is done for the heads of each target, on the same rows; with
`model.scope: choices` the loss is over each row's choices (`over_choices`), and no logits over the
vocabulary are computed.

Source: arXiv:2507.17618, L-SPADE (v1), Linear SimLens (v2). The optimiser, its schedule and every
default are ours: the paper does not give them.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lspade_train.cache import StateBatch
from lspade_train.errors import ArtifactError, NumericsError, RecipeError
from lspade_train.models import Unembedding
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import NO_END, HeadConfig
from lspade_train.training.layer_sums import METRICS, LayerSums, answers
from lspade_train.training.layerwise import ALL_LAYERS, LayerGroup, layer_losses
from lspade_train.training.losses import Distilled, cross_entropy, distillation
from lspade_train.training.numerics import chunk_memory
from lspade_train.training.over_choices import choice_distillation
from lspade_train.training.reduction import pays_off
from lspade_train.training.targets import (
    Target,
    is_reducible,
    target_of,
    with_reduced_final,
)
from lspade_train.training.tiles import tile_of


def check_rank(config: HeadConfig, hidden_size: int) -> None:
    """Refuse a rank above the model's width, which full heads do not need.

    Raises:
        RecipeError: the rank exceeds the model's width.
    """
    if config.form == "low_rank" and config.rank > hidden_size:
        raise RecipeError(
            f"model.rank is {config.rank}, and the model's hidden size is {hidden_size}; expected "
            f"at most {hidden_size}. Lower --model.rank, or set --model.form full."
        )


class LSpadeModule(LightningModule):
    """Trains one linear map per layer by cross-entropy against SPADE (or the model's own answer).

    Args:
        config: form, target and optimiser of the heads.
        heads: heads to continue from, with a tuned lens beside them if the target is `both`; None
            starts at the identity.
        group: the group of the batches' layers to train.

    Logs `SPLIT/METRIC/layer_NN` (loss, kl, agreement, accuracy) and the means over the layers,
    `.../mean`. Loss and KL in nats, agreement with the target 0..1, accuracy 0..1 (over the task's
    choices, or over the vocabulary if it has none). With `model.scope: choices` all four are over
    the choices. With the target `both` these are the L-SPADE heads' metrics, and the tuned lens's
    are `SPLIT/final/...`.

    Raises:
        ArtifactError: the target is `both`, and the heads to continue from have no tuned lens.
    """

    def __init__(
        self, config: HeadConfig, heads: LSpadeHeads | None = None, group: LayerGroup = ALL_LAYERS
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.tuned_lens: LSpadeHeads | None = None
        self.group = group
        if heads is not None and config.target == "both":
            self.tuned_lens = heads.tuned_lens
            if self.tuned_lens is None:
                raise ArtifactError(
                    "model.target is both, and the given heads have no tuned lens beside them.\n"
                    "Set --model.target to what they were fitted to, or fit both."
                )
        self._unembed: Unembedding | None = None
        self._epoch: dict[str, LayerSums] = {}
        self._latest: tuple[int, Tensor] | None = None
        self._buffer: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Take the layers, the width and the frozen unembedding from the data module.

        A fit over the vocabulary bounds the validation rows, and reduces the targets first if that
        pays off over the epochs to come.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._unembed = data.unembed
        if stage == "fit":
            whole = self.config.scope == "vocabulary"
            data.validation_rows = self.config.validation_rows if whole else None
            if whole and self._reduces_rows():
                data.reduce_targets()
        if self.heads is None:
            layers = data.layers[self.group.among(len(data.layers))]
            if not layers:
                raise RecipeError(
                    f"model.layer_groups is {self.group.count}, and there are {len(data.layers)} "
                    "layers; expected no more groups than layers. Lower --model.layer_groups."
                )
            check_rank(self.config, data.hidden_size)
            self.heads, *others = (
                LSpadeHeads(layers, data.hidden_size, form=self.config.form, rank=self.config.rank)
                for _ in self.config.targets
            )
            self.tuned_lens = others[0] if others else None

    def fitted(self) -> Iterator[tuple[str, str, LSpadeHeads]]:
        """For each set of heads: prefix of its metrics' names, its target, the heads."""
        assert self.heads is not None
        first, *others = self.config.targets
        yield "", first, self.heads
        for target in others:
            assert self.tuned_lens is not None
            yield f"{target}/", target, self.tuned_lens

    @property
    def latest(self) -> Tensor | None:
        """Losses of the last step by layer, the targets concatenated."""
        return None if self._latest is None else self._latest[1]

    def losses(
        self,
        batch: StateBatch,
        sums: list[LayerSums] | None = None,
        *,
        heads: LSpadeHeads | None = None,
        target: str | None = None,
    ) -> Tensor:
        """Mean loss over the rows, per layer, nats; differentiable in the heads.

        Args:
            batch: cached rows.
            sums: receives the metrics of each piece of the layers, which cost a little more.
            heads: heads to use; None means the first set.
            target: what they are fitted to.
        """
        heads = self.heads if heads is None else heads
        assert heads is not None
        target = target or self.config.targets[0]
        batch = self._trained(batch, target)

        def of_piece(heads: LSpadeHeads, piece: slice) -> Tensor:
            part = batch.of_layers(piece)
            if sums is None and self.config.scope == "vocabulary":
                loss = cross_entropy(*self._sides(heads, part, target), memory=self._memory)
            else:
                result = self._distil(heads, part, target)
                loss = result.loss
                if sums is not None:
                    sums.append(self._sums(part, result))
            return loss.reshape(len(batch), -1).mean(0)

        return layer_losses(heads, self._pieces(batch), of_piece)

    def training_step(self, batch: StateBatch, batch_idx: int) -> Tensor:
        """One step on all layers and targets: the sum of the layers' mean losses."""
        self._require_finite()
        # Dozens of values: only on steps that Lightning logs.
        trainer: Any = self.trainer
        logs = (self.global_step + 1) % trainer.log_every_n_steps == 0
        parts: list[Tensor] = []
        for prefix, target, heads in self.fitted():
            sums: list[LayerSums] = []
            found = self.losses(batch, sums if logs else None, heads=heads, target=target)
            parts.append(found)
            if logs:
                self._log(f"train/{prefix}", LayerSums.beside(sums).means())
        losses = torch.cat(parts)
        self._latest = self.global_step, losses.detach()
        self.log("loss", losses.detach().mean(), prog_bar=True, logger=False)
        self.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"])
        # A sum over layers, so that each head trains as if alone.
        return losses.sum()

    def on_train_epoch_end(self) -> None:
        """Check the last step's loss before a checkpoint is saved."""
        self._require_finite()

    def validation_step(self, batch: StateBatch, batch_idx: int) -> None:
        """Add a batch to the epoch's sums."""
        self._accumulate("val", batch)

    def test_step(self, batch: StateBatch, batch_idx: int) -> None:
        """Add a batch to the epoch's sums."""
        self._accumulate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all rows of all processes."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all rows of all processes."""
        self._log_epoch("test")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other heads.

        Raises:
            RecipeError: its layers, form, rank or targets differ from this recipe's.
        """
        mine, found = (
            {name: tuple(value.shape) for name, value in state.items()}
            for state in (self.state_dict(), checkpoint["state_dict"])
        )
        if mine != found:
            raise RecipeError(
                f"The checkpoint holds other heads: {found}, this recipe makes {mine}.\n"
                "Give the model.layers, model.form, model.rank and model.target of the fit that "
                "wrote it."
            )

    def configure_optimizers(self) -> Any:
        """AdamW; decay pulls the residual maps to zero, that is, the heads to the identity."""
        config, trainer = self.config, self.trainer
        fitted = [heads for _, _, heads in self.fitted()]
        maps = [p for h in fitted for name, p in h.named_parameters() if name != "bias"]
        groups = [
            {"params": maps, "weight_decay": config.weight_decay},
            {"params": [heads.bias for heads in fitted], "weight_decay": 0.0},
        ]
        # Fused, it writes no temporaries: 13 times faster for 510 MB of heads on a CPU. Lightning
        # cannot clip a fused optimizer's gradients in mixed precision.
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, fused=not trainer.gradient_clip_val
        )
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise RecipeError(NO_END)
        warmup = max(round(config.warmup * steps), 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(steps - warmup, 1)
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Metrics ---------------------------------------------------------------------------------

    def _require_finite(self) -> None:
        """Check the previous step's loss: one step late, to avoid waiting for the GPU."""
        if self._latest is None:
            return
        (step, losses), self._latest = self._latest, None
        if not torch.isfinite(losses).all():
            raise NumericsError(
                f"The loss is {float(losses.mean())} at step {step}; expected a finite number.\n"
                "Lower --model.lr, or clip with --trainer.gradient_clip_val 1.0."
            )

    def _memory(self) -> Tensor:
        """A buffer for logits, allocated when a step first needs it."""
        if self._buffer is None:
            assert self._unembed is not None
            self._buffer = chunk_memory(self._unembed)
        return self._buffer

    def _reduces_rows(self) -> bool:
        """Whether the data module should reduce SPADE's targets for a fit of this length."""
        assert self._unembed is not None
        # A group would reduce the targets of all layers.
        wanted = "spade" in self.config.targets and self.group == ALL_LAYERS
        # True half precision casts batches, and reduced targets with them.
        wanted &= self.trainer.precision not in ("bf16-true", "16-true")
        epochs = self.trainer.max_epochs or 0
        return wanted and is_reducible(self._unembed) and pays_off(epochs, self.trainer.world_size)

    def _trained(self, batch: StateBatch, target: str) -> StateBatch:
        """The layers to train; a target that they share is reduced once for all of them."""
        assert self._unembed is not None
        batch = batch.of_layers(self.group.among(batch.hidden.shape[1]))
        reduces = target == "final" and is_reducible(self._unembed)
        if self.config.scope == "choices" or not reduces:
            return batch
        with torch.autocast(batch.final.device.type, enabled=False):
            return with_reduced_final(batch, self._unembed)

    def _pieces(self, batch: StateBatch) -> list[slice]:
        """The layers, in pieces of about as many rows as a tile of the loss."""
        layers = batch.hidden.shape[1]
        if self.config.scope == "choices":
            return [slice(0, layers)]
        assert self._unembed is not None
        size = max(tile_of(self._unembed)[0] // max(len(batch), 1), 1)
        return [slice(first, min(first + size, layers)) for first in range(0, layers, size)]

    def _sides(
        self, heads: LSpadeHeads, batch: StateBatch, target: str
    ) -> tuple[Tensor, Target, Any]:
        """Student, target and unembedding of rows x layers, flattened row by row."""
        assert self._unembed is not None
        student = heads(batch.hidden).flatten(0, 1)
        return student, target_of(batch, target, self._unembed), self._unembed

    def _distil(self, heads: LSpadeHeads, batch: StateBatch, target: str) -> Distilled:
        """Loss and statistics of rows x layers, flattened row by row."""
        if self.config.scope == "choices":
            assert self._unembed is not None
            return choice_distillation(heads(batch.hidden), batch, target, self._unembed)
        choices = batch.choice_ids[:, None].expand(-1, batch.hidden.shape[1], -1).flatten(0, 1)
        sides = self._sides(heads, batch, target)
        return distillation(*sides, token_ids=choices.long(), memory=self._memory)

    def _sums(self, batch: StateBatch, result: Distilled) -> LayerSums:
        rows, layers = len(batch), batch.hidden.shape[1]
        right = answers(batch, result).reshape(rows, layers) == batch.answer_id[:, None]
        right &= batch.labelled[:, None]
        values = torch.stack(
            [
                result.loss.detach().double(),
                result.kl.double(),
                result.agrees.double(),
                right.reshape(-1).double(),
            ]
        )
        counts = torch.stack([torch.tensor(rows, device=self.device), batch.labelled.sum()])
        return LayerSums(values.reshape(len(METRICS), rows, layers).sum(1), counts)

    def _accumulate(self, stage: str, batch: StateBatch) -> None:
        for prefix, target, heads in self.fitted():
            rows = self._trained(batch, target)
            found: list[LayerSums] = []
            for piece in self._pieces(rows):
                part = rows.of_layers(piece)
                found.append(self._sums(part, self._distil(heads.part(piece), part, target)))
            place, sums = f"{stage}/{prefix}", LayerSums.beside(found)
            self._epoch[place] = self._epoch[place] + sums if place in self._epoch else sums

    def _log_epoch(self, stage: str) -> None:
        reduce = self.trainer.strategy.reduce
        for prefix, _, _ in self.fitted():
            local = self._epoch.pop(f"{stage}/{prefix}")
            sums, rows = (reduce(value, reduce_op="sum") for value in (local.sums, local.rows))
            self._log(f"{stage}/{prefix}", LayerSums(sums, rows).means())

    def _log(self, place: str, means: dict[str, Tensor]) -> None:
        assert self.heads is not None
        values: dict[str, Any] = {}
        for name, per_layer in means.items():
            values[f"{place}{name}/mean"] = per_layer.mean()
            for layer, value in zip(self.heads.layers, per_layer, strict=True):
                values[f"{place}{name}/layer_{layer:02d}"] = value
        # Epoch means are already equal on all processes; this only silences Lightning's warning.
        same = not place.startswith("train/")
        self.log_dict({k: v.float() for k, v in values.items()}, batch_size=1, sync_dist=same)
