"""What SIT and ViT-VQGAN cost at growing image sizes.

SIT gets one more scale of the same number of tokens with every doubling of the side; ViT-VQGAN, with patches of one size, four times the
tokens. Costs do not depend on what weights hold, so they are random. Measured one model and size after the other in processes of their own,
in which the peak of the resident memory is that of the model alone.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sitlib.model.config import TokenizerConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from workbook.estimates import flops
from workbook.profile import Profile, load_profile
from workbook.throughput import peak_mb

SIZES = (64, 128, 256, 512, 1024)  # px
BATCHES = (1, 4, 16, 64)
SWEPT_SIZES = (64, 256)  # px, at which the batch size varies
LONGEST_SAMPLED = 4096  # tokens; a longer sequence is not sampled, which takes hours
MODELS = ("sit4", "vit_vqgan")
FITTED = ("tokens", "parameters", "flops", "encode", "decode", "train", "sample", "memory_mb")


def configuration(profile: Profile, variant: str, size: int) -> TokenizerConfig:
    """The variant for images of `size` px, as the paper scales it: one more level a doubling, or more patches of the same size."""
    config = profile.tokenizer_variant(variant)
    doublings = (size // config.size).bit_length() - 1
    if config.levels == 0:
        return replace(config, size=size, grid_size=config.grid_size << doublings)
    books = (
        config.num_scales + doublings
        if config.num_codebooks == config.num_scales
        else config.num_codebooks
    )
    return replace(config, size=size, levels=config.levels + doublings, num_codebooks=books)


def measured(profile: Profile, variant: str, size: int, batch_size: int = 1) -> dict[str, Any]:
    """Costs at one size, in this process.

    Returns:
        `tokens`, `parameters`; `flops`: operations of encoding and decoding an image; `encode`, `decode`, `train`: seconds
        an image (`train`: forward, L2 loss and backward, without LPIPS, which costs the same for every model); `sample`:
        seconds to draw an image's codes with a cache and guidance, by the profile's class-conditional shape (None beyond
        LONGEST_SAMPLED tokens); `memory_mb`: what the training step adds to the peak of this process.
    """
    torch.manual_seed(0)
    config = configuration(profile, variant, size)
    tokenizer = SpectralTokenizer(config).eval()
    images = torch.rand(batch_size, 3, size, size)
    tokens = config.num_scales * config.tokens_per_scale

    def train() -> None:
        (tokenizer(images).reconstruction - images).square().mean().backward()

    before = peak_mb()
    train()  # before anything else, so that nothing else has made the peak
    memory = peak_mb() - before
    with torch.no_grad():
        operations = flops(lambda: tokenizer(images[:1]))
    codes = tokenizer.encode(images)
    sampled = tokens <= LONGEST_SAMPLED and batch_size == 1
    return {
        "variant": variant,
        "size": size,
        "batch_size": batch_size,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "flops": operations,
        "encode": _seconds(lambda: tokenizer.encode(images)) / batch_size,
        "decode": _seconds(lambda: tokenizer.decode(codes)) / batch_size,
        "train": _seconds(train) / batch_size,
        "sample": _sampling_seconds(profile, config) if sampled else None,
        "memory_mb": memory,
    }


def _sampling_seconds(profile: Profile, config: TokenizerConfig) -> float:
    shape = replace(profile.autoregressive_variant(f"ar_{MODELS[0]}"), dropout=0.0)
    books = min(config.num_codebooks, config.num_scales)
    geometry = (config.num_scales, config.tokens_per_scale, config.num_codes, books)
    model = AutoregressiveModel(CodeModelConfig(shape, *geometry, ["class"], None)).eval()
    sampling = replace(profile.autoregressive.sampling, guidance=1.5, guidance_growth="constant")
    return _seconds(lambda: generate(model, torch.zeros(1, dtype=torch.int64), sampling), 1)


def _seconds(action: Callable[[], Any], repetitions: int = 3) -> float:
    """Median over repetitions, after one that is not counted; of one only where that took more than ten seconds."""
    began = time.perf_counter()
    action()
    first = time.perf_counter() - began
    if first > 10:
        return first
    found = []
    for _ in range(repetitions):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slope of log cost against log pixels, by variant and kind of cost, over the rows of one image that have it."""
    found: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant and row["batch_size"] == 1]
        found[variant] = {}
        for key in FITTED:
            points = [(row["size"] ** 2, row[key]) for row in own if row[key]]
            if len(points) > 1:
                x, y = np.log(np.array(points)).T
                found[variant][key] = float(np.polyfit(x, y, 1)[0])
    return found


def measure(profile: str, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Rows of all models and sizes, each measured in a process of its own, and their exponents."""
    cases = [(variant, size, 1) for size in sizes for variant in MODELS]
    cases += [
        (variant, size, batch)
        for size in SWEPT_SIZES
        if size in sizes
        for batch in BATCHES[1:]
        for variant in MODELS
    ]
    rows = []
    for case in cases:
        module = ["-m", "workbook.efficiency", profile, *map(str, case)]
        answer = subprocess.run([sys.executable, *module], capture_output=True, text=True)
        if answer.returncode:
            raise ValueError(
                f"{' '.join(map(str, case))} could not be measured: {answer.stderr.strip()[-300:]}"
            )
        rows.append(json.loads(answer.stdout.splitlines()[-1]))
        print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
    hardware = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    return {"rows": rows, "exponents": exponents(rows), "hardware": hardware}


if __name__ == "__main__":  # one case, in this process
    name, model, px, batch = sys.argv[1:]
    print(json.dumps(measured(load_profile(name), model, int(px), int(batch))))
