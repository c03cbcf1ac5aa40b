"""Figures of results: what they show, and how matplotlib and plotly draw them.

Independent of models and caches. Importing this package loads neither library.
"""

from lspade_train.reporting.plots.charts import Bars, Chart, Figure, Heatmap, Omitted, Series
from lspade_train.reporting.plots.figures import all_figures, comparison
from lspade_train.reporting.plots.static import compare_accuracy, write_figures

__all__ = [
    "Bars",
    "Chart",
    "Figure",
    "Heatmap",
    "Omitted",
    "Series",
    "all_figures",
    "compare_accuracy",
    "comparison",
    "write_figures",
]
