"""Profiles (`profiles/*.yaml`): their sections and variants, and what is ablated of them (`ablations/params.yaml`)."""

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sitlib.model.config import AutoregressiveConfig, SamplingConfig, TokenizerConfig
from sitlib.strict import (
    ConfigError,
    Strict,
    changes_of,
    from_dict,
    known,
    require,
    require_seed,
    to_dict,
)
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
from workbook.paths import resolve

ABLATIONS = "ablations/params.yaml"
PARAMETERS = "params.yaml"
Kind = Literal["crops", "wide"]
_TRAINING_KEYS = ("loss", "adversarial", "optimizer", "codes_from", "data")


@dataclass(frozen=True)
class EvaluationSet(Strict):
    """Held-out views of one kind of images."""

    source: str  # as data.source; its test split
    views: int
    kind: Kind  # multi-scale crops, or wide views of whole images

    def __post_init__(self):
        require(
            self.views >= 2, f"views must be at least 2 for a standard error, it is {self.views}"
        )


@dataclass(frozen=True)
class TokenizerEvaluationConfig(Strict):
    """Held-out views on which a tokenizer is judged; the first set is the one that tables call held-out."""

    sets: dict[str, EvaluationSet]
    seed: int  # of the views, the same for every model
    # Also the standard FID and IS, of samples too; their network is downloaded (extra "inception").
    inception: bool

    def __post_init__(self):
        require_seed(self.seed)
        require(len(self.sets) > 0, "sets must name at least one set of images")


@dataclass(frozen=True)
class TokenizerSection(Strict):
    common: dict[str, Any]  # keys of TokenizerConfig that every variant shares
    # The keys in which each variant differs; under `loss`, `adversarial`, `optimizer` and `data` those of its training, and with
    # `codes_from` the variant whose encoder and codebooks it takes over.
    variants: dict[str, dict[str, Any]]
    loss: TokenizerLossConfig
    adversarial: AdversarialConfig
    optimizer: OptimizerConfig
    evaluation: TokenizerEvaluationConfig


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


@dataclass(frozen=True)
class ApplicationsConfig(Strict):
    """Models and images of the applications notebook. Samplers are those of the models' sections, but for what is named here."""

    class_generator: str  # class-conditional variant over the codes of a scale-causal tokenizer
    text_generator: str  # text-conditional, likewise
    baseline: str  # tokenizer variant beside which rates and other data sets are measured
    model_seed: int  # of both generators
    images: int  # held-out images that are upsampled and edited
    temperatures: list[float]  # of upsampling at the largest factor
    repeated: int  # images of which several samples are drawn
    samples: int  # that many
    previews: int  # of one prompt
    preview_prompts: int  # for which previews are judged
    rounds: int  # of timing
    kid_subset_size: int
    seed: int

    def __post_init__(self):
        require(self.images >= 2, f"images must be at least 2, it is {self.images}")
        require(
            1 <= self.repeated <= self.images,
            f"repeated must lie in 1 ... images = {self.images}, it is {self.repeated}",
        )
        for name in ("samples", "previews", "preview_prompts"):
            require(
                getattr(self, name) >= 2, f"{name} must be at least 2, it is {getattr(self, name)}"
            )
        require(self.rounds >= 1, f"rounds must be at least 1, it is {self.rounds}")
        require(
            len(self.temperatures) > 0 and min(self.temperatures) > 0,
            f"temperatures must be positive numbers, they are {self.temperatures}",
        )
        require(
            2 <= self.kid_subset_size <= self.images,
            f"kid_subset_size must lie in 2 ... images = {self.images}, it is {self.kid_subset_size}",
        )
        require_seed(self.seed)
        require_seed(self.model_seed, "model_seed")


