"""Metrics of reconstructions, codebooks, image sets and retrieval, with confidence intervals.

Images are RGB [B, 3, H, W] in [0, 1], codes int64 [B, S, N]. Results are plain dictionaries for
JSON; `protocol` says what was measured on what.
"""

from sitlib.metrics.codebook import code_counts, codebook_statistics, coded_bits
from sitlib.metrics.generation import (
    GENERATION_METRICS,
    InceptionMetrics,
    classifier_score,
    frechet_distance,
    generation_metrics,
    kernel_distance,
    lite0_features,
    lite0_score,
    precision,
    r_precision,
    recall,
)
from sitlib.metrics.networks import load_lpips
from sitlib.metrics.reconstruction import (
    METRICS,
    Metric,
    border_differences,
    evaluate_reconstructions,
    fast_metrics,
    in_batches,
    lpips_per_image,
    psnr_per_image,
    reconstruction_values,
    ssim_per_image,
    summarize_reconstructions,
)
from sitlib.metrics.statistics import bootstrap_interval, group_means, paired_interval
from sitlib.metrics.weights import fetch_weights
