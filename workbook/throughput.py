"""How fast images are sampled at every size: `python -m workbook.throughput` (the paper's throughput table; SIT section 5).

A model over scale-causal codes stops after the scales that a size needs and decodes only these; a model over ViT-VQGAN's codes samples the
whole image and averages it down. Speed does not depend on what weights hold, so they are random. Measured are code sampling and decoding
together, with guidance (both halves of every step), in turns, medians over rounds; of short cases each round takes several, which one
disturbance would change most. (A single round, as tests and dry runs have it, takes one.) Peak memory is that of a process of its own for
each model. The baseline does the same whatever the size, so it is measured once a round.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.files import write_json
from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from workbook.errors import command
from workbook.paths import resolve
from workbook.profile import Profile, load_profile

SHARES = (1, 2, 4, 8)  # full size, 1/2, 1/4, 1/8
ENOUGH_SECONDS = 3.0  # of one case in one round
MODELS = ("ar_sit4_scd", "ar_vit_vqgan")
# Reported by the paper for MS-COCO at 256, 64 and 32 px: images a second of Parti-350M over ViT-VQGAN, and of AR-SIT-SCD-4.
REPORTED = {1: (7.8, 6.5), 4: (7.6, 24.5), 8: (7.7, 74.7)}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a tokenizer and of a transformer over its codes."""

    name: str
    size: int  # px
    sit_grid: int
    raster_grid: int
    shape: AutoregressiveConfig
    batch_size: int


