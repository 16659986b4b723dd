"""Profiles, runs, experiments and reports: what notebooks and stages of the pipeline call."""

import os
from pathlib import Path

# Notebooks, stages and their workers start in different folders and share one folder of weights.
os.environ.setdefault("SITLIB_WEIGHTS", str(Path(__file__).resolve().parents[1] / "weights"))
