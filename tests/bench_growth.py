"""How cost scales: seconds and memory at doubling sizes, one panel each, with the final exponent.

    python tests/bench_growth.py growth.svg

Random models in fp32; calibrate and evaluate on the quickstart's heads (`make quickstart` first).
An exponent is the slope between the last two points on log-log axes: 1 is linear, 2 quadratic.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_cache import build
from bench_fit import Setting
from bench_shape import DEVICE, TOKENS_PER_BATCH, llama, prompts
from bench_timing import interleaved, peak_memory, seconds
from rich.console import Console

from lspade_train.cli.parsing import command_parser, parse
from lspade_train.evaluation.run import FittedRecipe, evaluate_recipe
from lspade_train.policies.policy import ExitPolicy
from lspade_train.policies.selection import calibrate
from lspade_train.probes.heads import LSpadeHeads
from lspade_train.recipe import Recipe, heads_folder
from lspade_train.runtime import ExitRuntime
from lspade_train.runtime.batching import Query, collate
from lspade_train.runtime.decide import decide_batch

WIDTH, LAYERS, VOCAB = 256, 8, 8_000
ROUNDS = 3
QUICKSTART = "recipes/quickstart.yaml"


@dataclass(frozen=True)
class Series:
    """The cost of one operation at several sizes.

    Attributes:
        name: of the operation.
        against: what the size measures.
        unit: s or MB.
        points: cost by size, ascending.
    """

    name: str
    against: str
    unit: str
    points: Mapping[int, float]

    @property
    def exponent(self) -> float:
        """Slope between the last two points on log-log axes."""
        (x0, y0), (x1, y1) = list(self.points.items())[-2:]
        return math.log(y1 / y0) / math.log(x1 / x0)


def timed(
    name: str, against: str, cases: Mapping[int, Callable[[], object]], rounds: int = ROUNDS
) -> Series:
    """Median seconds of each case, run alternately."""
    taken = interleaved({str(size): run for size, run in cases.items()}, rounds)
    return Series(name, against, "s", {size: seconds(taken, str(size)) for size in cases})


def extraction() -> Iterator[Series]:
    """Cache the states and SPADE targets of all layers."""
    adapter = llama(WIDTH, LAYERS, VOCAB)
    with tempfile.TemporaryDirectory() as folder:

        def cached(count: int, tokens: int) -> Callable[[], object]:
            examples = prompts(count, tokens, VOCAB)
            return partial(build, Path(folder), adapter, examples, 64, TOKENS_PER_BATCH)

        lengths, rows = (32, 64, 128, 256, 512), (32, 64, 128, 256)
        yield timed("cache, 32 prompts", "tokens of a prompt", {n: cached(32, n) for n in lengths})
        yield timed("cache, 64 tokens each", "prompts", {n: cached(n, 64) for n in rows})


def fitting() -> Iterator[Series]:
    """One training step over 128 rows; its peak memory beyond inputs, heads and optimiser."""
    settings: dict[str, dict[int, dict[str, int]]] = {
        "layers": {n: {"layers": n} for n in (4, 8, 16, 32)},
        "d": {n: {"width": n} for n in (128, 256, 512, 1024)},
        "V": {n: {"vocab": n} for n in (8_000, 16_000, 32_000, 64_000)},
    }
    for against, sizes in settings.items():
        steps = {size: sized(**change).step for size, change in sizes.items()}
        yield timed("training step, 128 rows", against, steps)
        del steps
        memory = {
            size: peak_memory("bench_growth", f"warmed(**{change})", "it.step()")
            for size, change in sizes.items()
        }
        yield Series("training step, peak memory", against, "MB", memory)


def sized(layers: int = LAYERS, width: int = WIDTH, vocab: int = VOCAB) -> Setting:
    """Heads, states and targets for one step."""
    return Setting(128, vocab, layers=layers, width=width)


def warmed(**sizes: int) -> Setting:
    """The same after one step, with its working memory released."""
    setting = sized(**sizes)
    setting.step()
    setting.module.__dict__.pop("_memory", None)
    return setting


def choosing(config: str) -> Iterator[Series]:
    """`calibrate` and `evaluate` on the first rows of a fitted recipe, with its states cached."""
    recipe = parse(command_parser("calibrate", ""), ["--config", config]).recipe
    folder = heads_folder(recipe)
    if not (folder / "config.json").exists():
        sys.stderr.write(f"no heads in {folder}: calibrate and evaluate are left out\n")
        return
    sizes = (125, 250, 500, 1000)
    limited = {n: FittedRecipe(_limited(recipe, n), folder) for n in sizes}
    runs = {n: partial(_calibrate, one) for n, one in limited.items()}
    yield timed("calibrate", "rows of each split", runs, rounds=1)
    runs = {n: partial(evaluate_recipe, one) for n, one in limited.items()}
    yield timed("evaluate", "test rows", runs, rounds=1)


def _limited(recipe: Recipe, rows: int) -> Recipe:
    return replace(recipe, data=replace(recipe.data, limit=rows, mode="memory", cache_dir=None))


def _calibrate(fitted: FittedRecipe) -> Any:
    return calibrate(fitted.data, fitted.heads, max_accuracy_drop=0.05)


def serving() -> Iterator[Series]:
    """A batch through the runtime that exits halfway, answered by SPADE."""
    adapter = llama(WIDTH, LAYERS, VOCAB)
    heads = LSpadeHeads(range(1, LAYERS), WIDTH).to(DEVICE)
    probe = ExitRuntime(adapter, heads, policy=ExitPolicy.always(LAYERS // 2)).probe

    def answered(count: int) -> Callable[[], object]:
        ids = torch.randint(3, VOCAB, (count, 64)).tolist()
        batch = collate([Query(i, tuple(row), None) for i, row in enumerate(ids)], adapter.device)
        return partial(decide_batch, probe, batch)

    sizes = (1, 2, 4, 8, 16, 32, 64)
    yield timed("runtime, 64 tokens each", "prompts in a batch", {n: answered(n) for n in sizes})


def draw(found: Sequence[Series], path: Path) -> None:
    """One panel per series on log-log axes, beside a line of slope 1."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lspade_train.reporting.plots.static import SETTINGS

    columns = 4
    rows = -(-len(found) // columns)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(2.7 * columns, 2.3 * rows), layout="constrained")
        axes: Any = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(found) :]:
            axis.set_axis_off()
        for axis, one in zip(axes.flat, found, strict=False):
            sizes, costs = [*one.points], [*one.points.values()]
            axis.loglog(sizes, costs, "o-", color="C0", lw=1.4, ms=4)
            linear = [costs[-1] * size / sizes[-1] for size in sizes]
            axis.loglog(sizes, linear, ":", color="gray", lw=1)
            axis.set_title(f"{one.name}\nexponent {one.exponent:.2f}", fontsize=8)
            axis.set_xlabel(one.against, fontsize=8)
            axis.set_ylabel(one.unit, fontsize=8)
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=6)
            axis.minorticks_off()
            axis.tick_params(axis="y", labelsize=7)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure, print and draw."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("figure", type=Path, help="SVG or PNG to write")
    options.add_argument("--config", default=QUICKSTART, help="a fitted recipe")
    asked = options.parse_args()
    show = Console(highlight=False, width=140).print
    show(f"{torch.get_num_threads()} threads, d={WIDTH}, L={LAYERS}, V={VOCAB:,} unless stated")
    found: list[Series] = []
    for series in (extraction(), fitting(), serving(), choosing(asked.config)):
        for one in series:
            found.append(one)
            points = ", ".join(f"{x:,}: {y:.3g}" for x, y in one.points.items())
            show(f"{one.exponent:5.2f}  {one.name} against {one.against} ({points} {one.unit})")
            draw(found, asked.figure)


if __name__ == "__main__":
    main()
