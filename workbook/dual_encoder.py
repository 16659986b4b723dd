"""The dual encoder that judges text-conditional samples.

It learns from the training images and captions of the text-conditional models, and never sees a
held-out one. It also learns from degraded copies of them and from what the tokenizers leave of
them: a judge that knows sharp images only takes their reconstructions for something else.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitlib.data import CaptionedImages, ImageSource, degrade, training_views
from sitlib.files import Row
from sitlib.metrics import in_batches, lite0_features
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.metrics.weights import fetch_weights
from sitlib.model.dual_encoder import DualEncoder
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.dual_encoder import train_dual_encoder
from workbook.codes import captioned
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import DualEncoderRun, Trained, train_or_load

VIEWS = 1024  # in memory at a time


def trained_dual_encoder(profile: Profile, pipeline: bool = False) -> Trained[DualEncoder]:
    """The dual encoder of a profile, trained now or earlier; `pipeline` as for `train_or_load`."""
    run = DualEncoderRun.of(profile)

    def train_now(folder: Path) -> tuple[DualEncoder, list[Row]]:
        fetch_weights()
        seed = profile.text.tokenizer_seed
        device, names = best_device(), run.model.reconstructions
        tokenizers = [trained_tokenizer(profile, name, seed).model.to(device) for name in names]
        data, lite0 = captioned(profile, "train"), load_lite0().to(device)
        return train_on_views(run, data, tokenizers, lite0, folder)

    return train_or_load(run, "dual_encoder", "text", DualEncoder, train_now, pipeline)


def train_on_views(
    run: DualEncoderRun,
    data: CaptionedImages,
    tokenizers: list[SpectralTokenizer],
    lite0: Lite0,
    folder: Path,
) -> tuple[DualEncoder, list[Row]]:
    """Train a run on captioned images and on reconstructions of them, resumable from `folder`."""
    features, positions = view_features(run, data.images, tokenizers, lite0)
    texts, title = (data.captions, data.names), f"dual encoder, seed {run.seed}"
    return train_dual_encoder(
        run.model, features, positions, *texts, seed=run.seed, folder=folder, title=title
    )


def judge_features(images: Tensor, lite0: Lite0, run: DualEncoderRun, progress: str) -> Tensor:
    """Lite0 features [M, 1280] of images [M, 3, H, W] in [0, 1], at the judge's own input size."""
    return lite0_features(images, lite0, size=run.model.image_size, batch_size=32, title=progress)


def view_features(
    run: DualEncoderRun, images: ImageSource, tokenizers: list[SpectralTokenizer], lite0: Lite0
) -> tuple[Tensor, NDArray]:
    """Features [V, 1280] of wide views of all images, clean, degraded and reconstructed, and the
    position [V] of each one's image.

    Views of `VIEWS` images at a time are in memory.
    """
    place = {key: position for position, key in enumerate(images.keys)}
    batch, seed = min(VIEWS, len(images)), run.seed
    parts, positions = [], []
    for start in range(0, len(images), batch):
        views, _, keys = training_views(
            images, start // batch, batch, run.data.size, seed, kind="wide", flip=False
        )
        views = views[: len(images) - start]  # the last ones may be of a second epoch
        worse = [
            degrade(views, seed + copy * len(images) + start)
            for copy in range(run.model.degraded_views)
        ]
        again = [in_batches(model.reconstruct, views, size=64) for model in tokenizers]
        for number, version in enumerate((views, *worse, *again), 1):
            title = f"images {start + 1} to {start + len(views)}, version {number}"
            parts.append(judge_features(version, lite0, run, title))
            positions += [place[key] for key in keys[: len(views)]]
    return torch.cat(parts), np.array(positions)
