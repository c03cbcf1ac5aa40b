"""What docs/models.md says about each family matches what a tiny model of it does."""

import pytest
from families import END, PAGE, between_markers, table
from tiny_models import FAMILIES, KINDS


@pytest.mark.parametrize(
    "families", [pytest.param(KINDS, id="kinds"), pytest.param(FAMILIES, marks=pytest.mark.slow)]
)
def test_the_documented_table_of_families_matches_the_models(families):
    text = PAGE.read_text(encoding="utf-8")
    assert END in text
    written = between_markers(text).splitlines()
    rows = {line.split("`")[1]: line for line in written if line.startswith("| `")}
    kept = [*written[:2], *(rows[family] for family in families)]
    assert kept == table(families).splitlines(), "run: python tests/families.py --write"
    assert not [line for line in kept if "| no |" in line]
    assert rows.keys() == {*FAMILIES}
