"""Prompts of text-conditional samples, judged by R-precision (AttnGAN, arXiv 1711.10485).

A sample is right if, among many captions, a dual encoder that was trained on real images finds the
sample's own the most similar. The same is measured of real held-out images, the ceiling of such a
judge, and of their reconstructions, which a model over the tokenizer's codes can reach.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sitlib import evaluate, metrics
from sitlib.data import (
    ImageSource,
    held_out_positions,
    held_out_views,
    rgb_to_tensor,
    training_views,
)
from sitlib.files import Row
from sitlib.model.dual_encoder import DualEncoder
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.strict import require
from sitlib.train.dual_encoder import train_dual_encoder
from workbook.codes import captioned
from workbook.profile import Profile
from workbook.runs import DualEncoderRun, Trained, train_or_load
from workbook.tokenizers import trained_tokenizer

VIEWS = 1024  # of training images, in memory at a time
KINDS = {
    "held_out": "names that training never saw",
    "seen": "names of training images, in new words",
    "known": "names of training images, in words of training",
}


@dataclass
class Prompts:
    """Captions of one of `KINDS`, and the real images that they describe."""

    captions: list[str]
    known: list[str]  # captions in phrasings of training, by which samples are judged
    names: list[str]  # of what is shown, in no particular gender, each once
    images: Tensor  # [M, 3, H, W] in [0, 1]


def prompts(profile: Profile, kind: str) -> Prompts:
    """Prompts of a kind, one for each of `text.evaluation.prompts` names, the same for every model.

    Names are `CaptionedImages.groups`: COOK and MAN COOK are one. "seen" and "known" are of the
    same images; what is lost from there to "seen" is lost to the words. Raises `ValueError` if
    there are fewer names.
    """
    settings, size = profile.text.evaluation, DualEncoderRun.of(profile).data.size
    split = "test" if kind == "held_out" else "train"
    texts = captioned(profile, split)
    # The first view of each name, in the random order of held-out views.
    order = held_out_positions(texts.images, len(texts.images), settings.seed)
    first = {texts.groups[position]: row for row, position in reversed([*enumerate(order)])}
    rows = sorted(first.values())[: settings.prompts]
    found = f"{texts.images.where} has only {len(rows)} names"
    sentence = f"text.evaluation.prompts is {settings.prompts}, but {found}."
    require(len(rows) == settings.prompts, sentence)
    views, _, keys = held_out_views(texts.images, rows[-1] + 1, size, settings.seed, kind="wide")
    positions = [texts.images.position_of[keys[row]] for row in rows]

    def one_each(captions: list[list[str]]) -> list[str]:
        u = np.random.default_rng([settings.seed, int(split == "test")]).random(len(positions))
        of_each = zip(u, (captions[position] for position in positions), strict=True)
        return [options[int(share * len(options))] for share, options in of_each]

    known = one_each(texts.captions)
    asked = one_each(captioned(profile, split, "new").captions) if kind == "seen" else known
    return Prompts(asked, known, [texts.groups[i] for i in positions], views[rows])


class Judge:
    """The dual encoder of a profile, by which images are compared with captions."""

    def __init__(self, profile: Profile):
        self.model, self.settings = trained_dual_encoder(profile).model, profile.text.evaluation
        self.size = profile.text.dual_encoder.image_size

    def features(self, images: Tensor, title: str = "") -> Tensor:
        """Features [M, 1280] of images [M, 3, H, W], as the dual encoder takes them."""
        return metrics.lite0_features(images, size=self.size, batch_size=32, title=title)

    def retrieval(self, features: Tensor, captions: list[str], names: list[str]) -> Tensor:
        """R-precision in % [M] of images, given as `features`, and their captions of names."""
        with torch.no_grad():
            tokens = self.model.text_tokenizer.encode(captions, truncate=True)
            similarity = self.model.similarity(features, tokens)
        options = {"candidates": self.settings.candidates, "seed": self.settings.seed}
        right = torch.arange(len(similarity))
        return 100 * metrics.r_precision(similarity, right, names, **options)

    def retrieved(self, images: Tensor, asked: Prompts, title: str = "") -> dict[str, Any]:
        """R-precision (%) of images for captions in phrasings of training, with its interval.

        Whatever the samples were asked for with: new words test the generator, not the judge.
        """
        values = self.retrieval(self.features(images, title), asked.known, asked.names)
        return {
            "r_precision": float(values.mean()),
            "interval": list(metrics.bootstrap_interval(values, asked.names)),
            "chance": 100 / self.settings.candidates,
            "by_prompt": [round(value, 1) for value in values.tolist()],
        }

    def prompt_scores(
        self, tokenizer: SpectralTokenizer, asked: dict[str, Prompts], samples: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Scores by `retrieved` for every kind of prompts, of samples, of the real images and of
        their reconstructions; `by_prompt` of samples only.
        """
        kinds: dict[str, dict[str, dict[str, Any]]] = {}
        for kind, told in asked.items():
            images = {
                "samples": evaluate.decode(tokenizer, samples[kind]),
                "reconstruction": evaluate.reconstruct(tokenizer, told.images)[1],
                "real": told.images,
            }
            kinds[kind] = {of: self.retrieved(x, told, f"{of}, {kind}") for of, x in images.items()}
            for of in ("reconstruction", "real"):
                del kinds[kind][of]["by_prompt"]
        shares = {f"r_precision_{kind}": of["samples"]["r_precision"] for kind, of in kinds.items()}
        return {**shares, "kinds": kinds}


