"""False-alarm rate, detection delay and cost of an audit.

    python tests/bench_audit.py
    python tests/bench_audit.py --shifts
    python tests/bench_audit.py --overhead --config recipes/quickstart.yaml

The first simulates only a stream's audit draws and failures, as the runtime makes them: no model is
needed. The second answers shifted rows with the quickstart's policy, then simulates streams at the
measured disagreement. The third answers a recipe's test rows alternately with and without an audit,
and gives the ratio of CPU seconds (wall time is unreliable on a shared machine) beside the FLOPs,
which are exact.
"""

import argparse
import math
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from lspade_train import Audit, ExitPolicy, ExitRuntime, tasks
from lspade_train.cli.options import runtime_parts
from lspade_train.cli.parsing import command_parser, parse
from lspade_train.policies.sequential import add_to_blocks, log_evidence
from lspade_train.tasks.asking import Asker

ALPHA, BUDGET, CALIBRATED = 0.05, 0.02, 0.01
STREAMS, ROWS = 500, 5000
AUDITS, SHIFTS = (0.01, 0.02, 0.05), (0.05, 0.1, 0.3)
HISTORIES = (0, 5000, 250_000)
LIMIT = math.log(1 / ALPHA)
show = Console(width=120, highlight=False).print


def blocks_of(losses):
    """Yield the audited rows in blocks."""
    blocks = ()
    for loss in losses:
        blocks = add_to_blocks(blocks, 1, int(loss))
    return blocks


def first_alarm(rng, blocks, disagreement, most):
    """Audited rows until the alarm; None if `most` rows do not raise it."""
    for n in range(1, most + 1):
        loss = int(rng.random() < disagreement)
        blocks = add_to_blocks(blocks, 1, loss)
        if loss and log_evidence(blocks, BUDGET) >= LIMIT:
            return n
    return None


def false_alarms(rng, disagreement, rows):
    """Fraction of streams audited at 2% that raise an alarm."""
    drawn = rng.binomial(rows, 0.02, STREAMS)
    return np.mean([first_alarm(rng, (), disagreement, int(n)) is not None for n in drawn])


def delays(rng, disagreement, audit, history, streams, before=CALIBRATED):
    """Rows served from the shift to the alarm, and the fraction of earlier (false) alarms."""
    found, early = [], 0
    for _ in range(streams):
        past = rng.random(rng.binomial(history, audit)) < before
        blocks = blocks_of(past)
        if log_evidence(blocks, BUDGET) >= LIMIT:
            early += 1
            continue
        drawn = first_alarm(rng, blocks, disagreement, 100_000)
        found.append(math.inf if drawn is None else drawn + rng.negative_binomial(drawn, audit))
    return np.quantile(found, [0.5, 0.9]), early


def served(config, heads):
    """The `predict` runtime, the prompt renderer and the recipe's data section."""
    parsed = parse(command_parser("predict", ""), ["--config", config])
    folder = heads or Path("checkpoints") / parsed.recipe.name
    loaded, adapter, tokenizer = runtime_parts(parsed, folder)
    parts = partial(
        ExitRuntime, adapter, loaded, policy=ExitPolicy.load(folder), tokenizer=tokenizer
    )
    prefix = loaded.metadata.get("training", {}).get("data", {}).get("answer_prefix")
    return parts, Asker(parsed.recipe.data, tokenizer, prefix), parsed.recipe.data


def question_first(row):
    """The same prompt with one line of the template moved."""
    *facts, question = row["prompt"].splitlines()
    return {**row, "prompt": "\n".join([question, *facts])}


