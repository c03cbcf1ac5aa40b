"""What docs/models.md says of each family is what a tiny model of it does."""

from families import END, PAGE, between_markers, table


def test_the_table_of_families_is_what_the_models_do():
    text = PAGE.read_text(encoding="utf-8")
    assert END in text
    found = table()
    assert between_markers(text) == found, "run: python tests/families.py --write"
    assert "| no |" not in found
