"""Metrics that carry their protocol: reconstruction, codebook use, distances between sets of images, retrieval, and intervals.

Images are RGB in [0, 1], `[B, 3, H, W]`; codes are int64 `[B, S, N]`. Results are plain dictionaries, ready for JSON; what was measured
on what stands under `protocol`.
"""

from sitlib.metrics.codebook import bits_per_pixel, codebook_statistics
from sitlib.metrics.generation import (
    PrecomputedFeatures,
    classifier_score,
    frechet_distance,
    generation_metrics,
    kernel_distance,
    lite0_features,
    lite0_score,
    precision_recall,
    split_distance,
)
from sitlib.metrics.inception import InceptionError, InceptionMetrics
from sitlib.metrics.intervals import bootstrap_interval, group_means, paired_interval
from sitlib.metrics.reconstruction import (
    evaluate_reconstructions,
    lpips_per_image,
    psnr_per_image,
    reconstruction_scores,
    reconstruction_values,
    ssim_per_image,
)
from sitlib.metrics.retrieval import r_precision

__all__ = [
    "InceptionError",
    "InceptionMetrics",
    "PrecomputedFeatures",
    "bits_per_pixel",
    "bootstrap_interval",
    "classifier_score",
    "codebook_statistics",
    "evaluate_reconstructions",
    "frechet_distance",
    "generation_metrics",
    "group_means",
    "kernel_distance",
    "lite0_features",
    "lite0_score",
    "lpips_per_image",
    "paired_interval",
    "precision_recall",
    "psnr_per_image",
    "r_precision",
    "reconstruction_scores",
    "reconstruction_values",
    "split_distance",
    "ssim_per_image",
]