@dataclass(frozen=True)
class Profile(Strict):
    """A whole profile, validated."""

    data: DataConfig
    tokenizer: TokenizerSection
    autoregressive: AutoregressiveSection
    text: TextSection
    applications: ApplicationsConfig
    engine: EngineConfig

    def __post_init__(self):
        for variant in self.tokenizer.variants:
            config, training = self.tokenizer_variant(variant), self.tokenizer_training(variant)
            vectors = self.tokenizer_data(variant).normalization_views * config.tokens_per_scale
            require(
                config.num_codes <= vectors,
                f"tokenizer.{variant} has {config.num_codes} codes but k-means starts from {vectors} vectors: "
                "raise data.normalization_views or lower num_codes",
            )
            require(
                not training.adversarial.weight or config.size % 8 == 0,
                f"a discriminator needs sizes that are multiples of 8 px, tokenizer.{variant} has size {config.size}",
            )
            require(
                not training.loss.smaller
                or (config.levels > 0 and config.decoder_attention == "scale_causal"),
                f"loss.smaller of tokenizer.{variant} is about images of the first scales alone, which need several levels and "
                "decoder_attention: scale_causal",
            )
            smallest = {"alex": 31, "vgg": 16}[training.loss.lpips_net]
            require(
                not training.loss.lpips or config.size >= smallest,
                f"LPIPS-{training.loss.lpips_net} needs at least {smallest} px but tokenizer.{variant} has size {config.size}",
            )
        shared = sorted(set(self.autoregressive.variants) & set(self.text.variants))
        require(
            not shared, f"autoregressive.variants and text.variants both have {', '.join(shared)}"
        )
        for name in self.text.dual_encoder.reconstructions:
            known(name, self.tokenizer.variants, "text.dual_encoder.reconstructions")
        for variant in (*self.autoregressive.variants, *self.text.variants):
            config, section = self.autoregressive_variant(variant), self._section_name(variant)
            known(
                config.tokenizer, self.tokenizer.variants, f"{section}.variants.{variant}.tokenizer"
            )
            size, wanted = self.tokenizer_variant(config.tokenizer).size, self.data.size
            require(
                size == wanted,
                f"{section}.{variant} needs a tokenizer of data.size {wanted} px, {config.tokenizer} is built for {size} px",
            )
            self.generator_optimizer(variant)
            self.sampler(variant)
            is_text = variant in self.text.variants
            require(
                is_text == (config.text is not None),
                f"{section}.{variant}: `text` describes a text encoder, which "
                + (
                    "a model of the section text needs"
                    if is_text
                    else "only models of the section text have"
                ),
            )
            require(
                is_text or not config.text_noise,
                f"{section}.{variant}: text_noise is of texts, but this model is told classes",
            )
        for name in ("autoregressive", "text"):
            section = getattr(self, name)
            for variant in section.samplers:
                known(variant, section.variants, f"{name}.samplers")
        self._check_applications()
        self._check_shares()

    def _check_applications(self) -> None:
        section = self.applications
        if not self.autoregressive.variants or not self.text.variants:
            return  # applications need a model of each kind
        known(section.class_generator, self.autoregressive.variants, "applications.class_generator")
        known(section.text_generator, self.text.variants, "applications.text_generator")
        known(section.baseline, self.tokenizer.variants, "applications.baseline")
        candidates = self.text.evaluation.candidates
        require(
            section.images >= candidates,
            f"applications.images must be at least text.evaluation.candidates = {candidates}, captions among which that of an edited image "
            f"has to be found; it is {section.images}",
        )
        require(
            "extra" in self.tokenizer.evaluation.sets,
            "applications: the class-conditional model also upsamples images of other things than it was trained on: "
            "tokenizer.evaluation.sets needs an entry `extra`",
        )
        for variant in (section.class_generator, section.text_generator):
            name = self.autoregressive_variant(variant).tokenizer
            config = self.tokenizer_variant(name)
            require(
                config.levels >= 3
                and config.encoder_attention == config.decoder_attention == "scale_causal",
                f"applications: {variant} upsamples images of 1/8 of the size, so its tokenizer {name} needs three levels or more and "
                "scale-causal attention in encoder and decoder",
            )

    def _check_shares(self) -> None:
        """Every batch can be shared by the processes of the engine."""
        sizes = {
            f"tokenizer.{v}": self.tokenizer_training(v).optimizer for v in self.tokenizer.variants
        }
        engine = self.engine
        for variant in (*self.autoregressive.variants, *self.text.variants):
            name, optimizer = (
                f"{self._section_name(variant)}.{variant}",
                self.generator_optimizer(variant),
            )
            require(
                engine.strategy != "fsdp" or not optimizer.ema_decay,
                f"engine.strategy fsdp keeps no moving average of sharded weights: set ema_decay of {name} to 0.0, or strategy: ddp",
            )
            sizes[name] = optimizer
        for name, optimizer in sizes.items():
            require(
                optimizer.batch_size % engine.world_size == 0,
                f"engine: {engine.world_size} processes share every batch equally, but batch_size of {name} is {optimizer.batch_size}",
            )

    def tokenizer_variant(self, variant: str) -> TokenizerConfig:
        """`tokenizer.common` with the keys of `tokenizer.variants.<variant>` laid over it.

        A variant with `codes_from` starts from that variant's keys instead, and may change those of its decoder only.
        """
        section = self.tokenizer
        known(variant, section.variants, "tokenizer variant")
        own = {
            key: value
            for key, value in section.variants[variant].items()
            if key not in _TRAINING_KEYS
        }
        where = f"tokenizer.variants.{variant}"
        base = section.variants[variant].get("codes_from")
        if variant.endswith("_second") and base != variant.removesuffix("_second"):
            raise ConfigError(
                f"{where}.codes_from must be {variant.removesuffix('_second')}, on which the pipeline's stage of this name depends, "
                f"it is {base}."
            )
        if base is None:
            return from_dict(TokenizerConfig, {**section.common, **own}, where=where)
        known(str(base), section.variants, f"{where}.codes_from")
        if "codes_from" in section.variants[base]:
            raise ConfigError(
                f"{where}.codes_from: {base} has codes of another variant itself; name that one."
            )
        config = from_dict(
            TokenizerConfig, {**to_dict(self.tokenizer_variant(base)), **own}, where=where
        )
        changed = [key for key in own if not key.startswith("decoder_")]
        if changed:
            raise ConfigError(
                f"{where}: {', '.join(changed)} cannot differ from {base}, whose codes it takes over: only decoder_* can."
            )
        return config

    def tokenizer_training(self, variant: str) -> TokenizerTraining:
        """Loss, adversarial term and optimizer of the section with the variant's own keys laid over them."""
        section = self.tokenizer
        known(variant, section.variants, "tokenizer variant")
        own, where = section.variants[variant], f"tokenizer.variants.{variant}"
        parts = {}
        for name in ("loss", "adversarial", "optimizer"):
            parts[name] = {**to_dict(getattr(section, name)), **changes_of(own, name, where)}
        return from_dict(
            TokenizerTraining, {**parts, "codes_from": own.get("codes_from")}, where=where
        )

    def tokenizer_data(self, variant: str) -> DataConfig:
        """`data` with the variant's own keys laid over it, and the size that the variant is built for."""
        known(variant, self.tokenizer.variants, "tokenizer variant")
        variants, where = self.tokenizer.variants, f"tokenizer.variants.{variant}"
        base = variants[variant].get(
            "codes_from", variant
        )  # a second decoder learns on the images of its codes
        changes = changes_of(variants[base], "data", where) | changes_of(
            variants[variant], "data", where
        )
        size = {"size": self.tokenizer_variant(variant).size}
        if "size" in changes:
            raise ConfigError(
                f"{where}.data.size: views are as large as the tokenizer; set {where}.size."
            )
        return from_dict(DataConfig, {**to_dict(self.data), **changes, **size}, f"{where}.data")

    def generator_section(self, variant: str) -> AutoregressiveSection | TextSection:
        """The section that has a variant of this name."""
        return getattr(self, self._section_name(variant))

    def autoregressive_variant(self, variant: str) -> AutoregressiveConfig:
        """`common` of its section with the keys of `variants.<variant>` laid over it."""
        name, section = self._section_name(variant), self.generator_section(variant)
        own = {key: value for key, value in section.variants[variant].items() if key != "optimizer"}
        return from_dict(
            AutoregressiveConfig, {**section.common, **own}, f"{name}.variants.{variant}"
        )

    def generator_optimizer(self, variant: str) -> OptimizerConfig:
        """`optimizer` of its section with the variant's own keys laid over it."""
        section, where = (
            self.generator_section(variant),
            f"{self._section_name(variant)}.variants.{variant}",
        )
        changes = changes_of(section.variants[variant], "optimizer", where)
        return from_dict(
            OptimizerConfig, {**to_dict(section.optimizer), **changes}, f"{where}.optimizer"
        )

    def sampler(self, variant: str) -> SamplingConfig:
        """How codes of a variant are drawn: `sampling` of its section with the variant's keys of `samplers` laid over it."""
        section, where = self.generator_section(variant), f"{self._section_name(variant)}.samplers"
        changes = changes_of(section.samplers, variant, where)
        return from_dict(
            SamplingConfig, {**to_dict(section.sampling), **changes}, f"{where}.{variant}"
        )

    def _section_name(self, variant: str) -> str:
        both = {**self.autoregressive.variants, **self.text.variants}
        known(variant, both, "autoregressive or text variant")
        return "text" if variant in self.text.variants else "autoregressive"


