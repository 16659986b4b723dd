"""The standard FID and Inception score by torchmetrics, for machines with internet: they need a network that is downloaded."""

import warnings

import torch
from torch import Tensor

from sitlib.metrics.batches import batch_starts
from sitlib.metrics.checks import check_images
from sitlib.model.precision import best_device

BATCH_SIZE = 32


class InceptionError(ValueError):
    """The Inception network cannot be had; the message says what to do."""


class InceptionMetrics:
    """FID (arXiv 1706.08500) and Inception score (arXiv 1606.03498) on the Inception-v3 of torch-fidelity (95 MB).

    Raises `InceptionError` where the optional package is not installed, or the network cannot be downloaded.
    """

    def __init__(self):
        # Here, so that nothing else asks for the optional package.
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", UserWarning
                )  # torchmetrics: the features are kept in memory
                self.distance = FrechetInceptionDistance(feature=2048).to(best_device())
                self.scores = {
                    name: InceptionScore().to(best_device())
                    for name in ("inception_score", "inception_score_originals")
                }
        except ModuleNotFoundError:
            raise InceptionError(
                "FID and Inception score (evaluation.inception: true) need the package torch-fidelity: "
                'pip install -e ".[inception]", or set evaluation.inception to false.'
            ) from None
        except OSError as error:
            raise InceptionError(
                "FID and Inception score (evaluation.inception: true) need the weights of Inception-v3, which torch-fidelity could not "
                f"download ({error}): the machine needs internet, once; or set evaluation.inception to false."
            ) from None

    def reset(self) -> None:
        """Forgets all images."""
        for metric in (self.distance, *self.scores.values()):
            metric.reset()

    def add(self, images: Tensor, references: Tensor, *, progress: bool | str = False) -> None:
        """Takes more images to be judged, and more originals, both `[B, 3, H, W]` in [0, 1]."""
        self.add_images(images, progress=progress)
        self.add_references(references, progress=progress)

    def add_images(self, images: Tensor, *, progress: bool | str = False) -> None:
        """Takes more images to be judged, `[B, 3, H, W]` in [0, 1]."""
        self._add("images", images, "inception_score", progress)

    def add_references(self, references: Tensor, *, progress: bool | str = False) -> None:
        """Takes more originals, `[B, 3, H, W]` in [0, 1]."""
        self._add("references", references, "inception_score_originals", progress)

    def _add(self, name: str, batch: Tensor, score: str, progress: bool | str) -> None:
        check_images(name, batch)
        for i in batch_starts(len(batch), BATCH_SIZE, "Inception", progress):
            pixels = (255 * batch[i : i + BATCH_SIZE].clamp(0, 1)).round().byte()
            pixels = pixels.to(self.distance.device)
            self.distance.update(pixels, real=name == "references")
            self.scores[score].update(pixels)

    def compute(self, *, seed: int = 0) -> dict[str, float]:
        """`fid` of the images against the originals, their `inception_score` and `inception_score_originals`.

        A score is the mean over ten random splits, drawn with `seed`. FID with fewer images than 2048 is biased upwards.

        Raises ValueError for fewer than two images of either.
        """
        counts = (self.distance.fake_features_num_samples, self.distance.real_features_num_samples)
        if min(map(int, counts)) < 2:
            raise ValueError("InceptionMetrics needs at least two images, and two originals.")
        found = {"fid": self.distance.compute().item()}
        for name, score in self.scores.items():
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(
                    seed
                )  # not those of GPUs, which nothing here uses
                found[name] = score.compute()[0].item()
        return found
