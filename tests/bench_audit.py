"""How often an audit rings without a reason, and how many rows a shift takes: prints two tables.

    python tests/bench_audit.py

Draws only the coins and the losses of a stream, as the runtime does: no model is needed.
"""

import math

import numpy as np
from rich.console import Console

from lspade_train.policies.sequential import add_to_blocks, log_evidence

ALPHA, BUDGET, CALIBRATED = 0.05, 0.02, 0.01
STREAMS, ROWS = 500, 5000
AUDITS, SHIFTS = (0.01, 0.02, 0.05), (0.05, 0.1, 0.3)
HISTORIES = (0, 5000, 250_000)
LIMIT = math.log(1 / ALPHA)
show = Console(width=120, highlight=False).print


def blocks_of(losses):
    """The blocks of drawn rows."""
    blocks = ()
    for loss in losses:
        blocks = add_to_blocks(blocks, 1, int(loss))
    return blocks


def first_alarm(rng, blocks, disagreement, most):
    """Drawn rows until the alarm; None where `most` do not raise it."""
    for n in range(1, most + 1):
        loss = int(rng.random() < disagreement)
        blocks = add_to_blocks(blocks, 1, loss)
        if loss and log_evidence(blocks, BUDGET) >= LIMIT:
            return n
    return None


def false_alarms(rng, disagreement, rows):
    """Share of streams at 2% audit that ring."""
    drawn = rng.binomial(rows, 0.02, STREAMS)
    return np.mean([first_alarm(rng, (), disagreement, int(n)) is not None for n in drawn])


def delays(rng, disagreement, audit, history, streams):
    """Rows in use from the shift to the alarm, and the share of streams that rang before it."""
    found, early = [], 0
    for _ in range(streams):
        past = rng.random(rng.binomial(history, audit)) < CALIBRATED
        blocks = blocks_of(past)
        if log_evidence(blocks, BUDGET) >= LIMIT:
            early += 1
            continue
        drawn = first_alarm(rng, blocks, disagreement, 100_000)
        found.append(math.inf if drawn is None else drawn + rng.negative_binomial(drawn, audit))
    return np.quantile(found, [0.5, 0.9]), early


def main():
    """Print the tables."""
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
