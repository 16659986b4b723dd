"""The memory of a training step that `workbook.describe` estimates, beside that of a real one.

    python benchmarks/memory.py [--sizes 1 2 3]

On the CPU, in float32. The estimate runs the step on fake tensors and counts what is alive. The
measurement runs it on real ones and adds up every allocation and release that torch's CPU allocator
reports to the profiler, also inside of kernels. Neither is the process's resident size. Weights,
gradients and activations are counted, moments not.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from sitlib.model.generator import CodeModelConfig
from workbook.describe import Subject, autoregressive_subject, cost, tokenizer_subject
from workbook.profile import load_profile

SIZES = {"1": (64, 2, 8), "2": (192, 4, 4), "3": (384, 6, 2)}  # width, layers, batch


def subjects(size: str, pixels: int = 128) -> dict[str, Callable[[], Subject]]:
    """A tokenizer with LPIPS and discriminator, and a model over codes, of one size."""
    settings = load_profile("quick")
    width, layers, batch = SIZES[size]
    parts = ("encoder", "decoder")
    shape = {f"{part}_width": width for part in parts}
    shape |= {f"{part}_layers": layers for part in parts} | {f"{part}_heads": 4 for part in parts}
    training = settings.tokenizer_training("sit4")
    training = replace(training, adversarial=replace(training.adversarial, weight=0.1, channels=16))
    tokenizer = replace(settings.tokenizer_variant("sit4"), size=pixels, grid_size=8, **shape)
    model = settings.autoregressive_variant("ar_sit4")
    model = replace(model, width=width, layers=layers, heads=4, dropout=0.1)
    codes = CodeModelConfig(model, 4, 64, [1024] * 4, 2, ["a", "b"], None)
    return {
        "tokenizer": lambda: tokenizer_subject(tokenizer, training, batch),
        "model over codes": lambda: autoregressive_subject(codes, 2 * batch),
    }


def measured_peak(subject: Callable[[], Subject]) -> int:
    """Bytes at the worst moment of a step, the models included."""
    made = subject()
    tensors = [t for model in made.models for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    held = sum(storage.nbytes() for storage in storages.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made.step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="(all)")
    print(f"torch {torch.__version__}; peak of a training step, MiB")
    print(f"  {'':20s}{'width':>7s}{'layers':>8s}{'estimate':>10s}{'measured':>10s}{'ratio':>8s}")
    for size in parser.parse_args().sizes:
        width, layers, _ = SIZES[size]
        for name, subject in subjects(size).items():
            estimate, measured = cost(subject).peak_bytes / 2**20, measured_peak(subject) / 2**20
            sizes = f"{width:7d}{layers:8d}{estimate:10.1f}{measured:10.1f}"
            print(f"  {name:20s}{sizes}{estimate / measured:8.3f}")


if __name__ == "__main__":
    main()
