"""Photographs for the front page: what every tokenizer makes of them, and the overview picture.

The pages are made from these files, so that making pages anew needs no model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from sitlib import codec
from sitlib.data import held_out_views, open_images
from sitlib.files import write_json
from sitlib.metrics import lpips_per_image, psnr_per_image
from sitlib.model.tiling import decode_codes, encode_image
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.figures.core import ORANGE, picture_uri, png, style
from workbook.names import label
from workbook.params import pipeline_params, seeds_by_variant
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer

COUNT = 6  # photographs


@torch.no_grad()
def examples(
    tokenizers: Mapping[str, SpectralTokenizer], views: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Content of the front page's sliders for views [B, 3, H, H] in [0, 1].

    Returns:
        `names`: version -> name for a reader; `photographs`: name and versions of every view
        ("original" and each tokenizer's, with PSNR in dB and LPIPS-Alex).
    """
    photographs: list[dict[str, Any]] = [
        {"name": name, "images": {"original": {"png": picture_uri(view)}}}
        for name, view in zip(names, views, strict=True)
    ]
    for name, model in tokenizers.items():
        made = model.reconstruct(views)
        scores = psnr_per_image(made, views).tolist(), lpips_per_image(made, views).tolist()
        for photograph, image, psnr, lpips in zip(photographs, made, *scores, strict=True):
            version = {"png": picture_uri(image), "psnr": psnr, "lpips_alex": lpips}
            photograph["images"][name] = version
    known = {"original": "the original"} | {name: label(name) for name in tokenizers}
    return {"names": known, "photographs": photographs}


def growing(tokenizer: SpectralTokenizer, view: Tensor) -> dict[str, Any]:
    """A view [3, H, H] as a .sit file that arrives byte after byte.

    Returns:
        `original`, the view; `bytes` of the file; `steps`: with so many bytes, how many scales are
        whole, their image, and its PSNR (dB) and LPIPS-Alex to the view when enlarged to its size.
    """
    file, steps = codec.compress(tokenizer, encode_image(tokenizer, view[None])), []
    for scales, end in enumerate(codec.ends_of_scales(tokenizer, file), 1):
        image = decode_codes(tokenizer, codec.decompress(tokenizer, file[:end])[0])
        large = F.interpolate(image, view.shape[1:], mode="bicubic").clamp(0, 1)
        scores = psnr_per_image(large, view[None]), lpips_per_image(large, view[None])
        step = {"bytes": end, "scales": scales, "size": image.shape[-1]}
        step |= {name: float(x) for name, x in zip(("psnr", "lpips_alex"), scores, strict=True)}
        steps.append(step | {"png": picture_uri(image[0])})
    return {"original": picture_uri(view), "bytes": len(file), "steps": steps}


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
    codes = tokenizer.encode(image[None])[0]  # [S, N]
    scales = [x[0] for x in tokenizer.geometry.forward(image[None])]
    pictures = [image, pyramid_mosaic(scales), None, tokenizer.decode(codes[None])[0]]
    titles = ["photograph", "wavelet pyramid", "codes", "reconstruction"]
    notes = [
        f"{config.size} x {config.size} px",
        f"{len(codes)} scales, {codes.shape[1]} patches in each",
        f"{codes.numel():,} codes, {config.bits():,.0f} bits in all, coarse to fine",
        f"{name}, {config.bits() / config.size**2:.2f} bits per pixel",
    ]
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.5))
    for axis, picture, title, note in zip(axes, pictures, titles, notes, strict=True):
        axis.set_title(title)
        axis.axis("off")
        axis.text(0.5, -0.03, note, transform=axis.transAxes, ha="center", va="top", fontsize=9)
        if picture is not None:
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1))

    grid = config.grid_size
    for s, x in enumerate(scales):  # lines between patches, in every band of a scale
        side = x.shape[-1]
        for left, top in [(0, 0)] if s == 0 else [(side, 0), (0, side), (side, side)]:
            for k in range(grid + 1):
                # Half a pixel off, because pixels are centred on integers.
                at = k * side / grid - 0.5
                look = {"color": ORANGE, "linewidth": 1.2 if k in (0, grid) else 0.3}
                axes[1].plot([left - 0.5, left + side - 0.5], [top + at] * 2, **look)
                axes[1].plot([left + at] * 2, [top - 0.5, top + side - 0.5], **look)

    axis, step, columns = axes[2], 1.2 * grid, math.isqrt(len(codes) - 1) + 1
    rows = -(-len(codes) // columns)
    for s, scale_codes in enumerate(codes):  # a colour for each code
        row, column = divmod(s, columns)
        left, top = column * step, (row + 0.15) * step
        axis.text(left, top - 0.02 * step, f"scale {s + 1}", fontsize=8, va="bottom")
        box = (left, left + grid, top + grid, top)
        tones = scale_codes.view(grid, grid) / max(config.codebook_sizes[s] - 1, 1)
        axis.imshow(tones, extent=box, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlim=(0, columns * step), ylim=((rows + 0.15) * step, 0), aspect="equal")
    return figure


def write_examples(profile: Profile) -> None:
    """Write reports/examples.json of the tokenizers in params.yaml, and reports/overview.png.

    The photographs are the first held-out ones of each class.

    Raises:
        ValueError: no tokenizer is trained on the images of the profile.
    """
    style()
    # A tokenizer of other images or of another size has no place beside these.
    tokenizers = {
        name: trained_tokenizer(profile, name, seeds[0]).model
        for name, seeds in seeds_by_variant(pipeline_params()["tokenizers"]).items()
        if profile.tokenizer_data(name) == profile.data
        and not profile.tokenizer_training(name).codes_from
    }
    if not tokenizers:
        raise ValueError(
            "No tokenizer in params.yaml is trained on data.source of the profile: add sit4."
        )
    source = open_images(resolve(profile.data.folder), "test").labeled()
    seed, size = profile.autoregressive.codes.seed, profile.data.size
    views, labels, _ = held_out_views(source, len(source), size, seed, kind="wide")
    packaged = SpectralTokenizer.from_pretrained("photos-256")
    large, _, _ = held_out_views(source, len(source), packaged.sizes[-1], seed, kind="wide")
    first = {number: i for i, number in reversed(list(enumerate(labels.tolist())))}
    shown = sorted(first.values())[:COUNT]
    classes = [source.class_names[int(labels[i])] for i in shown]
    titles = [f"Photograph {i}: {name}" for i, name in enumerate(classes, 1)]
    content = examples(tokenizers, views[shown], titles)
    for photograph, view in zip(content["photographs"], large[shown], strict=True):
        photograph["file"] = growing(packaged, view)
    write_json(resolve("reports/examples.json"), content)
    picture = png(overview(packaged, large[shown[0]], "SIT-SC-5 of the package"))
    resolve("reports/overview.png").write_bytes(picture)