def load_profile(name: str | Path = "quick") -> Profile:
    """Read and check `profiles/<name>.yaml` (or the file at a path that ends in .yaml).

    Raises:
        ConfigError: no such profile, or a key in it that is unknown, missing, of a wrong type or
            in an impossible combination.
    """
    return from_dict(Profile, profile_values(name), where=_profile_path(name).name)


def profile_values(name: str | Path) -> dict[str, Any]:
    """Plain values of a profile, with the folders of params.yaml filled in.

    Raises:
        ConfigError: no such profile, no valid YAML, or a folder that params.yaml does not name.
    """
    path = _profile_path(name)
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(
            f"There is no profile {str(name)!r}: choose one of {there or '(none found)'}."
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path.name} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    file = resolve(PARAMETERS)
    return fill_in(values, (yaml.safe_load(file.read_text()) or {}) if file.exists() else {})


def _profile_path(name: str | Path) -> Path:
    return resolve(name if str(name).endswith((".yaml", ".yml")) else f"profiles/{name}.yaml")


def fill_in(values: Any, parameters: dict[str, Any]) -> Any:
    """Plain values in which every `${name}` is replaced by that text of `parameters`.

    Raises:
        ConfigError: there is no such text.
    """
    if isinstance(values, dict):
        return {key: fill_in(value, parameters) for key, value in values.items()}
    if isinstance(values, list):
        return [fill_in(value, parameters) for value in values]
    if not isinstance(values, str):
        return values
    texts = {name: value for name, value in parameters.items() if isinstance(value, str)}
    for name in re.findall(r"\$\{(\w+)\}", values):
        if name not in texts:
            raise ConfigError(
                f"the path {values!r} names ${{{name}}}, which {PARAMETERS} does not have as a "
                f"text; it has {', '.join(texts) or 'none'}."
            )
        values = values.replace(f"${{{name}}}", texts[name])
    return values


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A profile's plain values with the values at dotted keys replaced; raises ConfigError for a key that is not there."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.get(section, {}) if isinstance(target, dict) else {}
        if name not in target:
            raise ConfigError(f"a change of {key}, which the profile does not have.")
        target[name] = value
    return values