def geometries(profile: Profile) -> list[Geometry]:
    """That of the profile's class-conditional models; and the paper's 256 px and 1,024 tokens, with a transformer of half the width."""
    sit, raster = (profile.tokenizer_variant(name) for name in ("sit4_scd", "vit_vqgan"))
    shape = replace(profile.autoregressive_variant("ar_vit_vqgan"), dropout=0.0)
    small = replace(shape, width=shape.width // 2, heads=max(1, shape.heads // 2))
    batch = profile.autoregressive.evaluation.throughput_batch_size
    return [
        Geometry("profile", sit.size, sit.grid_size, raster.grid_size, shape, batch),
        Geometry("paper", 256, 16, 32, small, batch),
    ]


class Subject:
    """One model in one geometry, with random weights."""

    def __init__(self, name: str, geometry: Geometry, profile: Profile):
        torch.manual_seed(0)
        variant = {"ar_sit4_scd": "sit4_scd", "ar_vit_vqgan": "vit_vqgan"}[name]
        grid = geometry.sit_grid if variant == "sit4_scd" else geometry.raster_grid
        config: TokenizerConfig = replace(
            profile.tokenizer_variant(variant), size=geometry.size, grid_size=grid
        )
        self.device = best_device()
        self.tokenizer = SpectralTokenizer(config).eval().to(self.device)
        books = min(config.num_codebooks, config.num_scales)
        shape = (config.num_scales, config.tokens_per_scale, config.num_codes, books)
        self.model = AutoregressiveModel(CodeModelConfig(geometry.shape, *shape, ["class"], None))
        self.model = self.model.eval().to(self.device)
        self.sampling: SamplingConfig = replace(
            profile.autoregressive.sampling,
            guidance=1.5,
            guidance_growth="constant",
            batch_size=geometry.batch_size,
        )
        self.labels = torch.zeros(geometry.batch_size, dtype=torch.int64)

    @torch.inference_mode()
    def images(self, share: int) -> Tensor:
        """A batch at 1 / share of the full size."""
        num_scales = self.model.config.num_scales
        if num_scales == 1:
            images = self.tokenizer.decode(generate(self.model, self.labels, self.sampling))
            return F.avg_pool2d(images, share) if share > 1 else images
        scales = num_scales - share.bit_length() + 1
        return self.tokenizer.decode(
            generate(self.model, self.labels, self.sampling, scales=scales)
        )


def seconds(subject: Subject, share: int) -> float:
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    subject.images(share)
    if subject.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def usual_seconds(subject: Subject, share: int) -> float:
    """Median of as many measurements as fit into `ENOUGH_SECONDS`, at least one."""
    taken = [seconds(subject, share)]
    while sum(taken) + taken[-1] <= ENOUGH_SECONDS:
        taken.append(seconds(subject, share))
    return statistics.median(taken)


def memory(name: str, geometry: Geometry, profile: Profile) -> dict[int, float]:
    """Share of the size -> MB that sampling and decoding a batch needs at its peak beyond the models, in this process.

    A peak never goes down again, so the smallest images come first.
    """
    subject, found = Subject(name, geometry, profile), {}
    is_cuda = subject.device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else peak_mb()
    for share in (1,) if name == MODELS[1] else SHARES[::-1]:
        subject.images(share)
        peak = torch.cuda.max_memory_allocated() / 1e6 if is_cuda else peak_mb()
        found[share] = peak - (before / 1e6 if is_cuda else before)
    return found


def peak_mb() -> float:
    """Peak of this process's resident memory so far, MB."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere the peak of the process that started this one counts, too
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # bytes there, KiB elsewhere


def _memory_elsewhere(name: str, geometry: str, profile: str) -> dict[int, float]:
    """`memory` in a process of its own, whose peak is that of one model alone."""
    case = ["--profile", profile, "--memory", name, geometry]
    threads = max(1, (os.cpu_count() or 1) // len(MODELS))  # they run side by side
    result = subprocess.run(
        [sys.executable, "-m", "workbook.throughput", *case],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(result.stdout.splitlines()[-1])
    return {int(share): float(used) for share, used in found.items()}


def measure(profile: Profile, name: str, rounds: int) -> dict[str, Any]:
    """Both models in both geometries at every size: images a second, peak memory, ratios and the paper's."""
    rows = []
    for geometry in geometries(profile):
        subjects = {model: Subject(model, geometry, profile) for model in MODELS}
        ours, baseline = MODELS
        times: dict[tuple[str, int], list[float]] = {(ours, share): [] for share in SHARES}
        times[baseline, 1] = []
        for model, share in times:
            if geometry.name == "profile":  # warms up
                seconds(subjects[model], share)
        for number in range(rounds):
            # There and back, so that a machine that grows slower or faster favours nobody.
            for model, share in list(times)[:: 1 if number % 2 == 0 else -1]:
                measured = usual_seconds if rounds > 1 else seconds
                times[model, share].append(measured(subjects[model], share))
        with ThreadPoolExecutor() as pool:  # what a process needs does not depend on another one
            found = pool.map(
                partial(_memory_elsewhere, geometry=geometry.name, profile=name), MODELS
            )
            used = dict(zip(MODELS, found, strict=True))
        for share in SHARES:
            taken = {ours: times[ours, share], baseline: times[baseline, 1]}
            rate = {m: geometry.batch_size / statistics.median(taken[m]) for m in MODELS}
            peak = {ours: used[ours][share], baseline: used[baseline][1]}
            paper = REPORTED.get(share)
            rows.append(
                {
                    "geometry": geometry.name,
                    "size": geometry.size // share,
                    "share": share,
                    "images_per_second": rate,
                    "ratio": rate[ours] / rate[baseline],
                    "ratio_by_round": [
                        b / a for a, b in zip(taken[ours], taken[baseline], strict=True)
                    ],
                    "paper_ratio": paper[1] / paper[0] if paper else None,
                    "peak_mb": peak,
                }
            )
    about = {
        g.name: {
            "size": g.size,
            "tokens": g.raster_grid**2,
            "transformer": f"{g.shape.layers} layers, width {g.shape.width}, {g.shape.heads} heads",
            "batch_size": g.batch_size,
        }
        for g in geometries(profile)
    }
    protocol = {
        "weights": "random",
        "guidance": "on: conditional and unconditional halves in one batch",
        "rounds": rounds,
        "seconds_a_round": ENOUGH_SECONDS if rounds > 1 else 0.0,
        "threads": torch.get_num_threads(),
        "device": str(best_device()),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    return {"geometries": about, "rows": rows, "protocol": protocol}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.throughput", description=__doc__)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", default="metrics/throughput.json", help="metrics file to write")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "GEOMETRY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    if arguments.memory:
        name, wanted = arguments.memory
        chosen = next(g for g in geometries(profile) if g.name == wanted)
        print(json.dumps(memory(name, chosen, profile)))
        return
    write_json(resolve(arguments.output), measure(profile, arguments.profile, arguments.rounds))


if __name__ == "__main__":
    command(main)