def shifts(heads):
    """Rows from a real shift until the alarm."""
    runtime_with, ask, data = served("recipes/quickstart.yaml", heads)
    rows = tasks.load_rows(data, "test").records
    others = tasks.load_rows(replace(data, dataset="recipes/quickstart/data_open"), "test").records
    streams = {
        "no shift": rows,
        "questions of 3 hops": [row for row in rows if row["group"] == "hops: 3"],
        "open questions": others,
        "question before the facts": [question_first(row) for row in rows],
    }
    rng, before = np.random.default_rng(0), 0.0
    show(f"budget {BUDGET:.0%}; rows from the shift to the alarm after {ROWS:,} rows, median / 90%")
    for name, records in streams.items():
        with tempfile.TemporaryDirectory() as place:
            every = Audit(state=Path(place) / "audit.json", rate=1.0, budget=0.99, seed=0)
            runtime = runtime_with(audit=every)
            asked = [ask(record) for record in records]
            texts = [one.texts if one.choices is None else one.choices for one in asked]
            runtime.decide([one.prompt for one in asked], texts)
            seen = runtime.auditor.flush().seen
        rate = seen.failures / seen.rows
        cells = []
        for audit in AUDITS if rate > BUDGET else ():
            (half, most), _ = delays(rng, rate, audit, ROWS, 200, before)
            cells.append(f"{half:9,.0f} / {most:9,.0f}")
        before = before if cells else rate if name == "no shift" else before
        summary = "   ".join(cells) or "within the budget"
        show(f"  {name} (n = {seen.rows:,}): {rate:.1%} of the answers differ: {summary}")


def overhead(config, heads, rate, rounds, window):
    """CPU seconds with the audit over those without, and the FLOPs the audit used."""
    runtime_with, ask, data = served(config, heads)
    records = tasks.load_rows(data, tasks.evaluation_split(data)).records
    asked = [ask(records[place]) for place in range(min(len(records), rounds * window))]
    with tempfile.TemporaryDirectory() as place:
        audit = Audit(state=Path(place) / "audit.json", rate=rate, budget=0.5, seed=0)
        both = [runtime_with(audit=one) for one in (None, audit)]
        spent = [[], []]
        for start in range(-window, len(asked), window):  # the first window is a warm-up
            part = asked[max(start, 0) : max(start, 0) + window]
            prompts, choices = (
                [one.prompt for one in part],
                [one.texts if one.choices is None else one.choices for one in part],
            )
            groups = [one.group for one in part]
            for which in (0, 1) if start % (2 * window) else (1, 0):
                begin = time.process_time()
                both[which].decide(prompts, choices, groups=groups)
                spent[which].append(time.process_time() - begin)
        seen = both[1].auditor.flush().seen
    plain, audited = (np.array(times[1:]) for times in spent)
    model, used, audit = seen.flops
    show(
        f"{seen.rows:,} rows in windows of {window}, {seen.exited / seen.rows:.1%} exited, "
        f"{seen.drawn:,} drawn ({rate:.0%}), {seen.audited:,} finished by the full model"
    )
    show(
        f"  FLOPs of the audit: {audit / model:.3%} of the full model's, "
        f"{audit / used:.3%} of the policy's (which saves {1 - used / model:.1%})"
    )
    ratios = audited / plain
    show(
        f"  CPU seconds, with audit over without, in turn: {audited.sum() / plain.sum():.3f} in "
        f"all ({plain.sum():.2f} s); median of windows {np.median(ratios):.3f}"
    )


def main():
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--overhead", action="store_true")
    options.add_argument("--shifts", action="store_true")
    options.add_argument("--config", default="recipes/quickstart.yaml")
    options.add_argument("--heads", type=Path, help="default: checkpoints/NAME")
    options.add_argument("--rate", type=float, default=0.02)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--window", type=int, default=256)
    asked = options.parse_args()
    if asked.overhead:
        overhead(asked.config, asked.heads, asked.rate, asked.rounds, asked.window)
        return
    if asked.shifts:
        shifts(asked.heads)
        return
    rng = np.random.default_rng(0)
    show(f"budget {BUDGET:.0%}, alpha {ALPHA:.0%}, {STREAMS} streams of {ROWS:,} rows, 2% audited")
    for level in (CALIBRATED, BUDGET):
        show(f"  true disagreement {level:.0%}: {false_alarms(rng, level, ROWS):.1%} ring")
    level = false_alarms(rng, BUDGET, 20 * ROWS)
    show(f"  {BUDGET:.0%} over {20 * ROWS:,} rows: {level:.1%} ring")
    show("rows from the shift to the alarm, median / 90%, by rows answered before it at 1%")
    for history in HISTORIES:
        streams = 200 if history < 100_000 else 40
        for shift in SHIFTS:
            cells = []
            for audit in AUDITS:
                (half, most), _ = delays(rng, shift, audit, history, streams)
                cells.append(f"{half:9,.0f} / {most:9,.0f}")
            show(f"  {history:>8,} rows before, then {shift:.0%}: " + "   ".join(cells))


if __name__ == "__main__":
    main()
