"""Names of models and runs as a reader should see them."""

import re
from typing import Any

WORDS = {"vit-vqgan": "ViT-VQGAN", "sit": "SIT", "ar": "AR"}
SIT = re.compile(r"sit(\d+)(?:_(sce|scd|sc))?(?=_|$)")
SEED = re.compile(r"-(?:seed)?(\d+)$")


def label(name: str) -> str:
    """Name for a reader: "sit4" -> "SIT-4", "sit5_sc" -> "SIT-SC-5", "ar_vit_vqgan-1" -> "AR-ViT-
    VQGAN, seed 1",
    "ar_captioned_sit4_sc" -> "AR-SIT-SC-4, captioned", "top_k" -> "top k"."""
    seed = SEED.search(name)
    suffix = f", seed {seed[1]}" if seed else ""
    name = SEED.sub("", name)
    if name.endswith("_second"):
        name, suffix = name.removesuffix("_second"), f", second decoder{suffix}"
    if name.endswith("_two"):
        name, suffix = name.removesuffix("_two"), f", two codebooks{suffix}"
    if "captioned_" in name:
        name, suffix = name.replace("captioned_", ""), f", captioned{suffix}"
    is_model = "sit" in name or "vit_vqgan" in name
    name = SIT.sub(lambda m: "-".join(filter(None, ("SIT", (m[2] or "").upper(), m[1]))), name)
    parts = [WORDS.get(part, part) for part in name.replace("vit_vqgan", "vit-vqgan").split("_")]
    return ("-" if is_model else " ").join(parts) + suffix


def of_each(value: Any) -> str:
    """A setting that models share as it is; one that differs, {model: value}, as "0.3 for A, 0.6
    for B".
    """
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return ", ".join(f"{of_each(item)} for {label(name)}" for name, item in value.items())
