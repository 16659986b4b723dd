"""Judging a tokenizer on held-out images: `python -m workbook.tokenizer_evaluation`.

Every set of the profile's `tokenizer.evaluation.sets` is judged at every size with the same views. Smaller images are the views averaged
over squares of pixels, as the Haar transform does it. `PART` views at a time are in memory.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sitlib.files import read_json, read_metadata, write_json, write_tensors
from sitlib.metrics import (
    InceptionMetrics,
    bits_per_pixel,
    classifier_score,
    codebook_statistics,
    fast_metrics,
    generation_metrics,
    lite0_features,
    reconstruction_values,
    summarize_reconstructions,
)
from sitlib.metrics import networks as lite0_module
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.metrics.weights import fetch_weights
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2, orthonormal_gains
from sitlib.strict import digest
from sitlib.train.config import DataConfig
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import TokenizerRun, command
from workbook.tokenizers import held_out_set, trained_tokenizer

PART = 512  # views
ERROR_LEVELS = 3  # scales of the error budget: those of SIT-4, for every model
SMALLEST_SIZE = (
    4  # px; down to which a tokenizer of one size is judged: the coarsest scale of SIT-5
)
FEATURES = "build/features"  # of originals, which are the same for every tokenizer
BY_PHOTOGRAPH = ("photographs", "counts", "by_photograph")


def evaluated_sizes(tokenizer: SpectralTokenizer) -> list[int]:
    """Sides in px at which a tokenizer is judged, the full size first.

    Smaller ones are those that it encodes and decodes by itself, for which encoder and decoder have to be scale-causal; or, for the
    baseline without scales, all halves down to 4 px: see `reconstructed`.
    """
    config, full = tokenizer.config, tokenizer.sizes[-1]
    if config.levels == 0:
        sizes = [full]
        while sizes[-1] % 2 == 0 and sizes[-1] > SMALLEST_SIZE:
            sizes.append(sizes[-1] // 2)
        return sizes
    return tokenizer.sizes[::-1] if config.decoder_attention == "scale_causal" else [full]


def reconstructed(tokenizer: SpectralTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [V, k, N] and reconstructions [V, 3, H, H], on the CPU, of images [V, 3, H, H] in [0, 1].

    To a tokenizer that does not take images of H px they are given as the paper gives them to its baseline (SIT, arXiv 2412.09607):
    enlarged to its full size (bicubic, clamped); and the reconstruction is averaged down to H px again.
    """
    size, full = images.shape[-1], tokenizer.sizes[-1]
    if size not in tokenizer.sizes:
        codes, large = reconstructed(
            tokenizer, F.interpolate(images, (full, full), mode="bicubic").clamp(0, 1)
        )
        return codes, F.avg_pool2d(large, full // size)
    codes = torch.cat([tokenizer.encode(batch).cpu() for batch in images.split(64)])
    return codes, torch.cat([tokenizer.decode(batch).cpu() for batch in codes.split(64)])


def error_by_scale(
    images: Tensor, reconstructions: Tensor, levels: int = ERROR_LEVELS
) -> list[float]:
    """Mean squared error in [-1, 1], shared out among the scales of a Haar transform, coarsest first; their sum is the whole error."""
    coefficients = dwt2(
        2 * (images - reconstructions), "haar", levels
    )  # differences double from [0, 1] to [-1, 1]
    gains = orthonormal_gains(levels)
    return [
        float((gain * x).square().sum() / images.numel())
        for gain, x in zip(gains, coefficients, strict=True)
    ]


@dataclass
class _Measured:
    """What is measured of some views, one value for each; but for the error."""

    codes: Tensor  # [V, k, N]
    values: dict[str, Tensor]  # of `reconstruction_values`, [V] each
    features: Tensor  # Lite0's of the reconstructions, [V, 1280]
    originals: Tensor  # and of the originals
    error_by_scale: list[
        float
    ]  # of all of them; empty where an image is too small for the transform


def evaluate_tokenizer(
    tokenizer: SpectralTokenizer, profile: Profile, data: DataConfig | None = None
) -> dict[str, Any]:
    """Reconstruction and distribution metrics on every evaluation set and at every size, and codebook use, with the protocol.

    Args:
        data: what it was trained on, the profile's `data` by default. A tokenizer of other images is judged at its full size only, and
            "the first set" is the one of its own images.

    Returns:
        `sets`: name -> side in px, as text -> `psnr` (dB), `ssim`, `lpips_alex`, `lpips_vgg`, their `intervals`, `photographs`, `counts`
        and values `by_photograph` (see `evaluate_reconstructions`; LPIPS-VGG, which takes most of the time, at full size only);
        `fd_lite0`, `kid`, `kid_standard_deviation` against the originals; `lite0_score` and, of the originals, `lite0_score_originals`;
        `bits_per_pixel`; with `evaluation.inception` at full size also `fid`, `inception_score` and `inception_score_originals`;
        `protocol`.
        At the top level the same for the first set at full size, but for the values by photograph, and for this set `error_by_scale`,
        `codebooks`, `scales`, and `usage`: the share in % of codes used at least once, of the codebook that uses the smallest share;
        `parameters`.
    """
    settings, config = profile.tokenizer.evaluation, tokenizer.config
    inception = InceptionMetrics() if settings.inception else None
    lite0 = load_lite0().to(best_device())
    sizes, sets, first, own = evaluated_sizes(tokenizer), {}, {}, next(iter(settings.sets))
    if data is not None and data.source != profile.data.source:
        sizes = sizes[:1]
        own = next(
            (name for name, chosen in settings.sets.items() if chosen.source == data.source), own
        )
    for name, chosen in settings.sets.items():
        keys: list[str] = []
        parts: dict[int, list[_Measured]] = {size: [] for size in sizes}
        if inception is not None:
            inception.reset()
        for start in range(0, chosen.views, PART):
            views, keys_of_part = held_out_set(profile, name, config.size, PART, start)
            keys += keys_of_part
            for size in sizes:
                images = F.avg_pool2d(views, config.size // size)
                codes, reconstructions = reconstructed(tokenizer, images)
                title = f"{name}, {size} px" + (
                    f", from view {start + 1}" if chosen.views > PART else ""
                )
                about, nets = (
                    [chosen, size, settings.seed],
                    None if size == sizes[0] else fast_metrics(),
                )
                parts[size].append(
                    _measured(images, codes, reconstructions, lite0, nets, about, title)
                )
                if inception is not None and size == sizes[0]:
                    inception.add(reconstructions, real=False, title=title)
                    inception.add(images, real=True, title=title)
        sets[name] = {}
        for size in sizes:
            measured = _joined(parts[size])
            scores = _scores(measured, keys, lite0, profile, name, size)
            scores["bits_per_pixel"] = bits_per_pixel(
                measured.codes[0].numel(), config.num_codes, size
            )
            if inception is not None and size == sizes[0]:
                scores |= inception.compute(seed=settings.seed)
            if size not in tokenizer.sizes:
                scores["protocol"]["size_change"] = (
                    f"enlarged to {config.size} px (bicubic, clamped), reconstructed, averaged down again"
                )
            sets[name][str(size)] = scores
            if name == own and size == sizes[0]:
                first = _of_first(tokenizer, measured, scores)
    return {**first, "parameters": sum(p.numel() for p in tokenizer.parameters()), "sets": sets}


def _of_first(
    tokenizer: SpectralTokenizer, measured: _Measured, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """What is reported of the first set at full size: its scores, and what is measured there only."""
    config = tokenizer.config
    books = min(config.num_codebooks, config.num_scales)
    statistics = codebook_statistics(measured.codes, config.num_codes, num_codebooks=books)
    return {
        **{name: value for name, value in scores.items() if name not in BY_PHOTOGRAPH},
        "error_by_scale": measured.error_by_scale,
        "usage": min(book["usage"] for book in statistics["codebooks"].values()),
        **statistics,
    }


def _measured(
    images: Tensor,
    codes: Tensor,
    reconstructions: Tensor,
    lite0: Lite0,
    nets: list[str] | None,
    about: list[Any],
    title: str,
) -> _Measured:
    """Measures views [V, 3, H, H] and their reconstructions; `about` names the set, as for `original_features`."""
    values = reconstruction_values(images, reconstructions, metrics=nets, title=title)
    features = lite0_features(reconstructions, lite0, title=title)
    originals = original_features(images, lite0, about, title=f"{title}, originals")
    fits = images.shape[-1] % 2**ERROR_LEVELS == 0
    errors = error_by_scale(images, reconstructions) if fits else []
    return _Measured(codes, values, features, originals, errors)


def _joined(parts: Sequence[_Measured]) -> _Measured:
    """Parts of a set as a whole."""
    shares = [len(part.codes) / sum(len(part.codes) for part in parts) for part in parts]
    errors = zip(*(part.error_by_scale for part in parts), strict=True)
    return _Measured(
        torch.cat([part.codes for part in parts]),
        {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        torch.cat([part.features for part in parts]),
        torch.cat([part.originals for part in parts]),
        [
            sum(share * error for share, error in zip(shares, scale, strict=True))
            for scale in errors
        ],
    )


def _scores(
    measured: _Measured,
    keys: list[str],
    lite0: Lite0,
    profile: Profile,
    name: str,
    size: int,
) -> dict[str, Any]:
    """Scores of reconstructions of all views of the evaluation set `name` at a size in px, of what `_measured` found."""
    settings = profile.tokenizer.evaluation
    chosen, features, originals = settings.sets[name], measured.features, measured.originals
    scores = summarize_reconstructions(measured.values, keys, (size, size))
    subset = min(100, max(2, len(keys) // 2))  # of KID; larger subsets would be nearly the same
    distances = generation_metrics(features, originals, kid_subset_size=subset, seed=settings.seed)
    cut = {
        "crops": "random crops of {} held-out photographs",
        "wide": "wide views of {} held-out images",
    }
    protocol = {
        **scores["protocol"],
        **distances["protocol"],
        "views": cut[chosen.kind].format(len(scores["photographs"])),
        "source": chosen.source,
        "seed": settings.seed,
    }
    del protocol["samples"], protocol["reference_images"]  # both are `images`
    return {
        **scores,
        **distances,
        "lite0_score": classifier_score(lite0.logits(features)),
        "lite0_score_originals": classifier_score(lite0.logits(originals)),
        "protocol": protocol,
    }


def original_features(images: Tensor, lite0: Lite0, about: list[Any], *, title: str = "") -> Tensor:
    """Lite0 features [V, 1280] of originals [V, 3, H, W], kept in `build/features` for the other tokenizers.

    The file is named by `about`, the pixels and the code of the network. A damaged one is made again; of processes that write at once
    the last one wins, with equal content.
    """
    content = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    code = hashlib.sha256(Path(lite0_module.__file__).read_bytes()).hexdigest()
    run = digest(*about, content, code)
    path = resolve(f"{FEATURES}/{run}.safetensors")
    with suppress(OSError, ValueError, SafetensorError):
        if read_metadata(path).get("run") == run:
            return load_file(path)["features"]
    features = lite0_features(images, lite0, title=title)
    with suppress(OSError):  # a folder that cannot be written to only costs time
        own = path.with_name(f"{run}-{os.getpid()}.safetensors")
        write_tensors(own, {"features": features}, {"run": run})
        os.replace(own, path)
    return features


def tokenizer_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path, run = (
        resolve(f"metrics/tokenizer/{variant}-seed{seed}.json"),
        _run(profile, variant, seed),
    )
    if path.exists() and (scores := read_json(path)).get("run") == run:
        return scores
    fetch_weights()
    tokenizer = trained_tokenizer(profile, variant, seed).model.to(best_device())
    return evaluate_tokenizer(tokenizer, profile, profile.tokenizer_data(variant))


def _run(profile: Profile, variant: str, seed: int) -> str:
    settings = (
        profile.tokenizer.evaluation
    )  # a digest knows no order, and the first set has a role of its own
    return digest(TokenizerRun.of(profile, variant, seed), settings, list(settings.sets))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workbook.tokenizer_evaluation", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", required=True, help="metrics file to write")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    tokenizer = trained_tokenizer(profile, arguments.variant, arguments.seed).model.to(
        best_device()
    )
    run = {"run": _run(profile, arguments.variant, arguments.seed)}
    scores = evaluate_tokenizer(tokenizer, profile, profile.tokenizer_data(arguments.variant))
    write_json(resolve(arguments.output), {**run, **scores})


if __name__ == "__main__":
    command(main)
