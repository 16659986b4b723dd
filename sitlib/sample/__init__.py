"""Sampling codes from a generator, and what it is good for."""
