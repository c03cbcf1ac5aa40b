"""`ModelAdapter` over any Hugging Face decoder: record the model's own plan, replay it.

No forward is re-implemented. A shallow copy of the decoder runs once with recorders in place of
its blocks, so that the model's own code computes embeddings, masks, position embeddings and
per-layer choices; `Plan` keeps each block's arguments. With a plan the caller can run the blocks,
stop at any of them, drop rows, or substitute hidden states. Independent of SPADE, heads and tasks.
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

    The caller's model is never modified, and may change between two calls. What is cached for it
    (start-token caches, digests) is then recomputed, and the load-time check repeated if more than
    the values of its weights changed. Thread-safe, also while other threads run the model itself.
    All results are computed without gradients.

    Attributes:
        model: the caller's model, unwrapped from `DataParallel` or `torch.compile`.
        revision: the Hub commit that `from_pretrained` loaded; None for a folder.

    Args:
        model: any Hugging Face decoder-only model, on any device, in any dtype.
        check: check on one short probe that replay, unembedding and the start-token cache
            reproduce the model's own results.
        compile: run the blocks through `torch.compile`; see `data.compile`.

    Raises:
        UnsupportedModelError: the model is not a decoder, uses dropout (training mode), or fails
            the check.
        RecipeError: the blocks cannot be compiled here.
    """

    def __init__(
        self, model: "PreTrainedModel", *, check: bool = True, compile: bool = False
    ) -> None:
        self.model = unwrapped(model)
        self.compiled = compile
        self._apply = compiled_apply() if compile else apply_block
        self._wants_check = False  # not while its parts are looked up
        self._known: Known | None = None
        self.revision: str | None = None
        self.refresh()
        if quantization(self.model) is not None:
            # Now, because the first product on a CPU repacks and rounds bitsandbytes' 4-bit scales.
            _ = self.identity
        if check:
            self.check()

    @classmethod
    def of(cls, model: "PreTrainedModel | ModelAdapter") -> "ModelAdapter":
        """An adapter of `model`; its results are cached for the model's next adapter."""
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
            device: auto (a GPU if there is one) or a torch device.
            device_map: accelerate's map for models too large for one device; replaces `device`.
            quantization: int8 or int4 quantises the blocks while loading; None leaves the
                checkpoint as it is, quantised or not.
            trust_remote_code: run code from the model's repository.
            gguf_file: name of a GGUF file there, whose weights are dequantised while loading.
            check: run the load-time check.
            compile: run the blocks through `torch.compile`.

        Raises:
            UnsupportedModelError: no model there, not a decoder, or the check fails.
            RecipeError: no such device, bitsandbytes is missing, or the blocks do not compile.
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
        # No caller shares this model, so freeze it: training then computes no gradient of its norm.
        adapter = cls(model.eval().requires_grad_(False), check=check, compile=compile)
        adapter.revision = commit
        return adapter

    def check(self) -> None:
        """Check on one short probe that every path reproduces the model's own results.

        Done once, and again when the model's modules, mode or adapters have changed.

        Raises:
            UnsupportedModelError: a path does not.
        """
        self._wants_check = True
        self.refresh()

    def refresh(self) -> Known:
        """Detect changes of the model; called by `plan` and `plan_step`.

        Returns:
            The model's cached properties: the same object as long as nothing has changed.

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
    def steady(self, *, check: bool = False) -> Generator[None]:
        """Detect changes only once for everything inside the block, on this thread.

        Args:
            check: make sure first that the model has been checked, as `check` does.
        """
        self._wants_check |= check
        self.refresh()
        outer = _STEADY.set(self)
        try:
            yield
        finally:
            _STEADY.reset(outer)

    def _check(self, known: Known) -> Known:
        checking = _CHECKING.set(True)  # the check itself calls `plan`
        try:
            check_adapter(self)
            if quantization(self.model) is not None:
                known = self.refresh()  # the first run may move its weights
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
        """Longest prompt in tokens, or None if positions are unlimited."""
        config = self.text_config
        named = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
        return next((getattr(config, name) for name in named if hasattr(config, name)), None)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens at which `generate` stops; () if there are none."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    @property
    def device(self) -> torch.device:
        """Device for token ids."""
        return cast(Tensor, self.model.get_input_embeddings().weight).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return self.model.dtype

    @property
    def identity(self) -> dict[str, str]:
        """What identifies this model: digests, dtype and quantisation."""
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
            input_ids: prompts, padded on either side; on the right if they share tokens.
            attention_mask: 1 or True for real tokens; None if nothing is padded.
            shared: number of leading tokens that all prompts have in common and that are run once,
                now or in an earlier call; less than the shortest prompt's length. See
                `shared_groups`.

        Returns:
            The plan; its `hidden` is h^0 of the tokens after the shared ones.

        Raises:
            TaskError: a token id outside the model's vocabulary, or a mask of another shape.
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
        """Plan one single-token row per start token: the row attends to that token and itself.

        Args:
            start_ids: first real token of each row's prompt.
            positions: position id of the row's own token.

        Returns:
            A plan over (rows, 1, d). Its `hidden` is a placeholder: substitute your own.
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
        """Plan a forward after the tokens in `cache`, which the blocks fill as they run.

        Args:
            input_ids: new tokens.
            attention_mask: 1 for real tokens, over the cached and the new ones.
            position_ids: position ids of the new tokens.
            cache: keys and values so far; None uses no cache.
        """
        return self._record(input_ids, attention_mask, position_ids, cache)

    @torch.no_grad()
    def run_block(
        self, plan: Plan, block: int, hidden: Float[Tensor, "rows tokens d"]
    ) -> Float[Tensor, "rows tokens d"]:
        """Apply block number `block` (0-based: it maps h^block to h^(block+1))."""
        args, kwargs = plan.call(block)
        return self._apply(without_checkpointing(self.blocks[block]), hidden, args, kwargs)

    @torch.no_grad()
    def model_unembed(self, hidden: Float[Tensor, "rows tokens d"]) -> Tensor:
        """Logits from raw outputs of the last block, by the model's own code; slow but exact.

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
        """Keys and values of a start token, or of a longer prefix, at every block.

        Cached while they are valid and there is room. Always computed alone: in a batch, the last
        bits would depend on the other rows.
        """
        known = self._known
        assert known is not None

        return known.start(tokens, self.device, partial(prefill, self, tokens))
