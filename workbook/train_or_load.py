"""Placeholder."""

from workbook.runs import AutoregressiveRun, TokenizerRun

__all__ = ["AutoregressiveRun", "TokenizerRun"]
