"""Training the dual encoder that judges text-conditional samples: pairs told apart in a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from sitlib.files import Row
from sitlib.model.dual_encoder import DualEncoder, StoredDualEncoderConfig, contrastive_loss
from sitlib.model.text import TextTokenizer
from sitlib.strict import to_dict
from sitlib.train.config import DualEncoderConfig
from sitlib.train.loop import Logged, train_module


def train_dual_encoder(
    config: DualEncoderConfig,
    features: Tensor,
    image_of: np.ndarray,
    captions: Sequence[Sequence[str]],
    names: Sequence[str],
    *,
    seed: int,
    folder: Path,
    **options: Any,
) -> tuple[DualEncoder, list[Row]]:
    """Train an image and a text encoder on features of views -> both, and the training curve.

    One process takes whole batches: each pair is told apart from all others of the batch.

    Args:
        features: [V, F] of views. image_of: int [V], the image that each view is of.
        captions, names: of every image: texts, of which a step draws one, and what it shows.
        folder, options: as for `TrainLoop`.
    """
    every = [text for of_image in captions for text in of_image]
    texts = TextTokenizer.train(every, config.vocab_size, config.max_tokens)
    tokens = texts.encode(every, truncate=True)
    counts = np.array([len(of_image) for of_image in captions])
    first = np.cumsum(counts) - counts  # where the captions of each image begin among all
    name_ids = torch.from_numpy(np.unique(np.array(names), return_inverse=True)[1])
    run = {"model": to_dict(config), "views": list(features.shape), "seed": seed}
    set_seed(seed)
    module = DualEncoder(StoredDualEncoderConfig(config.shape, texts.to_json(), features.shape[1]))

    def batch_at(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random views, one random caption of each: features [B, F], tokens [B, L], names [B]."""
        rng = np.random.default_rng([seed, step])
        views = rng.integers(len(image_of), size=config.optimizer.batch_size)
        images = image_of[views]
        rows = first[images] + rng.integers(counts[images])
        tokens_BL = tokens[torch.from_numpy(rows)]
        tokens_BL = tokens_BL[:, : int((tokens_BL != texts.pad).sum(dim=1).max())]
        return features[torch.from_numpy(views)], tokens_BL, name_ids[torch.from_numpy(images)]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, ...], _: int) -> tuple[Tensor, Logged]:
        features_BF, tokens_BL, names_B = batch
        logits = model(features_BF, tokens_BL)  # [B, B], of every image and caption
        is_right = names_B[logits.detach().argmax(dim=1)] == names_B
        values = {"accuracy": is_right.float().mean(), "scale": module.log_scale.detach().exp()}
        return contrastive_loss(logits, names_B), values

    options["after_update"] = module.limit_scale
    return train_module(module, loss_fn, batch_at, config.optimizer, folder, run, **options)
