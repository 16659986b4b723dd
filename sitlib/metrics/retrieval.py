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
        candidates: captions to choose from, the right one included.

    Returns:
        float64 [M]; 1 / n where n captions share the first place with the right one.

    Raises:
        ValueError: the shapes do not fit, a value is not finite, or too few captions have another
            name.
    """
    num_captions = len(names)
    if similarity.shape != (len(right), num_captions) or right.ndim != 1:
        raise ValueError(
            f"similarity must be [M, C] of M right captions and C names, not "
            f"{list(similarity.shape)} of {list(right.shape)} and {num_captions}."
        )
    if not len(right):
        raise ValueError("R-precision needs at least one image.")
    if not similarity.isfinite().all():
        raise ValueError("similarity contains NaN or infinite values.")
    if right.min() < 0 or right.max() >= num_captions:
        raise ValueError(f"right must hold positions among {num_captions} captions, from 0 on.")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, not {candidates}.")
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    subjects = np.array([number_of[name] for name in names])  # [C]
    scores = np.empty(len(right))
    rows = zip(similarity.detach().double().cpu().numpy(), right.tolist(), strict=True)
    for image, (row, caption) in enumerate(rows):
        others = np.flatnonzero(subjects != subjects[caption])
        if len(others) < candidates - 1:
            raise ValueError(
                f"{candidates} candidates need {candidates - 1} captions of other names than "
                f"{names[caption]!r}; there are {len(others)}."
            )
        drawn = np.random.default_rng([seed, image]).choice(others, candidates - 1, replace=False)
        ties = (row[drawn] == row[caption]).sum()
        scores[image] = 1 / (1 + ties) if row[caption] >= row[drawn].max() else 0
    return torch.from_numpy(scores)
