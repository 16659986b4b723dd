"""How alike two sets of images are, on EfficientNet-Lite0 features: FD-Lite0, KID, precision and recall, and the Lite0 score.

None of them has a bootstrap interval. A resample of images holds only about 63 % of them, some several times: with repeated images the
covariances of a Frechet distance lose rank, the classifier's marginal loses classes and KID's unbiased estimate becomes biased, so that
the resampled values scatter around another value than the one reported. KID has its standard deviation over random subsets instead.
"""

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from sitlib.metrics.batches import batch_starts
from sitlib.metrics.checks import check_count, check_features, check_images
from sitlib.metrics.efficientnet import INPUT_SIZE, NUM_FEATURES, Lite0, load_lite0
from sitlib.model.precision import best_device

BLOCK = 2**23  # distances in memory at a time, 64 MB


def lite0_features(
    images: Tensor,
    lite0: Lite0 | None = None,
    *,
    folder="weights",
    batch_size: int | None = None,
    size: int = INPUT_SIZE,
    progress: bool | str = False,
) -> Tensor:
    """EfficientNet-Lite0 features `[B, 1280]`, on the CPU, of `images` `[B, 3, H, W]`, clamped to [0, 1].

    Args:
        lite0: the network, on the device where it is to run; default: loaded from `folder` onto the
            accelerator if there is one.
        batch_size: images at a time. Default: 8, which are fastest on a CPU, because their activations stay in its cache; on a single
            thread 16, because PyTorch takes a slow path for 1x1 convolutions of fewer.
        size: px to which images are resized first; distances are measured at the default only.
        progress: show a progress bar; a text stands before its title.

    `lite0.classifier` makes ImageNet logits of them.
    """
    check_images("images", images)
    if lite0 is None:
        lite0 = load_lite0(folder).to(best_device())
    device = lite0.classifier.weight.device
    fastest_on_cpu = 16 if torch.get_num_threads() == 1 else 8
    batch_size = batch_size or (256 if device.type == "cuda" else fastest_on_cpu)
    starts = batch_starts(len(images), batch_size, "Lite0 features", progress)
    return torch.cat(
        [
            lite0.features(images[i : i + batch_size].to(device).clamp(0, 1), size).cpu()
            for i in starts
        ]
    )


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features `[M, D]`, `[N, D]` (arXiv 1706.08500).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. With fewer samples than features the covariances
    are rank deficient; the distance stays defined, but is biased upwards: compare only distances of equal M
    and N.

    The eigenvalues of C1 C2 are taken from a symmetric matrix of at most min(M, D) rows instead of the
    general D x D one of `torchmetrics.image.fid`: the same value, two orders of magnitude faster for D = 1280
    and some hundred samples.
    """
    check_features(features, references)
    first, second = features.double(), references.double()
    mean_term = (first.mean(0) - second.mean(0)).square().sum()
    first = (first - first.mean(0)) / math.sqrt(len(first) - 1)
    second = (second - second.mean(0)) / math.sqrt(len(second) - 1)
    trace_term = first.square().sum() + second.square().sum()
    # C1 = A^T A and C2 = B^T B with centred sets A, B: C1 C2 shares its non-zero eigenvalues with (B A^T)^T
    # (B A^T).
    if len(first) > len(second):
        first, second = second, first
    if (
        len(first) > first.shape[1]
    ):  # more samples than features: the triangular factor R has R^T R = A^T A too
        first = torch.linalg.qr(first, mode="r").R
    cross = second @ first.T
    eigenvalues = torch.linalg.eigvalsh(cross.T @ cross).clamp_min(0)
    return (mean_term + trace_term - 2 * eigenvalues.sqrt().sum()).item()


class PrecomputedFeatures(nn.Module):
    """What torchmetrics calls a feature extractor, for features that were extracted already."""

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(
    features: Tensor,
    references: Tensor,
    *,
    subset_size: int = 100,
    num_subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """KID of features `[M, D]`, `[N, D]` by torchmetrics: mean and standard deviation over random subsets.

    The unbiased squared maximum mean discrepancy with kernel (x.y / D + 1)^3 (Binkowski et al., arXiv
    1801.01401), in float64: about 0 for equal distributions, possibly negative, and unlike a Frechet distance
    not biased by small sets. The global random state is restored.
    """
    check_features(features, references)
    smallest = min(len(features), len(references))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"kid_subset_size must be between 2 and the smaller number of images, {smallest}; "
            f"it is {subset_size}."
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # torchmetrics: the features are kept in memory
        metric = KernelInceptionDistance(
            feature=PrecomputedFeatures(), subsets=num_subsets, subset_size=subset_size
        )
    metric.update(references.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of GPUs, which nothing here uses
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_recall(
    features: Tensor, references: Tensor, *, neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall of features `[M, D]` against `[N, D]`, shares in [0, 1] (arXiv 1904.06991).

    A set covers what lies within a ball around any of its features, whose radius is the distance to the k-th
    nearest other feature of the set, boundary included. Precision is the share of `features` that `references`
    cover: how many samples look real. Recall is the share of `references` that `features` cover: how much of
    what is real the samples reach. Both depend on the numbers of images: compare only those of equal M and N.

    Args:
        neighbours: k; the paper's 3 by default.

    Distances are in float64, those of a block of rows at a time.
    Raises `ValueError` as `frechet_distance` does, and unless 1 <= k < min(M, N).
    """
    check_features(features, references)
    smallest = min(len(features), len(references))
    if not 1 <= neighbours < smallest:
        raise ValueError(
            f"neighbours must be at least 1 and below the smaller number of images, {smallest}; "
            f"it is {neighbours}."
        )
    features, references = features.double(), references.double()
    return _covered(features, references, neighbours), _covered(references, features, neighbours)


