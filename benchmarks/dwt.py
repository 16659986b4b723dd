"""Speed of the wavelet transform against PyWavelets, ptwt and a plain copy of the same bytes.

    python benchmarks/dwt.py [--wavelet haar] [--size 256] [--batch 16] [--levels 3] [--repeats 40]

Checks that the results agree, then calls every candidate once a round, so that whatever else the
machine does slows all of them, and prints medians, each also divided by that of sitlib. Run it on
an idle machine: PyWavelets uses one thread, the others wait for theirs.

ptwt pads where PyWavelets periodises: for Haar that adds nothing; for longer filters it computes
more coefficients than there are pixels, so only its reconstruction is compared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import ptwt
import pywt
import torch
from torch import Tensor

from sitlib.model.wavelets import dwt2, idwt2, orthonormal_gains

TOLERANCE = 1e-5  # float32, pixels in [0, 1]
Calls = dict[str, dict[str, Callable]]  # {"forward" | "inverse": {name: call}}


def candidates(images: Tensor, wavelet: str, levels: int) -> Calls:
    """Calls without arguments."""
    array, target = images.numpy(), torch.empty_like(images)
    settings = {"mode": "periodization", "axes": (-2, -1)}
    forward = {
        "sitlib": lambda: dwt2(images, wavelet, levels),
        "ptwt": lambda: ptwt.wavedec2(images, wavelet, mode="periodic", level=levels),
        "PyWavelets": lambda: pywt.wavedec2(array, wavelet, level=levels, **settings),
        "copy": lambda: target.copy_(images),
    }
    done = {name: call() for name, call in forward.items()}
    inverse = {
        "sitlib": lambda: idwt2(done["sitlib"], wavelet),
        "ptwt": lambda: ptwt.waverec2(done["ptwt"], wavelet),
        "PyWavelets": lambda: pywt.waverec2(done["PyWavelets"], wavelet, **settings),
        "copy": lambda: target.copy_(images),
    }
    return {"forward": forward, "inverse": inverse}


def check(images: Tensor, wavelet: str, levels: int, calls: Calls) -> None:
    """Print the largest differences of coefficients and reconstructions; stop if one is large."""
    errors = {
        f"reconstruction by {name}": torch.as_tensor(call()) - images
        for name, call in calls["inverse"].items()
        if name != "copy"
    }
    is_haar = pywt.Wavelet(wavelet).dec_len == 2
    for name in ["PyWavelets", "ptwt"] if is_haar else ["PyWavelets"]:
        approximation, *details = calls["forward"][name]()
        bands = [torch.as_tensor(approximation)]
        bands += [torch.cat([torch.as_tensor(band) for band in scale], dim=1) for scale in details]
        ours = zip(calls["forward"]["sitlib"](), orthonormal_gains(levels), bands, strict=True)
        differences = [(mine - theirs / gain).flatten() for mine, gain, theirs in ours]
        errors[f"coefficients against {name}"] = torch.cat(differences)
    for what, difference in errors.items():
        error = difference.abs().max().item()
        print(f"  {what + ':':38s} largest difference {error:.1e}")
        assert error <= TOLERANCE, f"{what}: {error:.1e} is more than {TOLERANCE:.0e}"


def medians(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each call, one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 3):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    # The first calls allocate, plan and warm up.
    return {name: statistics.median(values[3:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wavelet", default="haar", help="a discrete wavelet of PyWavelets")
    for name, value in {"size": 256, "batch": 16, "levels": 3, "repeats": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.batch, 3, options.size, options.size, generator=generator)
    print(f"{options.wavelet}, {options.levels} levels of {[*images.shape]} float32,", end=" ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    with torch.inference_mode():
        calls = candidates(images, options.wavelet, options.levels)
        check(images, options.wavelet, options.levels, calls)
        for direction, group in calls.items():
            median = medians(group, options.repeats)
            for name, seconds in median.items():
                ratio = seconds / median["sitlib"]
                print(f"{direction:10s}{name:12s}{seconds * 1e3:8.2f} ms{ratio:7.1f} x sitlib's")


if __name__ == "__main__":
    main()
