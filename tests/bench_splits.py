"""How often a calibrated policy violates its guarantee, over random splits of cached rows.

    python tests/bench_splits.py --config recipes/quickstart.yaml --splits 200
    python tests/bench_splits.py --config recipes/quickstart.yaml --per_group --per_depth

Training and validation rows are pooled. A random two fifths propose policies (gates are fitted on
them); the rest stand for the population of future prompts. Half their number is drawn from them
with replacement to test the policies, so the risk on all of them is the exact true risk. Heads that
were fitted on some of the rows treat all splits alike. A 95% guarantee may be violated in 5% of the
splits, up to the sampling error of 200 splits.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from scipy.stats import binom

from lspade_train.cache import StateDataset
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.policies.cached_exits import CachedExits, has_choices
from lspade_train.policies.exit_table import PolicyRow, evaluate_policy
from lspade_train.policies.gate import Reading
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.power import RiskKind
from lspade_train.policies.search import Options, Search
from lspade_train.policies.selection import Choice, choose

show = Console(width=120, highlight=False).print
JOINED = ("full_answer", "gold", "tokens")


@dataclass(frozen=True, kw_only=True)
class Pool(CachedExits):
    """Rows of several splits with their hidden states in memory, (rows, layers, d)."""

    states: torch.Tensor

    def hidden(self, layer: int) -> torch.Tensor:
        return self.states[:, self.layers.index(layer)]

    def rows(self, index: torch.Tensor) -> "Pool":
        return replace(super().rows(index), states=self.states[index])


def pooled(parts: list[CachedExits]) -> Pool:
    """All rows of several splits as one split; their data set is never read."""
    first = parts[0]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in JOINED}
    choices = None if first.choices is None else torch.cat([part.choices for part in parts])
    return Pool(
        layers=first.layers,
        scope=first.scope,
        counts=first.counts,
        readings={
            name: [
                Reading.stacked([part.readings[name][place] for part in parts])
                for place in range(len(first.layers))
            ]
            for name in first.readings
        },
        signals={key: torch.cat([part.signals[key] for part in parts]) for key in first.signals},
        answers={word: torch.cat([part.answers[word] for part in parts]) for word in first.answers},
        choices=choices,
        dataset=Nothing(),
        states=torch.cat([torch.stack([part.hidden(x) for x in part.layers], 1) for part in parts]),
        **joined,
    )


class Nothing:
    """Placeholder for the data set of pooled rows."""

    def select(self, _: torch.Tensor) -> "Nothing":
        return self


def group_names(parts: list[StateDataset]) -> np.ndarray:
    """Each pooled row's group; terciles of the prompt length where the task has none."""
    names = np.concatenate([np.array(part.groups)[part.labels["group"]] for part in parts])
    if len(np.unique(names)) > 1:
        return names
    lengths = np.concatenate([part.labels["position_id"].numpy() for part in parts])
    thirds = np.searchsorted(np.quantile(lengths, [1 / 3, 2 / 3]), lengths)
    return np.array(["short", "medium", "long"])[thirds]


def over_by_kind(
    found: Choice, truth: Pool, names: np.ndarray, risk: RiskKind, budget: float
) -> tuple[dict[str, list[bool]], float]:
    """Which of a policy's guarantees are violated, overall and by kind, and what it saves."""
    policy = found.policy
    assert policy is not None
    readers = policy.gate.readers if policy.gate else (policy.reader,) if policy.reader else ()
    table = truth.table(policy, readers)
    if policy.exit_groups is not None:
        table = table.held_back(~np.isin(names, policy.exit_groups))
    stops = table.exits(policy.threshold)
    everywhere = evaluate_policy(table, policy.threshold, oracle=1.0)
    broken = {"all rows": [risk_of(everywhere, risk) > budget]}
    for one in found.calibration.conditions:
        if not one.held:
            continue
        mask = names == one.name
        if one.kind == "depth":
            mask = stops <= policy.layers.index(int(one.name))
        row = evaluate_policy(table.rows(mask), policy.threshold, oracle=1.0)
        broken.setdefault(one.kind, []).append(risk_of(row, risk) > budget)
    return broken, everywhere.compute_saved


