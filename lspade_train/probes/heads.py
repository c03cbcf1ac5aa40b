"""`LSpadeHeads`: one residual affine map per layer, in front of the model's frozen unembedding.

Independent of training, tasks and policies.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lspade_train.errors import ArtifactError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import CONFIG, TUNED_LENS, WEIGHTS
from lspade_train.io.storage import (
    atomic_path,
    file_digest,
    first_line,
    read_json,
    require_kinds,
    write_json,
)
from lspade_train.io.tensors import read_tensors, write_tensors
from lspade_train.models import ModelAdapter, Unembedding
from lspade_train.recipe import Form, LossScope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
log = logging.getLogger(__name__)

AGAIN = "Fit or download it again."
KINDS = {
    "layers": list,
    "hidden_size": int,
    "form": str,
    "rank": int | None,
    "weights_sha256": str,
    "base_model": dict,
    "training": dict,
}


class LSpadeHeads(nn.Module):
    """Stacked linear heads: `h + A_l h + b_l`, then the frozen final norm and unembedding.

    The maps are residual and start at zero, so an untrained head equals the logit lens bit for
    bit, and weight decay pulls towards it.

    Args:
        layers: the layers that have a head, ascending.
        hidden_size: d.
        form: `full` (A is d x d), `low_rank` (A = U V, rank r) or `bias` (no A).
        rank: r of `low_rank`.
    """

    def __init__(
        self, layers: Sequence[int], hidden_size: int, *, form: Form = "full", rank: int = 64
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        self.form: Form = form
        self.rank = rank
        self.metadata: dict[str, Any] = {}  # base model and provenance, as read from config.json
        self._unembed: Unembedding | None = None
        self._beside: tuple[LSpadeHeads, ...] = ()  # in a tuple, so not registered as a submodule
        count, d = len(self.layers), hidden_size
        self.bias = nn.Parameter(torch.zeros(count, d))
        # Matrices are (in, out): a row vector is multiplied from the left.
        if form == "full":
            self.weight = nn.Parameter(torch.zeros(count, d, d))
        elif form == "low_rank":
            # One factor is random, the other zero: the product starts at zero, with a gradient.
            self.down = nn.Parameter(torch.empty(count, d, rank))
            self.up = nn.Parameter(torch.zeros(count, rank, d))
            if not self.down.is_meta:
                self._draw(self.down.detach())

    @property
    def target(self) -> str | None:
        """What they were fitted to: `spade` or `final` (a tuned lens); None if not recorded."""
        found = self._trained_as.get("target")
        # A fit of both keeps the tuned lens, recorded as `final`, in a separate folder.
        return "spade" if found == "both" else found

    @property
    def scope(self) -> LossScope:
        """The tokens that the loss was over: `vocabulary`, or the `choices` of each row."""
        return self._trained_as.get("scope", "vocabulary")

    @property
    def _trained_as(self) -> dict[str, Any]:
        return self.metadata.get("training", {}).get("recipe", {}).get("model", {})

    @property
    def tuned_lens(self) -> "LSpadeHeads | None":
        """Heads fitted to the model's own answers, if the folder holds both kinds."""
        return self._beside[0] if self._beside else None

    def beside(self, tuned_lens: "LSpadeHeads | None") -> Self:
        """Keep a tuned lens beside these heads, for policies that read both."""
        self._beside = () if tuned_lens is None else (tuned_lens,)
        return self

    @property
    def digest(self) -> str | None:
        """SHA-256 of the weights file they were read from; None if they never were in a file."""
        return self.metadata.get("weights_sha256")

    def extra_repr(self) -> str:
        """What `repr` shows."""
        form = f"{self.form} of rank {self.rank}" if self.form == "low_rank" else self.form
        base = self.metadata.get("base_model", {}).get("model_id")
        return (
            f"layers={self.layers}, {form}, d={self.hidden_size}, target={self.target}, of={base!r}"
        )

    def forward(self, hidden: Float[Tensor, "rows layers d"]) -> Float[Tensor, "rows layers d"]:
        """Translate the hidden states of all layers at once, in the heads' own precision."""
        states = hidden.to(self.bias.dtype)
        stacked = states.transpose(0, 1)  # (layers, rows, d): one batched product
        return states + self._delta(stacked).transpose(0, 1)

    def part(self, which: slice) -> "LSpadeHeads":
        """Heads of some of the layers, as separate leaf tensors that share this one's memory.

        Updates to the part are updates to these heads; gradients stay with the part.
        """
        part = copy(self)
        part.layers = self.layers[which]
        part._parameters = {
            name: nn.Parameter(parameter.detach()[which], parameter.requires_grad)
            for name, parameter in self.named_parameters()
        }
        return part

    @classmethod
    def joined(cls, parts: Sequence["LSpadeHeads"]) -> "LSpadeHeads":
        """Join the heads of groups of layers, given in ascending order of layer."""
        whole = copy(parts[0])
        whole.layers = tuple(layer for part in parts for layer in part.layers)
        whole._parameters = {
            name: nn.Parameter(torch.cat([getattr(part, name).detach() for part in parts]))
            for name in parts[0]._parameters
        }
        return whole

    def translate(self, hidden: Float[Tensor, "*batch d"], layer: int) -> Float[Tensor, "*batch d"]:
        """Map h^layer to a state that the frozen norm and head can read.

        Raises:
            ArtifactError: no head for that layer.
        """
        index = self.index(layer)
        # With a device_map the block may be on another device than the unembedding and these maps.
        states = hidden.to(self.bias.device, self.bias.dtype)
        flat = states.reshape(1, -1, self.hidden_size)
        return states + self._delta(flat, slice(index, index + 1)).reshape(states.shape)

    def logits(
        self, hidden: Float[Tensor, "*batch d"], layer: int
    ) -> Float[Tensor, "*batch vocab"]:
        """L-SPADE's logits at `layer`, in the model's dtype.

        Args:
            hidden: h_a^layer, raw output of that block.
            layer: one of `layers`.

        Raises:
            ArtifactError: no head for that layer, or `bind` was not called.
        """
        if self._unembed is None:
            raise ArtifactError(
                "These heads have no model yet: call heads.bind(model) once, "
                "with the model they were trained for."
            )
        return self._unembed(self.translate(hidden, layer).to(hidden.dtype))

    def index(self, layer: int) -> int:
        """Index of `layer` in the stacked maps.

        Raises:
            ArtifactError: no head for that layer.
        """
        if layer not in self.layers:
            raise ArtifactError(
                f"No head for layer {layer}; these heads have {list(self.layers)}. "
                "Ask for one of them, or fit with that layer in model.layers."
            )
        return self.layers.index(layer)

    def bind(self, model: "PreTrainedModel | ModelAdapter") -> Self:
        """Use the final norm and unembedding of `model`, and move to its device.

        Raises:
            ArtifactError: the heads were fitted for another model (`check_same_model`).
        """
        adapter = ModelAdapter.of(model)
        check_same_model(self.metadata.get("base_model", {}), adapter.identity)
        if self.hidden_size != adapter.hidden_size:
            raise ArtifactError(
                f"These heads are for d={self.hidden_size}, the model has "
                f"d={adapter.hidden_size}. Load the model they were trained for."
            )
        self._unembed = adapter.unembed
        for heads in self._beside:
            heads.bind(adapter)
        return self.to(adapter.unembed.weight.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `heads.safetensors` and `config.json`: both, or neither is replaced.

        A tuned lens beside them is written to `tuned_lens/` first, in the same way.

        Afterwards `metadata` is what `from_pretrained` would read, so a policy can be tied to it.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        folder = Path(folder)
        for heads in self._beside:
            heads.save_pretrained(folder / TUNED_LENS)
        with atomic_path(folder / WEIGHTS, ArtifactError) as weights:
            digest = write_tensors(weights, self.state_dict(), error=ArtifactError)
            config = {
                "format_version": FORMAT_VERSION,
                "layers": list(self.layers),
                "hidden_size": self.hidden_size,
                "form": self.form,
                "rank": self.rank if self.form == "low_rank" else None,
                "weights_sha256": digest,
                "base_model": self.metadata.get("base_model", {}),
                "training": self.metadata.get("training", {}),
            }
            # The weights are still under a temporary name: a full disk leaves the old files alone.
            write_json(folder / CONFIG, config, ArtifactError)
        self.metadata = config

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> Self:
        """Load a heads folder, or a repository of the Hub.

        Args:
            path: folder such as `checkpoints/arc`, or `org/name`.
            revision: branch, tag or commit on the Hub.

        Raises:
            ArtifactError: the folder is missing, damaged, or of an unknown format (HubError: the
                Hub cannot be reached, or has no such repository or revision).
        """
        folder = local_folder(path, revision)
        config = read_json(folder / CONFIG, ArtifactError)
        if config.get("format_version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{folder / CONFIG} has format_version {config.get('format_version')!r}; this "
                f"lspade-train reads {FORMAT_VERSION}. Install the version that wrote it."
            )
        config = {"base_model": {}, "training": {}} | config
        require_kinds(config, KINDS, folder / CONFIG, ArtifactError, AGAIN)
        tensors = read_tensors(folder / WEIGHTS, ArtifactError)
        if file_digest(folder / WEIGHTS) != config.get("weights_sha256"):
            raise ArtifactError(
                f"{folder / WEIGHTS} does not have the checksum in {CONFIG}: it is damaged or was "
                "changed. Fit or download it again."
            )
        try:
            heads = cls._described(config)
            shapes = {name: value.shape for name, value in heads.state_dict().items()}
            if shapes != {name: value.shape for name, value in tensors.items()}:
                raise ValueError(f"expected {shapes!s:.60}")
            heads.to_empty(device="cpu").load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
            raise ArtifactError(
                f"{folder / CONFIG} does not describe {WEIGHTS} ({first_line(cause)}). {AGAIN}"
            ) from cause
        heads.metadata = config
        if (folder / TUNED_LENS / CONFIG).is_file():
            heads.beside(cls.from_pretrained(folder / TUNED_LENS))
        return heads.requires_grad_(False).eval()

    @classmethod
    def _described(cls, config: dict[str, Any]) -> Self:
        """Heads on the meta device: a damaged config may claim more memory than there is."""
        layers, form = config["layers"], config["form"]
        if not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"layers is {layers!s:.40}")
        if layers != sorted(set(layers)) or form not in get_args(Form):
            raise ValueError(f"layers is {layers!s:.40}, form is {form!r:.40}")
        with torch.device("meta"):
            return cls(layers, config["hidden_size"], form=form, rank=config["rank"] or 0)

    def _draw(self, down: Tensor) -> None:
        """Seed by run and layer, so that each layer starts as if it were trained alone."""
        for layer, matrix in zip(self.layers, down, strict=True):
            seeded = torch.Generator().manual_seed(torch.initial_seed() + layer)
            drawn = torch.randn(*matrix.shape, generator=seeded, device="cpu")
            matrix.copy_(drawn / math.sqrt(self.hidden_size))

    def _delta(self, stacked: Tensor, which: slice | None = None) -> Tensor:
        """The learned part of all layers or of a slice, (layers, rows, d) -> (layers, rows, d)."""

        def of(maps: Tensor) -> Tensor:
            # Whole, not `maps[:]`, whose gradient would be copied into zeros of the same size.
            return maps if which is None else maps[which]

        bias = of(self.bias)[:, None]
        if self.form == "full":
            return torch.baddbmm(bias, stacked, of(self.weight))
        if self.form == "low_rank":
            return torch.baddbmm(bias, stacked @ of(self.down), of(self.up))
        return bias.expand(-1, stacked.shape[1], -1)


