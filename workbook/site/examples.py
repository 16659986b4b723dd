"""Photographs for the front page: what every tokenizer makes of them, and the overview picture.

The pages are made from these files, so that making pages anew needs no model.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sitlib.data import held_out_views, open_images
from sitlib.files import write_json
from sitlib.metrics import lpips_per_image, psnr_per_image
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2
from workbook.figures.core import ORANGE, png, png_uri, style
from workbook.names import label
from workbook.params import pipeline_params, seeds_by_variant
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer

COUNT = 6  # photographs


@torch.no_grad()
def partial_decodings(tokenizer: SpectralTokenizer, image: Tensor) -> list[dict[str, Any]]:
    """Image [3, H, H] in [0, 1] from its first 1, 2, ... scales: px, codes, bytes and the PNG."""
    codes, bits = tokenizer.encode(image[None]), math.log2(tokenizer.config.num_codes)
    steps = []
    for scales in range(1, codes.shape[1] + 1):
        decoded, count = tokenizer.decode(codes, scales)[0], scales * codes.shape[2]
        size, length = decoded.shape[-1], math.ceil(count * bits / 8)
        steps.append({"size": size, "codes": count, "bytes": length, "png": png_uri(decoded)})
    return steps


@torch.no_grad()
def examples(
    tokenizers: Mapping[str, SpectralTokenizer],
    views: Tensor,
    names: Sequence[str],
) -> dict[str, Any]:
    """Content of the front page's sliders for views [B, 3, H, H] in [0, 1].

    Returns:
        `names`: version -> name for a reader; `scales_of`: the tokenizer that decodes scale by
        scale,
        None if no one is scale-causal; `photographs`: name, versions ("original" and each
        tokenizer's, with PSNR in dB and LPIPS-Alex) and scales of every view.
    """
    causal = [name for name, model in tokenizers.items() if len(model.sizes) > 1]
    photographs: list[dict[str, Any]] = [
        {"name": name, "images": {"original": {"png": png_uri(view)}}}
        for name, view in zip(names, views, strict=True)
    ]
    for name, model in tokenizers.items():
        reconstructions = model.reconstruct(views)
        psnr = psnr_per_image(reconstructions, views).tolist()
        lpips_alex = lpips_per_image(reconstructions, views).tolist()
        for i, photograph in enumerate(photographs):
            version = {"psnr": psnr[i], "lpips_alex": lpips_alex[i]}
            photograph["images"][name] = {"png": png_uri(reconstructions[i]), **version}
    for photograph, view in zip(photographs, views, strict=True):
        model = tokenizers[causal[-1]] if causal else None
        photograph["scales"] = partial_decodings(model, view) if model else []
    known = {"original": "the original"} | {name: label(name) for name in tokenizers}
    return {"names": known, "scales_of": causal[-1] if causal else None, "photographs": photographs}


def pyramid_mosaic(scales: Sequence[Tensor]) -> Tensor:
    """Scales [C_s, h_s, w_s] of one image in the usual nested arrangement, [3, H, W].

    The approximation stands in the corner, details around it; each scale is stretched to its own
    98th percentile and centered on grey.
    """
    mosaic = scales[0].clamp(0, 1)
    for details in scales[1:]:
        limit = details.abs().quantile(0.98).clamp_min(1e-6)
        H, V, D = (details / (2 * limit) + 0.5).clamp(0, 1).chunk(3)
        mosaic = torch.cat([torch.cat([mosaic, V], dim=2), torch.cat([H, D], dim=2)], dim=1)
    return mosaic


@torch.no_grad()
def overview(tokenizer: SpectralTokenizer, image: Tensor, name: str) -> Figure:
    """Photograph [3, H, W] in [0, 1], its pyramid with patches, its codes, its reconstruction."""
    config = tokenizer.config
    codes, bits = tokenizer.encode(image[None])[0], math.log2(config.num_codes)  # [S, N]
    scales = [x[0] for x in dwt2(image[None], config.wavelet, config.levels)]
    pictures = [image, pyramid_mosaic(scales), None, tokenizer.decode(codes[None])[0]]
    titles = ["photograph", "wavelet pyramid", "codes", "reconstruction"]
    notes = [
        f"{config.size} x {config.size} px",
        f"{len(codes)} scales, {codes.shape[1]} patches in each",
        f"{codes.numel()} codes of {int(bits)} bits, coarse to fine",
        f"{name}, {codes.numel() * bits / config.size**2:.2f} bits per pixel",
    ]
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.5))
    for axis, picture, title, note in zip(axes, pictures, titles, notes, strict=True):
        axis.set_title(title)
        axis.axis("off")
        axis.text(0.5, -0.03, note, transform=axis.transAxes, ha="center", va="top", fontsize=9)
        if picture is not None:
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1))
    for s, x in enumerate(scales):
        side = x.shape[-1]
        corners = [(0, 0)] if s == 0 else [(side, 0), (0, side), (side, side)]
        for left, top in corners:
            _draw_patches(axes[1], left, top, side, config.grid_size)
    _draw_codes(axes[2], codes, config.grid_size, config.num_codes)
    return figure


def _draw_patches(axis: Axes, left: int, top: int, side: int, grid_size: int) -> None:
    """Grid lines of a band's patches; half a pixel off, because pixels are centred on integers."""
    for k in range(grid_size + 1):
        at, width = k * side / grid_size - 0.5, 1.2 if k in (0, grid_size) else 0.3
        ends_x, ends_y = [left - 0.5, left + side - 0.5], [top - 0.5, top + side - 0.5]
        axis.plot(ends_x, [top + at] * 2, color=ORANGE, linewidth=width)
        axis.plot([left + at] * 2, ends_y, color=ORANGE, linewidth=width)


def _draw_codes(axis: Axes, codes: Tensor, grid_size: int, num_codes: int) -> None:
    """Codes [S, N] as coloured numbers, one grid for each scale, in two columns."""
    step = grid_size + 1
    for s, scale_codes in enumerate(codes.tolist()):
        row, column = divmod(s, 2)
        axis.text(column * step, row * step + 0.4, f"scale {s + 1}", fontsize=8, va="bottom")
        for k, code in enumerate(scale_codes):
            y, x = divmod(k, grid_size)
            place, tone = (column * step + x, row * step + 0.5 + y), code / max(num_codes - 1, 1)
            axis.add_patch(plt.Rectangle(place, 0.94, 0.94, color=plt.get_cmap("viridis")(tone)))
            middle, ink = (place[0] + 0.47, place[1] + 0.5), "white" if tone < 0.7 else "black"
            axis.text(*middle, str(code), ha="center", va="center", fontsize=5, color=ink)
    side = max(2, -(-len(codes) // 2)) * step
    axis.set(xlim=(0, side), ylim=(side, 0), aspect="equal")


def first_of_each_class(profile: Profile) -> tuple[Tensor, list[str]]:
    """Views [B, 3, H, H] of the first held-out photograph of each class, and their names."""
    source = open_images(resolve(profile.data.source), "test").labeled()
    seed, size = profile.autoregressive.codes.seed, profile.data.size
    views, labels, _ = held_out_views(source, len(source), size, seed, kind="wide")
    first = {label: i for i, label in reversed(list(enumerate(labels.tolist())))}
    indices = sorted(first.values())[:COUNT]
    classes = [source.class_names[int(labels[i])] for i in indices]
    return views[indices], [f"Photograph {i}: {name}" for i, name in enumerate(classes, 1)]


def write_examples(profile: Profile, examples_file: Path, overview_file: Path) -> None:
    """Write examples.json and overview.png of the tokenizers that params.yaml lists.

    Raises:
        ValueError: none of them is trained on the images of the profile.
    """
    style()
    # A tokenizer of other images or of another size has no place beside these.
    seeds = {
        name: seeds[0]
        for name, seeds in seeds_by_variant(pipeline_params()["tokenizers"]).items()
        if profile.tokenizer_data(name) == profile.data
        and not profile.tokenizer_training(name).codes_from
    }
    if not seeds:
        raise ValueError(
            "No tokenizer in params.yaml is trained on data.source of the profile: add sit4."
        )
    tokenizers = {n: trained_tokenizer(profile, n, seed).model for n, seed in seeds.items()}
    views, titles = first_of_each_class(profile)
    write_json(examples_file, examples(tokenizers, views, titles))
    name = "sit4" if "sit4" in seeds else list(seeds)[-1]
    overview_file.write_bytes(png(overview(tokenizers[name], views[0], label(name))))
