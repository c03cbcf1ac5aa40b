"""`ModelAdapter` over any Hugging Face decoder: record the model's own plan, replay it.

No forward is re-implemented. A shallow copy of the decoder runs once with recorders in place of
its blocks, so that the model's own code computes embeddings, masks, position embeddings and
per-layer choices; `Plan` keeps what each block was given. Whoever holds a plan runs the blocks,
stops where it likes, drops rows, or substitutes hidden states. Knows nothing of SPADE, heads or
tasks.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from lspade_train.errors import TaskError
from lspade_train.models.compiled import apply_block, compiled_apply
from lspade_train.models.identity import model_identity, quantization
from lspade_train.models.known import Known, known_of
from lspade_train.models.load_check import check_adapter
from lspade_train.models.loading import hub_commit, load_model
from lspade_train.models.plan import Plan, StartCache, token_mask
from lspade_train.models.recorder import Recorder
from lspade_train.models.shadow import without_checkpointing
from lspade_train.models.sharing import prefill
from lspade_train.models.snapshot import snapshot
from lspade_train.models.structure import (
    Signature,
    find_decoder,
    refuse_dropout,
    unwrapped,
)
from lspade_train.models.unembedding import find_unembedding
from lspade_train.recipe import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CHECKING: ContextVar[bool] = ContextVar("lspade_checking", default=False)
_STEADY: ContextVar["ModelAdapter | None"] = ContextVar("lspade_steady", default=None)


class ModelAdapter:
    """A causal language model, run block by block, without modifying it.

    The model stays the caller's: nothing is set on it, and it may change between two calls. What
    is kept of it (start-token caches, digests) is then worked out again, and so is the load-time
    check where more than its weights' values changed. Safe to use from several threads, also
    while others run the model itself. Every call that returns numbers runs without gradients.

    Attributes:
        model: what the caller gave, out of `DataParallel` or `torch.compile`.
        revision: the Hub commit that `from_pretrained` loaded; None for a folder.

    Args:
        model: any Hugging Face decoder-only model, on any device, in any dtype.
        check: prove on one short probe that replay, unembedding and the start-token cache give
            the model's own numbers.
        compile: run the blocks through `torch.compile`; `data.compile` says what that takes.

    Raises:
        UnsupportedModelError: the model is not a decoder, drops values at random (training mode),
            or fails the check.
        RecipeError: the blocks cannot be compiled here.
    """

    def __init__(
        self, model: "PreTrainedModel", *, check: bool = True, compile: bool = False
    ) -> None:
        self.model = unwrapped(model)
        self.compiled = compile
        self._apply = compiled_apply() if compile else apply_block
        self._wants_check = False  # while its parts are looked up
        self._known: Known | None = None
        self.revision: str | None = None
        self.refresh()
        if quantization(self.model) is not None:
            # Now: bitsandbytes rounds 4-bit scales when their first product on a CPU repacks them.
            _ = self.identity
        if check:
            self.check()

    @classmethod
    def of(cls, model: "PreTrainedModel | ModelAdapter") -> "ModelAdapter":
        """An adapter of `model`; what it computes is cached for the model's next adapter."""
        return model if isinstance(model, ModelAdapter) else cls(model)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        quantization: Quantization | None = None,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        check: bool = True,
        compile: bool = False,
    ) -> Self:
        """Load a Hub id or a folder.

        Args:
            model_id: Hub id or folder.
            revision: commit, tag or branch on the Hub.
            dtype: auto (the checkpoint's), float32, bfloat16 or float16.
            device: auto (a GPU when there is one) or a torch device.
            device_map: accelerate's map for models too large for one device; replaces `device`.
            quantization: int8 or int4 quantises the blocks while loading; None leaves the
                checkpoint as it is, quantised or not.
            trust_remote_code: run code from the model's repository.
            gguf_file: name of a GGUF file there, whose weights are unpacked while loading.
            check: run the load-time check.
            compile: run the blocks through `torch.compile`.

        Raises:
            UnsupportedModelError: nothing there, no decoder, or the check fails.
            RecipeError: no such device, no bitsandbytes here, or blocks that do not compile.
        """
        commit = hub_commit(model_id, revision, gguf_file=gguf_file)
        model = load_model(
            model_id,
            revision=commit or revision,
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
            gguf_file=gguf_file,
        )
        # Ours alone, so it may be frozen: training heads then computes no gradient of its norm.
        adapter = cls(model.eval().requires_grad_(False), check=check, compile=compile)
        adapter.revision = commit
        return adapter

    def check(self) -> None:
        """Prove on one short probe that every path gives the model's own numbers.

        Done once, and again when the model's modules, mode or adapters have changed.

        Raises:
            UnsupportedModelError: one of them does not.
        """
        self._wants_check = True
        self.refresh()

    def refresh(self) -> Known:
        """See the model as it is now; `plan` and `plan_step` call this.

        Returns:
            What is known of it: the same object for as long as nothing has changed.

        Raises:
            UnsupportedModelError: it can no longer be run block by block.
        """
        if _STEADY.get() is self and self._known is not None:
            return self._known
        quantised = quantization(self.model) is not None
        known = known_of(self.model, snapshot(self.model), keeps_identity=quantised)
        if known is not self._known:
            self.decoder, self.blocks = find_decoder(self.model)
            refuse_dropout(self.model)
            self.unembed = find_unembedding(self.model, self.decoder)
            self._recorder = Recorder(self.model, self.decoder, self.blocks)
            self._known = known
        if self._wants_check and self.compiled not in known.checked and not _CHECKING.get():
            with known.lock:
                if self.compiled not in known.checked:
                    known = self._check(known)
        return known

    @contextmanager
    def steady(self) -> Generator[None]:
        """See the model once for everything that is done inside, on this thread."""
        self.refresh()
        outer = _STEADY.set(self)
        try:
            yield
        finally:
            _STEADY.reset(outer)

    def _check(self, known: Known) -> Known:
        checking = _CHECKING.set(True)  # the check itself plans runs
        try:
            check_adapter(self)
            if quantization(self.model) is not None:
                known = self.refresh()  # its weights have moved in its first run
        finally:
            _CHECKING.reset(checking)
        known.checked.add(self.compiled)
        return known

    # What the model is ----------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return int(self.text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return int(self.unembed.weight.shape[0])

    @property
    def text_config(self) -> Any:
        """The decoder's configuration, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def max_length(self) -> int | None:
        """Longest prompt in tokens, or None where the positions have no end."""
        config = self.text_config
        named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
        return next((getattr(config, name) for name in named if hasattr(config, name)), None)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a generated text, as `generate` ends it; () where there are none."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return cast(Tensor, self.model.get_input_embeddings().weight).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return self.model.dtype

    @property
    def identity(self) -> dict[str, str]:
        """What tells this model from another: digests, dtype and quantisation."""
        known = self.refresh()
        if known.identity is None:
            known.identity = model_identity(self.model, self.unembed.digest)
        return known.identity

    # Recording and replaying ----------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows tokens"] | None = None,
        *,
        shared: int = 0,
    ) -> Plan:
        """Let the decoder plan a forward over whole prompts; no block runs.

        Args:
            input_ids: prompts, padded on either side; on the right where they share tokens.
            attention_mask: 1 or True for real tokens; None where nothing is padded.
            shared: leading tokens that all prompts have in common and that are run once, now or
                in an earlier call; fewer than the shortest prompt has. `shared_groups` finds
                them.

        Returns:
            The plan; its `hidden` is h^0 of the tokens behind the shared ones.

        Raises:
            TaskError: a token id that the model has no embedding for, or a mask of another shape.
        """
        self.refresh()
        self._check_ids(input_ids)
        mask = token_mask(input_ids, attention_mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if not shared:
            return self._record(input_ids, mask, positions, None)
        start = tuple(input_ids[0, :shared].tolist())
        rows = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        cache = StartCache([self.start_cache(*start)], rows)
        return self._record(input_ids[:, shared:], mask, positions[:, shared:], cache)

    @torch.no_grad()
    def plan_step(self, start_ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> Plan:
        """Plan one single-token row per start token: the row sees that token and itself.

        Args:
            start_ids: first real token of each row's prompt.
            positions: position id of the row's own token.

        Returns:
            A plan over (rows, 1, d). Its `hidden` means nothing: substitute your own.
        """
        self.refresh()
        distinct, rows = start_ids.unique(return_inverse=True)
        cache = StartCache([self.start_cache(int(token)) for token in distinct], rows)
        mask = start_ids.new_ones(len(start_ids), 2)
        return self._record(start_ids[:, None], mask, positions[:, None], cache)

    @torch.no_grad()
    def plan_cached(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows seen"],
        position_ids: Int[Tensor, "rows tokens"],
        cache: DynamicCache | None,
    ) -> Plan:
        """Plan a forward behind the tokens in `cache`, which the blocks fill as they run.

        Args:
            input_ids: new tokens.
            attention_mask: 1 for real tokens, over the cached and the new ones.
            position_ids: of the new tokens.
            cache: keys and values so far; None keeps none.
        """
        return self._record(input_ids, attention_mask, position_ids, cache)

    @torch.no_grad()
    def run_block(
        self, plan: Plan, block: int, hidden: Float[Tensor, "rows tokens d"]
    ) -> Float[Tensor, "rows tokens d"]:
        """Apply block number `block` (0-based: it makes h^(block+1) of h^block)."""
        args, kwargs = plan.call(block)
        return self._apply(without_checkpointing(self.blocks[block]), hidden, args, kwargs)

    @torch.no_grad()
    def model_unembed(self, hidden: Float[Tensor, "rows tokens d"]) -> Tensor:
        """Logits by the model's own code from raw outputs of the last block; slow, exact.

        The reference that `unembed` is checked against.
        """
        return self._recorder.unembed(self._signature(), hidden)

    @torch.no_grad()
    def model_logits(
        self, input_ids: Int[Tensor, "rows tokens"], mask: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens vocab"]:
        """The model's own forward over whole prompts."""
        return self._recorder.logits(self.model, input_ids, mask)

    def _signature(self) -> Signature:
        known = self._known
        assert known is not None
        with known.lock:
            if known.signature is None:
                known.signature = self._recorder.signature()
            return known.signature

    def _record(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None
    ) -> Plan:
        return self._recorder.plan(self._signature(), input_ids, mask, positions, cache)

    def _check_ids(self, input_ids: Tensor) -> None:
        rows = int(cast(Tensor, self.model.get_input_embeddings().weight).shape[0])
        low, high = (int(found) for found in input_ids.aminmax())
        if low < 0 or high >= rows:
            raise TaskError(
                f"Token id {low if low < 0 else high} is outside the model's vocabulary, "
                f"0..{rows - 1}. Tokenize with the tokenizer that belongs to this model."
            )

    @torch.no_grad()
    def start_cache(self, *tokens: int) -> DynamicCache:
        """Keys and values of a start token, or of a longer beginning, at every block.

        Kept for as long as they hold and there is room. Always alone: in a batch their last bits
        would depend on the other rows.
        """
        known = self._known
        assert known is not None

        return known.start(tokens, self.device, partial(prefill, self, tokens))
