"""Figures about tokens, codebooks and attention; what they show is computed by the models themselves."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from sitlib.metrics.codebook import codebook_names
from sitlib.model.quantizer import Codebook
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import SequenceLayout, attend
from workbook.figures import colour, label


def attention_patterns(layouts: Mapping[str, SequenceLayout]) -> Figure:
    """Who attends to whom, one panel for each titled layout; read off `attend` itself with keys that are all alike."""
    fig, axes = plt.subplots(1, len(layouts), figsize=(3.1 * len(layouts), 3.9))
    for axis, (title, layout) in zip(np.atleast_1d(axes), layouts.items(), strict=True):
        length = layout.num_scales * layout.tokens_per_scale
        zeros, ones_at = torch.zeros(1, 1, length, length), torch.eye(length)[None, None]
        weights = attend(zeros, zeros, ones_at, layout)[0, 0]  # row = query, column = key
        axis.imshow(weights > 0, cmap="Blues", vmin=0, vmax=1.4, interpolation="none")
        for scale in range(1, layout.num_scales):
            edge = scale * layout.tokens_per_scale - 0.5
            axis.axhline(edge, color="0.6", linewidth=0.6)
            axis.axvline(edge, color="0.6", linewidth=0.6)
        centres = [
            (scale + 0.5) * layout.tokens_per_scale - 0.5 for scale in range(layout.num_scales)
        ]
        axis.set(title=title, xlabel="attended token (scale)", xticks=centres, yticks=centres)
        axis.set_xticklabels(range(1, layout.num_scales + 1))
        axis.set_yticklabels(range(1, layout.num_scales + 1))
        axis.grid(False)
    np.atleast_1d(axes)[0].set_ylabel("token (scale)")
    return fig


@torch.no_grad()
def codebook_map(tokenizer: SpectralTokenizer, images: Tensor) -> Figure:
    """Each codebook and the encoder outputs that look codes up in it, on the plane of their two main directions."""
    latents = tokenizer.latents(images)
    names, parts = codebook_names(len(tokenizer.codebooks)), tokenizer.by_codebook(latents)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4.1 * columns, 3.7 * rows), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name, codebook, part in zip(
        axes.flat, names, tokenizer.codebooks, parts, strict=False
    ):
        assert isinstance(codebook, Codebook)
        z = F.normalize(part.reshape(-1, part.shape[-1]), dim=-1)
        chosen = codebook.lookup(codebook.nearest(z))
        codes = F.normalize(codebook.weight, dim=-1)
        plane = torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh[:2].T
        points, stars = (z - z.mean(0)) @ plane, (codes - z.mean(0)) @ plane
        distance = (z - chosen).norm(dim=-1).mean()
        shown = points[:: max(1, len(points) // 1500)]
        axis.plot(*shown.T, ".", color="0.6", markersize=2.5, label="encoder outputs")
        axis.plot(*stars.T, "*", color=colour(name), markersize=5, markeredgewidth=0, label="codes")
        axis.set(
            title=f"{label(name)}: mean distance to the code {distance:.2f}",
            xlabel="first direction",
            ylabel="second direction",
        )
        axis.set_aspect("equal", adjustable="datalim")
        axis.legend(loc="upper right")
    return fig


def scores_by_seed(
    scores: Mapping[str, Sequence[Mapping[str, float]]], metrics: Mapping[str, str]
) -> Figure:
    """One panel for each metric, one row of points for each model, a point for each seed and a bar at their mean."""
    fig, axes = plt.subplots(
        1,
        len(metrics),
        figsize=(3.7 * len(metrics), 0.42 * len(scores) + 1.2),
        sharey=True,
        squeeze=False,
    )
    names = list(scores)
    for axis, (metric, title) in zip(axes[0], metrics.items(), strict=True):
        for row, name in enumerate(names):
            values = [seed[metric] for seed in scores[name]]
            axis.plot(
                values, [row] * len(values), "o", color=colour(name), markersize=6, alpha=0.75
            )
            axis.plot(
                [np.mean(values)], [row], "|", color=colour(name), markersize=20, markeredgewidth=2
            )
        axis.set(xlabel=title, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticklabels([label(name) for name in names])
        axis.grid(axis="y", visible=False)
    return fig


def error_budget(errors: Mapping[str, Sequence[float]]) -> Figure:
    """Squared error of every model, a bar each, shared out among scales, coarsest first."""
    fig, axis = plt.subplots(figsize=(7.6, 0.45 * len(errors) + 1.5))
    names, scales = list(errors), len(next(iter(errors.values())))
    shades = plt.cm.cividis(np.linspace(0.05, 0.95, scales))
    left = np.zeros(len(names))
    for scale, shade in enumerate(shades):
        widths = np.array([errors[name][scale] for name in names])
        title = "approximation" if scale == 0 else f"details {scales - scale}"
        bars = axis.barh(range(len(names)), widths, left=left, color=shade, label=title)
        axis.bar_label(
            bars,
            [f"{1000 * w:.1f}" for w in widths],
            label_type="center",
            fontsize=8,
            color="white" if scale < 2 else "black",
        )
        left += widths
    axis.set(yticks=range(len(names)), xlabel="mean squared error in [-1, 1] (labels: times 1000)")
    axis.set_yticklabels([label(name) for name in names])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=scales)
    return fig


def quality_by_size(
    models: Mapping[str, Mapping[int, Mapping[str, float]]], metrics: Mapping[str, str]
) -> Figure:
    """One panel for each metric {name: title}; a line for each model over the sizes {px: scores} at which it was judged."""
    fig, axes = plt.subplots(
        1, len(metrics), figsize=(4.4 * len(metrics) + 0.4, 3.3), squeeze=False
    )
    sizes = sorted({size for scores in models.values() for size in scores})
    for axis, (metric, title) in zip(axes[0], metrics.items(), strict=True):
        for name, scores in models.items():
            points = sorted((size, values[metric]) for size, values in scores.items())
            text = label(name) if axis is axes[0][0] else None
            axis.plot(*zip(*points, strict=True), "o-", color=colour(name), label=text)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="side of the image, px", ylabel=title, xticks=sizes)
        axis.set_xticklabels(sizes)
        axis.minorticks_off()
    fig.legend(loc="outside upper center", ncols=min(4, len(models)))
    return fig


def nats_by_scale(models: Mapping[str, Sequence[float]], uniform: float) -> Figure:
    """Held-out nats per token of every scale beside those of a uniform guess."""
    fig, axis = plt.subplots(figsize=(6.4, 3.2))
    longest = max(len(values) for values in models.values())
    for name, values in models.items():
        if len(values) == 1:
            axis.axhline(values[0], color=colour(name), label=f"{label(name)} (one scale)")
        else:
            axis.plot(
                range(1, len(values) + 1), values, "o-", color=colour(name), label=label(name)
            )
    axis.axhline(uniform, color="0.5", linestyle=":", label="uniform guess")
    axis.set(
        xlabel="scale (1 = approximation, then details, coarse to fine)",
        ylabel="nats per token",
        xticks=range(1, longest + 1),
    )
    fig.legend(loc="outside upper center", ncols=2)
    return fig
