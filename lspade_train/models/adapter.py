"""`ModelAdapter` over any Hugging Face decoder: record the model's own plan, replay it.

No forward is re-implemented. The model's decoder runs once with recorders in place of its blocks,
so that embeddings, masks, position embeddings and per-layer choices are computed by the model's
own code; `Plan` keeps what each block was given. Whoever holds a plan runs the blocks, stops where
it likes, drops rows, or substitutes hidden states. Knows nothing of SPADE, heads or tasks.
"""

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from lspade_train.models.compiled import apply_block, compiled_apply
from lspade_train.models.identity import model_identity, quantization
from lspade_train.models.load_check import check_adapter
from lspade_train.models.loading import hub_commit, load_model
from lspade_train.models.plan import Plan, StartCache
from lspade_train.models.structure import Stage, find_decoder
from lspade_train.models.unembedding import find_unembedding
from lspade_train.recipe import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelAdapter:
    """A frozen causal language model, driven block by block.

    Attributes:
        revision: the Hub commit that `from_pretrained` loaded; None for a folder.

    Args:
        model: any Hugging Face decoder-only model, on any device, in any dtype.
        check: prove on one short probe that replay, unembedding and the start-token cache give
            the model's own numbers.
        compile: run the blocks through `torch.compile`; `data.compile` says what that takes.

    Raises:
        UnsupportedModelError: the model is no decoder, or fails the check.
        RecipeError: the blocks cannot be compiled here.
    """

    def __init__(
        self, model: "PreTrainedModel", *, check: bool = True, compile: bool = False
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.decoder, self.blocks = find_decoder(model)
        self.unembed = find_unembedding(model, self.decoder)
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.compiled = compile
        self._apply = compiled_apply() if compile else apply_block
        self._stage = Stage(self.blocks, self._call_padded)
        self._starts: dict[int, DynamicCache] = {}
        self._checked = False
        self.revision: str | None = None
        if quantization(model) is not None:
            # Now: bitsandbytes rounds 4-bit scales when their first product on a CPU repacks them.
            _ = self.identity
        if check:
            self.check()

    @classmethod
    def of(cls, model: "PreTrainedModel | ModelAdapter") -> "ModelAdapter":
        """The adapter of `model`, made once and kept on it."""
        if isinstance(model, ModelAdapter):
            return model
        known = model.__dict__.get("_lspade_adapter")
        if known is None:
            known = model.__dict__["_lspade_adapter"] = cls(model)
        return known

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
        adapter = cls(model, check=check, compile=compile)
        adapter.revision = commit
        return adapter

    def check(self) -> None:
        """Prove on one short probe that every path gives the model's own numbers; done once.

        Raises:
            UnsupportedModelError: one of them does not.
        """
        if not self._checked:
            check_adapter(self)
            self._checked = True

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

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells this model from another: digests, dtype and quantisation."""
        return model_identity(self.model, self.unembed.digest)

    # Recording and replaying ----------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        attention_mask: Int[Tensor, "rows tokens"] | None = None,
    ) -> Plan:
        """Let the decoder plan a forward over whole prompts; no block runs.

        Args:
            input_ids: prompts, padded on either side.
            attention_mask: 1 for real tokens; None where nothing is padded.

        Returns:
            The plan; its `hidden` is h^0.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return self._record(input_ids, mask, positions, None)

    @torch.no_grad()
    def plan_step(self, start_ids: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> Plan:
        """Plan one single-token row per start token: the row sees that token and itself.

        Args:
            start_ids: first real token of each row's prompt.
            positions: position id of the row's own token.

        Returns:
            A plan over (rows, 1, d). Its `hidden` is of no meaning: substitute your own.
        """
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

    def run_block(
        self, plan: Plan, block: int, hidden: Float[Tensor, "rows tokens d"]
    ) -> Float[Tensor, "rows tokens d"]:
        """Apply block number `block` (0-based: it makes h^(block+1) of h^block)."""
        args, kwargs = plan.call(block)
        return self._apply(self.blocks[block], hidden, args, kwargs)

    @torch.no_grad()
    def model_unembed(self, hidden: Float[Tensor, "rows tokens d"]) -> Tensor:
        """Logits by the model's own code from raw outputs of the last block; slow, exact.

        The reference that `unembed` is checked against.
        """
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)

        def pass_on(state: Tensor, *_: Any, **__: Any) -> Any:
            return self._stage.as_output(state)

        def last(*_: Any, **__: Any) -> Any:
            return self._stage.as_output(hidden)

        with self._stage.replaced([pass_on] * (self.num_layers - 1) + [last]):
            return self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits

    def _record(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None
    ) -> Plan:
        per_row = self._stage.signature.per_row
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def recorder(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, args, kwargs))
            return self._stage.as_output(hidden)

        with self._stage.replaced([recorder] * self.num_layers):
            self._call_decoder(input_ids, mask, positions, cache, use_cache=cache is not None)
        return Plan(seen[0][0], tuple((args, kwargs) for _, args, kwargs in seen), per_row)

    def _call_padded(self, rows: int) -> None:
        """Run the decoder on a few tokens, some of them padding, so that every mask is there."""
        ids = torch.ones(rows, 5, dtype=torch.long, device=self.device)
        mask = torch.ones_like(ids)
        mask[1:, -1] = 0
        self._call_decoder(ids, mask, (mask.cumsum(-1) - 1), None, use_cache=False)

    def _call_decoder(
        self,
        input_ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        *,
        use_cache: bool,
    ) -> None:
        # The mask is always passed: without one, position ids with a gap are taken for two packed
        # sequences and the start token is masked out in silence.
        extra = {"position_ids": positions} if self.takes_positions else {}
        self.decoder(
            input_ids=input_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=use_cache,
            **extra,
        )

    def start_cache(self, token: int) -> DynamicCache:
        """Keys and values of one start token at every block, computed once.

        Always alone: in a batch their last bits would depend on the other tokens.
        """
        if token not in self._starts:
            cache = DynamicCache(config=self.model.config)
            ids = torch.tensor([[token]], device=self.device)
            with self._stage.lock:
                self._call_decoder(
                    ids, torch.ones_like(ids), torch.zeros_like(ids), cache, use_cache=True
                )
            self._starts[token] = cache
        return self._starts[token]
