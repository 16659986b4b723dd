"""The command `sit`: trained tokenizers and models for people without notebooks.

Every subcommand is a function `add_<name>(commands)` that adds its parser and names, with `set_defaults(run=...)`, the function that does
the work and returns the exit code. Modules of this package import torch, and what imports it, inside functions only, so that help is
there at once.

Exit codes: 0 all done; 1 something of the input could not be done, which a sentence names; 2 wrong usage; 130 stopped by Ctrl-C.
"""

import argparse
import os
import sys
from typing import cast

from sitlib import __version__
from sitlib.cli.doctor import add_doctor
from sitlib.cli.drawing import add_edit, add_sample, add_upsample
from sitlib.cli.images import add_decode, add_encode, add_reconstruct
from sitlib.cli.needs import add_describe
from sitlib.cli.options import UsageError

# In the order of the help text.
SUBCOMMANDS = (
    add_encode,
    add_decode,
    add_reconstruct,
    add_sample,
    add_upsample,
    add_edit,
    add_describe,
    add_doctor,
)

DESCRIPTION = """\
Spectral Image Tokenizer: photographs as codes from coarse to fine, and new images drawn code by code.
The trained models are those of the pipeline (make repro; make tokenizer for the first one alone) unless others are named."""
EXAMPLES = """\
examples:
  sit reconstruct photo.jpg --compare           what is left of a photograph, beside it
  sit encode photos/ -o codes/                  a folder of photographs as codes
  sit sample --class mountain --count 8 --grid  eight new mountains
  sit doctor                                    what is missing on this machine

sit COMMAND --help explains each command."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        "sit",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in SUBCOMMANDS:
        add(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs `sit` with these arguments (default: those of the process) and returns its exit code."""
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said what there is to say
        return cast(int, stop.code)
    try:
        return options.run(options)
    except UsageError as error:
        print(f"sit: {error} (--help shows the usage)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sit: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        print(
            f"sit: a package cannot be used ({error}): sit doctor says what is missing",
            file=sys.stderr,
        )
        return 1
    except (ValueError, OSError) as error:
        print(f"sit: {sentence(error)}", file=sys.stderr)
        return 1


def sentence(error: Exception) -> str:
    """What an error says to a user: of the operating system's errors the file and the reason, without a number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
