"""What the applications are measured with: generators, their tokenizers, and held-out images with what the models are told of them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sitlib.data import held_out_views, open_images
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.codes import captioned, held_out_wide, images_of
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer


@dataclass
class Task:
    """A generator, its tokenizer, and held-out images with what the model is told of them."""

    variant: str
    model: AutoregressiveModel
    tokenizer: SpectralTokenizer
    sampling: SamplingConfig
    images: Tensor  # [V, 3, H, H]
    prompts: Tensor | list[str] | None
    keys: list[
        Any
    ]  # what is resampled for an interval: the photograph of each view, or the name of each emoji
    positions: list[int]  # of each view's image in its split


def class_task(profile: Profile) -> Task:
    """Wide views of held-out photographs and their classes."""
    variant, count = profile.applications.class_generator, profile.applications.images
    images, labels = held_out_wide(profile, variant, count)
    photographs = len(images_of(profile, variant, "test"))
    positions = [i % photographs for i in range(count)]  # views take photographs in turn
    return Task(variant, *_models(profile, variant), images, labels, positions, positions)


def text_task(profile: Profile) -> Task:
    """Wide views of held-out images and a caption of each; their names are none of training."""
    variant, count = profile.applications.text_generator, profile.applications.images
    images, found = held_out_wide(profile, variant, count)
    texts, positions = captioned(profile, "test"), found.tolist()
    captions = [texts.captions[position][0] for position in positions]
    names = [texts.names[position] for position in positions]
    return Task(variant, *_models(profile, variant), images, captions, names, positions)


def _models(
    profile: Profile, variant: str
) -> tuple[AutoregressiveModel, SpectralTokenizer, SamplingConfig]:
    section, name = (
        profile.generator_section(variant),
        profile.autoregressive_variant(variant).tokenizer,
    )
    model = trained_generator(profile, variant, profile.applications.model_seed).model.to(
        best_device()
    )
    tokenizer = trained_tokenizer(profile, name, section.tokenizer_seed).model.to(best_device())
    return model, tokenizer, profile.sampler(variant)


def foreign(profile: Profile) -> Task:
    """The extra photographs, of which the class-conditional model is told nothing."""
    chosen = profile.tokenizer.evaluation.sets["extra"]
    size, seed = profile.data.size, profile.tokenizer.evaluation.seed
    source = open_images(resolve(chosen.source), "test")
    images, _, keys = held_out_views(source, chosen.views, size, seed, kind="wide")
    variant, place = (
        profile.applications.class_generator,
        {key: i for i, key in enumerate(source.keys)},
    )
    return Task(
        variant, *_models(profile, variant), images, None, keys, [place[key] for key in keys]
    )
