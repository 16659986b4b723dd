"""Training the dual encoder that judges text-conditional samples: `python -m workbook.dual_encoder`.

It learns from the training images and captions of the text-conditional models, and never sees a held-out one. It also learns from
degraded copies of them and from what the tokenizers leave of them: a judge that knows sharp images only takes their reconstructions for
something else.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sitlib.data import CaptionedImages, ImageSource, degrade, training_views
from sitlib.files import Row
from sitlib.metrics import lite0_features
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.metrics.weights import fetch_weights
from sitlib.model.dual_encoder import DualEncoder, StoredDualEncoderConfig, contrastive_loss
from sitlib.model.precision import best_device
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.engine import Part
from sitlib.train.loop import Logged, Phase, seed_everything, train
from workbook.codes import captioned
from workbook.profile import Profile, load_profile
from workbook.runs import DualEncoderRun, Trained, command, trained
from workbook.tokenizers import trained_tokenizer

VIEWS = 1024  # in memory at a time


def trained_dual_encoder(profile: Profile, pipeline: bool = False) -> Trained[DualEncoder]:
    """The dual encoder of a profile, trained now or earlier; `pipeline` as for `runs.trained`."""
    run = DualEncoderRun.of(profile)

    def train_now(checkpoints: Path) -> tuple[DualEncoder, list[Row]]:
        fetch_weights()
        seed = profile.text.tokenizer_seed
        device, names = best_device(), run.model.reconstructions
        tokenizers = [trained_tokenizer(profile, name, seed).model.to(device) for name in names]
        return train_dual_encoder(
            run, captioned(profile, "train"), tokenizers, load_lite0().to(device), checkpoints
        )

    return trained(run, "dual_encoder", "text", DualEncoder, train_now, pipeline)


def train_dual_encoder(
    run: DualEncoderRun,
    data: CaptionedImages,
    tokenizers: list[SpectralTokenizer],
    lite0: Lite0,
    checkpoints: Path,
) -> tuple[DualEncoder, list[Row]]:
    """Trains a run on captioned images and on reconstructions of them, resumable from the folder `checkpoints`.

    Returns:
        The dual encoder and its training curve.
    """
    settings = run.model
    features, positions = view_features(run, data.images, tokenizers, lite0)
    number_of = {name: number for number, name in enumerate(sorted(set(data.names)))}
    names = torch.tensor([number_of[name] for name in data.names])
    captions = [caption for of_image in data.captions for caption in of_image]
    texts = TextTokenizer.train(captions, settings.vocabulary, settings.max_tokens)
    tokens = texts.encode(captions, truncate=True)
    counts = np.array([len(of_image) for of_image in data.captions])
    first = np.cumsum(counts) - counts  # where the captions of each image begin among all

    seed_everything(run.seed)
    model = DualEncoder(StoredDualEncoderConfig(settings, texts.to_json(), features.shape[1]))

    def batch_at(step: int, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Random images and one random caption of each: features [B, F], token ids [B, L], names [B]."""
        generator = np.random.default_rng([run.seed, step])
        chosen = generator.integers(len(positions), size=settings.optimizer.batch_size)
        images = positions[chosen]
        texts_BL = tokens[torch.from_numpy(first[images] + generator.integers(counts[images]))]
        texts_BL = texts_BL[:, : int((texts_BL != texts.pad).sum(dim=1).max())]
        # In one process and one part, always: each pair is told apart from all others of the batch.
        return part.of(
            (features[torch.from_numpy(chosen)], texts_BL, names[torch.from_numpy(images)])
        )

    def loss(
        module: nn.Module, batch: tuple[Tensor, Tensor, Tensor], step: int
    ) -> tuple[Tensor, Logged]:
        *inputs, names_B = batch
        logits = module(*inputs)
        found = names_B[logits.detach().argmax(dim=1)] == names_B
        values = {"accuracy": found.float().mean(), "scale": model.log_scale.detach().exp()}
        return contrastive_loss(logits, names_B), values

    def after_update(optimizer: torch.optim.Optimizer) -> Logged:
        model.limit_scale()
        return {}

    phases = [Phase(model, loss, after_update)]
    title = f"dual encoder, seed {run.seed}"
    return model, train(phases, batch_at, settings.optimizer, checkpoints=checkpoints, title=title)


def judge_features(images: Tensor, lite0: Lite0, run: DualEncoderRun, progress: str) -> Tensor:
    """What the dual encoder sees of images [M, 3, H, W] in [0, 1]: Lite0 features [M, 1280] at its own input size."""
    return lite0_features(images, lite0, size=run.model.image_size, batch_size=32, title=progress)


def view_features(
    run: DualEncoderRun, images: ImageSource, tokenizers: list[SpectralTokenizer], lite0: Lite0
) -> tuple[Tensor, NDArray]:
    """Features [V, 1280] of wide views of all images, clean, degraded and reconstructed, and the position [V] of each one's image.

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
        again = [
            torch.cat([model.reconstruct(x).cpu() for x in views.split(64)]) for model in tokenizers
        ]
        for number, version in enumerate((views, *worse, *again), 1):
            title = f"images {start + 1} to {start + len(views)}, version {number}"
            parts.append(judge_features(version, lite0, run, title))
            positions += [place[key] for key in keys[: len(views)]]
    return torch.cat(parts), np.array(positions)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.dual_encoder", description=__doc__)
    parser.add_argument("--profile", required=True)
    arguments = parser.parse_args()
    trained_dual_encoder(load_profile(arguments.profile), pipeline=True)


if __name__ == "__main__":
    command(main)
