"""`lspade`, a model for the LM Evaluation Harness: its multiple-choice tasks with early exits.

    python -m lspade_train.integrations.lm_eval --model lspade \
        --model_args pretrained=MODEL,heads=FOLDER --tasks arc_challenge

is the harness's own command line with this model registered. Releases that read entry points (none
up to 0.4.13) find it from plain `lm_eval` too.

A question whose continuations are all single tokens goes through SPADE-EXIT once, and its choices
are scored from that run. The harness moves white space at the end of a context, such as the newline
at the end of a chat template, into the continuations; for a question it is moved back into the
prompt, and its log-likelihood, the same for all choices, is left out of their scores. With
`label_tokens=N`, continuations of up to N tokens, such as "entailment", are labels: the first token
in which they differ decides and is scored. Longer continuations, labels of which only some begin
alike, rolling likelihoods and generated text are left to the full model, through the harness's own
`hf` model, and are counted. With a policy that never exits this applies to every request, so the
scores are those of `--model hf` bit for bit.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.api.registry import register_model
from lm_eval.models import huggingface
from torch import Tensor
from tqdm import tqdm

from lspade_train.errors import PolicyError, UnsupportedModelError
from lspade_train.io.fetch import local_folder
from lspade_train.io.layout import POLICY
from lspade_train.models.checkpoint import load_checkpoint
from lspade_train.models.labels import Fork, conflict
from lspade_train.policies.flops import count_flops, paid_flops
from lspade_train.policies.policy import ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Batch, Query, shared_batches
from lspade_train.runtime.decide import Check, Probe, decide_batch

NEVER = "never"

HFLM: Any = huggingface.HFLM  # its decorator hides its type

Request = tuple[Any, list[int], list[int]]
"""The harness's: text (context, continuation), None within a rolling likelihood; their ids."""


@dataclass(frozen=True)
class Question:
    """Requests that share a context and differ in one token.

    Args:
        context: token ids up to that token.
        tokens: index of a request -> its token.
        texts: index of a request -> the harness's own texts.
        moved: whether white space that the harness had moved was moved back into the context.
    """

    context: tuple[int, ...]
    tokens: dict[int, int]
    texts: dict[int, Any]
    moved: bool


Answer = tuple[float, bool]
"""Log-likelihood in nats, and whether the continuation is the most probable one."""

# A child of the harness's logger, shown together with the harness's own messages.
log = logging.getLogger("lm_eval.lspade")


