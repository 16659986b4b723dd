"""Distances between sets of images, scores of samples; a new distance is one in GENERATION_METRICS.

None has a bootstrap interval: a resample repeats images, which lowers the rank of covariances,
takes classes from the classifier's marginal and biases KID, so resampled values scatter around
another value than the reported one. A jackknife repeats none.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.metrics.networks import INPUT_SIZE, NUM_FEATURES, cached_lite0
from sitlib.metrics.reconstruction import Metric, check_images, in_batches
from sitlib.metrics.weights import WeightsError
from sitlib.model.transformer import best_device
from sitlib.strict import require

BLOCK = 2**23  # distances in memory at a time, 64 MB
KID_SUBSETS = 100
JACKKNIFE_GROUPS = 64


def lite0_features(
    images: Tensor, *, batch_size: int | None = None, size: int = INPUT_SIZE, title: str = ""
) -> Tensor:
    """EfficientNet-Lite0 features [B, 1280], on the CPU, of images [B, 3, H, W] in [0, 1]."""
    check_images(images)
    lite0, device = cached_lite0(), best_device()
    # The activations of 8 stay in a CPU's cache; with one thread PyTorch has a slow path for 1x1
    # convolutions of fewer than 16.
    cpu_batch = 16 if torch.get_num_threads() == 1 else 8
    batch_size = batch_size or (256 if device.type == "cuda" else cpu_batch)
    title = f"{title}: Lite0 features" if title else ""

    def features(batch: Tensor) -> Tensor:
        return lite0(batch.to(device).clamp(0, 1), size)

    with torch.no_grad():
        return in_batches(features, images, size=batch_size, title=title)


def _checked(*sets: Tensor) -> list[Tensor]:
    """Features of two sets in float64; a NaN would be compared as if it were far away."""
    shapes = [list(features.shape) for features in sets]
    fit = all(len(s) == 2 and s[0] > 1 and s[1] == shapes[0][-1] for s in shapes)
    is_finite = all(features.isfinite().all() for features in sets)
    require(fit and is_finite, f"give features [M, D], [N, D] of numbers, M, N > 1, not {shapes}.")
    return [features.double() for features in sets]


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Squared Frechet distance (arXiv 1706.08500) of Gaussians fitted to features [M, D], [N, D].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. With fewer samples than features the
    covariances are rank deficient and the distance is biased upwards: compare only equal M and N.
    """
    x, y = _checked(features, references)
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    x = (x - x.mean(0)) / math.sqrt(len(x) - 1)  # C1 = x^T x
    y = (y - y.mean(0)) / math.sqrt(len(y) - 1)  # C2 = y^T y
    trace_term = x.square().sum() + y.square().sum()
    # C1 C2 shares its non-zero eigenvalues with (y x^T)^T (y x^T), which is symmetric and has
    # min(M, N, D) rows: for D = 1280 and some hundred samples two orders of magnitude faster than
    # those of a general D x D matrix.
    if len(x) > len(y):
        x, y = y, x
    if len(x) > x.shape[1]:  # the triangular factor R has R^T R = x^T x too
        x = torch.linalg.qr(x, mode="r").R
    cross = y @ x.T
    eigenvalues = torch.linalg.eigvalsh(cross.T @ cross).clamp_min(0)
    return (mean_term + trace_term - 2 * eigenvalues.sqrt().sum()).item()


