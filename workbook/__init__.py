"""Profiles, runs, experiments and reports: what the notebooks and the stages of the pipeline call."""
