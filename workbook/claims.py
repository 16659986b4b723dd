"""The paper's claims as contrasts between rows of ablations, and what came out.

Each claim names rows of ablations/params.yaml. A claim about reconstruction holds where PSNR or LPIPS moves the claimed way with 95 %
confidence and neither moves against it; it does not hold where one moves against it and none for it; otherwise it cannot be told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from workbook.effects import Estimate, contrast, factorial_effects, finished_seeds, mean

Rows = Mapping[str, Mapping[str, Any]]
UNTOLD = "cannot be told"
METRICS = ("psnr", "lpips_alex")
FACTORS = ("wavelets", "typed parameters", "scale-causal attention")


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper or its summary, and the contrast that tests it.

    Attributes:
        source: where it is said.
        claim: what is said.
        test: what is compared, in words.
        weights: the contrast; positive where the claim says "better".
        expected: 1: better reconstruction; -1: worse.
    """

    source: str
    claim: str
    test: str
    weights: Mapping[str, float]
    expected: int = 1


def _minus(row: str, baseline: str) -> dict[str, float]:
    return {row: 1.0, baseline: -1.0}


CLAIMS = (
    Claim(
        "First experiment 1",
        "Wavelet tokens alone (no ADTransformer, no scale-causal attention) reconstruct better than ViT-VQGAN",
        "wavelet, shared, full - ViT-VQGAN",
        _minus("wavelet_shared_full", "vit_vqgan"),
    ),
    Claim(
        "First experiment 2; mechanism 1",
        "Parameters of their own for approximation and details (ADTransformer) improve it",
        "typed - shared, wavelet, full attention",
        _minus("wavelet_typed_full", "wavelet_shared_full"),
    ),
    Claim(
        "Mechanism 1, by count",
        "It is the specialisation, not the number of parameters",
        "typed - shared with a wider MLP of as many parameters",
        _minus("wavelet_typed_full", "wavelet_wide_full"),
    ),
    Claim(
        "Mechanism 1, break condition",
        "Without frequency structure, parameters of their own help less",
        "(typed - shared with wavelets) - (typed - shared with raster blocks)",
        {
            "wavelet_typed_full": 1.0,
            "wavelet_shared_full": -1.0,
            "raster_typed_full": -1.0,
            "raster_shared_full": 1.0,
        },
    ),
    Claim(
        "Mechanism 1, codebooks",
        "A codebook each for approximation and details is better than a shared one",
        "two codebooks - one",
        _minus("wavelet_typed_full", "one_codebook"),
    ),
    Claim(
        "First experiment 3; trade-offs",
        "Scale-causal attention in the decoder costs some reconstruction",
        "decoder scale-causal - full, wavelet, typed",
        _minus("wavelet_typed_decoder_causal", "wavelet_typed_full"),
        -1,
    ),
    Claim(
        "Trade-offs",
        "Scale-causal attention in encoder and decoder costs some reconstruction",
        "scale-causal - full, wavelet, typed",
        _minus("wavelet_typed_causal", "wavelet_typed_full"),
        -1,
    ),
    Claim(
        "Next check 1",
        "Scale-causal attention costs reconstruction without a DWT, too",
        "block-causal - full, raster blocks, shared",
        _minus("raster_shared_causal", "raster_shared_full"),
        -1,
    ),
    Claim(
        "Mechanism 3",
        "At as many tokens and codes, tokens of scales are better than raster blocks, everything else equal",
        "wavelet - raster, mean over typed x attention",
        {
            f"{way}_{typed}_{attention}": sign / 4
            for way, sign in (("wavelet", 1.0), ("raster", -1.0))
            for typed in ("shared", "typed")
            for attention in ("full", "causal")
        },
    ),
    Claim(
        "Mechanism 3, wavelets or scales",
        "It takes wavelets: scales of an average-pooling pyramid are not enough",
        "wavelet - pyramid, mean over typed x attention",
        {
            f"{way}_{typed}_{attention}": sign / 4
            for way, sign in (("wavelet", 1.0), ("pyramid", -1.0))
            for typed in ("shared", "typed")
            for attention in ("full", "causal")
        },
    ),
    Claim(
        "Ablation",
        "Haar is better than LeGall 5/3",
        "Haar - LeGall 5/3",
        _minus("wavelet_typed_full", "legall53"),
    ),
    Claim(
        "Ablation",
        "LeGall 5/3 is better than CDF 9/7",
        "LeGall 5/3 - CDF 9/7",
        _minus("legall53", "cdf97"),
    ),
    Claim(
        "Open question 2",
        "Long wavelets lose because they leak between patches: without leakage they gain",
        "CDF 9/7 patch by patch - CDF 9/7",
        _minus("cdf97_patch_local", "cdf97"),
    ),
    Claim(
        "Open question 2",
        "Bringing neighbors together around the transformer makes up for leakage: it helps CDF 9/7 more than Haar",
        "(CDF 9/7 with neighbor mixing - without) - (the same for Haar)",
        {
            "cdf97_neighbours": 1.0,
            "cdf97": -1.0,
            "haar_neighbours": -1.0,
            "wavelet_typed_full": 1.0,
        },
    ),
    Claim(
        "Ablation",
        "A larger vocabulary reconstructs better",
        "1,024 codes - 256",
        _minus("codes_1024", "codes_256"),
    ),
    Claim(
        "Ablation; trade-offs",
        "A longer sequence reconstructs better",
        "64 tokens a scale - 16",
        _minus("tokens_64", "wavelet_typed_full"),
    ),
    Claim(
        "Trade-offs",
        "More scales reconstruct better (as SIT-5 does against SIT-4)",
        "5 scales - 4",
        _minus("scales_5", "wavelet_typed_full"),
    ),
    Claim(
        "Failure signature: instability",
        "Spectral normalization of the discriminator helps, SIT",
        "with - without, adversarial SIT at 64 px",
        _minus("sit_adversarial", "sit_adversarial_no_spectral_norm"),
    ),
    Claim(
        "Failure signature: instability",
        "Spectral normalization of the discriminator helps, ViT-VQGAN",
        "with - without, adversarial ViT-VQGAN at 64 px",
        _minus("vit_adversarial", "vit_adversarial_no_spectral_norm"),
    ),
    Claim(
        "Key result, larger images",
        "At twice the side SIT, with a third of the tokens, reconstructs better than ViT-VQGAN",
        "SIT-5 (80 tokens) - ViT-VQGAN (256 tokens), adversarial, 128 px",
        _minus("sit_128_adversarial", "vit_128_adversarial"),
    ),
)