def _covered(points: Tensor, features: Tensor, neighbours: int) -> float:
    """Share of `points` `[M, D]` in a ball around any of `features` `[N, D]`, up to its k-th nearest neighbour."""
    # Each is its own nearest neighbour, at distance 0.
    own = _squared_distances(features, features)
    radii = torch.cat([block.kthvalue(neighbours + 1, dim=1).values for block in own])
    inside = [(block <= radii).any(dim=1) for block in _squared_distances(points, features)]
    return torch.cat(inside).double().mean().item()


def _squared_distances(points: Tensor, features: Tensor) -> Iterator[Tensor]:
    """Squared distances of `points` to all `features`, `[b, N]` for every block of b points."""
    lengths = features.square().sum(dim=1)
    for block in points.split(max(1, BLOCK // len(features))):
        sums = block.square().sum(dim=1, keepdim=True) + lengths
        squares = sums - 2 * block @ features.T
        # What rounding leaves between equal features must not decide whether a copy lies in a ball of radius 0.
        yield squares.masked_fill(squares < 1e-12 * sums, 0)


def classifier_score(logits: Tensor) -> float:
    """exp E KL(p(y|x) || p(y)) of class logits `[N, K]`: the Inception score (arXiv 1606.03498) of any classifier.

    Between 1 (all images look alike to the classifier) and K (it is sure of every image, and all classes are equally frequent). It grows
    with the number of images: compare only scores of equal N. All images form one split; in float64.

    Raises `ValueError` for fewer than two images, or logits that are not finite.
    """
    check_features(logits, logits)
    log_p = logits.double().log_softmax(dim=1)
    log_marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp().item()


def lite0_score(features: Tensor, lite0: Lite0) -> float:
    """`classifier_score` of EfficientNet-Lite0 from its features `[N, 1280]`, which it classifies without another pass."""
    return classifier_score(lite0.classifier(features.to(lite0.classifier.weight)))


def generation_metrics(
    samples: Tensor,
    references: Tensor,
    *,
    lite0: Lite0 | None = None,
    folder="weights",
    batch_size: int | None = None,
    kid_subset_size: int = 100,
    kid_subsets: int = 100,
    neighbours: int | None = None,
    seed: int = 0,
    progress: bool | str = False,
) -> dict:
    """Distances between generated and real images on EfficientNet-Lite0 features: FD-Lite0, KID, precision and recall.

    No number compares with an FID, which needs the features of its own Inception network, nor with an
    FD-Lite0 of other image counts.

    Args:
        samples: generated images `[B, 3, H, W]`, clamped to [0, 1]; or their `lite0_features` `[B, 1280]`.
        references: real images or their features, so that these are computed once for many sample sets.
        lite0, folder, batch_size, progress: as for `lite0_features`.
        kid_subset_size, kid_subsets: images in a random subset of KID, and how many subsets; at most the
            smaller number of images.
        neighbours: of precision and recall, as for `precision_recall`; default: without them.
        seed: of the subsets.

    Returns `fd_lite0`, `kid`, `kid_standard_deviation` (over subsets), with `neighbours` also `precision` and
    `recall`, and `protocol`.
    Raises `ValueError` for fewer than two images, values that are not finite or far outside [0, 1], too large
    subsets, or too many neighbours.
    """
    if lite0 is None and (samples.ndim == 4 or references.ndim == 4):
        lite0 = load_lite0(folder).to(best_device())

    def features_of(batch: Tensor) -> Tensor:
        return (
            batch
            if batch.ndim == 2
            else lite0_features(batch, lite0, batch_size=batch_size, progress=progress)
        )

    check_count("generation_metrics", samples)
    check_count("generation_metrics", references)
    sample_features, reference_features = features_of(samples), features_of(references)
    fd = frechet_distance(sample_features, reference_features)
    kid, deviation = kernel_distance(
        sample_features,
        reference_features,
        subset_size=kid_subset_size,
        num_subsets=kid_subsets,
        seed=seed,
    )
    shares, counted = {}, {}
    if neighbours is not None:
        precision, recall = precision_recall(
            sample_features, reference_features, neighbours=neighbours
        )
        shares, counted = {"precision": precision, "recall": recall}, {"neighbours": neighbours}
    rank_deficient = min(len(samples), len(references)) <= NUM_FEATURES
    return {
        "fd_lite0": fd,
        "kid": kid,
        "kid_standard_deviation": deviation,
        **shares,
        "protocol": {
            "features": f"EfficientNet-Lite0, {NUM_FEATURES} pooled features at 224 px; not an FID",
            "samples": len(samples),
            "reference_images": len(references),
            "covariance": "rank deficient (fewer images than features): biased upwards"
            if rank_deficient
            else "full rank",
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "kid_seed": seed,
            **counted,
        },
    }


def split_distance(features: Tensor, *, seed: int = 0) -> float:
    """FD-Lite0 between random halves of real features `[N, D]`: a perfect generator's value with N/2 images.

    The bias of the Frechet distance grows as sets shrink, so the floor for sets of M images needs 2 M real
    ones.
    """
    if len(features) < 4:
        raise ValueError(
            f"split_distance needs at least 4 images, two for each half; it was given {len(features)}."
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    half = len(features) // 2
    return frechet_distance(features[order[:half]], features[order[half : 2 * half]])
