"""Metrics that carry their protocol: reconstruction (PSNR, LPIPS), codebook use, generation (FD-Lite0, KID).

Images are RGB in [0, 1], `[B, 3, H, W]`; codes are int64 `[B, S, N]`. Every result is a plain dictionary,
ready for JSON; what was measured on what stands under `protocol`.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from sitlib.lite0 import NUM_FEATURES, Lite0, load_lite0
from sitlib.perceptual import load_lpips

# An unclamped decoder overshoots by less than this; [-1, 1] or [0, 255] images do not stay within it.
RANGE_TOLERANCE = 0.5


# --------------------------------------------------------------------------------------------- reconstruction


def psnr_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `[B]` in dB, peak 1, over channels and pixels; infinite for equal images.

    Args:
        images: `[B, 3, H, W]`, RGB; clamped to [0, 1].
        references: the same shape, in [0, 1].

    Raises `ValueError` if shapes differ, a value is not finite, or lies far outside [0, 1].
    """
    check_pair(images, references)
    return peak_signal_noise_ratio(
        images.clamp(0, 1), references.clamp(0, 1), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )


def evaluate_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    *,
    lpips_nets: Sequence[str] = ("alex", "vgg"),
    folder="weights",
    batch_size: int = 32,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> dict:
    """PSNR and LPIPS of `reconstructions` against `images`: means over the images of the per-image values.

    Args:
        images: originals `[B, 3, H, W]` in [0, 1], B at least 2.
        reconstructions: the same shape; clamped to [0, 1] before anything is measured.
        lpips_nets: trunks of LPIPS, of "alex" and "vgg".
        folder: of the LPIPS weights.
        device: where LPIPS runs; default: the accelerator if there is one.

    Returns `psnr` (dB), `lpips_<net>` for each net, `standard_error` of each of these, and `protocol`.
    Raises `ValueError` for inputs as in `psnr_per_image`, and for fewer than two images.
    """
    check_pair(reconstructions, images)
    check_count("evaluate_reconstructions", images)
    device = torch.device(device) if device else default_device()
    images, reconstructions = images.clamp(0, 1), reconstructions.clamp(0, 1)
    values = {"psnr": psnr_per_image(reconstructions, images)}
    for net in lpips_nets:
        network = load_lpips(net, folder).to(device)
        starts = batch_starts(len(images), batch_size, f"LPIPS-{net}", progress)
        with torch.inference_mode():
            distances = [
                network(
                    reconstructions[i : i + batch_size].to(device), images[i : i + batch_size].to(device)
                ).cpu()
                for i in starts
            ]
        values[f"lpips_{net}"] = torch.cat(distances)
    values = {name: value.double() for name, value in values.items()}
    return {
        **{name: value.mean().item() for name, value in values.items()},
        "standard_error": {
            name: (value.std() / math.sqrt(len(value))).item() for name, value in values.items()
        },
        "protocol": {
            "images": len(images),
            "size": list(images.shape[2:]),
            "psnr": "RGB in [0, 1], clamped; mean over images of the PSNR of each",
            "lpips": "version 0.1 heads, RGB clamped to [0, 1], at the size given; mean over images",
            "lpips_nets": list(lpips_nets),
        },
    }


# -------------------------------------------------------------------------------------------------- codebooks


