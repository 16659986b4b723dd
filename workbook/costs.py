"""Time, memory and operations of models with random weights.

`efficiency` at growing image sizes, `throughput` as in the paper's table of images a second (SIT,
section 5). Costs do not depend on what weights hold. Peaks of memory are those of a process of
its own for each model.
"""

import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.sample.generate import generate
from workbook.describe import flops
from workbook.generators import config_over
from workbook.paths import resolve
from workbook.profile import Profile, load_profile, read_yaml

SIZES = (64, 128, 256, 512, 1024)  # px
LONGEST_SAMPLED = 4096  # tokens; drawing a longer sequence takes hours
TOKENIZERS = ("sit4", "vit_vqgan")
SHARES = (1, 2, 4, 8)  # full size, 1/2, 1/4, 1/8
OURS, BASELINE = "ar_sit4_scd", "ar_vit_vqgan"
GENERATORS = {OURS: "sit4_scd", BASELINE: "vit_vqgan"}  # and their tokenizers
# Ratio of images a second that the paper reports for MS-COCO at 256, 64 and 32 px: AR-SIT-SCD-4 to
# Parti-350M over ViT-VQGAN.
REPORTED = {1: 6.5 / 7.8, 4: 24.5 / 7.6, 8: 74.7 / 7.7}
ROUND_SECONDS = 3.0  # of one case in one round
CAPTION = "a man and a dog walk along the beach in the evening"  # as long as most of MS-COCO


# -- measuring ---------------------------------------------------------------------------------


def seconds(action: Callable[[], Any], budget: float = 0.0) -> float:
    """Median seconds of as many calls as fit into `budget` seconds, at least one."""
    taken: list[float] = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    while not taken or sum(taken) + taken[-1] <= budget:
        wait()
        began = time.perf_counter()
        action()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def warm_seconds(action: Callable[[], Any]) -> float:
    """The same of a second of calls after one that does not count, unless that took over 10 s."""
    first = seconds(action)
    return first if first > 10 else seconds(action, 1.0)


