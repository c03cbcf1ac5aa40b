"""How often a calibrated policy breaks its promise, over random splits of a recipe's cached rows.

    python tests/bench_splits.py --config recipes/quickstart.yaml --splits 200

Training and validation rows are pooled and dealt out anew each time: some propose policies (gates
are fitted on them), some test them, and the rest stand for the prompts to come. Heads that were
fitted on some of the rows treat all splits alike, as the deals are random. A promise at 95% may be
broken in 5% of the splits, give or take what 200 coins do.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom

from lspade_train.cli.parsing import command_parser, parse
from lspade_train.evaluation.run import FittedRecipe
from lspade_train.policies.cached_exits import CachedExits, has_choices
from lspade_train.policies.exit_table import evaluate_policy
from lspade_train.policies.gate import Reading
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.search import Options, Search
from lspade_train.policies.selection import choose

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
    """All rows of several splits as one; their data set is never read."""
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
    """Stands for the data set of pooled rows."""

    def select(self, _: torch.Tensor) -> "Nothing":
        return self


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", required=True)
    options.add_argument("--heads", type=Path, help="default: checkpoints/NAME")
    options.add_argument("--splits", type=int, default=200)
    options.add_argument("--budget", type=float, default=0.01)
    options.add_argument("--decoder", default=None)
    options.add_argument("--disagreement", action="store_true", help="budget for changed answers")
    asked = options.parse_args()
    parser = command_parser("calibrate", "", with_trainer=True)
    recipe = parse(parser, ["--config", asked.config]).recipe
    fitted = FittedRecipe(recipe, asked.heads or Path("checkpoints") / recipe.name)
    parts = [fitted.data.stored(split) for split in ("train", "validation")]
    template = ExitPolicy(
        layers=tuple(fitted.layers),
        scope="choices" if has_choices(parts[0]) else "vocabulary",
        positions=recipe.data.positions,
    )
    search = Search(fitted.data.adapter, fitted.heads, template, Options(decoder=asked.decoder))
    rows = pooled([search.read(part) for part in parts])
    risk = "disagreement" if asked.disagreement else "accuracy_drop"
    over, saved, never = 0, [], 0
    for seed in range(asked.splits):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        proposing, tested, others = order.tensor_split([len(order) * 2 // 5, len(order) * 7 // 10])
        found = choose(
            search.propose(rows.rows(proposing)), rows.rows(tested), risk, asked.budget, 0.95
        )
        if found.policy is None:
            never += 1
            saved.append(0.0)
        else:
            truth = rows.rows(others)
            gate, reader = found.policy.gate, found.policy.reader
            readers = gate.readers if gate else (reader,) if reader else ()
            row = evaluate_policy(truth.table(found.policy, readers), found.policy.threshold)
            value = row.disagreement if asked.disagreement else row.drop
            over += value > asked.budget
            saved.append(row.compute_saved)
        if seed % 20 == 19:
            log.info(f"{seed + 1} splits: {over} over the budget")
    most = int(binom.ppf(0.99, asked.splits, 0.05))
    print(
        f"{asked.splits} splits of {len(rows):,} rows ({len(proposing):,} propose, "
        f"{len(tested):,} test, {len(others):,} stand for the truth): {over} over the budget of "
        f"{asked.budget:g} ({over / asked.splits:.1%}; 5% and chance allow {most}); never exit "
        f"{never}; FLOPs saved {np.mean(saved):.1%} ({min(saved):.1%} to {max(saved):.1%})"
    )
    sys.exit(over > most)


if __name__ == "__main__":
    main()
