"""Sections of a profile: models, their training, evaluation and applications.

Defaults of evaluation and applications are those of the profile quick.
"""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT, TokenizerConfig
from sitlib.model.generator_config import AutoregressiveConfig, SamplingConfig
from sitlib.strict import require
from sitlib.train.config import (
    AdversarialConfig,
    CaptionsConfig,
    CodesConfig,
    DualEncoderConfig,
    OptimizerConfig,
    TokenizerLossConfig,
)

Changes = dict[str, Any]  # keys in which a variant differs from what its section says
AtLeastTwo = Annotated[int, Field(ge=2)]
TopP = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=STRICT)
class EvaluationSet:
    """Held-out views of one kind of images: the test split of `source`."""

    source: str
    views: AtLeastTwo  # for a standard error
    kind: Literal["crops", "wide"]  # multi-scale crops, or wide views of whole images


@dataclass(frozen=True, config=STRICT)
class TokenizerEvaluationConfig:
    """Held-out views by which tokenizers are judged."""

    sets: Annotated[dict[str, EvaluationSet], Field(min_length=1)]  # the first is "held-out"
    seed: NonNegativeInt = 0  # of the views, the same for every model
    # The standard FID and IS too, also of samples; their network is downloaded (extra "inception").
    inception: bool = False


@dataclass(frozen=True, config=STRICT)
class TokenizerSection:
    """Tokenizers: what they share, and their variants.

    A variant lists the keys of TokenizerConfig in which it differs from `common`. Under `loss`,
    `adversarial`, `optimizer` and `data` stand those of its training, and `codes_from` names the
    variant whose encoder and codebooks it takes over.
    """

    evaluation: TokenizerEvaluationConfig
    variants: dict[str, Changes]
    common: TokenizerConfig = TokenizerConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclass(frozen=True, config=STRICT)
class GenerationEvaluationConfig:
    """Samples and held-out views between which FD-Lite0, KID, precision, recall are measured."""

    samples: PositiveInt = 500
    reference_views: PositiveInt = 500
    kid_subset_size: AtLeastTwo = 100
    neighbors: PositiveInt = 3  # k of the manifolds of precision and recall (arXiv 1904.06991)
    guidance_sweep: list[float] = field(default_factory=list)  # weights to compare; may be empty
    top_p_sweep: list[TopP] = field(default_factory=list)
    sweep_samples: PositiveInt = 500  # at each of them
    throughput_batch_size: PositiveInt = 64  # images at a time where speed is measured
    seed: NonNegativeInt = 0

    def __post_init__(self):
        smallest = min(self.samples, self.reference_views)
        _require_fewer(self, smallest, min(smallest, self.sweep_samples))


@dataclass(frozen=True, config=STRICT)
class TextEvaluationConfig:
    """Prompts for which samples are drawn, and how these are judged."""

    prompts: PositiveInt = 184  # of each kind: seen names in new words, held-out names
    # Captions among which the right one has to be found; chance is 1 / candidates.
    candidates: AtLeastTwo = 100
    kid_subset_size: AtLeastTwo = 100
    neighbors: PositiveInt = 3
    # At which held-out names are drawn too, to compare; may be empty.
    top_p_sweep: list[TopP] = field(default_factory=list)
    guidance_sweep: list[float] = field(default_factory=list)
    seed: NonNegativeInt = 0

    def __post_init__(self):
        require(
            self.candidates <= self.prompts,
            f"candidates {self.candidates} are drawn from the {self.prompts} prompts: there must "
            "be as many",
        )
        _require_fewer(self, self.prompts, self.prompts)


def _require_fewer(config: Any, images: int, smallest_set: int) -> None:
    """KID subsets and nearest neighbors come from sets of images that must be large enough."""
    require(
        config.kid_subset_size <= images,
        f"kid_subset_size must lie in 2 ... {images}, it is {config.kid_subset_size}",
    )
    require(
        config.neighbors < smallest_set,
        f"neighbors must lie in 1 ... {smallest_set - 1}, below the number of images, it is "
        f"{config.neighbors}",
    )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GeneratorSection:
    """Models over codes: what they share, and their variants."""

    common: AutoregressiveConfig
    variants: dict[str, Changes]  # of AutoregressiveConfig; under `optimizer`, of their training
    tokenizer_seed: NonNegativeInt = 0  # of the tokenizer whose codes are modelled
    codes: CodesConfig = CodesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    samplers: dict[str, Changes] = field(default_factory=dict)  # variants with other sampling


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AutoregressiveSection(GeneratorSection):
    """Class-conditional models."""

    evaluation: GenerationEvaluationConfig = GenerationEvaluationConfig()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TextSection(GeneratorSection):
    """Text-conditional models."""

    captions: CaptionsConfig = CaptionsConfig()
    evaluation: TextEvaluationConfig = TextEvaluationConfig()
    dual_encoder: DualEncoderConfig


@dataclass(frozen=True, config=STRICT)
class ApplicationsConfig:
    """Models and images of the applications notebook; samplers are those of the models."""

    class_generator: str  # class-conditional variant over the codes of a scale-causal tokenizer
    text_generator: str  # text-conditional, likewise
    baseline: str  # tokenizer variant beside which rates and other data sets are measured
    model_seed: NonNegativeInt = 0  # of both generators
    images: AtLeastTwo = 150  # held-out images that are upsampled and edited
    # Of upsampling at the largest factor.
    temperatures: Annotated[list[PositiveFloat], Field(min_length=1)] = field(
        default_factory=lambda: [0.7, 1.0]
    )
    repeated: PositiveInt = 50  # images of which several samples are drawn
    samples: AtLeastTwo = 4  # that many
    previews: AtLeastTwo = 8  # of one prompt
    preview_prompts: AtLeastTwo = 60  # for which previews are judged
    rounds: PositiveInt = 5  # of timing
    kid_subset_size: AtLeastTwo = 100
    seed: NonNegativeInt = 0

    def __post_init__(self):
        for name in ("repeated", "kid_subset_size"):
            require(
                (number := getattr(self, name)) <= self.images,
                f"{name} must not be more than images = {self.images}, it is {number}",
            )