def peak_mb() -> float:
    """Peak of this process's resident memory so far, MB."""
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024 / 1e6
    # On macOS, in bytes; on Linux it would count the process that started this one, too.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Result of a function of a module, called in a new process with a peak of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def hardware() -> dict[str, Any]:
    """Threads, cores and processor, for a protocol."""
    machine = platform.processor() or platform.machine()
    return {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": machine}


def random_generator(
    shape: AutoregressiveConfig, tokenizer: TokenizerConfig
) -> AutoregressiveModel:
    """A model of one class, or of texts, over codes of a tokenizer."""
    texts = TextTokenizer.train([CAPTION], 300, 16).to_json() if shape.text else None
    config = config_over(tokenizer, replace(shape, dropout=0.0), ["class"], texts)
    return AutoregressiveModel(config).eval()


def guided(profile: Profile, batch_size: int) -> SamplingConfig:
    """The profile's sampler with conditional and unconditional halves in every step."""
    return replace(profile.autoregressive.sampling, batch_size=batch_size, guidance=1.5)


# -- growing sizes -----------------------------------------------------------------------------


def scaled_config(profile: Profile, variant: str, size: int) -> TokenizerConfig:
    """The variant for `size` px, as the paper scales it: with every doubling of the side one more
    level, with one more codebook if each scale has its own, or patches of the same size."""
    config = profile.tokenizer_variant(variant)
    doublings = (size // config.size).bit_length() - 1
    if config.levels == 0:
        return replace(config, size=size, grid_size=config.grid_size << doublings)
    more_books = doublings if config.num_codebooks == config.num_scales else 0
    books = config.num_codebooks + more_books
    return replace(config, size=size, levels=config.levels + doublings, num_codebooks=books)


def size_costs(profile: Profile, variant: str, size: int) -> dict[str, Any]:
    """Costs of a tokenizer at one size, on the CPU, in this process.

    Returns:
        `tokens`, `parameters`; `flops` of encoding and decoding an image; `encode`, `decode`,
        `train`: seconds an image (`train`: forward, L2 loss and backward, without LPIPS, which
        costs every model the same); `sample`: seconds to draw an image's codes with a cache and
        guidance, None beyond LONGEST_SAMPLED tokens; `memory_mb`: what the
        training step adds to the peak of this process.
    """
    torch.manual_seed(0)
    config = scaled_config(profile, variant, size)
    tokenizer = SpectralTokenizer(config).eval()
    images = torch.rand(1, 3, size, size)
    tokens = config.num_scales * config.tokens_per_scale

    def train() -> None:
        (tokenizer(images).reconstruction - images).square().mean().backward()

    before = peak_mb()
    train()  # before anything else, so that nothing else has made the peak
    memory = peak_mb() - before
    with torch.no_grad():
        operations = flops(lambda: tokenizer(images))
    codes, sample = tokenizer.encode(images), None
    if tokens <= LONGEST_SAMPLED:
        generator = random_generator(profile.autoregressive_variant("ar_sit4"), config)
        sampling, label = guided(profile, 1), torch.zeros(1).long()
        sample = warm_seconds(lambda: generate(generator, label, sampling))
    return {
        "variant": variant,
        "size": size,
        "tokens": tokens,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "flops": operations,
        "encode": warm_seconds(lambda: tokenizer.encode(images)),
        "decode": warm_seconds(lambda: tokenizer.decode(codes)),
        "train": warm_seconds(train),
        "sample": sample,
        "memory_mb": memory,
    }


def efficiency(_: Profile) -> dict[str, Any]:
    """Costs of both tokenizers at every size, in the profile of the study."""
    profile = load_profile(read_yaml(resolve("study/params.yaml"))["profile"])
    rows = []
    for size, variant in product(SIZES, TOKENIZERS):
        rows.append(in_own_process(size_costs, profile, variant, size))
        print({key: value for key, value in rows[-1].items() if value is not None}, flush=True)
    return {"rows": rows, "hardware": hardware()}


# -- images a second ---------------------------------------------------------------------------


def geometries(
    profile: Profile,
) -> dict[str, tuple[dict[str, TokenizerConfig], AutoregressiveConfig]]:
    """Tokenizer of each generator, and the transformer over its codes: those of the profile; and,
    as the paper's, of 256 px and 1,024 tokens, told a text: half as wide in smaller profiles."""
    shape = profile.autoregressive_variant("ar_vit_vqgan")
    text = profile.autoregressive_variant(next(iter(profile.text.variants)))
    if profile.data.size < 256:
        text = replace(text, width=text.width // 2, heads=max(1, text.heads // 2))
    configs = {name: profile.tokenizer_variant(of) for name, of in GENERATORS.items()}
    paper = {
        name: replace(config, size=256, grid_size=16 if config.levels else 32)
        for name, config in configs.items()
    }
    return {"profile": (configs, shape), "paper": (paper, text)}


def sampler(profile: Profile, name: str, geometry: str, batch_size: int) -> Callable[[int], Tensor]:
    """A function that draws and decodes a batch of images at 1 / share of the full size.

    Over scale-causal codes it stops after the scales that the size needs and decodes only these;
    over codes in raster order it draws the whole images and averages them down.
    """
    torch.manual_seed(0)
    configs, shape = geometries(profile)[geometry]
    config, device = configs[name], best_device()
    tokenizer = SpectralTokenizer(config).eval().to(device)
    model = random_generator(shape, config).to(device)
    prompts = [CAPTION] * batch_size if shape.text else torch.zeros(batch_size).long()

    @torch.inference_mode()
    def draw(share: int) -> Tensor:
        k = config.num_scales - share.bit_length() + 1 if config.levels else 1
        images = tokenizer.decode(generate(model, prompts, guided(profile, batch_size), scales=k))
        return F.avg_pool2d(images, share * images.shape[-1] // config.size)

    return draw


def sampling_peaks(profile: Profile, name: str, geometry: str, batch_size: int) -> dict[str, float]:
    """Share of the size -> MB that drawing a batch needs at its peak beyond the models, here.

    A peak never goes down again, so the smallest images come first.
    """
    draw, peaks = sampler(profile, name, geometry, batch_size), {}
    on_gpu = best_device().type == "cuda"
    before = torch.cuda.memory_allocated() / 1e6 if on_gpu else peak_mb()
    for share in (1,) if name == BASELINE else SHARES[::-1]:
        draw(share)
        peak = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_mb()
        peaks[str(share)] = peak - before
    return peaks


def throughput(profile: Profile, rounds: int = 4, batch_size: int = 64) -> dict[str, Any]:
    """Images a second and peak memory of both models at every size, in both geometries.

    Args:
        rounds: in a single one, of dry runs, every time is taken once.
        batch_size: images drawn at a time.

    Returns:
        `rows`, one for each geometry and size; `geometries`, what these are; `protocol`.
    """
    budget = ROUND_SECONDS if rounds > 1 else 0.0
    # The baseline does the same whatever the size, so it is measured once a round.
    cases = [*((OURS, share) for share in SHARES), (BASELINE, 1)]
    # On a GPU every case captures CUDA graphs at first; on a CPU the shortest draw will do.
    first = cases if best_device().type == "cuda" else [(OURS, SHARES[-1])]
    about, rows = {}, []
    for geometry, (configs, shape) in geometries(profile).items():
        draw = {name: sampler(profile, name, geometry, batch_size) for name in GENERATORS}
        times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for name, share in first if rounds > 1 else ():  # warms up
            draw[name](share)
        for number in range(rounds):
            # There and back, so that a machine that grows slower or faster favours nobody.
            for name, share in cases[:: 1 if number % 2 == 0 else -1]:
                times[name, share].append(seconds(partial(draw[name], share), budget))
        peaks = {
            name: in_own_process(sampling_peaks, profile, name, geometry, batch_size)
            for name in draw
        }
        for share in SHARES:
            taken = {OURS: times[OURS, share], BASELINE: times[BASELINE, 1]}
            rate = {name: batch_size / statistics.median(x) for name, x in taken.items()}
            pairs = zip(*taken.values(), strict=True)
            rows.append(
                {
                    "geometry": geometry,
                    "size": configs[OURS].size // share,
                    "share": share,
                    "images_per_second": rate,
                    "ratio": rate[OURS] / rate[BASELINE],
                    "ratio_by_round": [baseline / ours for ours, baseline in pairs],
                    "paper_ratio": REPORTED.get(share),
                    "peak_mb": {OURS: peaks[OURS][str(share)], BASELINE: peaks[BASELINE]["1"]},
                }
            )
        about[geometry] = {
            "size": configs[BASELINE].size,
            "tokens": configs[BASELINE].tokens_per_scale,
            "transformer": f"{shape.layers} layers, width {shape.width}, {shape.heads} heads",
            "batch_size": batch_size,
        }
    protocol = {
        "weights": "random",
        "guidance": "on: conditional and unconditional halves in one batch",
        "rounds": rounds,
        "seconds_a_round": budget,
        "device": str(best_device()),
    }
    return {"geometries": about, "rows": rows, "protocol": protocol | hardware()}
