"""The command `sit`: trained tokenizers and generators for people without notebooks.

This module parses the command line and imports nothing heavy, so that help is there at once.
"""

import argparse
import importlib
import io
import os
import sys
import warnings
from typing import Any

from sitlib import __version__

ALL = "all"  # a value of --scales
TOKENIZER = "photos-256"  # of this package
GENERATORS = {"class": "photos-class", "text": "emoji-text"}  # of this package

DESCRIPTION = """\
Spectral Image Tokenizer: photographs as codes from coarse to fine, and new images drawn code by
code. Models are those of this package by name, or those in models/ of this folder and of those
above it, where `make repro` puts them.

exit codes: 0 all done; 1 something was not, which a sentence names; 2 wrong usage; 130 Ctrl-C"""

FILES = "inputs --output --overwrite"
MODELS = "--class --text --model --tokenizer --device"
SAMPLING = "--count --seed --guidance --temperature --top-p --steps-per-scale"


def positive(text: str) -> int:
    """Type of an option."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def path(text: str) -> str:
    """Type of an option. An unset variable of a shell must not mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return os.path.expanduser(text)


def scales(text: str) -> list[int] | str:
    """Type of an option: `3` or `1,2,3` -> ascending numbers of scales; `all` -> ALL."""
    return ALL if text == ALL else sorted({positive(number) for number in text.split(",")})


# Tables, not code: formatted by hand.
# fmt: off
OPTIONS: dict[str, dict[str, Any]] = {
    "inputs": dict(type=path, nargs="+", metavar="FILE", help="files, or folders of them"),
    "checkpoint": dict(type=path, metavar="NAME|PATH", help="a trained model"),
    "--output": dict(type=path, metavar="PATH", help="folder to write into, with the structure "
                     "of input folders; or a file, for one output (default: %(default)s/)"),
    "--overwrite": dict(action="store_true",
                        help="replace files that are there (default: keep them and say so)"),
    "--tokenizer": dict(type=path, metavar="NAME|PATH", help="a trained one by name, or a "
                        f"checkpoint's path (default: that of the codes or model, or {TOKENIZER})"),
    "--prior": dict(type=path, metavar="NAME|PATH", help="a masked generator over the tokenizer's "
                    "codes, such as photos-class, which makes files smaller; to read them takes "
                    "it again"),
    "--device": dict(choices=("cpu", "cuda"), help="default: cuda where there is one"),
    "--scales": dict(type=scales, metavar="K", help="use the first K scales only, for an image of "
                     "half the side for every scale left out; several as 1,2,3, or all"),
    "--compare": dict(action="store_true", help="also write original and result side by side"),
    "--class": dict(dest="class_name", metavar="NAME",
                    help="a class of photographs, such as mountain; an unknown one lists all"),
    "--text": dict(help='what the image shows, such as "an emoji of a cat face"'),
    "--model": dict(type=path, metavar="NAME|PATH", help="a trained generator by name, or a "
                    f"checkpoint's path (default: {GENERATORS['class']}; "
                    f"with --text {GENERATORS['text']})"),
    "--count": dict(type=positive, default=1, help="images to draw (default: %(default)s)"),
    "--seed": dict(type=int, help="sample i is a function of the seed and i"),
    "--guidance": dict(type=float, help="weight of classifier-free guidance; 1 is off"),
    "--temperature": dict(type=float, help="below 1: likelier codes, less variety"),
    "--top-p": dict(type=float, help="draw among the likeliest codes of this share; 1 is off"),
    "--steps-per-scale": dict(type=positive, metavar="K", help="passes in which a masked model draws "
                    "a scale: more take longer (defaults of these five: those of the checkpoint)"),
    "sample --scales": dict(type=positive, metavar="K", help="stop after the first K scales: a "
                            "small preview of what the same seed gives in full"),
    "--grid": dict(action="store_true", help="also write all images as one"),
    "--size": dict(type=positive, metavar="PX", help="first make the center of an image a "
                   "square of this side (default: the image must have a fitting size)"),
    "data": dict(type=path, metavar="DATA", help="folder of images or of WebDataset shards"),
    "--split": dict(help="of the data (default: test; all images where no folder or shard names "
                    "splits, and --split test is what training holds back of these)"),
    "--views": dict(type=positive, metavar="N", help="default: one of every image"),
    "--kind": dict(choices=("center", "wide", "crops"), default="center", help="views: the largest "
                   "square in the middle, a random one nearly as large, or of any size (default: "
                   "%(default)s); all are resized to the model's size, bicubic, antialiased"),
    "evaluate --size": dict(type=positive, metavar="PX", help="of tokenizers: views averaged down "
                            "to this side (default: the full size)"),
    "--inception": dict(action="store_true", help="FID and Inception score, too (extra inception)"),
    "--fetch": dict(action="store_true", help="first fetch the networks of LPIPS, with which sit "
                    "evaluate measures: 64 MB, once"),
    "--keep": dict(type=int, default=2, metavar="K", help="scales that stay as "
                   "they are, coarsest first (default: %(default)s)"),
}

