"""Figures and tables of the notebooks, in one look."""

from workbook.figures.core import colour, curves, image_grid, say, show, style
from workbook.figures.tables import table
from workbook.names import label

__all__ = ["colour", "curves", "image_grid", "label", "say", "show", "style", "table"]
