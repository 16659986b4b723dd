"""What a SIT tokenizer costs beside the ViT-VQGAN baseline of as many tokens: training step, encode and decode, on the CPU.

    python benchmarks/tokenizer.py [--profile quick] [--geometry profile paper] [--repetitions 15] [--threads 2]

Two geometries: that of the profile, and the paper's (arXiv 2412.09607: 256 px, 1024 tokens) with its "Small" transformers and a batch of
one. A training step is forward, loss with LPIPS, backward, clipping, AdamW and the restart of dead codes. The models take turns, call by
call, so that whatever else the machine does slows both; times are medians, a ratio is SIT's median divided by the baseline's.

FLOPs are those of matrix products, convolutions and attention, as torch counts them (of attention's backward pass five products: scores
are computed again). Their rate is compared with the best that square matrix products reached in the same run; what is missing is anything
that is no product. Also printed: the rate of products of the profile's own shapes, which no step can exceed. Run it on an idle machine:
a median suffers from a busy core, a best does not.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

import torch
from torch import Tensor

from sitlib.metrics.weights import fetch_weights
from sitlib.model.config import TokenizerConfig
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.codebooks import update_codebooks
from sitlib.train.losses import TokenizerLoss
from sitlib.train.optim import make_optimizer
from workbook.estimates import flops
from workbook.profile import Profile, load_profile

VARIANTS = {"ViT-VQGAN": "vit_vqgan", "SIT-4": "sit4"}  # of the profile; the baseline first
OPERATIONS = ("training step", "encode", "decode")
SQUARES = (512, 1024, 2048)  # sides of the matrices whose product shows what the machine can do
PAPER_SIZE = 256  # px
PAPER_SMALL = {
    "layers": 8,
    "width": 512,
    "heads": 8,
}  # of encoder and decoder; MLPs are 4 times as wide


class Subject:
    """A tokenizer with random weights and a batch of random images."""

    def __init__(self, config: TokenizerConfig, profile: Profile, batch_size: int):
        torch.manual_seed(0)
        self.training = profile.tokenizer
        self.tokenizer = SpectralTokenizer(config)
        self.loss = TokenizerLoss(self.training.loss)
        self.optimizer = make_optimizer(self.tokenizer, self.training.optimizer)
        self.images = torch.rand(batch_size, 3, config.size, config.size)
        self.codes = self.tokenizer.encode(self.images)

    def training_step(self) -> None:
        """The step of `sitlib.train.tokenizer.train_tokenizer`, without a discriminator."""
        output = self.tokenizer(self.images)
        total, _ = self.loss(output, self.images)
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(
            self.tokenizer.parameters(), self.training.optimizer.clip_norm
        )
        self.optimizer.step()
        after = self.training.loss.reset_dead_codes_after
        update_codebooks(self.tokenizer, output.latents, output.codes, after)

    def encode(self) -> Tensor:
        return self.tokenizer.encode(self.images)

    def decode(self) -> Tensor:
        return self.tokenizer.decode(self.codes)

    @property
    def calls(self) -> dict[str, Callable]:
        return dict(zip(OPERATIONS, (self.training_step, self.encode, self.decode), strict=True))


def configurations(profile: Profile, geometry: str) -> dict[str, TokenizerConfig]:
    """The two tokenizers in a geometry, "profile" or "paper"."""
    configs = {name: profile.tokenizer_variant(variant) for name, variant in VARIANTS.items()}
    if geometry == "paper":
        small = {
            f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in PAPER_SMALL.items()
        }
        configs = {
            name: replace(
                c,
                size=PAPER_SIZE,
                grid_size=c.grid_size * PAPER_SIZE // c.size,
                mlp_ratio=4.0,
                **small,
            )
            for name, c in configs.items()
        }
    return configs


def seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gigaflops(call: Callable) -> float:
    """10^9 operations of one call, in matrix products, convolutions and attention."""
    return flops(call) / 1e9


def product_rate(rows: int, inner: int, columns: int) -> float:
    """10^9 operations a second of [rows, inner] times [inner, columns] in float32, into memory that is there already."""
    a, b, out = torch.rand(rows, inner), torch.rand(inner, columns), torch.empty(rows, columns)
    torch.mm(a, b, out=out)
    work = 2e-9 * rows * inner * columns
    count = max(1, round(0.2 / work))  # one small product is too short to be timed
    return count * work / seconds(lambda: [torch.mm(a, b, out=out) for _ in range(count)])


def compare(subjects: dict[str, Subject], repetitions: int) -> None:
    """Times both models in turns and prints their table."""
    calls = {
        (name, what): call
        for name, subject in subjects.items()
        for what, call in subject.calls.items()
    }
    work = {key: gigaflops(call) for key, call in calls.items()}  # which also warms up
    times: dict[tuple, list[float]] = {key: [] for key in calls}
    rates = []
    for _ in range(repetitions):
        for what in OPERATIONS:
            for name in subjects:
                times[name, what].append(seconds(calls[name, what]))
        rates += [product_rate(side, side, side) for side in SQUARES]
    median = {key: statistics.median(values) for key, values in times.items()}

    print(f"  matrix products of sides {SQUARES}: {max(rates):.1f} GFLOP/s at best")
    print(
        f"  {'':16s}{'':12s}{'ms':>10s}{'images/s':>10s}{'GFLOP':>9s}{'GFLOP/s':>9s}{'of best':>9s}"
    )
    baseline, sit = subjects
    for what in OPERATIONS:
        for name, subject in subjects.items():
            flops, duration = work[name, what], median[name, what]
            print(
                f"  {what:16s}{name:12s}{duration * 1e3:10.1f}{len(subject.images) / duration:10.2f}{flops:9.2f}"
                f"{flops / duration:9.1f}{flops / duration / max(rates):9.0%}"
            )
        ratio = median[sit, what] / median[baseline, what]
        flop_ratio = work[sit, what] / work[baseline, what]
        print(f"  {what:16s}{sit} / {baseline}: {ratio:.2f} in time, {flop_ratio:.2f} in FLOPs")


def print_own_shapes(config: TokenizerConfig, batch_size: int, repetitions: int) -> None:
    """Rates of the matrix products of an encoder block: over all tokens, and the first also over approximation tokens alone."""
    tokens, width = batch_size * config.num_scales * config.tokens_per_scale, config.encoder_width
    hidden = int(width * config.mlp_ratio)
    shapes = [(tokens, width, 3 * width), (tokens, width, width), (tokens, width, hidden)]
    shapes += [(tokens, hidden, width), (tokens // config.num_scales, width, 3 * width)]
    print("  matrix products of an encoder block, GFLOP/s:")
    for rows, inner, columns in shapes:
        rates = [product_rate(rows, inner, columns) for _ in range(repetitions)]
        shape = f"[{rows}, {inner}] x [{inner}, {columns}]"
        print(f"    {shape:32s}{statistics.median(rates):7.1f}, {max(rates):.1f} at best")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="quick", help="profile with the two variants (quick)")
    parser.add_argument(
        "--geometry",
        nargs="+",
        choices=("profile", "paper"),
        default=["profile", "paper"],
        help="(both)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=15,
        help="timed rounds (15); a fifth of them in the paper's geometry",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch (its own choice)"
    )
    options = parser.parse_args(arguments)
    if min(options.repetitions, options.threads) < 1:
        parser.error("repetitions and threads must be at least 1.")

    torch.set_num_threads(options.threads)
    fetch_weights()
    profile = load_profile(options.profile)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.threads} threads, float32"
    )
    if hasattr(os, "getloadavg"):
        print(
            f"{os.cpu_count()} cores, of which {os.getloadavg()[0]:.1f} were busy in the last minute"
        )
    for geometry in options.geometry:
        batch_size = profile.tokenizer.optimizer.batch_size if geometry == "profile" else 1
        repetitions = options.repetitions if geometry == "profile" else -(-options.repetitions // 5)
        configs = configurations(profile, geometry)
        subjects = {name: Subject(config, profile, batch_size) for name, config in configs.items()}
        print(f"\nGeometry of the {geometry}, batches of {batch_size}, {repetitions} rounds")
        for name, config in configs.items():
            parameters = sum(p.numel() for p in subjects[name].tokenizer.parameters()) / 1e6
            print(
                f"  {name}: {config.size} px, {config.num_scales} x {config.tokens_per_scale} tokens, "
                f"{parameters:.2f} M parameters"
            )
        compare(subjects, repetitions)
        if geometry == "profile":
            print_own_shapes(configs["SIT-4"], batch_size, repetitions)


if __name__ == "__main__":
    main()
