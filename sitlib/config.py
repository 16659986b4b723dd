"""Typed configuration: what a profile file (`profiles/*.yaml`) may say, and nothing else.

Every key has a type and a default-free place in the profile, so that two profiles always hold the same keys. Unknown keys, wrong
types and impossible combinations are refused with a sentence that says what to do. The classes know nothing of models or data.
"""

import dataclasses
import difflib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pywt
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sitlib.paths import resolve

Attention = Literal["full", "scale_causal"]
Kind = Literal["crops", "wide"]


class ConfigError(ValueError):
    """A profile or parameter that cannot be used; the message says which key and what would be accepted."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


class _Strict:
    """Base of every section: frozen by its decorator; extra keys and silent type conversions are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class DataConfig(_Strict):
    """Which images, and how training views are cut from them."""

    source: str  # folder of WebDataset shards (`<split>-*.tar`), or an image folder (`split/class/name.jpg`, `class/name.jpg`)
    size: int  # side of a view, px
    min_crop: float  # smallest side of a random crop, as a fraction of the photograph's short side
    flip: bool  # random horizontal flips
    normalisation_views: int  # training views from which the per-scale mean and deviation are measured

    def __post_init__(self):
        _require(self.size > 0, f"size must be positive, it is {self.size}")
        _require(0 < self.min_crop <= 1, f"min_crop is a fraction in (0, 1], it is {self.min_crop}")
        _require(self.normalisation_views > 0, "normalisation_views must be at least 1")


