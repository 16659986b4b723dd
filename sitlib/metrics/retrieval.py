"""How often the right caption of an image is the most similar one among several: R-precision of text-conditional samples."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor


def r_precision(
    similarity: Tensor, right: Tensor, names: Sequence[Hashable], *, candidates: int, seed: int = 0
) -> Tensor:
    """Whether the right caption of each image is the most similar of its candidates, float64 `[M]` in [0, 1] (arXiv 1711.10485).

    The candidates of an image are its right caption and others drawn without replacement from the captions of
    other names: a caption of the same name is not wrong. Chance is 1 / candidates. The draws follow from the
    seed, the position of the image, `right` and `names` alone, so that every model is asked the same questions
    and `paired_interval` applies. Report the mean, with `bootstrap_interval` over the names.

    Args:
        similarity: of images to captions, `[M, C]`, larger for more similar.
        right: position of the right caption of each image, int64 `[M]`.
        names: what each caption is about, C names or numbers.
        candidates: captions to choose from, the right one included.
        seed: of the draws.

    Returns 1 where the right caption is the most similar, 0 where it is not, and 1 / n where n captions share
    the first place with it.
    Raises `ValueError` for shapes that do not fit, values that are not finite, or too few captions of other
    names.
    """
    _check(similarity, right, names, candidates)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    name_ids = np.array([numbers[name] for name in names])
    rows, captions = similarity.detach().double().cpu().numpy(), right.cpu().numpy()
    shares = np.empty(len(rows))
    for image, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        others = np.flatnonzero(name_ids != name_ids[caption])
        if len(others) < candidates - 1:
            raise ValueError(
                f"{candidates} candidates need {candidates - 1} captions of other names than {names[caption]!r}; "
                f"there are {len(others)}."
            )
        drawn = np.random.default_rng([seed, image]).choice(others, candidates - 1, replace=False)
        best, tied = row[drawn].max(), (row[drawn] == row[caption]).sum()
        shares[image] = 1 / (1 + tied) if row[caption] >= best else 0
    return torch.from_numpy(shares)


def _check(similarity: Tensor, right: Tensor, names: Sequence[Hashable], candidates: int) -> None:
    if (
        similarity.ndim != 2
        or right.shape != similarity.shape[:1]
        or len(names) != similarity.shape[1]
    ):
        raise ValueError(
            f"similarity must be [M, C] with M right captions and C names, not {list(similarity.shape)} "
            f"with {list(right.shape)} and {len(names)}."
        )
    if not len(right):
        raise ValueError("R-precision needs at least one image.")
    if not similarity.isfinite().all():
        raise ValueError(
            "similarity contains NaN or infinite values; look at the features that it comes from."
        )
    if right.min() < 0 or right.max() >= len(names):
        raise ValueError(f"right must hold positions among {len(names)} captions, from 0 on.")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, it is {candidates}.")