def check_same_model(base: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Refuse a model whose `identity` differs from `base` (a config's `base_model`).

    Heads and a policy's guarantee hold for one model only: other blocks void both, even with the
    same norm and head. Compared are

    - the configuration, always;
    - norm and head, bit for bit, in the dtype that the heads were fitted in;
    - all weights, by `model_identity`'s sample, in that dtype or between float32 and bfloat16. Not
      between float16 or quantised weights and others, whose values differ by their rounding.

    The device makes no difference, except that quantisation may round differently: different
    weights of the same quantisation are only a warning.

    Raises:
        ArtifactError: another configuration, unembedding or weights.
    """
    same_dtype = base.get("dtype") == identity["dtype"]
    wide = {base.get("dtype"), identity["dtype"]} <= {"float32", "bfloat16"}
    same_quantization = base.get("quantization", "none") == identity["quantization"]
    compared = {
        "model_config": ("another configuration", True),
        "unembedding": ("another unembedding", same_dtype),
        "model_weights": (
            "other weights in its blocks",
            same_quantization and (same_dtype or wide),
        ),
    }
    for field, (what, comparable) in compared.items():
        if not comparable or base.get(field) in (None, identity[field]):
            continue
        message = (
            f"These heads were trained for {base.get('model_id')} "
            f"(revision {base.get('revision')}); the given model has {what}.\n"
            "Load that model, or fit heads for this one with lspade-train fit."
        )
        if field == "model_weights" and identity["quantization"] != "none":
            log.warning("%s", message)
        else:
            raise ArtifactError(message)
