"""Are samples copies of training images? Distances to the nearest of them, beside held-out ones."""

from typing import Any

import torch
from torch import Tensor

from sitlib.evaluate import features_of_codes
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.codes import Codes

# Training views, px of Lite0 (a quarter of the usual time), pairs to look at.
SEEN, SEEN_PX, SUSPECTS = 3072, 112, 8


def memorisation(sampled: Tensor, tokenizer: SpectralTokenizer, codes: Codes) -> dict[str, Any]:
    """Distances of samples to the nearest of SEEN reconstructed training views.

    Beside that of held-out views: of a model that copies no more than chance, 5 % of the samples
    are nearer than the nearest 5 % of these. `pairs`: [sample, training view] of the nearest ones.
    """
    views = {"samples": sampled, "held-out": codes.held_out, "training": codes.train[:SEEN]}
    sampled_F, held_out_F, seen_F = (
        features_of_codes(tokenizer, x, f"{name} views", size=SEEN_PX).double()
        for name, x in views.items()
    )
    distances, rows = torch.cdist(sampled_F, seen_F).min(dim=1)
    unseen = torch.cdist(held_out_F, seen_F).min(dim=1).values
    suspects = distances.argsort()[:SUSPECTS]
    return {
        "nearest": float(distances.quantile(0.5)),
        "nearest_held_out": float(unseen.quantile(0.5)),
        "share_below_5th": float((distances < unseen.quantile(0.05)).double().mean()),
        "pairs": torch.stack([suspects, rows[suspects]], dim=1).tolist(),
        "protocol": f"medians of L2 of Lite0 features at {SEEN_PX} px, {len(seen_F)} training views",
    }