def risk_of(row: PolicyRow, risk: RiskKind) -> float:
    """The risk that the budget bounds."""
    value = row.disagreement if risk == "disagreement" else row.drop
    assert value is not None
    return value


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    add = options.add_argument
    add("--config", required=True)
    add("--heads", type=Path, help="default: checkpoints/NAME")
    add("--splits", type=int, default=200)
    add("--draws", type=int, default=1, help="tests of each set of proposals; more take less time")
    add("--budget", type=float, default=0.01)
    add("--measure", default=None)
    add("--decoder", default=None)
    add("--disagreement", action="store_true", help="budget for changed answers")
    add("--per_group", action="store_true", help="the same within groups, or thirds by length")
    add("--per_depth", action="store_true", help="the same up to every exit layer")
    return options.parse_args()


def main() -> None:
    """Split, choose, count."""
    asked = arguments()
    recipe = parse(command_parser("calibrate", ""), ["--config", asked.config]).recipe
    fitted = FittedRecipe(recipe, asked.heads or Path("checkpoints") / recipe.name)
    parts = [fitted.data.stored(split) for split in ("train", "validation")]
    template = ExitPolicy(
        layers=tuple(fitted.layers),
        scope="choices" if has_choices(parts[0]) else "vocabulary",
        positions=recipe.data.positions,
    )
    search = Search(
        fitted.data.adapter, fitted.heads, template,
        Options(measure=asked.measure, decoder=asked.decoder),
    )  # fmt: skip
    rows, names = pooled([search.read(part) for part in parts]), group_names(parts)
    risk: RiskKind = "disagreement" if asked.disagreement else "accuracy_drop"
    saved: list[float] = []
    over, promises, never = Counter(), Counter(), 0
    for seed in range(asked.splits):
        generator = torch.Generator().manual_seed(seed)
        if seed % asked.draws == 0:
            order = torch.randperm(len(rows), generator=generator)
            proposing, others = order.tensor_split([len(order) * 2 // 5])
            proposals, truth = search.propose(rows.rows(proposing)), rows.rows(others)
        drawn = torch.randint(len(others), (len(others) // 2,), generator=generator)
        tested = names[others][drawn]
        found = choose(
            proposals, truth.rows(drawn), risk, asked.budget, 0.95,
            groups={n: tested == n for n in np.unique(names)} if asked.per_group else {},
            by_depth=asked.per_depth, hold_back=True,
        )  # fmt: skip
        if found.policy is None:
            never += 1
            saved.append(0.0)
        else:
            broken, share = over_by_kind(found, truth, names[others], risk, asked.budget)
            saved.append(share)
            over += Counter({kind: 1 for kind, many in broken.items() if any(many)})
            promises += Counter({kind: len(many) for kind, many in broken.items()})
        if seed % 20 == 19:
            show(f"{seed + 1} splits: {dict(over) or 'none'} over the budget")
    most = int(binom.ppf(0.99, asked.splits, 0.05))
    show(
        f"{asked.splits} splits of {len(rows):,} rows ({len(proposing):,} propose, {len(drawn):,} "
        f"test, {len(others):,} are the truth), {risk} of {asked.budget:g}: never exit {never}; "
        f"FLOPs saved {np.mean(saved):.1%} ({min(saved):.1%} to {max(saved):.1%})"
    )
    for kind, count in promises.items():
        show(
            f"{kind}: {count / asked.splits:.1f} promises a split; one of them over the budget in "
            f"{over[kind]} splits ({over[kind] / asked.splits:.1%}; 5% and chance allow {most})"
        )
    sys.exit(max(over.values(), default=0) > most)


if __name__ == "__main__":
    main()
