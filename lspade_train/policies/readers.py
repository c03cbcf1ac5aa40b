"""Which heads a policy's checks and answers need, by the words that `policy.json` uses."""

from collections.abc import Collection, Sequence

from lspade_train.errors import PolicyError
from lspade_train.policies.drafting import Drafting
from lspade_train.policies.policy import REMEDY, ExitPolicy
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.probes.measures import FIXED

Readers = dict[str, LSpadeHeads | None]
"""Heads by the name of the lens they are, `l-spade` or `tuned_lens`; None is `logit_lens`."""

TARGETS = {"l-spade": "spade", "tuned_lens": "final"}


def own_name(heads: LSpadeHeads) -> str:
    """What heads are: `tuned_lens` where they were fitted to the model's own answers."""
    return "tuned_lens" if heads.target == "final" else "l-spade"


def available(heads: LSpadeHeads | None) -> Readers:
    """Everything that can read a layer: the heads, the tuned lens beside them, and no head."""
    found: Readers = {}
    if heads is not None:
        found[own_name(heads)] = heads
        if heads.tuned_lens is not None:
            found.setdefault("tuned_lens", heads.tuned_lens)
    return found | {"logit_lens": None}


def check_readers(policy: ExitPolicy, heads: LSpadeHeads | None) -> Readers:
    """What every check of the policy reads, in order.

    Raises:
        PolicyError: heads that are not there, or that were fitted over the choices for a policy
            that looks at the vocabulary.
    """
    if policy.gate is not None:
        names: tuple[str, ...] = policy.gate.readers
    elif policy.reader is not None:
        names = (policy.reader,)
    elif heads is None or policy.decoder == "logit_lens":
        names = ("logit_lens",)
    else:
        names = (own_name(heads),)
    found = _named(names, heads)
    if policy.measure != FIXED:  # which reads nothing
        _check_scope(policy, found)
    return found


def answer_readers(policy: ExitPolicy, heads: LSpadeHeads | None) -> Readers:
    """The heads that answer at an exit; without `spade`, which needs none.

    Raises:
        PolicyError: as `check_readers`.
    """
    words = [name for name in dict.fromkeys(policy.decoders) if name != "spade"]
    found = _named(words, heads)
    _check_scope(policy, found)
    return found


def draft_reader(drafting: Drafting, heads: LSpadeHeads | None) -> LSpadeHeads | None:
    """The heads that draft; None: the logit lens, which is no head.

    Raises:
        PolicyError: heads that are not there, or were fitted over the choices.
        ArtifactError: heads that the layer has none of.
    """
    if drafting.reader is None:
        known = available(heads)
        whole = [known[name] for name in ("tuned_lens", "l-spade") if name in known]
        fit = (h for h in whole if h and h.scope != "choices" and drafting.layer in h.layers)
        return next(fit, None)
    found = _named((drafting.reader,), heads)[drafting.reader]
    if found is not None and found.scope == "choices":
        raise PolicyError(
            f"The {drafting.reader} heads were fitted over the choices (model.scope), and drafts "
            "are any tokens.\nFit them with --model.scope vocabulary, or draft with reader "
            "logit_lens."
        )
    if found is not None:
        found.index(drafting.layer)
    return found


def read_by_checks(policy: ExitPolicy, known: Collection[str]) -> tuple[str, ...]:
    """Names of what every check reads, as `check_readers` finds them.

    Args:
        policy: the policy.
        known: names of the readers that there are, the heads' own first.
    """
    if policy.measure == FIXED:
        return ()
    if policy.gate is not None:
        return policy.gate.readers
    if policy.reader is not None:
        return (policy.reader,)
    return ("logit_lens",) if policy.decoder == "logit_lens" else (next(iter(known)),)


def answer_head(policy: ExitPolicy, layer: int, known: Collection[str]) -> str:
    """Who answers at an exit: `spade`, or the name of a reader.

    Args:
        policy: the policy.
        layer: of the exit; any one, where one answers at all of them.
        known: as for `read_by_checks`.
    """
    several = isinstance(policy.decoder, tuple)
    found = policy.decoder_at(layer) if several else str(policy.decoder)
    # Heads whose target is not recorded serve as what they are asked for.
    return found if found == "spade" or found in known else next(iter(known))


def _check_scope(policy: ExitPolicy, readers: Readers) -> None:
    """Refuse to read tokens that the heads' loss never looked at."""
    for name, heads in readers.items():
        if policy.scope == "vocabulary" and heads is not None and heads.scope == "choices":
            raise PolicyError(
                f"The policy's scope is vocabulary, and the {name} heads were fitted over the "
                "choices (model.scope).\nUse the scope choices (calibrate --scope choices), or fit "
                "them with --model.scope vocabulary."
            )


def _named(names: Sequence[str], heads: LSpadeHeads | None) -> Readers:
    known = available(heads)
    if heads is not None and heads.target is None:
        # Not recorded: they serve as what they are asked for.
        known = {**dict.fromkeys(TARGETS, heads), **known}
    for name in names:
        if name not in known:
            has = ", ".join(n for n in known if n != "logit_lens") or "none"
            raise PolicyError(
                f"The policy needs {name} heads (model.target {TARGETS[name]}), but the loaded "
                f"heads are {has}.\nFit them as well (lspade-train fit --model.target both), or "
                f"choose another policy: {REMEDY}"
            )
    return {name: known[name] for name in names}
