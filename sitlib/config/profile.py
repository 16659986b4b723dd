"""A whole profile file (`profiles/*.yaml`): its sections, and the variants that they describe."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from sitlib.config.applications import ApplicationsConfig
from sitlib.config.engine import EngineConfig
from sitlib.config.generation import (
    AutoregressiveConfig,
    AutoregressiveSection,
    SamplingConfig,
    TextSection,
)
from sitlib.config.strict import ConfigError, Strict, changes_of, from_dict, known, require, to_dict
from sitlib.config.tokenizer import (
    DataConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerSection,
    TokenizerTraining,
)
from sitlib.paths import resolve

_TRAINING_KEYS = ("loss", "adversarial", "optimizer", "codes_from", "data")


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
    """Reads and checks `profiles/<name>.yaml` (or the file at a path that ends in .yaml).

    Raises:
        ConfigError: no such profile, or a key in it that is unknown, missing, of a wrong type or in an impossible combination.
    """
    path = resolve(name if str(name).endswith((".yaml", ".yml")) else f"profiles/{name}.yaml")
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            f"There is no profile {str(name)!r}: choose one of {', '.join(there) or '(none found)'}."
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path.name} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    return from_dict(Profile, values, where=path.name)