# -- training the dual encoder -----------------------------------------------------------------


def trained_dual_encoder(profile: Profile, pipeline: bool = False) -> Trained[DualEncoder]:
    """The dual encoder of a profile, trained now or earlier; `pipeline` as for `train_or_load`."""
    run = DualEncoderRun.of(profile)

    def train_now(folder: Path) -> tuple[DualEncoder, list[Row]]:
        metrics.fetch_weights()
        seed, device = profile.text.tokenizer_seed, best_device()
        names = run.model.reconstructions
        tokenizers = [trained_tokenizer(profile, name, seed).model.to(device) for name in names]
        data = captioned(profile, "train")
        features = view_features(run, data.images, tokenizers)
        texts, title = (data.captions, data.names), f"dual encoder, seed {run.seed}"
        about = {"seed": run.seed, "folder": folder, "title": title}
        return train_dual_encoder(run.model, *features, *texts, **about)

    return train_or_load(run, "dual_encoder", "text", DualEncoder, train_now, pipeline)


def view_features(
    run: DualEncoderRun, images: ImageSource, tokenizers: list[SpectralTokenizer]
) -> tuple[Tensor, NDArray]:
    """Features [V, 1280] of wide views of all images, and the position [V] of each one's image.

    Also of degraded copies, and of what the tokenizers leave of the views: a judge that knows sharp
    images only takes their reconstructions for something else.
    """
    batch, size, seed = min(VIEWS, len(images)), run.data.size, run.seed
    parts, positions = [], []
    for start in range(0, len(images), batch):
        place = start // batch, batch, size, seed
        views, _, keys = training_views(images, *place, kind="wide", flip=False)
        views = views[: len(images) - start]  # the last ones may be of a second epoch
        copies = (seed + copy * len(images) for copy in range(run.model.degraded_views))
        worse = [degrade(views, number + start) for number in copies]
        again = [metrics.in_batches(model.reconstruct, views, size=64) for model in tokenizers]
        for number, version in enumerate((views, *worse, *again), 1):
            title = f"images {start + 1} to {start + len(views)}, version {number}"
            options = {"size": run.model.image_size, "batch_size": 32, "title": title}
            parts.append(metrics.lite0_features(version, **options))
            positions += [images.position_of[key] for key in keys[: len(views)]]
    return torch.cat(parts), np.array(positions)


def degrade(images: Tensor, seed: int) -> Tensor:
    """Make images [B, 3, H, W] in [0, 1] worse, each as follows from the seed and its index.

    An image is shrunk and enlarged again (smoothly or in squares), compressed as a poor JPEG, both,
    or neither; half of them, and all of "neither", get noise.
    """
    worse = []
    for index, image in enumerate(images):
        rng = np.random.default_rng([seed, index])
        kind = rng.integers(4)  # 0: shrunk, 1: compressed, 2: both, 3: neither
        if kind in (0, 2):
            shape = image.shape[1:]
            small = [max(1, round(side * rng.uniform(0.2, 0.6))) for side in shape]
            mode = "bicubic" if rng.random() < 0.5 else "nearest"
            small = F.interpolate(image[None], small, mode="area")
            image = F.interpolate(small, shape, mode=mode)[0]
        if kind in (1, 2):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            file = BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(2, 20)))
            image = rgb_to_tensor(Image.open(file).convert("RGB")) / 255
        if kind == 3 or rng.random() < 0.5:
            noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
            image = image + noise * rng.uniform(0.02, 0.12)
        worse.append(image.clamp(0, 1))
    return torch.stack(worse)
