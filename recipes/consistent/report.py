"""The table and the figure of docs/consistent-space.md, from the files in results/ alone.

python recipes/consistent/report.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
PAGE = ROOT / "docs/consistent-space.md"
FIGURE = ROOT / "docs/assets/consistent-space.svg"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

POLICIES = {"own_head": "own head alone", "own_answer": "own head answers", "anything": "anything"}
COLOURS = {"own_head": "#8A8A8A", "own_answer": "#E69F00", "anything": "#0072B2"}
STYLES = ("o-", "s--")
"""Of the first and second seed; more seeds are in the table alone."""
HEADINGS = (
    *("model and task", "row", "accuracy at layer L", "KL to the original"),
    *("own head agrees at L/4, L/2, 3L/4", *POLICIES.values(), "training FLOPs"),
)


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results, sorted by the names of their files."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def name_of(found: Mapping[str, Any]) -> str:
    """Model and task, and the seed."""
    return f"{found['title']}, seed {found['seed']}"


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table: one line per row of a results file, in the order of `HEADINGS`."""
    base = found["rows"]["frozen"]["training_flops"]
    lines: list[list[str]] = []
    for name, row in found["rows"].items():
        label = f"{name} ({row['note']})" if row["note"] else name
        saved = [
            f"{100 * row[p]['compute_saved']:.1f}% / {100 * row[p]['drop']:+.1f}" for p in POLICIES
        ]
        agreement = dict(zip(row["layers"], row["own_head_agreement"], strict=True))
        quarters = [round(found["num_layers"] * part / 4) for part in (1, 2, 3)]
        agrees = ", ".join(f"{agreement[x]:.2f}" if x in agreement else "-" for x in quarters)
        ratio = f"{row['training_flops'] / base:.1f}x"
        lines.append(
            [
                name_of(found),
                label,
                f"{row['accuracy']:.3f}",
                f"{row['kl']:.3f}",
                agrees,
                *saved,
                ratio,
            ]
        )
    return lines


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The part of the page between the markers."""
    if not results:
        return "No results yet.\n"
    lines = [
        HEADINGS,
        ["---"] * len(HEADINGS),
        *(line for found in results for line in cells(found)),
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    notes = "".join(f"- {settings(found)}\n" for found in results)
    figure = f"![FLOPs saved against KL to the original model](assets/{FIGURE.name})\n"
    return f"{figure}\n{table}\n{notes}"


def settings(found: Mapping[str, Any]) -> str:
    """How one results file was made."""
    tuning, made, n = found["tuning"], found["provenance"], found["n"]
    trained = [row["training"] for row in found["rows"].values() if row["training"]]
    spent = sum(one["cpu_seconds"] for one in trained) / 60 / max(len(trained), 1)
    return (
        f"{name_of(found)}: {n['train']:,} rows to train, {n['validation']:,} to choose policies, "
        f"{n['test']:,} for the table; fine-tuned with `--epochs {tuning['epochs']} --lr "
        f"{tuning['lr']:g} --batch_size {tuning['batch_size']} --rank {tuning['rank']}`, "
        f"{spent:.1f} CPU minutes per weight; policies with `--max_accuracy_drop "
        f"{found['budget']:g}`; "
        f"{made['dtype']}, {made['hardware']}, torch {made['versions']['torch']}."
    )


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """FLOPs saved against KL to the original, one panel per model and task; seeds share a panel."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from lspade_train.reporting.plots.static import SETTINGS

    titles = list(dict.fromkeys(found["title"] for found in results))
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(4.4 * len(titles) + 0.6, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        panels: Any = figure.subplots(1, len(titles), squeeze=False, sharey=True)
        for axes, title in zip(panels[0], titles, strict=True):
            seeds = [found for found in results if found["title"] == title]
            for found, style in zip(seeds, STYLES, strict=False):
                _lines(axes, found, style)
            note = " (dashed: second seed)" if len(seeds) > 1 else ""
            axes.set_title(title + note, fontsize=9)
            axes.set_xlabel("KL to the original model, nats (frozen: 0)", fontsize=8)
            axes.tick_params(labelsize=8)
        panels[0][0].set_ylim(bottom=0)  # room for the rows' names
        panels[0][0].set_ylabel("FLOPs saved, %", fontsize=8)
        handles = {line.get_label(): line for line in panels[0][0].get_lines()[: len(POLICIES)]}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _lines(axes: Any, found: Mapping[str, Any], style: str) -> None:
    rows = {n: row for n, row in found["rows"].items() if n == "frozen" or row["training"]}
    names = sorted(rows, key=lambda name: rows[name]["kl"])
    lost = [rows[name]["kl"] for name in names]
    for key, label in POLICIES.items():
        saved = [100 * rows[name][key]["compute_saved"] for name in names]
        axes.plot(lost, saved, style, label=label, color=COLOURS[key], lw=1.2, ms=4)
    for name, x in zip(names, lost, strict=True):
        axes.annotate(
            name,
            (x, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="bottom",
            ha="right",
            fontsize=6,
            color="#555555",
        )


def write_page(folder: Path = RESULTS, page: Path = PAGE, figure: Path = FIGURE) -> Path:
    """Replace the part of the page between the markers, and draw the figure."""
    results = load(folder)
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}", encoding="utf-8")
    if results:
        draw(results, figure)
    return page


if __name__ == "__main__":
    write_page()
