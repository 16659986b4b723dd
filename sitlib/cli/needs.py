"""`sit describe`: what a profile asks of a machine."""

import argparse
import sys
from typing import Any

from sitlib.cli.options import add_command


def add_describe(commands: Any) -> None:
    """The subcommand `describe`."""
    parser = add_command(
        commands,
        "describe",
        _describe,
        "what a profile asks of a machine: parameters, operations, memory, GPU-hours, disk",
        "sit describe paper --gpu H100",
        "Nothing is trained, and no model is built.",
    )
    parser.add_argument("profile", help="name of a profile, such as quick or paper")
    parser.add_argument(
        "variants",
        nargs="*",
        help="some of its tokenizers and autoregressive models (default: all)",
    )
    parser.add_argument("--variants", dest="more", nargs="+", default=[], help="the same")
    parser.add_argument(
        "--gpu",
        default="H100",
        help="a GPU by name, such as A100 (an unknown one lists all; default: %(default)s)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.35,
        help="share of the GPU's peak that training reaches (default: %(default)s)",
    )


def _describe(options: argparse.Namespace) -> int:
    variants = [*options.variants, *options.more]
    print("Counting what models would need, up to some minutes ...", file=sys.stderr, flush=True)
    from workbook.describe import describe

    describe(options.profile, variants or None, gpu=options.gpu, utilisation=options.utilisation)
    return 0
