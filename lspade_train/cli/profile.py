"""`profile`: what a policy gains on this machine, in time, memory and FLOPs."""

import logging
import sys
from pathlib import Path
from typing import Any

from lspade_train.cli.options import find_heads, heads_given, heads_option, runtime_parts
from lspade_train.cli.parsing import Parsed, command_parser, parse
from lspade_train.errors import RecipeError

log = logging.getLogger(__name__)

PROFILE = """\
Wall time, memory and FLOPs of the exit policy, compared with the original model on the same
batches, over prompt lengths, batch sizes and thresholds, on the model's device. Both models are
loaded, so twice the memory is needed.
Prompts are the task's validation prompts, cut or joined to each length. A policy that was
selected by calibrate --cost time is also timed at the batch size and length that it was priced
at: predicted time beside measured. Writes profile.json and figures/speedup into the heads folder.

  lspade-train profile --config recipes/arc.yaml
  lspade-train profile --config recipes/arc.yaml --lengths [128,512] --thresholds [0.5,1,2]
  lspade-train profile --config recipes/arc.yaml --generate 16   (several tokens, by exit layer)"""

LENGTHS, PAPER_THRESHOLDS = (64, 256, 1024), (0.5, 1.0, 1.5, 2.0)


def profile(arguments: list[str]) -> None:
    """Time, print, write and draw."""
    parser = command_parser("profile", PROFILE)
    heads_option(parser)
    add = parser.add_argument
    add("--lengths", type=list[int] | None, default=None, help="tokens; default: 64, 256, 1024")
    add("--batch_sizes", type=list[int], default=[1, 8], help="prompts per batch")
    add(
        "--thresholds",
        type=list[float] | None,
        default=None,
        help="in the policy's measure; default: policy.json's, or the paper's 0.5 to 2 nats "
        "without one",
    )
    add("--repeats", type=int, default=5, help="timed rounds per shape, after one that warms up")
    add("--generate", type=int, default=0, help="also profile greedy decoding of so many tokens")
    parsed = parse(parser, arguments, early=find_heads)
    options = parsed.options
    if options.generate < 0:
        raise RecipeError(f"--generate is {options.generate}; expected 0 (off) or more tokens.")

    from dataclasses import replace

    from rich.console import Console

    from lspade_train import profiling
    from lspade_train.io.progress import track
    from lspade_train.runtime import ExitRuntime

    folder = heads_given(parsed, written_by="profile")
    heads, adapter, tokenizer = runtime_parts(parsed, folder)
    policy, thresholds = _policy(parsed, folder, heads)
    data = parsed.recipe.data
    if policy.exit_groups is not None:
        log.info(
            "policy: only the prompts of groups that may exit early are timed: %s",
            ", ".join(policy.exit_groups) or "none",
        )
    prompts, choices = profiling.prompts_of(data, tokenizer, adapter.max_length, policy.may_exit)
    runtime = ExitRuntime(adapter, heads, policy=policy)
    plain, among = profiling.untouched(data), choices if policy.scope == "choices" else ()
    console = Console(width=max(Console().width, 110))
    found = profiling.profile(
        runtime,
        plain,
        lengths=_fitting(adapter) if options.lengths is None else options.lengths,
        batch_sizes=options.batch_sizes,
        thresholds=[None, *thresholds],
        prompts=prompts,
        choices=among,
        repeats=options.repeats,
        track=lambda shapes: track(shapes, "profiling", len(shapes), "shapes"),
    )
    console.print(found.table())
    confirmed = profiling.confirm(
        runtime, plain, prompts=prompts, choices=among, repeats=options.repeats
    )
    if confirmed is not None:  # the policy was priced by time
        found = replace(found, confirmation=confirmed)
        sys.stdout.write(f"{confirmed.words}\n")
    saved = found.save(folder)
    if options.generate:
        room = (adapter.max_length or 2**31) - options.generate
        short = [ids for ids in prompts if len(ids) <= room]
        rows = profiling.profile_generation(runtime, short[:32], options.generate)
        console.print(profiling.generation_table(rows, options.generate))
    sys.stdout.write(
        "Speed-up: the original model's median time over the policy's; beside it the smallest\n"
        "and the largest ratio of one round. FLOPs: as a fraction of the model's. For the effect\n"
        "on accuracy, see lspade-train calibrate and evaluate.\n"
    )
    log.info("profile: %s", saved)


def _policy(parsed: Parsed, folder: Path, heads: Any) -> tuple[Any, list[Any]]:
    """The calibrated policy and its threshold, or the paper's thresholds over every layer."""
    from lspade_train.io.layout import POLICY
    from lspade_train.policies.policy import ExitPolicy

    asked = parsed.options.thresholds
    if (folder / POLICY).exists():
        policy = ExitPolicy.load(folder / POLICY)
        if policy.layers:
            return policy, [policy.threshold] if asked is None else asked
    policy = ExitPolicy(
        layers=heads.layers, scope=heads.scope, positions=parsed.recipe.data.positions
    )
    return policy, list(PAPER_THRESHOLDS) if asked is None else asked


def _fitting(adapter: Any) -> list[int]:
    """The usual prompt lengths that fit the model's context, or its full context."""
    limit = adapter.max_length or LENGTHS[-1]
    return [length for length in LENGTHS if length < limit] + [limit] * (limit <= LENGTHS[-1])
