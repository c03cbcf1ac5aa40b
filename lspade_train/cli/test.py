"""`test`: metrics of fitted heads on the test split."""

from lspade_train.cli.validate import check_split


def test(arguments: list[str]) -> None:
    """Metrics on the test split."""
    check_split("test", "test", arguments)
