"""The token view: every layer's answer at every position of one prompt."""

from lspade_train.inspection.render import render_html, render_terminal
from lspade_train.inspection.view import Cell, TokenView, inspect_prompt

__all__ = ["Cell", "TokenView", "inspect_prompt", "render_html", "render_terminal"]