@dataclass(frozen=True)
class Finding:
    """A claim with its numbers: None where a row is missing."""

    claim: Claim
    psnr: Estimate | None
    lpips: Estimate | None

    @property
    def verdict(self) -> str:
        if self.psnr is None or self.lpips is None:
            return "not run"
        moves = {self.psnr.sign, -self.lpips.sign} - {0}
        if moves == {self.claim.expected}:
            return "holds"
        return "does not hold" if moves == {-self.claim.expected} else UNTOLD


def findings(rows: Rows) -> list[Finding]:
    """Every claim, tested with the rows that there are."""
    found = []
    for claim in CLAIMS:
        there = all(name in rows for name in claim.weights)
        psnr, lpips = (
            contrast(rows, claim.weights, metric) if there else None for metric in METRICS
        )
        found.append(Finding(claim, psnr, lpips))
    return found


def finding_rows(found: list[Finding]) -> list[dict[str, Any]]:
    """Rows of a table for a reader."""
    return [
        {
            "source": item.claim.source,
            "claim": item.claim.claim,
            "our test": item.claim.test,
            "PSNR, dB": item.psnr.text(2) if item.psnr else None,
            "LPIPS-Alex": item.lpips.text(3) if item.lpips else None,
            "verdict": item.verdict,
        }
        for item in found
    ]


def generation_rows(rows: Rows) -> list[dict[str, Any]]:
    """Reconstruction and generation of every row that has both, one table for their trade-off."""
    return [
        {
            "row": name,
            "tokens": row["generation"]["tokens"],
            "codes": row["tokenizer"].get("num_codes", 512),
            "PSNR, dB": mean(row, "psnr"),
            "LPIPS-Alex": mean(row, "lpips_alex"),
            "codes used, %": mean(row, "usage"),
            "nats per image": row["generation"]["nats_per_image"],
            "FD-Lite0": row["generation"]["fd_lite0"],
            "KID x 1000": 1000 * row["generation"]["kid"],
        }
        for name, row in rows.items()
        if "generation" in row
    ]


def stability_rows(rows: Rows) -> list[dict[str, Any]]:
    """Gradient norms of the rows with an adversarial term, and of the same without."""
    found = []
    for name, row in rows.items():
        seeds = finished_seeds(row)
        norms = [scores["gradient_norm"] for scores in seeds]
        found.append(
            {
                "row": name,
                "seeds": len(row["seeds"]),
                "failed": len(row["seeds"]) - len(seeds),
                "median norm": float(np.mean([norm["median"] for norm in norms])),
                "largest, medians": float(np.max([norm["largest"] for norm in norms])),
                "spikes a seed": float(np.mean([norm["spikes"] for norm in norms])),
                "PSNR, dB": mean(row, "psnr"),
                "LPIPS-Alex": mean(row, "lpips_alex"),
            }
        )
    return found


def score_rows(rows: Rows, names: Iterable[str]) -> list[dict[str, Any]]:
    """Cost and reconstruction of the named rows that there are."""
    return [
        {
            "row": name,
            "parameters, M": rows[name]["parameters"] / 1e6,
            "operations an image, M": rows[name]["flops_per_image"] / 1e6,
            "PSNR, dB": mean(rows[name], "psnr"),
            "LPIPS-Alex": mean(rows[name], "lpips_alex"),
            "codes used, %": mean(rows[name], "usage"),
            "seeds": len(finished_seeds(rows[name])),
        }
        for name in names
        if name in rows
    ]


def differences(
    rows: Rows, names: Mapping[str, str], baseline: str
) -> dict[str, dict[str, Estimate]]:
    """Each row minus a baseline: what it is to be called -> metric -> estimate, for the rows that there are."""
    return {
        title: {metric: contrast(rows, _minus(name, baseline), metric) for metric in METRICS}
        for title, name in names.items()
        if name in rows and baseline in rows
    }


def mechanism_effects(rows: Rows) -> dict[str, dict[str, Estimate]]:
    """Effects and interactions of wavelets, typed parameters and scale-causal attention, once against raster blocks and once against the
    pyramid: what it is called -> metric -> estimate. A factorial with a missing cell is left out."""
    found: dict[str, dict[str, Estimate]] = {}
    for other, title in (("raster", "blocks"), ("pyramid", "pyramid")):
        cells = {
            levels: f"{(other, 'wavelet')[levels[0]]}_{('shared', 'typed')[levels[1]]}_{('full', 'causal')[levels[2]]}"
            for levels in product((0, 1), repeat=len(FACTORS))
        }
        if all(name in rows for name in cells.values()):
            by_metric = {
                metric: factorial_effects(rows, cells, list(FACTORS), metric) for metric in METRICS
            }
            found |= {
                f"against {title}: {name}": {metric: by_metric[metric][name] for metric in METRICS}
                for name in by_metric["psnr"]
            }
    return found
