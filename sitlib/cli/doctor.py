"""`sit doctor` and `sit describe`: what this machine lacks, and what a checkpoint holds."""

import argparse
import shutil
import sys
from importlib.metadata import requires, version
from math import log2


def doctor(options: argparse.Namespace) -> int:
    """Print a line for every check; every import is inside one, for a package may be broken."""
    if options.fetch:
        from sitlib.metrics import fetch_weights

        fetch_weights()
    failed = 0
    for check, remedy in CHECKS.items():
        try:
            print(f"ok       {check()}", flush=True)
        except Exception as error:  # whatever a broken installation raises
            failed += check is not evaluation  # which every other command does without
            reason = " ".join(str(error).split())
            print(f"missing  {check.__name__}: {reason} -> {remedy}", flush=True)
    print(f"{failed} needed missing" if failed else "everything needed is there")
    return min(failed, 1)


def packages() -> str:
    """Python and the packages that sitlib requires, in the versions that it lists."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in requires("sitlib") or [] if "extra ==" not in text]
    for package in listed:
        if not package.specifier.contains(version(package.name), prereleases=True):
            raise ValueError(f"{package.name} {version(package.name)} is not {package.specifier}")
    return f"Python {sys.version.split()[0]} with {len(listed)} packages"


def torch_pair() -> str:
    """torchvision's compiled operators work with the torch that they were built for, only."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # raises where they do not
    return f"torch {torch.__version__} with torchvision {torchvision.__version__}"


def gpu() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and shutil.which("nvidia-smi"):
        raise ValueError("there is a driver, but torch cannot use it")
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    return f"GPU: {', '.join(names) or 'none, and none is needed'}"


def models() -> str:
    """The models that come along."""
    from sitlib.files import read_metadata
    from sitlib.model.pretrained import CHECKPOINT, PACKAGED

    found = sorted(PACKAGED.glob(f"*/{CHECKPOINT}"))
    if not found:
        raise ValueError(f"{PACKAGED} has none")
    kinds = {path.parent.name: read_metadata(path)["class"] for path in found}
    return f"models: {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}"


def evaluation() -> str:
    """The networks of LPIPS."""
    from sitlib.metrics.weights import TRUNKS, trunk_file, weights_folder

    if missing := [path for path in map(trunk_file, TRUNKS) if not path.is_file()]:
        raise ValueError(f"sit evaluate needs {missing[0]}")
    return f"evaluation: networks of LPIPS in {weights_folder()}"


CHECKS = {
    packages: 'pip install --upgrade "sitlib", in a clone pip install -e .',
    torch_pair: "pip install --force-reinstall torch torchvision, both from one index",
    models: "install the package again, in a clone check out sitlib/weights",
    evaluation: "sit doctor --fetch (64 MB to download)",
    gpu: "install a torch that is built for the CUDA version which nvidia-smi shows",
}


def describe(options: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    from sitlib.cli.files import KINDS, find_checkpoint
    from sitlib.files import load_model, read_metadata
    from sitlib.model.generator import AutoregressiveModel
    from sitlib.model.tokenizer import SpectralTokenizer, codes_digest

    path = find_checkpoint(options.checkpoint, *KINDS.values())
    metadata = read_metadata(path)
    is_generator = metadata.get("class") == AutoregressiveModel.__name__
    model = load_model(path, AutoregressiveModel if is_generator else SpectralTokenizer)
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    tokens = config.num_scales * config.tokens_per_scale
    rows = {
        "class": type(model).__name__,
        "name": metadata.get("name", path.resolve().parent.name),
        "parameters": f"{parameters / 1e6:.2f} million",
        "tokens": f"{config.num_scales} scales of {config.tokens_per_scale}, {tokens} in all",
        "codes": f"{config.codebook_sizes} by scale, {config.num_codebooks} codebooks",
        "bits": f"{config.tokens_per_scale * sum(map(log2, config.codebook_sizes)):.0f} an image",
    }
    if isinstance(model, AutoregressiveModel):
        classes = model.config.classes
        rows["tokenizer"] = model.config.transformer.tokenizer
        rows["draws"] = f"classes {', '.join(classes)}" if classes else "texts"
        rows["sampling"] = str(model.config.sampling)
    else:
        rows["digest"] = f"{codes_digest(model)}, which files of codes and .sit files name"
        rows["sizes"] = f"{', '.join(map(str, model.sizes))} px; others in tiles"
    for title, text in rows.items():
        print(f"{title:<12}{text}")
    return 0
