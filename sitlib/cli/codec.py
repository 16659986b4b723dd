"""`sit compress` and `sit decompress`: images as .sit files, and back."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from sitlib import codec
from sitlib.cli import TOKENIZER, files
from sitlib.cli.images import write_images
from sitlib.model import tiling
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.prior import Prior
from sitlib.strict import require


def load_models(options: argparse.Namespace) -> tuple[SpectralTokenizer, Prior | None]:
    """The tokenizer of the options, and the prior, if they name one."""
    name = options.tokenizer or TOKENIZER
    tokenizer, _ = files.load_checkpoint(name, SpectralTokenizer, options.device)
    if options.prior is None:
        return tokenizer, None
    model, _ = files.load_checkpoint(options.prior, AutoregressiveModel, options.device)
    return tokenizer, Prior(model)


def compress(options: argparse.Namespace) -> int:
    jobs, (tokenizer, prior) = files.Jobs(options), load_models(options)

    def work(path: Path, target: Path) -> list[str]:
        jobs.reserve(target)
        image = files.read_image(path)
        codec.check_size(image.shape[2:])
        encoded = tiling.encode_image(tokenizer, image)
        data = codec.compress(tokenizer, encoded, prior)
        with files.atomic_write(target) as partial:
            partial.write_bytes(data)
        if prior is not None and not codec.has_prior(data):
            tqdm.write(f"sit: {path}: the prior does not help, and is not needed", file=sys.stderr)
        per_pixel = 8 * len(data) / image[0, 0].numel()
        return [files.row(files.size_of(image), len(data), f"{per_pixel:.3f}", target)]

    return jobs.run(work, "size", "bytes", "bits/px", "file")


def decompress(options: argparse.Namespace) -> int:
    jobs, (tokenizer, prior) = files.Jobs(options), load_models(options)

    def work(path: Path, target: Path) -> list[str]:
        require(path.is_file(), "there is no such file")
        most = f"this is no .sit file: it has more than {codec.MOST_BYTES} bytes"
        require(path.stat().st_size <= codec.MOST_BYTES, most)
        encoded, is_whole = codec.decompress(tokenizer, path.read_bytes(), prior)
        needs_all = tokenizer.config.decoder_attention == "full"
        require(is_whole or not needs_all, "it was cut off, and this tokenizer needs all scales")
        if not is_whole:
            left = f"its first {len(encoded.codes)} scales are whole"
            tqdm.write(
                f"sit: {path} was cut off: {left}, which give a smaller image", file=sys.stderr
            )
        return write_images(jobs, target, tokenizer, encoded)

    return jobs.run(work, "size", "scales", "file")
