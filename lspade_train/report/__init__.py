"""`report.html`: what was measured, as one file that needs no network, from results alone."""

from lspade_train.report.page import write_report
from lspade_train.report.tables import Table, all_tables

__all__ = ["Table", "all_tables", "write_report"]