@dataclass(frozen=True)
class TokenizerConfig(_Strict):
    """One tokenizer: its spectral geometry, its transformers and its codebooks (SIT, arXiv 2412.09607).

    `levels=0` is ViT-VQGAN (arXiv 2110.04627): no DWT, one scale, `grid` x `grid` pixel patches.
    """

    size: int  # side of the images it is built for, px
    levels: int  # DWT levels L; the model has S = L + 1 scales
    grid: int  # tokens per side and scale: N = grid * grid
    wavelet: str  # any discrete PyWavelets wavelet
    encoder_layers: int
    encoder_width: int
    encoder_heads: int
    encoder_attention: Attention  # scale_causal: a token sees its own and coarser scales (SCE)
    decoder_layers: int
    decoder_width: int
    decoder_heads: int
    decoder_attention: Attention  # scale_causal: SCD
    mlp_ratio: float  # width of a block's MLP / width of the block
    typed_parameters: bool  # ADTransformer: own q, k, v, norms and MLP for approximation and detail tokens
    scale_mixing: (
        bool  # one linear map across the scales of a place before each transformer; false: as in the paper
    )
    num_codebooks: int  # 2: one for approximation codes, one for detail codes; 1: shared
    num_codes: int  # codes in each codebook
    code_dim: int  # dimension of the l2-normalised lookup space
    code_learning: Literal[
        "gradient", "ema"
    ]  # codes follow the codebook loss, or moving averages of what chose them
    code_decay: float  # of these moving averages
    code_gradient: Literal["straight_through", "rotation"]  # how gradients pass the lookup backwards

    def __post_init__(self):
        for name in ("size", "grid", "encoder_layers", "decoder_layers", "num_codes", "code_dim"):
            _require(getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.levels >= 0, f"levels must be 0 (ViT-VQGAN) or more, it is {self.levels}")
        _require(self.mlp_ratio > 0, f"mlp_ratio must be positive, it is {self.mlp_ratio}")
        unit = self.grid * 2**self.levels
        _require(
            self.size % unit == 0,
            f"size {self.size} cannot be cut into {self.grid}x{self.grid} tokens at every scale of {self.levels} levels: "
            f"use a multiple of grid * 2^levels = {unit}",
        )
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            _require(
                self.mlp_ratio * width >= 1,
                f"mlp_ratio {self.mlp_ratio} leaves no unit of {part}_width {width}",
            )
            _require(
                heads > 0 and width % heads == 0,
                f"{part}_width {width} must be a multiple of {part}_heads {heads}",
            )
        known = pywt.wavelist(kind="discrete")
        _require(
            self.wavelet in known, f"wavelet {self.wavelet!r} is not known{_nearest(self.wavelet, known)}"
        )
        _require(self.num_codebooks in (1, 2), f"num_codebooks must be 1 or 2, it is {self.num_codebooks}")
        _require(0 < self.code_decay < 1, f"code_decay must lie in (0, 1), it is {self.code_decay}")

    @property
    def num_scales(self) -> int:
        return self.levels + 1

    @property
    def tokens_per_scale(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class OptimiserConfig(_Strict):
    """AdamW with linear warm-up and cosine decay, gradients clipped by norm."""

    steps: int
    batch_size: int
    learning_rate: float  # peak
    final_learning_rate: float  # at the last step
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    ema_decay: float  # of the moving average of the weights, which is what is kept in the end; 0 keeps the last weights
    log_every: int  # steps between rows of the training curve
    checkpoint_every: int  # steps between resumable checkpoints

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            _require(getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}")
        _require(
            0 <= self.warmup_steps <= self.steps,
            f"warmup_steps {self.warmup_steps} must lie in 0 ... steps = {self.steps}",
        )
        _require(
            0 <= self.final_learning_rate <= self.learning_rate,
            f"final_learning_rate {self.final_learning_rate} must lie in 0 ... learning_rate = {self.learning_rate}",
        )
        _require(
            self.checkpoint_every % self.log_every == 0,
            f"checkpoint_every {self.checkpoint_every} must be a multiple of log_every {self.log_every}",
        )
        _require(self.learning_rate > 0, f"learning_rate must be positive, it is {self.learning_rate}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), it is {getattr(self, name)}")
        _require(self.clip_norm > 0, f"clip_norm must be positive, it is {self.clip_norm}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), it is {self.ema_decay}")


@dataclass(frozen=True)
class TokenizerLossConfig(_Strict):
    """Weights of the tokenizer's loss, in pixel space in [-1, 1] after the inverse DWT (SIT section 4; ViT-VQGAN section 3)."""

    l2: float
    lpips: float
    lpips_net: Literal["alex", "vgg"]
    commitment: float  # beta: pulls encoder outputs to their codes
    codebook: float  # pulls codes to the encoder outputs that chose them
    # Steps without use after which a code is moved onto a current encoder output; 0 = never.
    restart_after: int
    # Steps over which the decoder's input turns from the encoder's outputs into codes; 0 = codes from the first step on.
    quantization_ramp: int

    def __post_init__(self):
        for name in ("l2", "lpips", "commitment", "codebook", "restart_after", "quantization_ramp"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")


@dataclass(frozen=True)
class AdversarialConfig(_Strict):
    """The adversarial term: a discriminator that learns beside the tokenizer, and when it may speak (SIT section 4)."""

    weight: float  # of the term in the tokenizer's loss, at the end of the ramp; 0 = no discriminator
    start: int  # step at which the discriminator begins to learn
    warmup: int  # steps for which it learns alone
    ramp: int  # steps over which the weight then grows from 0
    channels: int  # of the discriminator at full size; they double with every halving, up to 8 times
    learning_rate: float
    r1: float  # weight of the penalty on the gradient at real images (gamma / 2); 0 = off
    r1_every: int  # steps between penalties, each weighted with this number

    def __post_init__(self):
        for name in ("weight", "start", "warmup", "ramp", "r1"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, it is {getattr(self, name)}")
        for name in ("channels", "r1_every"):
            _require(getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}")
        _require(self.learning_rate > 0, f"learning_rate must be positive, it is {self.learning_rate}")


@dataclass(frozen=True)
class TokenizerTraining(_Strict):
    """How a variant is trained; `codes_from` names the variant whose encoder and codebooks it takes over, frozen."""

    loss: TokenizerLossConfig
    adversarial: AdversarialConfig
    optimiser: OptimiserConfig
    codes_from: str | None = None

    def __post_init__(self):
        ramp, steps = self.loss.quantization_ramp, self.optimiser.steps
        _require(ramp < steps, f"quantization_ramp {ramp} must be shorter than training, {steps} steps")
        alone = self.adversarial.start + self.adversarial.warmup
        _require(
            not self.adversarial.weight or alone < steps,
            f"the adversarial term would never act: start + warmup = {alone} of {steps} steps",
        )


@dataclass(frozen=True)
class EvaluationSet(_Strict):
    """Held-out views of one kind of images."""

    source: str  # as data.source; its test split
    views: int
    kind: Kind  # multi-scale crops, or wide views of whole images

    def __post_init__(self):
        _require(self.views >= 2, f"views must be at least 2 for a standard error, it is {self.views}")


@dataclass(frozen=True)
class TokenizerEvaluationConfig(_Strict):
    """Held-out views on which a tokenizer is judged; the first set is the one that tables call held-out."""

    sets: dict[str, EvaluationSet]
    seed: int  # of the views, the same for every model
    inception: bool  # also the standard FID and IS, whose network is downloaded (extra "inception")

    def __post_init__(self):
        _require(self.seed >= 0, f"seed must not be negative, it is {self.seed}")
        _require(len(self.sets) > 0, "sets must name at least one set of images")


@dataclass(frozen=True)
class TokenizerSection(_Strict):
    common: dict[str, Any]  # keys of TokenizerConfig that every variant shares
    # The keys in which each variant differs; under `loss`, `adversarial` and `optimiser` those of its training, and with
    # `codes_from` the variant whose encoder and codebooks it takes over.
    variants: dict[str, dict[str, Any]]
    loss: TokenizerLossConfig
    adversarial: AdversarialConfig
    optimiser: OptimiserConfig
    evaluation: TokenizerEvaluationConfig


@dataclass(frozen=True)
class AutoregressiveConfig(_Strict):
    """A decoder-only transformer over the codes of one tokenizer variant."""

    tokenizer: str  # name of the tokenizer variant whose codes it models
    layers: int
    width: int
    heads: int
    mlp_ratio: float
    dropout: float
    class_dropout: float  # share of training samples whose class is hidden, for classifier-free guidance

    def __post_init__(self):
        _require(self.layers > 0, f"layers must be at least 1, it is {self.layers}")
        _require(self.mlp_ratio > 0, f"mlp_ratio must be positive, it is {self.mlp_ratio}")
        _require(
            self.heads > 0 and self.width % self.heads == 0,
            f"width {self.width} must be a multiple of heads {self.heads}",
        )
        for name in ("dropout", "class_dropout"):
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), it is {getattr(self, name)}")


@dataclass(frozen=True)
class CodesConfig(_Strict):
    """Wide views from which codes are extracted once, flips and crops included."""

    views_per_image: int  # of every labelled training photograph; each view and its mirror image
    held_out_views: int
    seed: int

    def __post_init__(self):
        _require(
            self.views_per_image > 0 and self.held_out_views > 0,
            "views_per_image and held_out_views must be at least 1",
        )


@dataclass(frozen=True)
class SamplingConfig(_Strict):
    """How codes are drawn."""

    temperature: float
    top_k: int  # 0 = off
    top_p: float  # 1.0 = off
    guidance: float  # classifier-free guidance weight w: uncond + w (cond - uncond); 1.0 = off
    batch_size: int
    seed: int

    def __post_init__(self):
        _require(
            self.temperature > 0, f"temperature must be positive, it is {self.temperature}; top_k 1 is greedy"
        )
        _require(self.top_k >= 0, f"top_k must be 0 (off) or more, it is {self.top_k}")
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], it is {self.top_p}")
        _require(self.batch_size > 0, f"batch_size must be at least 1, it is {self.batch_size}")


@dataclass(frozen=True)
class GenerationEvaluationConfig(_Strict):
    """Samples and held-out views between which FD-Lite0 and KID are measured."""

    samples: int
    reference_views: int
    kid_subset_size: int
    seed: int

    def __post_init__(self):
        smallest = min(self.samples, self.reference_views)
        _require(
            2 <= self.kid_subset_size <= smallest,
            f"kid_subset_size must lie in 2 ... {smallest}, it is {self.kid_subset_size}",
        )


@dataclass(frozen=True)
class AutoregressiveSection(_Strict):
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    codes: CodesConfig
    optimiser: OptimiserConfig
    sampling: SamplingConfig
    evaluation: GenerationEvaluationConfig


@dataclass(frozen=True)
class Profile(_Strict):
    """A whole profile, validated."""

    data: DataConfig
    tokenizer: TokenizerSection
    autoregressive: AutoregressiveSection

    def __post_init__(self):
        for variant in self.tokenizer.variants:
            config, training = self.tokenizer_variant(variant), self.tokenizer_training(variant)
            vectors = self.data.normalisation_views * config.tokens_per_scale
            _require(
                config.num_codes <= vectors,
                f"tokenizer.{variant} has {config.num_codes} codes but k-means starts from {vectors} vectors: "
                "raise data.normalisation_views or lower num_codes",
            )
            _require(
                not training.adversarial.weight or config.size % 8 == 0,
                f"a discriminator needs sizes that are multiples of 8 px, tokenizer.{variant} has size {config.size}",
            )
            smallest = {"alex": 31, "vgg": 16}[training.loss.lpips_net]
            _require(
                not training.loss.lpips or config.size >= smallest,
                f"LPIPS-{training.loss.lpips_net} needs at least {smallest} px but tokenizer.{variant} has size {config.size}",
            )
        for variant in self.autoregressive.variants:
            name = self.autoregressive_variant(variant).tokenizer
            _known(name, self.tokenizer.variants, f"autoregressive.variants.{variant}.tokenizer")
            size = self.tokenizer_variant(name).size
            _require(
                size == self.data.size,
                f"autoregressive.{variant} needs a tokenizer of data.size {self.data.size} px, {name} is built for {size} px",
            )

    def tokenizer_variant(self, variant: str) -> TokenizerConfig:
        """`tokenizer.common` with the keys of `tokenizer.variants.<variant>` laid over it.

        A variant with `codes_from` starts from that variant's keys instead, and may change those of its decoder only.
        """
        section = self.tokenizer
        _known(variant, section.variants, "tokenizer variant")
        own = {key: value for key, value in section.variants[variant].items() if key not in _TRAINING_KEYS}
        where = f"tokenizer.variants.{variant}"
        base = section.variants[variant].get("codes_from")
        if variant.endswith("_second") and base != variant.removesuffix("_second"):
            raise ConfigError(
                f"{where}.codes_from must be {variant.removesuffix('_second')}, on which the pipeline's stage of this name depends, "
                f"it is {base}."
            )
        if base is None:
            return from_dict(TokenizerConfig, {**section.common, **own}, where=where)
        _known(str(base), section.variants, f"{where}.codes_from")
        if "codes_from" in section.variants[base]:
            raise ConfigError(
                f"{where}.codes_from: {base} has codes of another variant itself; name that one."
            )
        config = from_dict(TokenizerConfig, {**to_dict(self.tokenizer_variant(base)), **own}, where=where)
        changed = [key for key in own if not key.startswith("decoder_")]
        if changed:
            raise ConfigError(
                f"{where}: {', '.join(changed)} cannot differ from {base}, whose codes it takes over: only decoder_* can."
            )
        return config

    def tokenizer_training(self, variant: str) -> TokenizerTraining:
        """Loss, adversarial term and optimiser of the section with the variant's own keys laid over them."""
        section = self.tokenizer
        _known(variant, section.variants, "tokenizer variant")
        own, where = section.variants[variant], f"tokenizer.variants.{variant}"
        parts = {}
        for name in ("loss", "adversarial", "optimiser"):
            changes = own.get(name, {})
            if not isinstance(changes, dict):
                raise ConfigError(
                    f"{where}.{name} lists the keys in which the variant differs, it is {changes!r}."
                )
            parts[name] = {**to_dict(getattr(section, name)), **changes}
        return from_dict(TokenizerTraining, {**parts, "codes_from": own.get("codes_from")}, where=where)

    def autoregressive_variant(self, variant: str) -> AutoregressiveConfig:
        """`autoregressive.common` with the keys of `autoregressive.variants.<variant>` laid over it."""
        section = self.autoregressive
        return _merge(AutoregressiveConfig, section.common, section.variants, variant, "autoregressive")


def load_profile(name: str | Path = "quick") -> Profile:
    """Reads and checks `profiles/<name>.yaml` (or the file at a path that ends in .yaml).

    Raises:
        ConfigError: no such profile, or a key in it that is unknown, missing, of a wrong type or in an impossible combination.
    """
    path = resolve(name if str(name).endswith((".yaml", ".yml")) else f"profiles/{name}.yaml")
    if not path.exists():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"There is no profile {str(name)!r}: choose one of {', '.join(known) or '(none found)'}."
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from None
    return from_dict(Profile, values, where=path.name)


def from_dict(cls: type, values: dict[str, Any], where: str = "configuration") -> Any:
    """A dataclass of this module from plain values, strictly.

    Raises:
        ConfigError: one line for every key that is wrong, with the nearest known key where one was misspelt.
    """
    try:
        return TypeAdapter(cls).validate_json(
            json.dumps(values)
        )  # strict about types, yet takes mappings for classes
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(cls, problem, where) for problem in error.errors())) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values of a dataclass of this module; `from_dict` takes them back."""
    return dataclasses.asdict(config)


def digest(*parts: Any) -> str:
    """16 hexadecimal digits that name a combination of configurations and plain values; equal parts give equal digests."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


