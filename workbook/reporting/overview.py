"""The picture that explains the project: one photograph on its way through a trained tokenizer. `python -m workbook.reporting.overview`."""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sitlib.data import held_out_views, open_images
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.wavelets import dwt2
from workbook.paths import resolve
from workbook.profile import load_profile
from workbook.reporting.plots import label, png, style
from workbook.runs import pipeline_parameters
from workbook.tokenizers import trained_tokenizer


def pyramid_mosaic(coefficients: list[Tensor]) -> Tensor:
    """Coefficients of one image, [C_s, h_s, w_s] for every scale, as the usual nested picture [3, H, W]: the approximation in the corner,
    details around it, each band stretched to its own 98th percentile and centred on grey."""
    mosaic = coefficients[0].clamp(0, 1)
    for details in coefficients[1:]:
        limit = details.abs().quantile(0.98).clamp_min(1e-6)
        horizontal, vertical, diagonal = (details / (2 * limit) + 0.5).clamp(0, 1).chunk(3)
        mosaic = torch.cat(
            [torch.cat([mosaic, vertical], dim=2), torch.cat([horizontal, diagonal], dim=2)], dim=1
        )
    return mosaic


@torch.no_grad()
def overview(tokenizer: SpectralTokenizer, image: Tensor, name: str) -> Figure:
    """Photograph, wavelet pyramid with its patches, codes scale by scale, reconstruction; image [3, H, W] in [0, 1]."""
    config, geometry = tokenizer.config, tokenizer.geometry
    codes = tokenizer.encode(image[None])[0]  # [S, N]
    steps = {
        "photograph": image,
        "wavelet pyramid": pyramid_mosaic(
            [x[0] for x in dwt2(image[None], config.wavelet, config.levels)]
        ),
        "codes": None,
        "reconstruction": tokenizer.decode(codes[None])[0],
    }
    fig, axes = plt.subplots(1, 4, figsize=(11.5, 3.5), width_ratios=[1, 1, 1, 1])
    for axis, (title, picture) in zip(axes, steps.items(), strict=True):
        axis.set_title(title)
        axis.axis("off")
        if picture is not None:
            axis.imshow(np.asarray(picture.permute(1, 2, 0).clamp(0, 1)), interpolation="none")
    _draw_patches(axes[1], geometry)
    _draw_codes(axes[2], codes, geometry.grid, config.num_codes)
    for axis, text in zip(
        axes,
        (
            f"{config.size} x {config.size} px",
            f"{geometry.num_scales} scales, {geometry.tokens_per_scale} patches in each",
            f"{geometry.num_tokens} codes of {int(np.log2(config.num_codes))} bits, coarse to fine",
            f"{name}, {geometry.num_tokens * np.log2(config.num_codes) / config.size**2:.2f} bits per pixel",
        ),
        strict=True,
    ):
        axis.text(0.5, -0.03, text, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    return fig


def _draw_patches(axis, geometry) -> None:
    """Grid lines of every scale's patches on the pyramid; half a pixel off, because pixels are centred on whole numbers."""
    for scale in geometry.scales:
        side, patch = geometry.scale_size(scale), geometry.patch_size(scale)
        corners = [(0, 0)] if scale == 1 else [(side, 0), (0, side), (side, side)]
        for x, y in corners:
            for k in range(geometry.grid + 1):
                style_of_line = {
                    "color": "#E69F00",
                    "linewidth": 1.2 if k in (0, geometry.grid) else 0.3,
                }
                axis.plot([x - 0.5, x + side - 0.5], [y + k * patch - 0.5] * 2, **style_of_line)
                axis.plot([x + k * patch - 0.5] * 2, [y - 0.5, y + side - 0.5], **style_of_line)


def _draw_codes(axis, codes: Tensor, grid: int, num_codes: int) -> None:
    """Codes as coloured cells, one grid for each scale, in two columns."""
    columns = 2
    for index, scale_codes in enumerate(codes):
        row, column = divmod(index, columns)
        left, top = column * (grid + 1), row * (grid + 1) + 0.5
        for k, code in enumerate(scale_codes.tolist()):
            y, x = divmod(k, grid)
            cell = plt.Rectangle(
                (left + x, top + y), 0.94, 0.94, color=plt.cm.viridis(code / (num_codes - 1))
            )
            axis.add_patch(cell)
            axis.text(
                left + x + 0.47,
                top + y + 0.5,
                code,
                ha="center",
                va="center",
                fontsize=5,
                color="white" if code < 0.7 * num_codes else "black",
            )
        axis.text(left, top - 0.1, f"scale {index + 1}", fontsize=8, va="bottom")
    side = max(columns, -(-len(codes) // columns)) * (grid + 1)
    axis.set(xlim=(0, side), ylim=(side, 0), aspect="equal")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workbook.reporting.overview", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--output", required=True, help="PNG file to write")
    arguments = parser.parse_args()
    style()
    profile = load_profile(arguments.profile)
    variant = "sit4" if "sit4" in (names := pipeline_parameters()["tokenizers"]) else names[-1]
    source = open_images(profile.data.source, "test").labelled()
    image = held_out_views(
        source, 1, profile.data.size, profile.autoregressive.codes.seed, kind="wide"
    )[0][0]
    tokenizer = trained_tokenizer(profile, variant, pipeline_parameters()["seeds"][0]).model
    path = resolve(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(overview(tokenizer, image, label(variant))))


if __name__ == "__main__":
    main()
