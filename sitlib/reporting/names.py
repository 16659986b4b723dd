"""Names of models and runs as a reader should see them."""

import re

WORDS = {"vit-vqgan": "ViT-VQGAN", "sit": "SIT", "ar": "AR", "sce": "SCE", "scd": "SCD", "sc": "SC"}
SEED = re.compile(r"-(?:seed)?(\d+)$")


def label(name: str) -> str:
    """Name for a reader: "sit4" -> "SIT-4", "ar_vit_vqgan-1" -> "AR-ViT-VQGAN, seed 1", "top_k": "top k"."""
    seed = SEED.search(name)
    suffix = f", seed {seed[1]}" if seed else ""
    name = SEED.sub("", name)
    if name.endswith("_second"):
        name, suffix = name.removesuffix("_second"), f", second decoder{suffix}"
    parts = []
    for part in name.replace("vit_vqgan", "vit-vqgan").split("_"):
        sit = re.fullmatch(r"sit(\d+)", part)
        parts.append(f"SIT-{sit[1]}" if sit else WORDS.get(part, part))
    is_model = "sit" in name or "vit_vqgan" in name
    return ("-" if is_model else " ").join(parts) + suffix
