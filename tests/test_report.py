"""The report: one file, drawn by a real browser, with the numbers of results.json."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lspade_train.cli.printing import print_results
from lspade_train.errors import ArtifactError
from lspade_train.evaluation.verdict import judge
from lspade_train.reporting.page import write_report
from lspade_train.reporting.plots import Omitted, all_figures
from lspade_train.reporting.plots.charts import Chart
from lspade_train.reporting.tables import METRICS, Ranged, all_tables, merged
from lspade_train.reporting.verdict import verdict

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(autouse=True)
def _wandb_off(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def results(evaluated_once):
    return evaluated_once.results


@pytest.fixture
def written(evaluated_once, results, tmp_path):
    """A per-test copy of a heads folder, and its results."""
    mine = tmp_path / "toy"
    shutil.copytree(evaluated_once.folder, mine)
    return mine, results


def browse(page, *, scheme="light"):
    """The page's document after its scripts have run, and the browser's log."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={page.parent / 'browser'}", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, logged


class Tables(HTMLParser):
    """The page's tables by id: rows of cell texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        name = dict(attrs).get("id") or ""
        if tag in {"details", "table"} and name.startswith("table-"):
            self.rows = self.found.setdefault(name.removeprefix("table-"), [])
        elif tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in {"td", "th"}

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def without_scripts(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_a_browser_draws_every_plot_and_logs_no_error(written, scheme):
    folder, results = written
    page, logged = browse(folder / "report.html", scheme=scheme)
    assert logged == []
    drawn = [f for f in all_figures(results) if not isinstance(f, Omitted)]
    for figure in drawn:
        place = re.search(rf'<div [^>]*id="plot-{figure.name}"[^>]*>', page)
        assert place is not None
        assert "js-plotly-plot" in place[0]
    assert page.count('class="main-svg"') >= len(drawn)
    assert len(re.findall(r'class="trace scatter', page)) > 2 * len(drawn)
    ink = "232, 232, 232" if scheme == "dark" else "26, 26, 26"
    assert f"fill: rgb({ink})" in page  # the plots' text comes after the page


def test_the_report_makes_no_network_requests(written):
    folder, _ = written
    page = without_scripts(folder)
    assert not re.search(r"<link|<iframe|<img|@import|url\(|<script[^>]* src", page)
    assert not re.search(r'(src|href)="(?!figures/|README|[a-z]+\.json)', page)


def test_the_reports_links_point_to_files_beside_it(written):
    folder, _ = written
    page = without_scripts(folder)
    links = re.findall(r'<a href="([^"]+)"', page)
    assert set(links) == {"README.md", "results.json", "config.json"}
    assert all((folder / link).is_file() for link in links)


def test_the_reports_figures_can_be_saved_from_the_page(written):
    folder, results = written
    page = without_scripts(folder)
    for figure in all_figures(results):
        if not isinstance(figure, Omitted):
            assert page.count(f'<button data-figure="{figure.name}">') == 2
    assert "figures/" not in re.sub("<noscript>.*?</noscript>", "", page, flags=re.S)


def with_policy(folder, results):
    """The same results with a policy for those heads and two rows that it answers differently."""
    row = results["exits"]["grid"][40]
    results["exits"]["policy"] = {
        "layers": [1, 2], "exit_layers": [1, 2, 4], "row": row | {"exit_counts": [6, 4, 2]},
        "measure": "entropy", "chosen_on_these_rows": False, "label": "policy.json: entropy",
        "promise": {"risk": "accuracy_drop", "budget": 0.5, "confidence": 0.95},
    }  # fmt: skip
    results["verdict"] = judge(results)
    one = {"prompt_end": "w1 <b> ? :", "full_model": "A", "confidence": 0.75, "exit": "B",
           "layer": 2, "label": None}  # fmt: skip
    results["examples"] = {"n": 3, "rows": [one, one | {"label": "B"}]}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    calibration = {"risk": "accuracy_drop", "budget": 0.5, "confidence": 0.95, "n": 20}
    record = {"heads_digest": results["heads"]["weights_sha256"], "calibration": calibration}
    (folder / "policy.json").write_text(json.dumps(record), encoding="utf-8")
    return write_report(folder).read_text(encoding="utf-8")


def test_the_report_starts_with_verdict_guarantee_and_time_taken(written):
    folder, results = written
    page = with_policy(folder, results)
    order = [verdict(results)[0], "Guarantee: ", "Fit took", "Evaluation took", 'id="figures"']
    places = [page.index(text) for text in order]
    assert places == sorted(places)


def test_the_rows_with_the_largest_disagreement_are_in_a_table(written):
    folder, results = written
    page = with_policy(folder, results)
    head, *rows = Tables(page).found["examples"]
    assert head == ["end of the prompt", "full model's answer", "its probability",
                    "policy's answer", "exit layer", "correct answer"]  # fmt: skip
    assert rows[0] == ["w1 <b> ? :", "A", "0.750", "B", "2", "-"]
    assert "3 of 12 rows" in page


def test_a_caption_mentions_the_oracle_only_where_it_is_drawn(results):
    charts = [figure for figure in all_figures(results) if isinstance(figure, Chart)]
    drawn = [any("oracle" in one.label for one in chart.series) for chart in charts]
    assert any(drawn)
    assert ["oracle" in chart.caption for chart in charts] == drawn


def test_the_reports_tables_are_the_rounded_results(written):
    folder, results = written
    shown = Tables((folder / "report.html").read_text(encoding="utf-8")).found
    assert {"accuracy", "agrees_model", "kl_to_model", "exits"} <= set(shown)
    for table in all_tables(results):
        head, *rows = shown[table.name]
        columns, values = merged(table)
        assert head == columns
        assert set(table.columns) - set(columns) == {c for c in table.columns if ends(c)}
        for cells, of_row in zip(rows, values, strict=True):
            assert cells == [rounded(value) for value in of_row]


def ends(column):
    return column.endswith(("low", "high"))


def rounded(value):
    if isinstance(value, Ranged):
        return f"{rounded(value.value)} {rounded(value.low)}\u2013{rounded(value.high)}"
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def test_the_tables_hold_the_unrounded_results(results):
    tables = {table.name: table for table in all_tables(results)}
    for metric in METRICS:
        columns = dict(
            zip(tables[metric].columns, zip(*tables[metric].rows, strict=True), strict=True)
        )
        assert list(columns["layer"]) == results["layers"]
        assert list(columns["L-SPADE"]) == results["lenses"]["l_spade"][metric]


def test_the_reports_plots_hold_the_unrounded_results(written):
    folder, results = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    specs = json.loads(re.search(r'id="specs">(.*?)</script>', page, re.S)[1])
    drawn = {trace["name"]: trace for trace in specs["accuracy_by_layer"]["data"]}
    assert drawn["L-SPADE"]["y"] == results["lenses"]["l_spade"]["accuracy"]
    assert drawn["full model"]["y"] == [results["full_model"]["accuracy"]] * 2
    intervals = results["lenses"]["spade"]["accuracy_interval"]
    assert drawn["SPADE"]["customdata"] == intervals


def test_the_printed_tables_match_the_report(written, capsys, monkeypatch):
    folder, results = written
    monkeypatch.setenv("COLUMNS", "200")
    print_results(results)
    printed = set(re.findall(r"[0-9]+\.[0-9]{3}", capsys.readouterr().out))
    shown = Tables((folder / "report.html").read_text(encoding="utf-8")).found
    assert printed
    for cells in shown["accuracy"][1:]:
        assert {cell.split()[0] for cell in cells[1:]} <= printed  # without their intervals


def test_the_report_includes_recipe_and_provenance(written):
    folder, results = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "max_epochs: 2" in page
    assert results["provenance"]["versions"]["torch"] in page
    assert results["heads"]["weights_sha256"] in page
    assert "{&#39;" not in page  # a mapping is shown as rows, not as its Python repr


def test_the_report_is_built_from_the_files_alone(written):
    folder, _ = written
    first = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert write_report(folder).read_bytes() == first


def test_names_in_the_results_cannot_inject_scripts(written):
    folder, results = written
    results = {**results, "name": "</script><script>alert(1)</script>"}
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page


def test_the_report_says_what_was_not_measured(written):
    folder, _ = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Transfer between tasks: Not measured" in page
    assert "No exit policy was measured on these 12 rows (test split): choose one" in page


def test_a_folder_without_results_is_rejected(tmp_path):
    with pytest.raises(ArtifactError, match=r"results\.json"):
        write_report(tmp_path)


def test_results_of_another_format_are_rejected(written):
    folder, results = written
    (folder / "results.json").write_text(json.dumps({**results, "format_version": 1}))
    with pytest.raises(ArtifactError, match=r"format_version 1; a report needs 2.*evaluate"):
        write_report(folder)