def codebook_statistics(codes: Tensor, num_codes: int, *, num_codebooks: int | None = None) -> dict:
    """How much of each codebook the codes of given images use, by codebook and by scale.

    Usage is the percentage of a codebook's codes that occur at least once among the codes of the images
    given; ViT-VQGAN (arXiv 2110.04627) reports it for a batch of 256 test images, so it depends on
    `usage_images`. Perplexity is exp of the entropy of the code
    frequencies, in nats: the number of codes that would give this entropy if used evenly; between 1 and
    `num_codes`.

    Args:
        codes: int64 `[B, S, N]`. Scale 1 uses the approximation codebook, scales 2.. share the details
            codebook.
        num_codes: codes in each codebook.
        num_codebooks: 1 or 2; default: 1 for a single scale, else 2. With 1, all scales share the only
            codebook.

    Returns `codebooks` (name -> `usage`, `perplexity`), `scales` (a list: `scale`, `codebook`, `usage`,
    `perplexity`) and `usage_images` (B). Raises `ValueError` if codes are not `[B, S, N]` integers in [0,
    num_codes).
    """
    if codes.ndim != 3 or codes.is_floating_point() or codes.numel() == 0:
        raise ValueError(
            f"codes must be a non-empty integer tensor [B, S, N], not {codes.dtype} {list(codes.shape)}."
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(
            f"codes must lie in [0, {num_codes}); found {codes.min().item()} to {codes.max().item()}."
        )
    num_scales = codes.shape[1]
    if num_codebooks is None:
        num_codebooks = 1 if num_scales == 1 else 2
    if num_codebooks not in (1, 2) or num_codebooks > num_scales:
        raise ValueError(
            f"{num_scales} scales have 1 or {min(2, num_scales)} codebooks, not {num_codebooks}."
        )

    def statistics(part: Tensor) -> dict[str, float]:
        share = torch.bincount(part.flatten(), minlength=num_codes).double() / part.numel()
        return {
            "usage": 100 * (share > 0).double().mean().item(),
            "perplexity": torch.special.entr(share).sum().exp().item(),
        }

    names = ["approximation"] + [("details" if num_codebooks == 2 else "approximation")] * (num_scales - 1)
    codebooks = (
        {"approximation": codes[:, :1], "details": codes[:, 1:]}
        if num_codebooks == 2
        else {"approximation": codes}
    )
    scales = [{"scale": i + 1, "codebook": name, **statistics(codes[:, i])} for i, name in enumerate(names)]
    return {
        "codebooks": {name: statistics(part) for name, part in codebooks.items()},
        "scales": scales,
        "usage_images": len(codes),
    }


def bits_per_pixel(num_tokens: int, num_codes: int, size: int | tuple[int, int]) -> float:
    """Bits per pixel of `num_tokens` codes out of `num_codes`, without entropy coding; image of `size` px."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(num_tokens, num_codes, height, width) < 1:
        raise ValueError("num_tokens, num_codes and size must be at least 1.")
    return num_tokens * math.log2(num_codes) / (height * width)


# ------------------------------------------------------------------------------------------------- generation


def lite0_features(
    images: Tensor,
    lite0: Lite0 | None = None,
    *,
    folder="weights",
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """EfficientNet-Lite0 features `[B, 1280]`, on the CPU, of `images` `[B, 3, H, W]`, clamped to [0, 1].

    Args:
        lite0: the network, on the device where it is to run; default: loaded from `folder` onto the
            accelerator if there is one.
    """
    check_images("images", images)
    if lite0 is None:
        lite0 = load_lite0(folder).to(default_device())
    device = lite0.classifier.weight.device
    starts = batch_starts(len(images), batch_size, "Lite0 features", progress)
    return torch.cat(
        [lite0.features(images[i : i + batch_size].to(device).clamp(0, 1)).cpu() for i in starts]
    )


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features `[M, D]`, `[N, D]` (arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. With fewer samples than features the covariances
    are rank deficient; the
    distance stays defined, but is biased upwards: compare only distances of equal M and N.

    The eigenvalues of C1 C2 are taken from a symmetric matrix of at most min(M, D) rows instead of the
    general D x D one of `torchmetrics.image.fid`: the same value, two orders of magnitude faster for D = 1280
    and some hundred samples.
    """
    check_features(features, references)
    first, second = features.double(), references.double()
    mean_term = (first.mean(0) - second.mean(0)).square().sum()
    first = (first - first.mean(0)) / math.sqrt(len(first) - 1)
    second = (second - second.mean(0)) / math.sqrt(len(second) - 1)
    trace_term = first.square().sum() + second.square().sum()
    # C1 = A^T A and C2 = B^T B with centred sets A, B: C1 C2 shares its non-zero eigenvalues with (B A^T)^T
    # (B A^T).
    if len(first) > len(second):
        first, second = second, first
    if (
        len(first) > first.shape[1]
    ):  # more samples than features: the triangular factor R has R^T R = A^T A too
        first = torch.linalg.qr(first, mode="r").R
    cross = second @ first.T
    eigenvalues = torch.linalg.eigvalsh(cross.T @ cross).clamp_min(0)
    return (mean_term + trace_term - 2 * eigenvalues.sqrt().sum()).item()


class PrecomputedFeatures(nn.Module):
    """What torchmetrics calls a feature extractor, for features that were extracted already."""

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(
    features: Tensor, references: Tensor, *, subset_size: int = 100, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID of features `[M, D]`, `[N, D]` by torchmetrics: mean and standard deviation over random subsets.

    The unbiased squared maximum mean discrepancy with kernel (x.y / D + 1)^3 (Binkowski et al., arXiv
    1801.01401), in float64: about 0 for equal distributions, possibly negative, and unlike a Frechet distance
    not biased by small sets. The global random state is restored.
    """
    check_features(features, references)
    smallest = min(len(features), len(references))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"kid_subset_size must be between 2 and the smaller number of images, {smallest}; "
            f"it is {subset_size}."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics: the features are kept in memory
        metric = KernelInceptionDistance(
            feature=PrecomputedFeatures(), subsets=num_subsets, subset_size=subset_size
        )
    metric.update(references.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def generation_metrics(
    samples: Tensor,
    references: Tensor,
    *,
    lite0: Lite0 | None = None,
    folder="weights",
    batch_size: int = 32,
    kid_subset_size: int = 100,
    kid_subsets: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Distances between generated and real images on EfficientNet-Lite0 features: FD-Lite0 and KID.

    Neither number compares with an FID, which needs the features of its own Inception network, nor with an
    FD-Lite0 of other image counts.

    Args:
        samples: generated images `[B, 3, H, W]`, clamped to [0, 1]; or their `lite0_features` `[B, 1280]`.
        references: real images or their features, so that these are computed once for many sample sets.
        lite0, folder, batch_size, progress: as for `lite0_features`.
        kid_subset_size, kid_subsets: images in a random subset of KID, and how many subsets; at most the
            smaller number of images.
        seed: of the subsets.

    Returns `fd_lite0`, `kid`, `kid_standard_deviation` (over subsets) and `protocol`.
    Raises `ValueError` for fewer than two images, values that are not finite or far outside [0, 1], or too
    large subsets.
    """
    if lite0 is None and (samples.ndim == 4 or references.ndim == 4):
        lite0 = load_lite0(folder).to(default_device())

    def features_of(batch: Tensor) -> Tensor:
        return (
            batch
            if batch.ndim == 2
            else lite0_features(batch, lite0, batch_size=batch_size, progress=progress)
        )

    check_count("generation_metrics", samples)
    check_count("generation_metrics", references)
    sample_features, reference_features = features_of(samples), features_of(references)
    fd = frechet_distance(sample_features, reference_features)
    kid, deviation = kernel_distance(
        sample_features, reference_features, subset_size=kid_subset_size, num_subsets=kid_subsets, seed=seed
    )
    rank_deficient = min(len(samples), len(references)) <= NUM_FEATURES
    return {
        "fd_lite0": fd,
        "kid": kid,
        "kid_standard_deviation": deviation,
        "protocol": {
            "features": f"EfficientNet-Lite0, {NUM_FEATURES} pooled features at 224 px; not an FID",
            "samples": len(samples),
            "reference_images": len(references),
            "covariance": "rank deficient (fewer images than features): biased upwards"
            if rank_deficient
            else "full rank",
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "kid_seed": seed,
        },
    }


def split_distance(features: Tensor, *, seed: int = 0) -> float:
    """FD-Lite0 between random halves of real features `[N, D]`: a perfect generator's value with N/2 images.

    The bias of the Frechet distance grows as sets shrink, so the floor for sets of M images needs 2 M real
    ones.
    """
    if len(features) < 4:
        raise ValueError(
            f"split_distance needs at least 4 images, two for each half; it was given {len(features)}."
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return frechet_distance(features[order[:half]], features[order[half : 2 * half]])


# ----------------------------------------------------------------------------------------------------- checks


def batch_starts(count: int, batch_size: int, title: str, progress: bool) -> tqdm:
    """First index of each batch of `count` images, under a progress bar if `progress`."""
    return tqdm(
        range(0, count, batch_size), title, unit="batch", mininterval=5.0, ncols=110, disable=not progress
    )


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_images(name: str, images: Tensor) -> None:
    """`ValueError` unless `images` are finite RGB `[B, 3, H, W]` in [0, 1], but for a decoder's overshoot."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point RGB [B, 3, H, W], not {images.dtype} {list(images.shape)}."
        )
    if images.numel() == 0:
        raise ValueError(f"{name} is empty: {list(images.shape)}.")
    if not images.isfinite().all():
        count = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
        raise ValueError(
            f"{count} of {len(images)} {name} contain NaN or infinite values: look at what made them."
        )
    lowest, highest = images.min().item(), images.max().item()
    if lowest < -RANGE_TOLERANCE or highest > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} must lie in [0, 1]; found {lowest:.3g} to {highest:.3g}. Rescale them first."
        )


def check_pair(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(
            f"images and references differ in shape: {list(images.shape)} and {list(references.shape)}."
        )
    check_images("images", images)
    check_images("references", references)


def check_count(function: str, images: Tensor) -> None:
    if len(images) < 2:
        raise ValueError(f"{function} needs at least 2 images, not {len(images)}.")


def check_features(features: Tensor, references: Tensor) -> None:
    if features.ndim != 2 or references.ndim != 2 or features.shape[1] != references.shape[1]:
        raise ValueError(
            f"features must be [M, D] and [N, D] with one D, "
            f"not {list(features.shape)} and {list(references.shape)}."
        )
    if min(len(features), len(references)) < 2:
        raise ValueError(
            f"A distance needs at least 2 images a set; there are {len(features)} and {len(references)}."
        )
    if not (features.isfinite().all() and references.isfinite().all()):
        raise ValueError("features contain NaN or infinite values; look at the images that they come from.")