@dataclass(frozen=True)
class AblationRow(Strict):
    """One row of ablations/params.yaml."""

    group: str  # rows of a group are compared with each other
    # Keys in which it differs from `tokenizer.common`, as in a profile's `tokenizer.variants`.
    tokenizer: dict[str, Any]
    generate: bool = (
        False  # also train a model over the codes of its first seed, and judge its samples
    )


@dataclass(frozen=True)
class Rung(Strict):
    """One size of one kind of model over the codes of a tokenizer variant of the profile."""

    kind: Literal["autoregressive", "diffusion"]
    tokenizer: str
    layers: int
    width: int
    heads: int
    learning_rate: float
    steps: int
    batch_size: int
    sampling_steps: int = 25  # of a diffusion model, two evaluations each


@dataclass(frozen=True)
class TextTrial(Strict):
    """A text-conditional model trained otherwise than the profile says."""

    tokenizer: str  # the model is the profile's variant ar_<tokenizer>
    changes: dict[str, Any]  # dotted keys of the profile, in its section `text`

    def __post_init__(self):
        others = [key for key in self.changes if not key.startswith("text.")]
        require(
            not others,
            f"a trial of a text-conditional model changes keys of `text`, not {', '.join(others)}",
        )

    @property
    def variant(self) -> str:
        return f"ar_{self.tokenizer}"

    def profile_of(self, values: dict[str, Any]) -> Profile:
        """The profile in `values` with the changes made.

        Raises:
            ConfigError: no such variant, or a change that the profile refuses.
        """
        profile = from_dict(
            Profile, changed(values, self.changes), where=f"trial of {self.variant}"
        )
        known(self.variant, profile.text.variants, "text variant")
        return profile


@dataclass(frozen=True)
class Ablations(Strict):
    """Content of ablations/params.yaml.

    `profile` is where everything comes from that is not said here, and `common` the keys of it (dotted) that all rows change.
    """

    profile: str
    seeds: list[int]
    common: dict[str, Any]
    rows: dict[str, AblationRow]
    ladder: dict[str, Rung]
    text: dict[str, TextTrial]

    def __post_init__(self):
        require(len(self.seeds) > 0, "seeds must name at least one seed")

    def values(self) -> dict[str, Any]:
        """The profile's plain values."""
        return profile_values(self.profile)

    def profile_of(self, name: str) -> Profile:
        """The profile in which the row is a tokenizer variant, and `ar_<row>` a model over its codes.

        Raises:
            ConfigError: no such row, or a key in it that a profile refuses.
        """
        known(name, self.rows, "ablation")
        values = changed(self.values(), self.common)
        values["tokenizer"]["variants"] = {name: self.rows[name].tokenizer}
        size = self.rows[name].tokenizer.get("size", values["tokenizer"]["common"]["size"])
        generators = {f"ar_{name}": {"tokenizer": name}} if size == values["data"]["size"] else {}
        values["autoregressive"] |= {"variants": generators, "samplers": {}}
        values["text"] |= {"variants": {}, "samplers": {}}
        values["text"]["dual_encoder"]["reconstructions"] = []
        values["applications"]["baseline"] = name
        return from_dict(Profile, values, where=f"ablations/params.yaml: {name}")


def load_ablations(path: str | Path = ABLATIONS) -> Ablations:
    """The rows that there are to be."""
    return from_dict(Ablations, yaml.safe_load(resolve(path).read_text()), where=Path(path).name)
