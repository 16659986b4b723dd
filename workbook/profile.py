"""Profiles (`profiles/*.yaml`): sections, variants, and which values go together.

A profile says in what it differs from its `base`, another profile, or from the defaults of the
dataclasses; those of evaluation and applications are the profile quick's. It is checked as a whole;
what is wrong is a `ConfigError` that says what to do.
"""

from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT, AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.strict import ConfigError, from_dict, require, require_known, to_dict
from sitlib.train.config import (
    AdversarialConfig,
    CaptionsConfig,
    CodesConfig,
    DataConfig,
    DualEncoderConfig,
    EngineConfig,
    OptimizerConfig,
    TokenizerLossConfig,
    TokenizerTraining,
)
from workbook.params import fill_in, merge, read_yaml
from workbook.paths import resolve

LPIPS_MIN_SIZE = {"alex": 31, "vgg": 16}  # px
Config = TypeVar("Config")
Changes = dict[str, Any]  # keys in which a variant differs from what its section says
Variants = dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], Changes]  # their names name files
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
    variants: Variants
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
        a, b = self.candidates, self.prompts
        require(a <= b, f"candidates {a} are drawn from the {b} prompts: there must be as many")
        _require_fewer(self, self.prompts, self.prompts)


def _require_fewer(config: Any, images: int, smallest_set: int) -> None:
    """KID subsets and nearest neighbors come from sets of images that must be large enough."""
    a, b = config.kid_subset_size, config.neighbors
    require(a <= images, f"kid_subset_size must lie in 2 ... {images}, it is {a}")
    sentence = f"neighbors must lie in 1 ... {smallest_set - 1}, below the number of images"
    require(b < smallest_set, f"{sentence}, it is {b}")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GeneratorSection:
    """Models over codes: what they share, and their variants."""

    name: ClassVar[str]
    common: AutoregressiveConfig
    variants: Variants  # of AutoregressiveConfig; under `optimizer`, of their training
    tokenizer_seed: NonNegativeInt = 0  # of the tokenizer whose codes are modelled
    codes: CodesConfig = CodesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    samplers: dict[str, Changes] = field(default_factory=dict)  # variants with other sampling


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AutoregressiveSection(GeneratorSection):
    """Class-conditional models."""

    name: ClassVar[str] = "autoregressive"
    evaluation: GenerationEvaluationConfig = GenerationEvaluationConfig()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TextSection(GeneratorSection):
    """Text-conditional models."""

    name: ClassVar[str] = "text"
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
    temperatures: list[PositiveFloat] = Field([0.7, 1.0], min_length=1)
    repeated: PositiveInt = 50  # images of which several samples are drawn
    samples: AtLeastTwo = 4  # that many
    previews: AtLeastTwo = 8  # of one prompt
    preview_prompts: AtLeastTwo = 60  # for which previews are judged
    rounds: PositiveInt = 5  # of timing
    kid_subset_size: AtLeastTwo = 100
    seed: NonNegativeInt = 0

    def __post_init__(self):
        for name in ("repeated", "kid_subset_size"):
            sentence = f"{name} must not be more than images = {self.images}"
            require((number := getattr(self, name)) <= self.images, f"{sentence}, it is {number}")


