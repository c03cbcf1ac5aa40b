"""The benchmarks themselves: their parts are documented, and the quick ones are quick."""

from pathlib import Path

import bench
import bench_timing
import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs/performance.md"


def test_the_performance_page_documents_every_part():
    named = PAGE.read_text(encoding="utf-8").split("The parts are\n`")[1].split("`")[0].split()
    assert set(named) == set(bench.parts_of(None)) - {"lens"}


def test_the_quick_parts_add_up_to_less_than_two_minutes():
    quick = [part.quick for part in bench.parts_of(None).values() if part.quick]
    assert len(quick) > 5
    assert sum(quick) < 120


def test_a_ratio_is_of_medians_and_its_range_is_over_rounds():
    taken = {"case": [1.0, 2.0, 9.0], "base": [2.0, 2.0, 3.0]}
    assert bench_timing.versus(taken, "case", "base") == "1.00 (0.50-3.00)"


def test_each_part_is_printed_and_saved_as_it_finishes(tmp_path, capsys):
    def fails():
        raise ValueError("the second part")

    parts = {
        "one": bench_timing.Part(lambda: [("figure", "0.50", "detail")], 100),
        "two": bench_timing.Part(fails, 30),
    }
    with pytest.raises(ValueError, match="the second part"):
        bench.run(parts, False, tmp_path / "kept.json")
    shown = capsys.readouterr().out
    assert "2 parts, about 2 min 10 s" in shown
    assert "0.50" in shown.split("one")[1]
    assert '"figure": "figure"' in (tmp_path / "kept.json").read_text()
