"""Speed of the wavelet transform against PyWavelets, ptwt and a plain copy of the same bytes, on the CPU.

    python benchmarks/dwt.py [--wavelet haar] [--size 256] [--batch 16] [--levels 3] [--repeats 40]

First checks that the results agree, then calls every candidate once per round (so that whatever else the
machine does slows all of them) and prints medians. A ratio is a median divided by that of sitlib. Run it on
an idle machine: threads that must wait for one another suffer most from a busy core, and PyWavelets uses one.

ptwt pads where PyWavelets periodises: for Haar that adds nothing and the coefficients are the same; for
longer filters it computes more coefficients than there are pixels, so only its reconstruction is compared.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, installed or not

import ptwt
import pywt
import torch

from sitlib.model.wavelets import dwt2, idwt2, orthonormal_gains

TOLERANCE = 1e-5  # float32, pixels in [0, 1]
BASELINES = ("ptwt", "PyWavelets", "copy")


def candidates(images: torch.Tensor, wavelet: str, levels: int) -> dict[str, dict[str, Callable]]:
    """Calls without arguments: {"forward" | "inverse": {name: call}}."""
    array, axes = images.numpy(), (-2, -1)
    ours = dwt2(images, wavelet, levels)
    target = torch.empty_like(images)

    def pywt_forward():
        return pywt.wavedec2(array, wavelet, mode="periodization", level=levels, axes=axes)

    def ptwt_forward():
        return ptwt.wavedec2(images, wavelet, mode="periodic", level=levels)

    from_pywt, from_ptwt = pywt_forward(), ptwt_forward()
    forward = {
        "sitlib": lambda: dwt2(images, wavelet, levels),
        "ptwt": ptwt_forward,
        "PyWavelets": pywt_forward,
        "copy": lambda: target.copy_(images),
    }
    inverse = {
        "sitlib": lambda: idwt2(ours, wavelet),
        "ptwt": lambda: ptwt.waverec2(from_ptwt, wavelet),
        "PyWavelets": lambda: pywt.waverec2(from_pywt, wavelet, mode="periodization", axes=axes),
        "copy": lambda: target.copy_(images),
    }
    return {"forward": forward, "inverse": inverse}


def check(
    images: torch.Tensor, wavelet: str, levels: int, calls: dict[str, dict[str, Callable]]
) -> None:
    """Raise AssertionError unless coefficients and reconstructions agree; print the largest differences."""
    ours = calls["forward"]["sitlib"]()
    gains = orthonormal_gains(levels)
    same_filters = ["PyWavelets", "ptwt"] if pywt.Wavelet(wavelet).dec_len == 2 else ["PyWavelets"]
    for name in same_filters:
        approximation, *details = calls["forward"][name]()
        bands = [[approximation], *details]
        theirs = [torch.cat([torch.as_tensor(band) for band in scale], dim=1) for scale in bands]
        pairs = zip(ours, theirs, gains, strict=True)
        report(f"coefficients against {name}", max(largest(a - b / gain) for a, b, gain in pairs))
    for name, call in calls["inverse"].items():
        if name != "copy":
            report(f"reconstruction by {name}", largest(torch.as_tensor(call()) - images))


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def report(what: str, error: float) -> None:
    print(f"  {what + ':':38s} largest difference {error:.1e}")
    assert error <= TOLERANCE, f"{what}: {error:.1e} is more than {TOLERANCE:.0e}"


def medians(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each call, one of each in turn."""
    seconds = {name: [] for name in calls}
    for round_number in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if round_number >= 3:  # the first calls allocate, plan and warm up
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wavelet", default="haar", help="a discrete wavelet of PyWavelets (default: haar)"
    )
    parser.add_argument(
        "--size", type=int, default=256, help="side of the square images, pixels (256)"
    )
    parser.add_argument("--batch", type=int, default=16, help="number of RGB images (16)")
    parser.add_argument("--levels", type=int, default=3, help="levels of the pyramid (3)")
    parser.add_argument("--repeats", type=int, default=40, help="timed rounds (40)")
    options = parser.parse_args()

    images = torch.rand(
        options.batch, 3, options.size, options.size, generator=torch.Generator().manual_seed(0)
    )
    shape = "x".join(map(str, images.shape))
    print(
        f"{options.wavelet}, {options.levels} levels of {shape} float32, {torch.get_num_threads()} threads,"
    )
    print(
        f"torch {torch.__version__}, PyWavelets {pywt.__version__}, Python {platform.python_version()}"
    )
    if hasattr(os, "getloadavg"):
        print(
            f"{os.cpu_count()} cores, of which {os.getloadavg()[0]:.1f} were busy in the last minute"
        )
    with torch.inference_mode():
        calls = candidates(images, options.wavelet, options.levels)
        check(images, options.wavelet, options.levels, calls)
        print(
            f"\n{'':10s}{'sitlib':>10s}"
            + "".join(f"{name:>12s}{'ratio':>8s}" for name in BASELINES)
        )
        for direction, group in calls.items():
            median = medians(group, options.repeats)
            row = f"{direction:10s}{median['sitlib'] * 1e3:7.2f} ms"
            for name in BASELINES:
                row += f"{median[name] * 1e3:9.2f} ms{median[name] / median['sitlib']:7.1f}x"
            print(row, flush=True)


if __name__ == "__main__":
    main()
