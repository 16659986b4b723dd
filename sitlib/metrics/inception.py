"""The standard FID and Inception score by torchmetrics, for machines with internet: they need a network that is downloaded."""

import warnings

import torch
from torch import Tensor

from sitlib.metrics.batches import batch_starts, default_device
from sitlib.metrics.checks import check_count, check_images

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
                warnings.simplefilter("ignore", UserWarning)  # torchmetrics: the features are kept in memory
                self.distance = FrechetInceptionDistance(feature=2048).to(default_device())
                self.score = InceptionScore().to(default_device())
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

    def __call__(
        self, images: Tensor, references: Tensor, *, seed: int = 0, progress: bool | str = False
    ) -> dict[str, float]:
        """`fid` of `images` against `references`, both `[B, 3, H, W]` in [0, 1], and the `inception_score` of each.

        The score is the mean over ten random splits, drawn with `seed`. FID with fewer images than 2048 is biased upwards.
        """
        for name, batch in (("images", images), ("references", references)):
            check_images(name, batch)
            check_count("InceptionMetrics", batch)
        self.distance.reset()
        scores = []
        for real, batch in ((False, images), (True, references)):
            self.score.reset()
            for i in batch_starts(len(batch), BATCH_SIZE, "Inception", progress):
                pixels = (255 * batch[i : i + BATCH_SIZE].clamp(0, 1)).round().byte()
                pixels = pixels.to(self.distance.device)
                self.distance.update(pixels, real=real)
                self.score.update(pixels)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                scores.append(self.score.compute()[0].item())
        return {
            "fid": self.distance.compute().item(),
            "inception_score": scores[0],
            "inception_score_originals": scores[1],
        }
