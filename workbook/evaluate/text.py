"""Prompts of text-conditional samples, judged by R-precision (AttnGAN, arXiv 1711.10485).

A sample is right if, among many captions, a dual encoder that was trained on real images finds the
sample's own the most similar. The same is measured of real held-out images, the ceiling of such a
judge, and of their reconstructions, which a model over the tokenizer's codes can reach.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sitlib import metrics
from sitlib.data import CaptionedImages, ImageSource, degrade, held_out_views, training_views
from sitlib.files import Row
from sitlib.metrics.networks import Lite0
from sitlib.model.dual_encoder import DualEncoder
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.train.dual_encoder import train_dual_encoder
from workbook import evaluate
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
    names: list[str]  # subjects
    images: Tensor  # [M, 3, H, W] in [0, 1]


def prompts(profile: Profile, kind: str) -> Prompts:
    """Prompts of a kind, one for each of `text.evaluation.prompts` names, the same for every model.

    "held_out": of held-out images, in phrasings of training. "seen": of training images, in
    phrasings that training never uses. "known": of the same images, in phrasings of training; what
    is lost from there to "seen" is lost to the words.
    """
    settings = profile.text.evaluation
    split = "test" if kind == "held_out" else "train"
    texts = captioned(profile, split)
    positions, images = _one_of_each_name(profile, texts)

    def one_each(captions: list[list[str]]) -> list[str]:
        u = np.random.default_rng([settings.seed, int(split == "test")]).random(len(positions))
        of_each = zip(u, (captions[position] for position in positions), strict=True)
        return [options[int(share * len(options))] for share, options in of_each]

    known = one_each(texts.captions)
    asked = one_each(captioned(profile, split, "new").captions) if kind == "seen" else known
    return Prompts(asked, known, [texts.names[i] for i in positions], images)


def _one_of_each_name(profile: Profile, texts: CaptionedImages) -> tuple[list[int], Tensor]:
    """Positions of images of different names, in a random order, and wide views of them.

    Raises:
        ValueError: there are fewer names than prompts.
    """
    settings, size = profile.text.evaluation, DualEncoderRun.of(profile).data.size
    count = settings.prompts
    while True:  # a shorter set of views begins a longer one
        count = min(2 * count, len(texts.images))
        views, _, keys = held_out_views(texts.images, count, size, settings.seed, kind="wide")
        positions = [texts.images.position_of[key] for key in keys]
        first = {texts.names[p]: row for row, p in reversed(list(enumerate(positions)))}
        rows = sorted(first.values())[: settings.prompts]
        if len(rows) == settings.prompts:
            return [positions[row] for row in rows], views[rows]
        if count == len(texts.images):
            raise ValueError(
                f"text.evaluation.prompts is {settings.prompts}, but {texts.images.where} has only "
                f"{len(rows)} names."
            )


@dataclass
class Judge:
    """A dual encoder, by which images are compared with captions."""

    model: DualEncoder
    lite0: Lite0
    profile: Profile

    @classmethod
    def of(cls, profile: Profile) -> "Judge":
        """The dual encoder of a profile, trained now or earlier."""
        lite0 = metrics.load_lite0().to(best_device())
        return cls(trained_dual_encoder(profile).model, lite0, profile)

    def features(self, images: Tensor, title: str = "") -> Tensor:
        """Features [M, 1280] of images [M, 3, H, W], as the dual encoder takes them."""
        return judge_features(images, self.lite0, DualEncoderRun.of(self.profile), title)

    def retrieval(self, features: Tensor, captions: list[str], names: list[str]) -> Tensor:
        """R-precision in % [M] of images, given as `features`, and their captions of names."""
        settings = self.profile.text.evaluation
        with torch.no_grad():
            tokens = self.model.text_tokenizer.encode(captions, truncate=True)
            similarity = self.model.similarity(features, tokens)
        right, options = torch.arange(len(similarity)), {"candidates": settings.candidates}
        return 100 * metrics.r_precision(similarity, right, names, **options, seed=settings.seed)

    def retrieved(self, images: Tensor, asked: Prompts, title: str = "") -> dict[str, Any]:
        """R-precision (%) of images, with an interval of 95 % over names, and `by_prompt`.

        Captions are in phrasings of training, whatever the samples were asked for with: new words
        test the generator, not the judge.
        """
        values = self.retrieval(self.features(images, title), asked.known, asked.names)
        return {
            "r_precision": float(values.mean()),
            "interval": list(metrics.bootstrap_interval(values, asked.names)),
            "chance": 100 / self.profile.text.evaluation.candidates,
            "by_prompt": [round(value, 1) for value in values.tolist()],
        }

    def prompt_scores(
        self, tokenizer: SpectralTokenizer, asked: dict[str, Prompts], samples: dict[str, Tensor]
    ) -> dict[str, Any]:
        """R-precision of samples for prompts of every kind, of real images and reconstructions.

        Returns:
            `kinds`: kind -> `samples`, `reconstruction`, `real` -> what `retrieved` returns,
            `by_prompt` of samples only; `r_precision_<kind>` of samples.
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
    """The dual encoder of a profile, trained now or earlier; `pipeline` as for `train_or_load`.

    It learns from the training images and captions of the text-conditional models, and never sees a
    held-out one.
    """
    run = DualEncoderRun.of(profile)

    def train_now(folder: Path) -> tuple[DualEncoder, list[Row]]:
        metrics.fetch_weights()
        seed = profile.text.tokenizer_seed
        device, names = best_device(), run.model.reconstructions
        tokenizers = [trained_tokenizer(profile, name, seed).model.to(device) for name in names]
        data, lite0 = captioned(profile, "train"), metrics.load_lite0().to(device)
        features, positions = view_features(run, data.images, tokenizers, lite0)
        texts, title = (data.captions, data.names), f"dual encoder, seed {run.seed}"
        return train_dual_encoder(
            run.model, features, positions, *texts, seed=run.seed, folder=folder, title=title
        )

    return train_or_load(run, "dual_encoder", "text", DualEncoder, train_now, pipeline)


def view_features(
    run: DualEncoderRun, images: ImageSource, tokenizers: list[SpectralTokenizer], lite0: Lite0
) -> tuple[Tensor, NDArray]:
    """Features [V, 1280] of wide views of all images, and the position [V] of each one's image.

    Also of degraded copies, and of what the tokenizers leave of the views: a judge that knows sharp
    images only takes their reconstructions for something else. `VIEWS` images at a time.
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
        again = [metrics.in_batches(model.reconstruct, views, size=64) for model in tokenizers]
        for number, version in enumerate((views, *worse, *again), 1):
            title = f"images {start + 1} to {start + len(views)}, version {number}"
            parts.append(judge_features(version, lite0, run, title))
            positions += [place[key] for key in keys[: len(views)]]
    return torch.cat(parts), np.array(positions)


def judge_features(images: Tensor, lite0: Lite0, run: DualEncoderRun, title: str) -> Tensor:
    """Lite0 features [M, 1280] of images [M, 3, H, W] in [0, 1], at the judge's own input size."""
    size = run.model.image_size
    return metrics.lite0_features(images, lite0, size=size, batch_size=32, title=title)