def kernel_distance(
    features: Tensor, references: Tensor, *, subset_size: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID of features [M, D] and [N, D] (arXiv 1801.01401): mean and deviation over random subsets.

    Unbiased squared maximum mean discrepancy with kernel (x.y / D + 1)^3, in float64: about 0 for
    equal distributions, possibly negative, and not biased by small sets.
    """
    smallest = min(len(features), len(references))
    fits = 2 <= subset_size <= smallest
    require(fits, f"subset_size of KID must lie between 2 and {smallest}, the images of a set.")
    features, references = _checked(features, references)
    generator = torch.Generator().manual_seed(seed)

    def subset(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:subset_size]]

    pairs = ((subset(references), subset(features)) for _ in range(KID_SUBSETS))
    kid = [squared_mmd(x, y) for y, x in pairs]
    return float(np.mean(kid)), float(np.std(kid))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """KID of all images: that of features [M, D] and [N, D] without the noise of random subsets."""
    x, y = _checked(x, y)

    def total(a: Tensor, b: Tensor) -> float:  # of the kernel, over all pairs
        parts = a.split(max(1, BLOCK // len(b)))
        return sum(float(((part @ b.T / b.shape[1] + 1) ** 3).sum()) for part in parts)

    def within(a: Tensor) -> float:  # the mean over pairs of different images
        own = float(((a.square().mean(dim=1) + 1) ** 3).sum())
        return (total(a, a) - own) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def jackknife_error(statistic: Callable[[Tensor], float], x: Tensor, groups: Sequence) -> float:
    """Standard error of a statistic of x [N, ...], of which one of G groups [N] is left out a time.

    sqrt((G - 1) / G sum (t_g - mean t)^2) (Efron and Tibshirani 1993, chapter 11). Groups are
    photographs: of more than JACKKNIFE_GROUPS, several are left out together.
    """
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1] % JACKKNIFE_GROUPS
    masks = [torch.from_numpy(numbers != number) for number in np.unique(numbers)]
    values = [statistic(x[mask]) for mask in masks]
    return math.sqrt((len(values) - 1) * np.var(values))


def precision(features: Tensor, references: Tensor, *, neighbors: int = 3) -> float:
    """Share of samples [M, D] that look real (improved precision, arXiv 1904.06991).

    They lie in the ball around a reference [N, D] whose radius is the distance to its k-th nearest
    neighbor, boundary included. In float64. Compare only equal M and N.
    """
    smallest = min(len(features), len(references))
    fits = 1 <= neighbors < smallest
    require(fits, f"neighbors must be at least 1 and below {smallest}, the images of a set.")
    features, references = _checked(features, references)
    # Each reference is its own nearest neighbor, at distance 0.
    blocks = _squared_distances(references, references)
    radii = torch.cat([block.kthvalue(neighbors + 1, dim=1).values for block in blocks])
    inside = [(b <= radii).any(dim=1) for b in _squared_distances(features, references)]
    return torch.cat(inside).double().mean().item()


def recall(features: Tensor, references: Tensor, *, neighbors: int = 3) -> float:
    """Share of references [N, D] that the samples [M, D] reach: `precision`, the sets exchanged."""
    return precision(references, features, neighbors=neighbors)


def _squared_distances(points: Tensor, features: Tensor) -> Iterator[Tensor]:
    """Squared distances [b, N] to all features, of one block of points after the other."""
    lengths = features.square().sum(dim=1)
    for block in points.split(max(1, BLOCK // len(features))):
        sums = block.square().sum(dim=1, keepdim=True) + lengths
        squares = sums - 2 * block @ features.T
        # Rounding must not decide whether a copy lies in a ball of radius 0.
        yield squares.masked_fill(squares < 1e-12 * sums, 0)


def classifier_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) of class logits [N, K]: Inception score (arXiv 1606.03498).

    From 1 (all images look alike) to K (sure of every image, classes equally frequent). Grows with
    N: compare only equal N. One split, in float64.
    """
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item()


def lite0_score(features: Tensor) -> float:
    """`classifier_score` of `lite0_features` [N, 1280] under the ImageNet classes of Lite0."""
    return classifier_score(cached_lite0().logits(features))


def _kid(x: Tensor, y: Tensor, options: dict) -> tuple[float, float]:
    subset_size, seed = options["kid_subset_size"], options["kid_seed"]
    return kernel_distance(x, y, subset_size=subset_size, seed=seed)


def _precision(x: Tensor, y: Tensor, options: dict) -> float:
    return precision(x, y, neighbors=options["neighbors"])


# Functions of samples [M, D], references [N, D] and the options in the protocol of
# `generation_metrics`; they return a number, or (number, standard deviation).
GENERATION_METRICS = {
    "fd_lite0": Metric(lambda x, y, _: frechet_distance(x, y), "FD-Lite0", 1, False),
    "kid": Metric(_kid, "KID x 1000", 2, False, factor=1000),
    "precision": Metric(_precision, "precision", 3, True, needs="neighbors"),
    "recall": Metric(lambda x, y, o: _precision(y, x, o), "recall", 3, True, needs="neighbors"),
}


def generation_metrics(
    features: Tensor,
    references: Tensor,
    *,
    kid_subset_size: int = 100,
    neighbors: int | None = None,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> dict:
    """Distances between generated and real images, given as `lite0_features` [M, D] and [N, D].

    No number compares with an FID, which needs its own Inception network, nor with one of other
    numbers of images. Precision and recall are left out where `neighbors` is None; with `groups`,
    the references' photographs, `jackknife` has standard errors over them, the samples as they are.
    """
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": kid_subset_size, "kid_seed": seed}
    options |= {} if neighbors is None else {"neighbors": neighbors}
    scores = {}
    for name, metric in GENERATION_METRICS.items():
        if not metric.needs or metric.needs in options:
            value = metric.function(features, references, options)
            if isinstance(value, tuple):
                value, scores[f"{name}_standard_deviation"] = value
            scores[name] = value
    if groups is not None:
        scores["jackknife"] = {
            "fd_lite0": jackknife_error(partial(frechet_distance, features), references, groups),
            "kid": jackknife_error(partial(squared_mmd, features), references, groups),
        }
    is_full = min(len(features), len(references)) > NUM_FEATURES
    deficient = "rank deficient (fewer images than features): biased upwards"
    network = f"EfficientNet-Lite0, {NUM_FEATURES} pooled features at {INPUT_SIZE} px; not an FID"
    protocol = {"features": network, "samples": len(features), "reference_images": len(references)}
    protocol["covariance"] = "full rank" if is_full else deficient
    return {**scores, "protocol": protocol | options}


def r_precision(
    similarity: Tensor, right: Tensor, names: Sequence[Hashable], *, candidates: int, seed: int = 0
) -> Tensor:
    """Score [M], 1 if an image's right caption is the most similar of its candidates, else 0.

    R-precision of AttnGAN (arXiv 1711.10485), from the similarity [M, C] of images to captions. The
    `right` caption [M] int64 stands among others, drawn from those of other `names` [C], because a
    caption of the same name is not wrong. The draws depend on the seed, the image's position,
    `right` and `names` only: all models are asked the same questions. It is 1 / n where n captions
    share the first place.
    """
    subjects = np.unique(np.array(names), return_inverse=True)[1]  # [C]
    scores = []
    rows = zip(similarity.detach().double().cpu().numpy(), right.tolist(), strict=True)
    for image, (row, caption) in enumerate(rows):
        of_others = np.flatnonzero(subjects != subjects[caption])
        needs = f"{candidates} candidates need as many captions of other names than"
        require(len(of_others) >= candidates - 1, f"{needs} {names[caption]!r}, but for one.")
        rng = np.random.default_rng([seed, image])
        drawn = row[rng.choice(of_others, candidates - 1, replace=False)]
        ties = (drawn == row[caption]).sum()
        scores.append(1 / (1 + ties) if row[caption] >= drawn.max() else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


class InceptionMetrics:
    """FID (arXiv 1706.08500) and Inception score by torchmetrics; the network is downloaded."""

    def __init__(self):
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # features are kept in memory
                self.fid = FrechetInceptionDistance(feature=2048).to(best_device())
                # Scores of the judged images, False, and of originals, True.
                self.scores = {real: InceptionScore().to(best_device()) for real in (False, True)}
            for metric in (self.fid, *self.scores.values()):
                vars(metric.inception)["use_antialias"] = False  # published FIDs are without
        except (ModuleNotFoundError, OSError) as error:
            raise WeightsError(
                'FID and Inception score need torch-fidelity (pip install -e ".[inception]") and, '
                f"once, internet for its network ({error}); or set evaluation.inception to false."
            ) from None

    def add(self, images: Tensor, *, real: bool, title: str = "") -> None:
        """Take more images [B, 3, H, W] in [0, 1]: originals if `real`, else those to be judged."""
        check_images(images)
        for batch in tqdm(images.split(32), f"{title}: Inception", ncols=110, disable=not title):
            pixels = (255 * batch.clamp(0, 1)).round().byte().to(self.fid.device)
            self.fid.update(pixels, real=real)
            self.scores[real].update(pixels)

    def compute(self, *, seed: int = 0) -> dict[str, float | str]:
        """FID (biased upwards below 2048 images), scores of ten splits; images are forgotten."""
        values = {"fid": self.fid.compute().item()}
        for real, score in self.scores.items():
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torchmetrics shuffles with it
                name = "inception_score_originals" if real else "inception_score"
                values[name] = score.compute()[0].item()
            score.reset()
        self.fid.reset()
        return values | {"inception_input": "any size, resized to 299 px as TensorFlow 1 does"}