_TRAINING_KEYS = ("loss", "adversarial", "optimiser", "codes_from")


def _merge(cls: type, common: dict, variants: dict[str, dict], variant: str, section: str) -> Any:
    _known(variant, variants, f"{section} variant")
    return from_dict(cls, {**common, **variants[variant]}, where=f"{section}.variants.{variant}")


def _known(name: str, known: dict[str, Any], what: str) -> None:
    if name not in known:
        raise ConfigError(
            f"{what}: {name!r} is not known; the profile has {', '.join(known)}{_nearest(name, known)}."
        )


def _nearest(name: str, known) -> str:
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _sentence(cls: type, problem: dict[str, Any], where: str) -> str:
    """One pydantic problem as a sentence that names the key and what would be accepted."""
    key = ".".join(str(part) for part in problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "unexpected_keyword_argument":
        fields = _fields_at(cls, problem["loc"][:-1])
        return f"{where}: {key} is not a known key{_nearest(str(problem['loc'][-1]), fields)}; known here: {', '.join(fields)}."
    if kind in ("missing", "missing_argument"):
        return f"{where}: {key} is missing; add it."
    if kind == "value_error":
        return f"{where}: {key + ': ' if key else ''}{str(problem['ctx']['error']).rstrip('.')}."
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and "float" in kind else ""
    return f"{where}: {key}: {problem['msg'].lower()}, it is {value!r}{hint}."


def _fields_at(cls: type, location: tuple) -> list[str]:
    for part in location:
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        cls = types.get(part, cls)
    return [field.name for field in dataclasses.fields(cls)]
