"""What a profile says of autoregressive models, their sampling and their evaluation."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from sitlib.config.folders import filled_in
from sitlib.config.strict import Strict, require, require_seed
from sitlib.config.tokenizer import OptimizerConfig


def _require_heads(width: int, heads: int) -> None:
    require(
        width > 0 and heads > 0 and width % heads == 0,
        f"width {width} must be a multiple of heads {heads}",
    )


def _require_text_size(vocabulary: int, max_tokens: int) -> None:
    require(
        vocabulary >= 300,
        f"vocabulary must be at least 300 (256 bytes and some merges), it is {vocabulary}",
    )
    require(max_tokens > 1, f"max_tokens must be at least 2, it is {max_tokens}")


@dataclass(frozen=True)
class TextEncoderConfig(Strict):
    """The text side of a text-conditional model; width, heads and blocks are those of the model (Parti, arXiv 2206.10789)."""

    layers: int
    vocabulary: int  # token ids of the BPE that is trained on the captions
    max_tokens: int  # longest text, its end included

    def __post_init__(self):
        require(self.layers > 0, f"layers must be at least 1, it is {self.layers}")
        _require_text_size(self.vocabulary, self.max_tokens)


@dataclass(frozen=True)
class AutoregressiveConfig(Strict):
    """A transformer over the codes of one tokenizer variant: decoder-only with a class prefix, or reading a text encoder."""

    tokenizer: str  # name of the tokenizer variant whose codes it models
    layers: int
    width: int
    heads: int
    mlp_ratio: float
    norm: Literal["layer", "rms"]
    mlp: Literal["gelu", "swiglu"]
    bias: bool  # of linear layers and LayerNorm
    qk_norm: bool  # normalized queries and keys
    positions: Literal[
        "learned", "rotary"
    ]  # of places in the grid; those of scales are learned either way
    dropout: float
    condition_dropout: float  # share of training samples whose class or text is hidden, for classifier-free guidance
    # Largest share of the codes that training replaces by random ones in what the model reads, never in what it predicts; each sequence
    # draws its own share. What was drawn before is not always right: the model learns to look at the condition again.
    code_noise: float
    text_noise: int  # most random tokens that training puts before a text, half as many after it: new words around a name mean nothing
    text: TextEncoderConfig | None  # None: conditioned on a class

    def __post_init__(self):
        require(self.layers > 0, f"layers must be at least 1, it is {self.layers}")
        _require_heads(self.width, self.heads)
        require(
            self.mlp_ratio * self.width >= 1,
            f"mlp_ratio {self.mlp_ratio} leaves no unit of width {self.width}",
        )
        require(
            self.positions == "learned" or self.width // self.heads % 4 == 0,
            f"rotary positions of rows and columns need heads of a multiple of 4 dimensions, not {self.width // self.heads}",
        )
        for name in ("dropout", "condition_dropout"):
            require(
                0 <= getattr(self, name) < 1,
                f"{name} must lie in [0, 1), it is {getattr(self, name)}",
            )
        require(
            0 <= self.code_noise <= 1, f"code_noise must lie in [0, 1], it is {self.code_noise}"
        )
        require(self.text_noise >= 0, f"text_noise must not be negative, it is {self.text_noise}")


@dataclass(frozen=True)
class DiffusionConfig(Strict):
    """A transformer that moves code vectors from noise to data, for comparison with autoregressive ones."""

    layers: int
    width: int
    heads: int
    mlp_ratio: float
    dropout: float
    condition_dropout: (
        float  # share of training samples whose class is hidden, for classifier-free guidance
    )

    def __post_init__(self):
        require(self.layers > 0, f"layers must be at least 1, it is {self.layers}")
        _require_heads(self.width, self.heads)
        for name in ("dropout", "condition_dropout"):
            require(
                0 <= getattr(self, name) < 1,
                f"{name} must lie in [0, 1), it is {getattr(self, name)}",
            )


@dataclass(frozen=True)
class CodesConfig(Strict):
    """Wide views from which codes are extracted once, flips and crops included."""

    views_per_image: int  # of every training image that has a class or a caption
    mirrored: bool  # each view's mirror image too; not where captions say left or right
    held_out_views: int
    seed: int

    def __post_init__(self):
        require(
            self.views_per_image > 0 and self.held_out_views > 0,
            "views_per_image and held_out_views must be at least 1",
        )
        require_seed(self.seed)


@dataclass(frozen=True)
class SamplingConfig(Strict):
    """How codes are drawn."""

    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1.0 = off
    min_p: float  # codes less likely than this share of the likeliest are left out (arXiv 2407.01082); 0.0 = off
    guidance: float  # classifier-free guidance weight w: uncond + w (cond - uncond); 1.0 = off
    # "linear": from 1.0 in the first scale to w in the last, as VAR does (arXiv 2404.02905); of one scale, w.
    guidance_growth: Literal["constant", "linear"]
    batch_size: int  # 0 = as many as half of the free memory holds
    seed: int

    def __post_init__(self):
        require(
            self.temperature > 0,
            f"temperature must be positive, it is {self.temperature}; top_k 1 is greedy",
        )
        require(self.top_k >= 0, f"top_k must be 0 (off) or more, it is {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], it is {self.top_p}")
        require(0 <= self.min_p < 1, f"min_p must lie in [0, 1), it is {self.min_p}")
        require(
            self.batch_size >= 0,
            f"batch_size must be 0 (automatic) or more, it is {self.batch_size}",
        )
        require(
            math.isfinite(self.guidance), f"guidance must be a finite number, it is {self.guidance}"
        )
        require_seed(self.seed)


def _require_sweeps(guidance: list[float], top_p: list[float]) -> None:
    require(
        all(math.isfinite(weight) for weight in guidance),
        f"guidance_sweep must list finite numbers, it is {guidance}",
    )
    require(
        all(0 < p <= 1 for p in top_p), f"top_p_sweep must list numbers in (0, 1], it is {top_p}"
    )


@dataclass(frozen=True)
class GenerationEvaluationConfig(Strict):
    """Samples and held-out views between which FD-Lite0, KID, precision and recall are measured."""

    samples: int
    reference_views: int
    kid_subset_size: int
    neighbours: int  # k of the manifolds of precision and recall (arXiv 1904.06991)
    guidance_sweep: list[float]  # guidance weights that are compared; empty = no sweep
    top_p_sweep: list[float]  # likewise
    sweep_samples: int  # samples at each of them
    throughput_batch_size: int  # images that are sampled at a time where speed is measured
    seed: int

    def __post_init__(self):
        smallest = min(self.samples, self.reference_views)
        require(
            2 <= self.kid_subset_size <= smallest,
            f"kid_subset_size must lie in 2 ... {smallest}, it is {self.kid_subset_size}",
        )
        smallest = min(smallest, self.sweep_samples)
        require(
            1 <= self.neighbours < smallest,
            f"neighbours must lie in 1 ... {smallest - 1}, below the numbers of images, it is {self.neighbours}",
        )
        _require_sweeps(self.guidance_sweep, self.top_p_sweep)
        require(
            self.throughput_batch_size > 0,
            f"throughput_batch_size must be at least 1, it is {self.throughput_batch_size}",
        )
        require_seed(self.seed)


@dataclass(frozen=True)
class AutoregressiveSection(Strict):
    """Class-conditional models."""

    tokenizer_seed: int  # of the tokenizer whose codes are modelled, whatever the model's own seed
    common: dict[str, Any]  # keys of AutoregressiveConfig that every variant shares
    variants: dict[
        str, dict[str, Any]
    ]  # the keys in which each differs; under `optimizer`, those of its training
    codes: CodesConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    samplers: dict[
        str, dict[str, Any]
    ]  # variants that are drawn otherwise, and the keys of `sampling` in which
    evaluation: GenerationEvaluationConfig

    def __post_init__(self):
        require_seed(self.tokenizer_seed, "tokenizer_seed")


@dataclass(frozen=True)
class CaptionsConfig(Strict):
    """Texts of the images that the tokenizer of a text-conditional model was trained on."""

    # "records": the captions in the records of the shards; "names": sentences built from the names there; or a COCO captions file, with
    # {split} in its path filled in, and `${name}` as in `data.source`
    source: str
    per_image: int  # sentences for an image, where they are built
    seed: int

    def __post_init__(self):
        object.__setattr__(self, "source", filled_in(self.source))
        require(self.per_image > 0, f"per_image must be at least 1, it is {self.per_image}")
        require_seed(self.seed)


@dataclass(frozen=True)
class DualEncoderConfig(Strict):
    """An image and a text encoder with a common space, by which text-conditional samples are judged."""

    layers: int  # of the text encoder
    width: int
    heads: int
    dim: int  # of the common space
    dropout: float
    vocabulary: int
    max_tokens: int
    image_size: int  # px at which EfficientNet-Lite0 sees an image; small ones cost little
    # Of every training image, besides the clean one, so that it also knows what is blurred or blocky.
    degraded_views: int
    reconstructions: list[
        str
    ]  # tokenizer variants whose reconstructions of the training images it learns from too
    optimizer: OptimizerConfig

    def __post_init__(self):
        _require_text_size(self.vocabulary, self.max_tokens)
        require(
            self.degraded_views >= 0,
            f"degraded_views must not be negative, it is {self.degraded_views}",
        )
        require(
            32 <= self.image_size <= 224,
            f"image_size must lie in 32 ... 224 px, it is {self.image_size}",
        )
        for name in ("layers", "dim"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        _require_heads(self.width, self.heads)
        require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), it is {self.dropout}")


@dataclass(frozen=True)
class TextEvaluationConfig(Strict):
    """Prompts for which samples are drawn, and how these are judged."""

    prompts: int  # of each kind: seen names in new words, held-out names
    candidates: int  # captions among which the right one has to be found; chance is 1 / candidates
    kid_subset_size: int
    neighbours: int
    top_p_sweep: list[float]  # at which held-out names are drawn too, to compare; empty = no sweep
    guidance_sweep: list[float]  # likewise
    seed: int

    def __post_init__(self):
        require(self.candidates > 1, f"candidates must be at least 2, it is {self.candidates}")
        require(
            self.candidates <= self.prompts,
            f"candidates {self.candidates} are drawn from the {self.prompts} prompts: there must be as many",
        )
        require(
            2 <= self.kid_subset_size <= self.prompts,
            f"kid_subset_size must lie in 2 ... {self.prompts}, it is {self.kid_subset_size}",
        )
        require(
            1 <= self.neighbours < self.prompts,
            f"neighbours must lie in 1 ... {self.prompts - 1}, it is {self.neighbours}",
        )
        _require_sweeps(self.guidance_sweep, self.top_p_sweep)
        require_seed(self.seed)


@dataclass(frozen=True)
class TextSection(Strict):
    """Text-conditional models."""

    tokenizer_seed: int
    captions: CaptionsConfig
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    codes: CodesConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    samplers: dict[str, dict[str, Any]]  # as in AutoregressiveSection
    evaluation: TextEvaluationConfig
    dual_encoder: DualEncoderConfig

    def __post_init__(self):
        require_seed(self.tokenizer_seed, "tokenizer_seed")