@dataclass(frozen=True, config=STRICT)
class Profile:
    """A whole profile. Every variant that it lists has been checked."""

    data: DataConfig
    tokenizer: TokenizerSection
    autoregressive: AutoregressiveSection
    text: TextSection
    applications: ApplicationsConfig
    engine: EngineConfig = EngineConfig()

    def __post_init__(self):
        tokenizers, classes = self.tokenizer.variants, self.autoregressive.variants
        texts, judge = self.text.variants, self.text.dual_encoder
        both = ", ".join(sorted(set(classes) & set(texts)))
        require(not both, f"autoregressive.variants and text.variants both have {both}")
        for variant in tokenizers:
            self._check_tokenizer(variant)
        for variant in (*classes, *texts):
            self._check_generator(variant)
        for where, names, known in (
            ("autoregressive.samplers", self.autoregressive.samplers, classes),
            ("text.samplers", self.text.samplers, texts),
            ("text.dual_encoder.reconstructions", judge.reconstructions, tokenizers),
        ):
            for name in names:
                require_known(name, known, where)
        if classes and texts:  # applications need a model of each kind
            self._check_applications()

    def _check_tokenizer(self, variant: str) -> None:
        config, training = self.tokenizer_variant(variant), self.tokenizer_training(variant)
        name, loss, size = f"tokenizer.{variant}", training.loss, config.size
        latents = self.tokenizer_data(variant).normalization_views * config.tokens_per_scale
        most = max(config.codebook_sizes)
        sentence = f"{name} has {most} codes but k-means starts from {latents} vectors"
        remedy = "raise data.normalization_views or lower num_codes"
        require(most <= latents, f"{sentence}: {remedy}")
        sentence = f"a discriminator needs sizes that are multiples of 8 px, {name} has {size}"
        require(not training.adversarial.weight or size % 8 == 0, sentence)
        previews = config.levels > 0 and config.decoder_attention == "scale_causal"
        sentence = f"loss.multiscale of {name} needs levels and decoder_attention: scale_causal"
        require(previews or not loss.multiscale, sentence)
        least = LPIPS_MIN_SIZE[loss.lpips_net]
        sentence = f"LPIPS-{loss.lpips_net} needs at least {least} px but {name} has {size}"
        require(not loss.lpips or size >= least, sentence)
        start, seen = training.starts_from, [variant]
        while start in self.tokenizer.variants and start not in seen:
            seen.append(start)
            start = self.tokenizer.variants[start].get("starts_from")
        sentence = f"{name} starts_from itself, by way of {', '.join(seen)}: name trained weights"
        require(start not in seen, sentence)
        self._check_shares(name, training.optimizer)

    def _check_generator(self, variant: str) -> None:
        config, optimizer = self.autoregressive_variant(variant), self.generator_optimizer(variant)
        section = self.generator_section(variant)
        name, is_text = f"{section.name}.{variant}", section is self.text
        self.sampler(variant)
        where, tokenizer = f"{section.name}.variants.{variant}.tokenizer", config.tokenizer
        require_known(tokenizer, self.tokenizer.variants, where)
        built, first = self.tokenizer_variant(tokenizer).size, next(iter(section.variants))
        size = self.tokenizer_variant(self.autoregressive_variant(first).tokenizer).size
        sentence = f"{name} is judged beside {first} on images of {size} px, but its tokenizer"
        require(built == size, f"{sentence} {tokenizer} is built for {built} px")
        which = "a model of the section text needs" if is_text else "only those of text have"
        sentence = f"{name}: `text` describes a text encoder, which {which}"
        require(is_text == (config.text is not None), sentence)
        sentence = f"{name}: captions keep no images apart: set data.validation_percent: 0"
        require(not is_text or not self.tokenizer_data(tokenizer).validation_percent, sentence)
        sentence = f"{name}: text_noise is of texts, but this model is told classes"
        require(is_text or not config.text_noise, sentence)
        self._check_shares(name, optimizer)

    def _check_shares(self, name: str, optimizer: OptimizerConfig) -> None:
        size, count = optimizer.batch_size, self.engine.world_size
        sentence = f"engine: {count} processes share every batch equally, but batch_size of {name}"
        require(size % count == 0, f"{sentence} is {size}")

    def _check_applications(self) -> None:
        section, candidates = self.applications, self.text.evaluation.candidates
        require_known(section.baseline, self.tokenizer.variants, "applications.baseline")
        sentence = f"applications.images must be at least text.evaluation.candidates = {candidates}"
        require(section.images >= candidates, f"{sentence}, it is {section.images}")
        sentence = "tokenizer.evaluation.sets needs an entry `extra`, which applications upsample"
        require("extra" in self.tokenizer.evaluation.sets, sentence)
        for kind, models in (("class", self.autoregressive), ("text", self.text)):
            key, variant = f"applications.{kind}_generator", getattr(section, f"{kind}_generator")
            require_known(variant, models.variants, key)
            tokenizer = self.autoregressive_variant(variant).tokenizer
            config = self.tokenizer_variant(tokenizer)
            attention = {config.encoder_attention, config.decoder_attention}
            sentence = f"{key}: {variant} upsamples images, so its tokenizer {tokenizer} needs"
            needs = "three levels or more and scale-causal attention on both sides"
            require(config.levels >= 3 and attention == {"scale_causal"}, f"{sentence} {needs}")

    def tokenizer_variant(self, variant: str) -> TokenizerConfig:
        """`tokenizer.common` with the variant's keys.

        A variant with `codes_from` starts from that one instead and may change its decoder only.
        """
        variants, where = self.tokenizer.variants, f"tokenizer.variants.{variant}"
        require_known(variant, variants, "tokenizer variant")
        training = ("loss", "adversarial", "optimizer", "codes_from", "starts_from", "data")
        changes = {key: x for key, x in variants[variant].items() if key not in training}
        base, first = variants[variant].get("codes_from"), variant.removesuffix("_second")
        sentence = f"{where}.codes_from must be {first}, whose codes a variant of this name keeps"
        require(base == first or variant == first, f"{sentence}, it is {base}")
        if base is None:
            return _changed(self.tokenizer.common, changes, where)
        require_known(str(base), variants, f"{where}.codes_from")
        sentence = f"{where}.codes_from: {base} has codes of another variant itself; name that one"
        require("codes_from" not in variants[base], sentence)
        config = _changed(self.tokenizer_variant(base), changes, where)
        fixed = ", ".join(key for key in changes if not key.startswith("decoder_"))
        sentence = f"{where}: {fixed} cannot differ from {base}, whose codes it takes over"
        require(not fixed, f"{sentence}: only decoder_* can")
        return config

    def tokenizer_training(self, variant: str) -> TokenizerTraining:
        """Loss, adversarial term and optimizer of the section with the variant's keys."""
        section, where = self.tokenizer, f"tokenizer.variants.{variant}"
        require_known(variant, section.variants, "tokenizer variant")
        changes = section.variants[variant]
        values: dict[str, Any] = {key: changes.get(key) for key in ("codes_from", "starts_from")}
        for key in ("loss", "adversarial", "optimizer"):
            part = _changed(getattr(section, key), changes.get(key, {}), f"{where}.{key}")
            values[key] = to_dict(part)
        return from_dict(TokenizerTraining, values, where)

    def tokenizer_data(self, variant: str) -> DataConfig:
        """`data` with the variant's keys, and the size that the variant is built for.

        A second decoder learns on the images of its codes.
        """
        size, variants = self.tokenizer_variant(variant).size, self.tokenizer.variants
        data, where = self.data, f"tokenizer.variants.{variant}"
        for name in (variants[variant].get("codes_from") or variant, variant):
            changes = variants[name].get("data", {})
            data = _changed(data, changes, f"{where}.data")
            sentence = f"{where}.data.size: views are as large as the tokenizer; set {where}.size"
            require("size" not in changes, sentence)
        return replace(data, size=size)

    def generator_section(self, variant: str) -> AutoregressiveSection | TextSection:
        """The section that has a variant of this name."""
        variants = self.autoregressive.variants | self.text.variants
        require_known(variant, variants, "autoregressive or text variant")
        return self.text if variant in self.text.variants else self.autoregressive

    def autoregressive_variant(self, variant: str) -> AutoregressiveConfig:
        """`common` of the variant's section with the variant's keys."""
        section = self.generator_section(variant)
        changes = {key: x for key, x in section.variants[variant].items() if key != "optimizer"}
        return _changed(section.common, changes, f"{section.name}.variants.{variant}")

    def generator_optimizer(self, variant: str) -> OptimizerConfig:
        """`optimizer` of the variant's section with the variant's keys."""
        section = self.generator_section(variant)
        changes = section.variants[variant].get("optimizer", {})
        return _changed(section.optimizer, changes, f"{section.name}.variants.{variant}.optimizer")

    def sampler(self, variant: str) -> SamplingConfig:
        """`sampling` of the variant's section with the keys under the variant in `samplers`."""
        section = self.generator_section(variant)
        changes = section.samplers.get(variant, {})
        return _changed(section.sampling, changes, f"{section.name}.samplers.{variant}")


