"""Photographs for the interactive parts of the front page: `python -m workbook.reporting.examples`.

A few held-out photographs, what each tokenizer makes of them, and what the first scales of a scale-causal one give alone; with the
picture that explains the project beside them. The pages are made from these files, so that making pages anew needs no model.
"""

import argparse
import base64
import io
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitlib.data import held_out_views, open_images
from sitlib.files import write_json
from sitlib.metrics import lpips_per_image, psnr_per_image
from sitlib.metrics.perceptual import PerceptualDistance, load_lpips
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.reporting.names import label
from workbook.reporting.overview import overview
from workbook.reporting.plots import png, style
from workbook.runs import pipeline_parameters
from workbook.tokenizers import trained_tokenizer

COUNT = 6


def data_uri(image: Tensor) -> str:
    """Image [3, H, W] in [0, 1] as the address of a PNG that is its own content."""
    pixels = (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@torch.no_grad()
def partial_decodings(tokenizer: SpectralTokenizer, image: Tensor) -> list[dict[str, Any]]:
    """Image [3, H, H] in [0, 1] from its first 1, 2, ... scales: side in px, number of codes, their bytes, and the PNG."""
    codes, bits = tokenizer.encode(image[None]), math.log2(tokenizer.config.num_codes)
    steps = []
    for scales in range(1, codes.shape[1] + 1):
        decoded, count = tokenizer.decode(codes, scales)[0], scales * codes.shape[2]
        steps.append(
            {
                "size": decoded.shape[-1],
                "codes": count,
                "bytes": math.ceil(count * bits / 8),
                "png": data_uri(decoded),
            }
        )
    return steps


@torch.no_grad()
def examples(
    tokenizers: dict[str, SpectralTokenizer],
    views: Tensor,
    names: Sequence[str],
    lpips: PerceptualDistance | None = None,
) -> dict[str, Any]:
    """What the front page shows of views [B, 3, H, H] in [0, 1].

    Returns:
        names: version -> name for a reader; scales_of: which tokenizer decodes scale by scale, None if none is scale-causal;
        photographs: for each view its name, versions ("original" and each tokenizer's, with PSNR in dB and LPIPS) and scales.
    """
    causal = [name for name, model in tokenizers.items() if len(model.sizes) > 1]
    known = {"original": "the original"} | {name: label(name) for name in tokenizers}
    photographs = [{"name": name, "images": {"original": {"png": data_uri(view)}}, "scales": []}
                   for name, view in zip(names, views, strict=True)]  # fmt: skip
    for name, model in tokenizers.items():
        made = model.reconstruct(views)
        psnr = psnr_per_image(made, views).tolist()
        distance = (
            lpips_per_image(made, views, lpips).tolist()
            if lpips is not None
            else [None] * len(views)
        )
        for photo, image, one, other in zip(photographs, made, psnr, distance, strict=True):
            photo["images"][name] = {"png": data_uri(image), "psnr": one, "lpips_alex": other}
    for photo, view in zip(photographs, views, strict=True):
        photo["scales"] = partial_decodings(tokenizers[causal[-1]], view) if causal else []
    return {"names": known, "scales_of": causal[-1] if causal else None, "photographs": photographs}


def _photographs(profile: Profile) -> tuple[Tensor, list[str]]:
    """The first held-out photographs of different classes, one view of each; nothing else decides."""
    source = open_images(profile.data.source, "test").labelled()
    views, labels, _ = held_out_views(
        source, len(source), profile.data.size, profile.autoregressive.codes.seed, kind="wide"
    )
    first: dict[int, int] = {}
    for index, place in enumerate(labels.tolist()):
        first.setdefault(place, index)
    chosen = list(first.values())[:COUNT]
    return views[chosen], [
        f"Photograph {i}: {source.class_names[int(labels[k])]}" for i, k in enumerate(chosen, 1)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m workbook.reporting.examples", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--overview", required=True, help="PNG file to write")
    arguments = parser.parse_args()
    style()
    profile, parameters = load_profile(arguments.profile), pipeline_parameters()
    seed, same = (
        parameters["seeds"][0],
        profile.data,
    )  # a tokenizer of other images or of another size has no place beside these
    variants = [name for name in parameters["tokenizers"] if profile.tokenizer_data(name) == same]
    if not variants:
        sys.exit(
            "No tokenizer in params.yaml is trained on data.source of the profile: add one, such as sit4."
        )
    tokenizers = {name: trained_tokenizer(profile, name, seed).model.eval() for name in variants}
    views, names = _photographs(profile)
    write_json(resolve(arguments.output), examples(tokenizers, views, names, load_lpips("alex")))
    first = "sit4" if "sit4" in variants else variants[-1]
    path = resolve(arguments.overview)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(overview(tokenizers[first], views[0], label(first))))


if __name__ == "__main__":
    main()
