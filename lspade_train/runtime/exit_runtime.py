"""`ExitRuntime`: a frozen model, its heads and a policy, ready to answer prompts."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from lspade_train.errors import PolicyError, TaskError
from lspade_train.models import ModelAdapter
from lspade_train.policies.drafting import Drafting
from lspade_train.policies.policy import REMEDY, ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED, find_measure
from lspade_train.runtime.audit import Audit, Auditor
from lspade_train.runtime.batching import (
    Choices,
    Prompt,
    Query,
    batches,
    encode,
    encode_prefix,
    shared_batches,
)
from lspade_train.runtime.decide import Decision, Probe, answers, decide_batch
from lspade_train.runtime.generate import (
    Generation,
    check_policy,
    check_tokens,
    generate_batch,
)
from lspade_train.runtime.lossless import Drafter, generate_lossless, why_plain
from lspade_train.runtime.sampling import Sampling
from lspade_train.runtime.steps import Step, join

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class ExitRuntime:
    """SPADE-EXIT (SimExit in paper v2) over any Hugging Face decoder.

    The model is not modified and can still be used directly; a runtime is thread-safe. Each call
    uses the model as it is then: a model that has changed so that the heads no longer belong to it
    is refused.

    Args:
        model: the model, or its adapter.
        heads: its L-SPADE heads; None only with the decoder `logit_lens` or with no check.
        policy: when to stop and how to answer.
        tokenizer: the model's; needed for prompts and choices in text.
        tokens_per_batch: padded tokens per batch.
        audit: answers a random share of `decide`'s rows with the full model, too, and raises an
            alarm where they disagree more than the budget allows. `generate` is not audited.

    Attributes:
        auditor: the running audit; `state` holds its counts, `flush()` writes the pending ones.

    Raises:
        ArtifactError: heads of another model, or none for a check layer.
        PolicyError: a policy for other heads, or that this model cannot follow.
        AuditError: an audit without a budget, or whose state is damaged or of another policy.

    Source: arXiv:2507.17618, SPADE-EXIT.
    """

    def __init__(
        self,
        model: "PreTrainedModel | ModelAdapter",
        heads: LSpadeHeads | None,
        *,
        policy: ExitPolicy,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tokens_per_batch: int = 8192,
        audit: Audit | None = None,
    ) -> None:
        self.adapter = ModelAdapter.of(model)
        self.heads = None if heads is None else heads.bind(self.adapter)
        self.policy = policy
        self.tokenizer = tokenizer
        self.tokens_per_batch = tokens_per_batch
        self.probe = Probe(self.adapter, self.heads, policy)
        self.full = Probe(self.adapter, None, ExitPolicy(layers=(), scope=policy.scope))
        self._bound = self.adapter.refresh()
        beside = None if heads is None else heads.tuned_lens
        digest = None if heads is None else heads.digest
        policy.check_heads(digest, None if beside is None else beside.digest)
        _check_fit(policy, self.adapter)
        self._require_heads()
        self.auditor = (
            Auditor(audit, self.adapter, self.heads, policy, tokens_per_batch) if audit else None
        )

    def __repr__(self) -> str:
        model = type(self.adapter.model).__name__
        audited = ", audited" if self.auditor else ""
        return (
            f"ExitRuntime({model}, {self.adapter.num_layers} blocks{audited},\n"
            f"  {self.heads!r},\n  {self.policy!r})"
        )

    def decide(
        self,
        prompts: Sequence[Prompt],
        choices: Choices | Sequence[Choices | None] | None = None,
        *,
        groups: Sequence[str | None] | None = None,
        prefix: Prompt | None = None,
        counted: int = 0,
    ) -> list[Decision]:
        """One answer for each prompt, with as few blocks as the policy allows.

        Prompts are batched by length within `tokens_per_batch`; the order is restored. A model
        without BOS takes the prompt's first token as the start token. A prefix that
        the prompts of a call share is run once if that saves some hundred tokens, and its keys and
        values are kept for later calls with the same prefix.

        A choice of several tokens is decided at the first that tells it from the others, as in
        constrained decoding. Choices that begin alike are one option there; if it is taken, its
        tokens join the prompt and the next step decides among them, by the same policy.

        Args:
            prompts: texts, or token ids with the start token first.
            choices: answers to choose from: one list for all prompts, one list (or None) per
                prompt, or None for the whole vocabulary. Texts, token ids, or a mapping from
                labels to tokens.
            groups: each prompt's subgroup of the task; needed where the policy lets only some
                groups exit (`exit_groups`). The full model answers the others.
            prefix: text or token ids, like the prompts, that every prompt begins with. They are
                run once even if a call has a single prompt. None: found automatically.
            counted: number of leading prompts that the audit counted in an earlier run.

        Raises:
            PolicyError: a policy that needs groups, without any.
            TaskError: an empty prompt, one over the context, choices that no token tells apart, a
                prompt that does not begin with the prefix.
            ArtifactError: the model has changed and the heads no longer belong to it.
            UnsupportedModelError: the model has changed and can no longer be run block by block.
            NumericsError: NaN logits.
        """
        with self.adapter.steady():
            return self._decide(prompts, choices, groups, prefix, counted)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        drafting: Drafting | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        on_token: Callable[[int, int], object] = lambda _, __: None,
    ) -> list[Generation]:
        """Several tokens for each prompt: the full model's with `drafting`, else from an exit.

        With `drafting` a head drafts tokens at a layer and the full model verifies them: greedy
        text is the model's own token for token, sampled text has its distribution, but for
        rounding. The policy has no part in it. `runtime/lossless.py` explains it.

        Of the model's generation_config only the end-of-text tokens are used: a repetition penalty
        or other settings there are not.

        Without, all tokens come from the exit layer of the first one, and the policy's calibrated
        guarantee covers that one only. `runtime/generate.py` explains it and its limits. Our
        extensions both, not the paper's.

        Args:
            prompts: texts, or token ids with the start token first.
            max_new_tokens: most tokens per prompt; the model's end-of-text token ends it earlier.
            drafting: where and how much to draft. A model whose several tokens at once are not
                those one by one is decoded plainly, and a warning says so.
            temperature: 0 takes the most probable token.
            top_p: sample from the smallest set of tokens that holds this probability.
            generator: source of randomness, on the model's device.
            on_token: called with (index of the prompt, token) as tokens come.

        Raises:
            TaskError: an empty prompt, or one that leaves no room for the new tokens.
            PolicyError: a setting out of range, a policy of scope `choices` without `drafting`, or
                a drafting that model and heads cannot follow.
            ArtifactError, UnsupportedModelError, NumericsError: as `decide`.
        """
        self._follow_model()
        check_tokens(max_new_tokens)
        sampling, probe, drafter = Sampling(temperature, top_p, generator), self.probe, None
        if drafting is None:
            check_policy(self.policy)
        else:
            drafter = Drafter(self.adapter, self.heads, drafting)
        queries = encode(prompts, None, self.adapter, self.tokenizer, new_tokens=max_new_tokens)
        longest = max((len(query.ids) for query in queries), default=0) + max_new_tokens
        plain = None if drafter is None else why_plain(self.adapter, longest)
        if plain is not None:
            log.warning("decoding plainly, without drafts: %s", plain)
            drafter, probe = None, Probe(self.adapter, None, ExitPolicy.never())
        found: dict[int, Generation] = {}
        for batch in batches(queries, self.tokens_per_batch, self.adapter.device):
            if drafter is not None:
                found |= generate_lossless(
                    drafter, batch, sampling, max_new_tokens=max_new_tokens, listen=on_token
                )
                continue
            found |= generate_batch(
                probe, batch, sampling.pick, max_new_tokens=max_new_tokens,
                ends=self.adapter.end_tokens, listen=on_token,
            )  # fmt: skip
        return [self._spelled(found[index]) for index in range(len(prompts))]

    def _decide(
        self,
        prompts: Sequence[Prompt],
        choices: Choices | Sequence[Choices | None] | None,
        groups: Sequence[str | None] | None,
        prefix: Prompt | None,
        counted: int,
    ) -> list[Decision]:
        self._follow_model()
        queries = encode(prompts, choices, self.adapter, self.tokenizer)
        self._check_scope(queries)
        queries = self._with_groups(queries, groups)
        stopped = self.auditor is not None and self.auditor.stopped
        start = None if prefix is None else encode_prefix(prefix, prompts, self.tokenizer)
        may = [query for query in queries if not stopped and self.policy.may_exit(query.group)]
        free = {query.index for query in may}
        rest = [query for query in queries if query.index not in free]
        walked = [*self._walk(self.probe, may, start), *self._walk(self.full, rest, start)]
        walked.sort(key=lambda one: one[0][0].index)  # stable: a prompt's steps stay in order
        if self.auditor is not None:  # after all batches: a call that fails counts no row twice
            new = [one for one in walked if one[0][0].index >= counted]
            asked = [replace(query, index=n) for n, ((query, _), _) in enumerate(new)]
            found = {n: decision for n, ((_, decision), _) in enumerate(new)}
            shared = {n: tokens for n, (_, tokens) in enumerate(new)}
            self.auditor.observe(asked, found, full=stopped, shared=shared)
        by_prompt: list[list[Step]] = [[] for _ in prompts]
        for (query, decision), _ in walked:
            by_prompt[query.index].append((query, decision))
        return [self._worded(join(of_prompt)) for of_prompt in by_prompt]

    def _walk(
        self, probe: Probe, queries: list[Query], start: Sequence[int] | None
    ) -> Iterator[tuple[Step, int]]:
        """Each step of each query, its steps in their order, and how many tokens were shared."""
        while queries:
            deeper: list[Query] = []
            for batch in shared_batches(queries, self.tokens_per_batch, self.adapter, start):
                outcome = decide_batch(probe, batch)
                decisions = answers(outcome, batch, self.policy, self.adapter.num_layers)
                for query, decision in zip(batch.queries, decisions, strict=True):
                    yield (query, decision), batch.shared
                    following = query.behind(decision.token_id)
                    deeper += [] if following is None else [following]
            queries = deeper

    def _require_heads(self) -> None:
        """Refuse heads that the policy needs and that are not there, before anything runs."""
        policy = self.policy
        checked = policy.check_layers and policy.measure != FIXED
        if checked and self.heads is None and policy.decoder != "logit_lens":
            raise PolicyError(
                f"The policy's checks need heads (decoder {policy.decoder}); got None. Load them "
                "with LSpadeHeads.from_pretrained, or use the decoder logit_lens."
            )
        for heads in (self.probe.readers | self.probe.answer_heads).values():
            for layer in policy.check_layers if heads is not None else ():
                heads.index(layer)  # pyright: ignore[reportOptionalMemberAccess]

    def _with_groups(
        self, queries: Sequence[Query], groups: Sequence[str | None] | None
    ) -> list[Query]:
        """The queries with their groups."""
        if groups is None:
            if self.policy.exit_groups is not None:
                raise PolicyError(
                    "The policy lets only rows of some groups exit "
                    f"({', '.join(self.policy.exit_groups) or 'none'}): give each prompt's group "
                    "(groups=...), or calibrate one with --small_groups exclude."
                )
            return [*queries]
        if len(groups) != len(queries):
            raise TaskError(f"{len(groups)} groups for {len(queries)} prompts. Give one each.")
        return [replace(query, group=g) for query, g in zip(queries, groups, strict=True)]

    def _follow_model(self) -> None:
        """See whether the heads still belong to the model, where it has changed."""
        known = self.adapter.refresh()
        if known is not self._bound:
            if self.heads is not None and self.heads.metadata.get("base_model"):
                self.heads.bind(self.adapter)
            elif self.heads is not None:
                self.heads.to(self.adapter.unembed.weight.device)
            self._bound = known

    def _spelled(self, generation: Generation) -> Generation:
        if self.tokenizer is None:
            return generation
        text = self.tokenizer.decode([*generation.token_ids], skip_special_tokens=True)
        return replace(generation, text=str(text))

    def _worded(self, decision: Decision) -> Decision:
        if decision.text is not None or self.tokenizer is None:
            return decision
        return replace(decision, text=str(self.tokenizer.decode([decision.token_id])))

    def _check_scope(self, queries: Sequence[Query]) -> None:
        if self.policy.scope == "choices" and any(query.choices is None for query in queries):
            raise TaskError(
                "The policy's scope is choices, and a prompt has none: give its choices, or "
                "calibrate a policy with scope vocabulary."
            )


def _check_fit(policy: ExitPolicy, adapter: ModelAdapter) -> None:
    top = adapter.num_layers - 1
    if policy.layers and policy.layers[-1] > top:
        raise PolicyError(
            f"The policy checks layer {policy.layers[-1]}; this model's check layers go from 0 to "
            f"{top}. {REMEDY}"
        )
    if policy.threshold is None:
        return
    limits = policy.threshold if isinstance(policy.threshold, tuple) else (policy.threshold,)
    measure = find_measure(policy.measure)
    most = measure.bounds(adapter.vocab_size)[1]
    if max(limits, default=most) > most:
        unit = f" {measure.unit}" if measure.unit else ""
        raise PolicyError(
            f"threshold {max(limits)} is out of range: the {measure.name} of "
            f"{adapter.vocab_size} tokens is at most {most:.3f}{unit}. {REMEDY}"
        )
