"""Names of models and runs as a reader should see them."""

import re
from typing import Any

WORDS = {"vit-vqgan": "ViT-VQGAN", "sit": "SIT", "ar": "AR"}
NOTES = {"captioned_": "captioned", "_ours(?=_|$)": "ours", "_second(?=_|$)": "second decoder"}
SIT = re.compile(r"sit(\d+)(?:_(sce|scd|sc))?(?=_|$)")
SEED = re.compile(r"-(?:seed)?(\d+)$")


def label(name: str) -> str:
    """Name for a reader: "sit5_sc" -> "SIT-SC-5", "ar_vit_vqgan-1" -> "AR-ViT-VQGAN, seed 1",
    "ar_captioned_sit4_sc" -> "AR-SIT-SC-4, captioned", "top_k" -> "top k".
    """
    seed, name, notes = SEED.search(name), SEED.sub("", name), ""
    for mark, note in NOTES.items():
        name, found = re.subn(mark, "", name)
        notes += f", {note}" if found else ""
    notes += f", seed {seed[1]}" if seed else ""
    is_model = "sit" in name or "vit_vqgan" in name
    name = SIT.sub(lambda m: "-".join(filter(None, ("SIT", (m[2] or "").upper(), m[1]))), name)
    parts = [WORDS.get(part, part) for part in name.replace("vit_vqgan", "vit-vqgan").split("_")]
    return ("-" if is_model else " ").join(parts) + notes


def of_each(value: Any) -> str:
    """A setting as text; one that differs, {model: value}, as "0.3 for A, 0.6 for B"."""
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, (int, float)) else str(value)
    return ", ".join(f"{of_each(item)} for {label(name)}" for name, item in value.items())