# Command: module of this package with a function of that name, output folder, options, help.
COMMANDS = {
    "encode": ("images", "codes", f"{FILES} --tokenizer --device", """\
write the codes of images

Images of any size: each is padded and cut into squares. A codes file (safetensors) holds the size
of its image and the name of its tokenizer.

  sit encode photo.jpg
  sit encode photos/ -o codes/ --tokenizer sit4"""),
    "decode": ("images", "decoded", f"{FILES} --scales --tokenizer --device", """\
make images of codes again

  sit decode codes/photo.safetensors
  sit decode codes/ -o decoded/ --scales 3"""),
    "reconstruct": (
        "images", "reconstructed", f"{FILES} --scales --compare --tokenizer --device", """\
show what is left of images after encoding and decoding

Prints size, codes, bits per pixel and PSNR; and LPIPS (AlexNet), of images up to 4 megapixels, if
sit doctor --fetch has fetched its weights.

  sit reconstruct photo.jpg --compare
  sit reconstruct photos/ --scales all"""),
    "compress": ("codec", "compressed", f"{FILES} --tokenizer --prior --device", """\
make images small files that, cut off after any scale, are the image at a smaller size

A .sit file holds the codes of a tokenizer, coarsest scale first, coded by their frequencies or by
what a generator expects of them.

  sit compress photo.jpg
  sit compress photos/ -o compressed/"""),
    "decompress": ("codec", "decompressed", f"{FILES} --scales --tokenizer --prior --device", """\
make images of .sit files again, also of files that were cut off

  sit decompress compressed/photo.sit
  sit decompress compressed/ -o previews/ --scales 3"""),
    "sample": (
        "sample", "samples", f"--output --overwrite {MODELS} {SAMPLING} --scales --grid", """\
draw new images of a class or a text

  sit sample --class mountain --count 8 --grid
  sit sample --text "an emoji of a cat face" --seed 3
  sit sample --class water --count 16 --scales 2"""),
    "upsample": ("sample", "upsampled", f"{FILES} {MODELS} {SAMPLING} --size", """\
draw the details that small images lack

Takes squares of the sizes of a scale-causal tokenizer's first scales: 16, 32, 64 or 128 px for
photos-class, half of that for emoji-text. Without --class or --text anything is drawn that the
model has learned.

  sit upsample small.png --class mountain
  sit upsample emoji.png --size 8 --text "a red apple" """),
    "edit": ("sample", "edited", f"{FILES} {MODELS} {SAMPLING} --keep", """\
keep the coarse scales of images and draw the details anew, for a class or a text

Of an image of another size its center is taken, as a square of the tokenizer's size.

  sit edit photo.png --keep 2 --class snow
  sit edit apple.png --keep 1 --text "a green apple" --count 4"""),
    "evaluate": ("evaluate", "evaluated", "checkpoint data --output --overwrite --split --views "
                 f"--kind --size {SAMPLING.removeprefix('--count ')} --tokenizer --inception "
                 "--device", """\
judge a tokenizer or a generator on images that it has never seen

Writes scores, and a manifest of what they depend on: weights, images by hash, views and how they
were resized, sampler, precision, device, versions. Samples are drawn for the classes of the images,
or for their names. Tokenizers are judged by LPIPS, too: sit doctor --fetch fetches its networks.

  sit evaluate photos-256 data/landscapes
  sit evaluate ar_sit5_sc data/landscapes --views 400"""),
    "describe": ("doctor", None, "checkpoint", """\
say what a checkpoint holds: class, parameters, scales, tokens, bits, sizes

  sit describe photos-256
  sit describe models/autoregressive/ar_sit5_sc-seed0/model.safetensors"""),
    "doctor": ("doctor", None, "--fetch", """\
say what is missing on this machine, and how to mend it

  sit doctor
  sit doctor --fetch"""),
}
# fmt: on


def main(arguments: list[str] | None = None) -> int:
    """Run `sit` with these arguments (default: those of the process); return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")
    warnings.showwarning = lambda message, *_, **__: print(f"sit: {message}", file=sys.stderr)
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    # Networks that judge images go there, too; not where a program calls this function.
    if arguments is None and getattr(options, "device", None) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        module = importlib.import_module(f"sitlib.cli.{COMMANDS[options.command][0]}")
        return getattr(module, options.command)(options)
    except argparse.ArgumentError as error:  # options that do not fit together
        print(f"sit: {error} (--help shows the usage)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sit: stopped; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        print(f"sit: {error}: sit doctor says what is missing", file=sys.stderr)
    except (ValueError, OSError, MemoryError) as error:
        print(f"sit: {sentence(error)}", file=sys.stderr)
    return 1


def sentence(error: Exception) -> str:
    """One line for an error; of one of the operating system, file and reason without number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return " ".join(str(error).split())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sit", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"sit {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True
    )
    for name, (_, folder, options, text) in COMMANDS.items():
        summary = text.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
        prompt: Any = None
        if "--class" in options:
            prompt = command.add_mutually_exclusive_group(required=name == "sample")
        for option in options.split():
            group = prompt if option in ("--class", "--text") else command
            settings = OPTIONS.get(f"{name} {option}") or OPTIONS[option]
            group.add_argument(*(["-o"] if option == "--output" else []), option, **settings)
        command.set_defaults(output=folder)
    return parser