def _changed(config: Config, changes: Changes, where: str) -> Config:
    """A configuration with other values under some of its keys."""
    sentence = f"{where} lists the keys in which the variant differs, it is {changes!r}"
    require(isinstance(changes, dict), sentence)
    return from_dict(type(config), to_dict(config) | changes, where)


def load_profile(name: str | Path = "quick") -> Profile:
    """Read and check `profiles/<name>.yaml`, or the file at a path that ends in .yaml.

    Raises:
        ConfigError: no such profile, or a key in it that is unknown, missing, twice there, of a
            wrong type or in an impossible combination.
    """
    values, parameters = _read_profile(name), resolve("params.yaml")
    values = fill_in(values, read_yaml(parameters) if parameters.exists() else {})
    return from_dict(Profile, values, _path(name).name)


def _path(name: str | Path) -> Path:
    return resolve(name if str(name).endswith((".yaml", ".yml")) else f"profiles/{name}.yaml")


def _read_profile(name: str | Path, *above: Path) -> dict[str, Any]:
    """Values of a profile file laid over those of its base, and so on."""
    path = _path(name)
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "(none)"
        raise ConfigError(f"There is no profile {str(name)!r}: choose one of {there}.")
    values = read_yaml(path)
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str) or _path(base) in (path, *above):
        raise ConfigError(f"{path.name}: base names another profile, it is {base!r}.")
    return merge(_read_profile(base, path, *above), values)