class Scorer(Probe):
    """Exits by the policy, but answers over the vocabulary, as log-likelihoods require."""

    def answer(
        self, state: Float[Tensor, "rows d"], batch: Batch, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of every token, for any scope of the policy."""
        policy = replace(self.policy, scope="vocabulary")
        return Probe(self.adapter, self.heads, policy).read(state, batch, rows)

    def exit_logits(
        self,
        check: Check | None,
        hidden: Float[Tensor, "rows d"],
        layer: int,
        batch: Batch,
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows vocab"]:
        """Logits of every token, recomputed, since a check may have read the choices only."""
        if self.policy.scope == "choices":
            return self.answer(self.exit_state(hidden, layer), batch, rows)
        return super().exit_logits(check, hidden, layer, batch, rows)


@dataclass
class Tally:
    """Exit layers of the questions, and counts of requests left to the full model.

    Attributes:
        tokens: prompt length of each question.
        choices: number of its choices.
        layers: its exit layer; L is the full model.
        moved: number of questions whose white space was moved back into the prompt.
        full_model: number of requests for which no exit was tried, by kind.
    """

    tokens: list[int] = field(default_factory=list[int])
    choices: list[int] = field(default_factory=list[int])
    layers: list[int] = field(default_factory=list[int])
    moved: int = 0
    full_model: Counter[str] = field(default_factory=Counter[str])

    def summary(self, runtime: ExitRuntime | None) -> dict[str, Any]:
        """Summary for the harness's results; fractions and FLOPs are over the questions."""
        found: dict[str, Any] = {
            "questions": len(self.layers),
            "white_space_read_as_prompt": self.moved,
            "full_model_requests": dict(self.full_model),
        }
        if runtime is None or not self.layers:
            return found
        top = runtime.adapter.num_layers
        exited = sum(layer < top for layer in self.layers)
        return found | {
            "num_layers": top,
            "exited": exited / len(self.layers),
            "mean_exit_layer": sum(self.layers) / len(self.layers),
            "flops_saved": self._saved(runtime),
        }

    def _saved(self, runtime: ExitRuntime) -> float:
        """Fraction of the plain model's FLOPs that is saved, with checks, each prompt alone."""
        counts = count_flops(runtime.adapter, runtime.heads)
        tokens, layers = torch.tensor(self.tokens), torch.tensor(self.layers)
        widths = torch.tensor(self.choices)
        paid = 0.0
        for width in widths.unique():
            mine = widths == width
            costs = paid_flops(
                counts, tokens[mine], layers[mine], runtime.policy, choices=int(width)
            )
            paid += float(costs.sum())
        return 1 - paid / float(counts.full(tokens).sum())


@register_model("lspade")
class LSpadeLM(HFLM):
    """A frozen model with its heads and an exit policy.

    A calibrated policy's guarantee only covers prompts like those it was calibrated on; tasks of
    the harness may phrase their questions differently.

    Args:
        pretrained: Hub id or folder of the frozen model, or the model itself.
        heads: heads folder or Hub repository; None only if the policy needs none.
        policy: `never` for the full model, or a policy.json (or a folder with one); None uses the
            one beside the heads.
        heads_revision: branch, tag or commit of heads on the Hub.
        tokens_per_batch: padded tokens per batch of questions; other requests use `batch_size`.
        label_tokens: most tokens of a continuation that is treated as a label, decided at the first
            token in which it differs from the others; 1 leaves longer ones to the full model.
        **settings: other arguments of the harness's `hf` model.

    Raises:
        PolicyError: no policy, or one that needs the group of each row.
        ArtifactError: heads of another model.
        UnsupportedModelError: an encoder-decoder model.
    """

    def __init__(
        self,
        pretrained: Any,
        heads: str | None = None,
        policy: str | None = None,
        heads_revision: str | None = None,
        tokens_per_batch: int = 8192,
        label_tokens: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, **settings)
        if self.backend != "causal":
            raise UnsupportedModelError(
                f"{pretrained} is an encoder-decoder, which --model lspade does not run. "
                "Expected a decoder-only model; use --model hf for this one."
            )
        self.tally = Tally()
        self.label_tokens = int(label_tokens)
        self.runtime: ExitRuntime | None = None
        folder = None if heads is None else local_folder(heads, heads_revision)
        chosen = _policy(policy, folder)
        if chosen.check_layers:
            self.runtime = ExitRuntime(
                self.model,
                None if folder is None else LSpadeHeads.from_pretrained(folder),
                policy=chosen,
                tokens_per_batch=tokens_per_batch,
            )

    def _create_model(self, *args: Any, **settings: Any) -> None:
        """Load like the harness, and raise if the weights do not match the configuration."""
        if self.backend == "causal":
            self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=load_checkpoint)
        super()._create_model(*args, **settings)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Score questions with the runtime, the rest with `hf`, in the order of the requests."""
        questions = list(self._questions(requests))
        found = self._decide(questions, disable_tqdm) if questions else {}
        rest = [place for place in range(len(requests)) if place not in found]
        if rest:
            others = [requests[place] for place in rest]
            self.tally.full_model.update(map(_kind, others))
            answers = super()._loglikelihood_tokens(others, disable_tqdm, override_bs)
            found |= dict(zip(rest, answers, strict=True))
        self._warn_of_none(questions, requests)
        return [found[place] for place in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate with the full model."""
        self.tally.full_model["generated texts"] += len(requests)
        return super().generate_until(requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's own information, and the exits so far; both go into its results."""
        return super().get_model_info() | {"lspade": self.tally.summary(self.runtime)}

    def _questions(self, requests: Sequence[Request]) -> Iterator[Question]:
        """Groups of requests that share a context and all differ in one last token."""
        if self.runtime is None:
            return
        contexts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, _) in enumerate(requests):
            contexts[tuple(context)].append(place)
        needed = 2 if self.runtime.policy.scope == "choices" else 1
        for context, places in contexts.items():
            asked = [requests[place] for place in places]
            shared = self._shared(asked)
            if shared is None:
                continue
            tokens = {place: requests[place][2][len(shared)] for place in places}
            texts = {place: requests[place][0] for place in places}
            # With a start token alone there is no separate answer position, hence no exit.
            if len(context) + len(shared) > 1 and len({*tokens.values()}) >= needed:
                moved = bool(shared) and _spaced(asked)
                yield Question((*context, *shared), tokens, texts, moved)

    def _shared(self, asked: Sequence[Request]) -> tuple[int, ...] | None:
        """The tokens before the one in which the continuations differ; None if there is none."""
        paths = {str(tokens): tuple(tokens) for _, _, tokens in asked}
        if not all(text and tokens for text, _, tokens in asked) or conflict([*paths], paths):
            return None
        fork = Fork.of(paths) if len(paths) > 1 else None
        shared = fork.shared if fork else tuple(asked[0][2][:-1])
        longest = max(map(len, paths.values()))
        if fork and fork.walked:
            return None
        if fork and longest <= self.label_tokens:
            return shared
        # Otherwise one token each, after white space from the context: no shared first word.
        single = all(len(path) == len(shared) + 1 for path in paths.values())
        white = not shared or (_spaced(asked) and self.tok_decode(shared).isspace())
        return shared if single and white else None

    def _warn_of_none(self, questions: Sequence[Question], requests: Sequence[Request]) -> None:
        """Warn if there is a policy but no request went through it."""
        asked = [request for request in requests if request[0]]
        if self.runtime is None or questions or not asked:
            return
        lengths = Counter(len(tokens) for _, _, tokens in asked)
        told = ", ".join(f"{count:,} of {n} tokens" for n, count in sorted(lengths.items()))
        log.warning(
            "NO REQUEST WENT THROUGH EARLY EXITS: all %s were answered by the full model, since "
            "their continuations are not single tokens (%s). Short labels are decided at the first "
            "token in which they differ with label_tokens=N.", f"{len(asked):,}", told,
        )  # fmt: skip

    @torch.no_grad()
    def _decide(self, questions: Sequence[Question], quiet: bool) -> dict[int, Answer]:
        """Run the runtime once for each question; returns answers by index of the request."""
        runtime = self.runtime
        assert runtime is not None
        scorer = Scorer(runtime.adapter, runtime.heads, runtime.policy)
        queries = [self._query(n, question) for n, question in enumerate(questions)]
        found: dict[int, Answer] = {}
        bar = tqdm(total=len(queries), disable=quiet, desc="Questions with early exits")
        for batch in shared_batches(queries, runtime.tokens_per_batch, runtime.adapter):
            outcome = decide_batch(scorer, batch)
            scores = outcome.logits.log_softmax(-1, dtype=self.softmax_dtype)
            for query, row, layer in zip(
                batch.queries, scores, outcome.layers.tolist(), strict=True
            ):
                self._count(query, layer)
                best = int(row.argmax())
                question = questions[query.index]
                for place, token in question.tokens.items():
                    found[place] = float(row[token]), token == best
                    self.cache_hook.add_partial(
                        "loglikelihood", question.texts[place], found[place]
                    )
            bar.update(len(batch.queries))
        bar.close()
        moved = sum(question.moved for question in questions)
        self.tally.moved += moved
        if moved:
            log.warning(
                "%s of %s questions end in white space, as chat templates do: it is read as part "
                "of the prompt, and scores are of the answer behind it.",
                f"{moved:,}", f"{len(questions):,}",
            )  # fmt: skip
        log.info("%s", _sentence(self.tally.summary(runtime)))
        return found

    def _query(self, number: int, question: Question) -> Query:
        """A question for the runtime, truncated on the left to the model's context as in `hf`."""
        tokens = dict.fromkeys(question.tokens.values())
        context = question.context[-self.max_length :]
        return Query(number, context, {str(token): token for token in tokens})

    def _count(self, query: Query, layer: int) -> None:
        self.tally.tokens.append(len(query.ids))
        self.tally.choices.append(len(query.choices or ()))
        self.tally.layers.append(layer)


def _spaced(asked: Sequence[Request]) -> bool:
    """Whether every context ends in white space, which the harness has moved."""
    return all(text[0] != text[0].rstrip() for text, _, _ in asked)


def _kind(request: Request) -> str:
    return "continuations" if request[0] else "rolling windows"


def _sentence(found: dict[str, Any]) -> str:
    return (
        f"{found['questions']} questions: {found['exited']:.1%} exited, mean exit layer "
        f"{found['mean_exit_layer']:.2f} of {found['num_layers']}, "
        f"{found['flops_saved']:.1%} of the FLOPs saved"
    )


def _policy(name: str | None, folder: Path | None) -> ExitPolicy:
    """The requested policy, or the one beside the heads.

    Raises:
        PolicyError: there is no policy, or it needs groups.
    """
    if name == NEVER:
        return ExitPolicy.never()
    if name is None and folder is None:
        raise PolicyError(
            "--model lspade got neither heads nor a policy. Give heads=FOLDER with its "
            f"{POLICY}, or policy={NEVER} for the full model."
        )
    policy = ExitPolicy.load(name if name is not None else folder or "")
    policy.require_no_groups("lm-eval")
    return policy


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
