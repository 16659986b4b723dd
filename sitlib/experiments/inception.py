"""Fetches the Inception network if a profile judges with it: `python -m sitlib.experiments.inception --profile paper`.

Before anything is trained: what is missing, a package or the way to the internet, should not be found out by the first evaluation.
"""

import argparse

from sitlib.config import load_profile
from sitlib.experiments.runs import command
from sitlib.metrics import InceptionMetrics


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sitlib.experiments.inception", description=__doc__)
    parser.add_argument("--profile", required=True)
    if load_profile(parser.parse_args().profile).tokenizer.evaluation.inception:
        InceptionMetrics()


if __name__ == "__main__":
    command(main)
