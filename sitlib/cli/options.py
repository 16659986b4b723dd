"""Options that several subcommands share, and the types of their values. Imports nothing heavy."""

import argparse
import textwrap
from collections.abc import Callable
from typing import Any

ALL = "all"  # what --scales takes besides numbers


class UsageError(Exception):
    """Options that do not fit together; ends with exit code 2. The message says what to do."""


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    example: str,
    more: str = "",
) -> argparse.ArgumentParser:
    """A subcommand's parser.

    Args:
        commands: what `add_subparsers` returned.
        run: does the work and returns the exit code.
        what: one line for the list of commands; `more`, sentences that only its own help shows.
        example: one or several command lines.
    """
    parser = commands.add_parser(
        name,
        help=what,
        description=textwrap.fill(f"{what[0].upper()}{what[1:]}. {more}".strip(), 80),
        epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_files(
    parser: argparse.ArgumentParser, metavar: str, what: str, default_folder: str
) -> None:
    """The inputs, and where outputs go."""
    parser.add_argument(
        "inputs", nargs="+", metavar=metavar, help=f"{what}: files, or folders of them"
    )
    add_output(parser, default_folder)
    parser.set_defaults(default_folder=default_folder)


def add_output(parser: argparse.ArgumentParser, default_folder: str) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help=f"folder to write into, which gets the structure of input folders; or a file, for one output (default: {default_folder}/)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that are there already (default: keep them and say so)",
    )


def add_tokenizer(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|PATH",
        help=f"a trained one by its name, such as sit5_sc, or the path of a checkpoint (default: {default})",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def add_prompt(parser: argparse.ArgumentParser, required: bool) -> None:
    """What the model is told, and which model is told it."""
    group = parser.add_mutually_exclusive_group(required=required)
    nothing = (
        "" if required else "; with neither of the two, the model of photographs is told nothing"
    )
    group.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="a class of photographs, such as mountain; an unknown one lists all",
    )
    group.add_argument(
        "--text", help=f'what the image shows, such as "an emoji of a red apple"{nothing}'
    )
    parser.add_argument(
        "--model",
        metavar="NAME|PATH",
        help="a trained autoregressive model by its name, such as ar_sit5_sc, or the path of a checkpoint (default: %(default)s)",
        default=OfProfile("applications.class_generator", "applications.text_generator"),
    )
    add_tokenizer(parser, "the one of whose codes the model is")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How codes are drawn. What is not given is as in the profile."""
    parser.add_argument(
        "--count", type=number_from(1), default=1, help="images to draw (default: %(default)s)"
    )
    for name, kind, what in (
        ("seed", int, "sample i depends on the seed and on i alone"),
        ("guidance", float, "how much more the model listens to what it is told; 1 is off"),
        ("temperature", float, "below 1: likelier codes, less variety"),
        ("top-p", float, "draw among the likeliest codes of this share; 1 is off"),
    ):
        key = f"sampling.{name.replace('-', '_')}"
        default = OfProfile(f"autoregressive.{key}", f"text.{key}")
        text = f"{what} (default: %(default)s) unless the profile's samplers say otherwise of the model"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


class OfProfile:
    """A default that the pipeline's profile gives, one for classes and one for texts; read when help shows it or a command runs."""

    def __init__(self, for_class: str, for_text: str):
        self.keys = for_class, for_text

    def of(self, is_text: bool) -> Any:
        """The value in the profile that params.yaml names.

        Raises:
            ValueError: there is no such profile here.
        """
        from sitlib.cli.models import pipeline_profile

        value = pipeline_profile()
        for name in self.keys[is_text].split("."):
            value = getattr(value, name)
        return value

    def __str__(self) -> str:
        try:
            for_class, for_text = self.of(False), self.of(True)
        except (ValueError, OSError, ImportError):
            return "the profile's"
        return (
            str(for_class)
            if for_class == for_text
            else f"{for_class} for classes, {for_text} for texts"
        )


def given(value: Any, is_text: bool) -> Any:
    """The value of an option, or what the profile says where it was not given."""
    return value.of(is_text) if isinstance(value, OfProfile) else value


def number_from(low: int) -> Callable[[str], int]:
    """A type of options: whole numbers of at least `low`."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return number

    return whole


def scales_list(text: str) -> list[int] | str:
    """`3`, `1,2,3` -> those numbers of scales, ascending; `all` -> ALL."""
    if text == ALL:
        return ALL
    try:
        return sorted({number_from(1)(part) for part in text.split(",")})
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of scales: give 3, or several as 1,2,3, or all"
        ) from None
