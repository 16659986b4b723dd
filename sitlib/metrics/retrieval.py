"""R-precision (arXiv 1711.10485): is an image's own caption the most similar of several?"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor


def r_precision(
    similarity: Tensor, right: Tensor, names: Sequence[Hashable], *, candidates: int, seed: int = 0
) -> Tensor:
    """Score 1 for each image whose right caption is the most similar of its candidates, else 0.

    Candidates are the right caption and others, drawn without replacement from the captions of
    other names, because a caption of the same name is not wrong. Chance is 1 / candidates. The
    draws depend on the seed, the image's position, `right` and `names` only, so that all models are
    asked the same questions and `paired_interval` applies.

    Args:
        similarity: of images to captions, [M, C].
        right: position of each image's caption, int64 [M].
        names: subject of each caption, C names or numbers.
        candidates: captions to choose from, the right one included; at least 2.

    Returns:
        float64 [M]; 1 / n where n captions share the first place with the right one.

    Raises:
        ValueError: the shapes do not fit, a value is not finite, or too few captions have another
            name.
    """
    if similarity.shape != (len(right), len(names)) or candidates < 2:
        raise ValueError(
            f"similarity must be [{len(right)}, {len(names)}] (images, captions) with at least 2 "
            f"candidates, not {list(similarity.shape)} with {candidates}."
        )
    if not similarity.isfinite().all():
        raise ValueError("similarity contains NaN or infinite values.")
    subjects = np.unique(np.array(names), return_inverse=True)[1]  # [C]
    scores = []
    rows = zip(similarity.detach().double().cpu().numpy(), right.tolist(), strict=True)
    for image, (row, caption) in enumerate(rows):
        of_others = np.flatnonzero(subjects != subjects[caption])
        if len(of_others) < candidates - 1:
            raise ValueError(
                f"{candidates} candidates need {candidates - 1} captions of other names than "
                f"{names[caption]!r}; there are {len(of_others)}."
            )
        rng = np.random.default_rng([seed, image])
        drawn = row[rng.choice(of_others, candidates - 1, replace=False)]
        ties = (drawn == row[caption]).sum()
        scores.append(1 / (1 + ties) if row[caption] >= drawn.max() else 0.0)
    return torch.tensor(scores, dtype=torch.float64)
