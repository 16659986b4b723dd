"""Profiles (`profiles/*.yaml`) and their variants.

A profile says in what it differs from its `base`, another profile, or from the defaults of the
dataclasses. It is checked as a whole; what is wrong is a `ConfigError` that says what to do.
"""

import copy
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT, TokenizerConfig
from sitlib.model.generator_config import AutoregressiveConfig, SamplingConfig
from sitlib.strict import ConfigError, from_dict, require, require_known, to_dict
from sitlib.train.config import DataConfig, EngineConfig, OptimizerConfig, TokenizerTraining
from workbook.paths import resolve
from workbook.sections import (
    ApplicationsConfig,
    AutoregressiveSection,
    Changes,
    TextSection,
    TokenizerSection,
)

PARAMETERS = "params.yaml"
TRAINING_KEYS = ("loss", "adversarial", "optimizer", "codes_from", "data")  # of a variant
LPIPS_MIN_SIZE = {"alex": 31, "vgg": 16}  # px
Config = TypeVar("Config")


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
        classes, texts = self.autoregressive.variants, self.text.variants
        both = sorted(set(classes) & set(texts))
        require(not both, f"autoregressive.variants and text.variants both have {', '.join(both)}")
        for variant in (*self.tokenizer.variants, *classes, *texts):
            is_name = re.fullmatch(r"\w[\w.-]*", variant) is not None
            require(is_name, f"the variant {variant!r} names files: use letters, digits, _ - .")
        for variant in self.tokenizer.variants:
            self._check_tokenizer(variant)
        for variant in (*classes, *texts):
            self._check_generator(variant)
        for name in ("autoregressive", "text"):
            section = getattr(self, name)
            for variant in section.samplers:
                require_known(variant, section.variants, f"{name}.samplers")
        for variant in self.text.dual_encoder.reconstructions:
            require_known(variant, self.tokenizer.variants, "text.dual_encoder.reconstructions")
        if classes and texts:  # applications need a model of each kind
            self._check_applications()

    def _check_tokenizer(self, variant: str) -> None:
        config, training = self.tokenizer_variant(variant), self.tokenizer_training(variant)
        name, loss = f"tokenizer.{variant}", training.loss
        latents = self.tokenizer_data(variant).normalization_views * config.tokens_per_scale
        require(
            config.num_codes <= latents,
            f"{name} has {config.num_codes} codes but k-means starts from {latents} vectors: raise "
            "data.normalization_views or lower num_codes",
        )
        require(
            not training.adversarial.weight or config.size % 8 == 0,
            f"a discriminator needs sizes that are multiples of 8 px, {name} has {config.size}",
        )
        require(
            not loss.multiscale
            or (config.levels > 0 and config.decoder_attention == "scale_causal"),
            f"loss.multiscale of {name} is about images of the first scales alone, which need "
            "several levels and decoder_attention: scale_causal",
        )
        smallest = LPIPS_MIN_SIZE[loss.lpips_net]
        require(
            not loss.lpips or config.size >= smallest,
            f"LPIPS-{loss.lpips_net} needs at least {smallest} px but {name} has {config.size}",
        )
        self._check_shares(name, training.optimizer)

    def _check_generator(self, variant: str) -> None:
        config, section = self.autoregressive_variant(variant), self._section_name(variant)
        name, is_text = f"{section}.{variant}", section == "text"
        tokenizers = self.tokenizer.variants
        require_known(config.tokenizer, tokenizers, f"{section}.variants.{variant}.tokenizer")
        size = self.tokenizer_variant(config.tokenizer).size
        require(
            size == self.data.size,
            f"{name} needs a tokenizer of data.size {self.data.size} px, {config.tokenizer} is "
            f"built for {size} px",
        )
        which = "a model of the section text needs" if is_text else "only those of text have"
        require(
            is_text == (config.text is not None),
            f"{name}: `text` describes a text encoder, which {which}",
        )
        require(
            is_text or not config.text_noise,
            f"{name}: text_noise is of texts, but this model is told classes",
        )
        optimizer = self.generator_optimizer(variant)
        self.sampler(variant)
        require(
            self.engine.strategy != "fsdp" or not optimizer.ema_decay,
            "engine.strategy fsdp keeps no moving average of sharded weights: set ema_decay of "
            f"{name} to 0.0, or strategy: ddp",
        )
        self._check_shares(name, optimizer)

    def _check_shares(self, name: str, optimizer: OptimizerConfig) -> None:
        require(
            optimizer.batch_size % self.engine.world_size == 0,
            f"engine: {self.engine.world_size} processes share every batch equally, but batch_size "
            f"of {name} is {optimizer.batch_size}",
        )

    def _check_applications(self) -> None:
        section, candidates = self.applications, self.text.evaluation.candidates
        models = {
            "class_generator": self.autoregressive.variants,
            "text_generator": self.text.variants,
        }
        for key, variants in (models | {"baseline": self.tokenizer.variants}).items():
            require_known(getattr(section, key), variants, f"applications.{key}")
        require(
            section.images >= candidates,
            f"applications.images must be at least text.evaluation.candidates = {candidates}, "
            f"captions among which that of an edited image has to be found; it is {section.images}",
        )
        require(
            "extra" in self.tokenizer.evaluation.sets,
            "applications upsample images of other things than models were trained on: "
            "tokenizer.evaluation.sets needs an entry `extra`",
        )
        for key in models:
            variant = getattr(section, key)
            name = self.autoregressive_variant(variant).tokenizer
            config = self.tokenizer_variant(name)
            require(
                config.levels >= 3
                and config.encoder_attention == config.decoder_attention == "scale_causal",
                f"applications.{key}: {variant} upsamples images of 1/8 of the size, so its "
                f"tokenizer {name} needs three levels or more and scale-causal attention on both "
                "sides",
            )

    # -- tokenizers --

    def tokenizer_variant(self, variant: str) -> TokenizerConfig:
        """`tokenizer.common` with the variant's keys.

        A variant with `codes_from` starts from that one instead and may change its decoder only.
        """
        section, where = self.tokenizer, f"tokenizer.variants.{variant}"
        require_known(variant, section.variants, "tokenizer variant")
        changes = section.variants[variant]
        base = changes.get("codes_from")
        changes = {key: value for key, value in changes.items() if key not in TRAINING_KEYS}
        wanted = variant.removesuffix("_second")
        if variant != wanted and base != wanted:
            raise ConfigError(
                f"{where}.codes_from must be {wanted}, on which the stage of this name depends, it "
                f"is {base}."
            )
        if base is None:
            return _merged(section.common, changes, where)
        require_known(str(base), section.variants, f"{where}.codes_from")
        if "codes_from" in section.variants[base]:
            raise ConfigError(
                f"{where}.codes_from: {base} has codes of another variant itself; name that one."
            )
        config = _merged(self.tokenizer_variant(base), changes, where)
        if fixed := [key for key in changes if not key.startswith("decoder_")]:
            raise ConfigError(
                f"{where}: {', '.join(fixed)} cannot differ from {base}, whose codes it takes "
                "over: only decoder_* can."
            )
        return config

    def tokenizer_training(self, variant: str) -> TokenizerTraining:
        """Loss, adversarial term and optimizer of the section with the variant's keys."""
        section, where = self.tokenizer, f"tokenizer.variants.{variant}"
        require_known(variant, section.variants, "tokenizer variant")
        changes = section.variants[variant]
        values: dict[str, Any] = {
            key: to_dict(getattr(section, key)) | _changes_of(changes, key, where)
            for key in ("loss", "adversarial", "optimizer")
        }
        values["codes_from"] = changes.get("codes_from")
        return from_dict(TokenizerTraining, values, where)

    def tokenizer_data(self, variant: str) -> DataConfig:
        """`data` with the variant's keys, and the size that the variant is built for.

        A second decoder learns on the images of its codes.
        """
        variants, where = self.tokenizer.variants, f"tokenizer.variants.{variant}"
        require_known(variant, variants, "tokenizer variant")
        changes = {}
        for name in (variants[variant].get("codes_from", variant), variant):
            changes |= _changes_of(variants[name], "data", where)
        if "size" in changes:
            raise ConfigError(
                f"{where}.data.size: views are as large as the tokenizer; set {where}.size."
            )
        size = self.tokenizer_variant(variant).size
        return _merged(self.data, changes | {"size": size}, f"{where}.data")

    # -- generators --

    def generator_section(self, variant: str) -> AutoregressiveSection | TextSection:
        """The section that has a variant of this name."""
        return getattr(self, self._section_name(variant))

    def _section_name(self, variant: str) -> str:
        variants = self.autoregressive.variants | self.text.variants
        require_known(variant, variants, "autoregressive or text variant")
        return "text" if variant in self.text.variants else "autoregressive"

    def autoregressive_variant(self, variant: str) -> AutoregressiveConfig:
        """`common` of the variant's section with the variant's keys."""
        section, where = self.generator_section(variant), self._where(variant)
        changes = {k: value for k, value in section.variants[variant].items() if k != "optimizer"}
        return _merged(section.common, changes, where)

    def generator_optimizer(self, variant: str) -> OptimizerConfig:
        """`optimizer` of the variant's section with the variant's keys."""
        section, where = self.generator_section(variant), self._where(variant)
        changes = _changes_of(section.variants[variant], "optimizer", where)
        return _merged(section.optimizer, changes, f"{where}.optimizer")

    def sampler(self, variant: str) -> SamplingConfig:
        """`sampling` of the variant's section with the keys under the variant in `samplers`."""
        section, where = self.generator_section(variant), f"{self._section_name(variant)}.samplers"
        changes = _changes_of(section.samplers, variant, where)
        return _merged(section.sampling, changes, f"{where}.{variant}")

    def _where(self, variant: str) -> str:
        return f"{self._section_name(variant)}.variants.{variant}"


def _merged(config: Config, changes: Changes, where: str) -> Config:
    return from_dict(type(config), to_dict(config) | changes, where)


def _changes_of(changes: Changes, key: str, where: str) -> Changes:
    """The changes under a key, such as `optimizer`."""
    if not isinstance(below := changes.get(key, {}), dict):
        raise ConfigError(
            f"{where}.{key} lists the keys in which the variant differs, it is {below!r}."
        )
    return below


# -- files -----------------------------------------------------------------------------------------


def load_profile(name: str | Path = "quick") -> Profile:
    """Read and check `profiles/<name>.yaml`, or the file at a path that ends in .yaml.

    Raises:
        ConfigError: no such profile, or a key in it that is unknown, missing, twice there, of a
            wrong type or in an impossible combination.
    """
    values = _read_profile(name)
    file = resolve(PARAMETERS)
    values = fill_in(values, read_yaml(file) if file.exists() else {})
    return from_dict(Profile, values, _path(name).name)


def changed(values: dict[str, Any], changes: Changes) -> dict[str, Any]:
    """Values of a whole profile (`to_dict`) with those at dotted keys replaced.

    Raises:
        ConfigError: there is no such key.
    """
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.get(name, {}) if isinstance(section, dict) else {}
        if last not in section:
            raise ConfigError(f"a change of {key}, which the profile does not have.")
        section[last] = value
    return values


def fill_in(values: Any, parameters: dict[str, Any]) -> Any:
    """Plain values with every `${name}` in a text replaced by that text of params.yaml.

    Raises:
        ConfigError: there is no such text.
    """
    if isinstance(values, dict):
        return {key: fill_in(value, parameters) for key, value in values.items()}
    if not isinstance(values, str):
        return values
    texts = {name: value for name, value in parameters.items() if isinstance(value, str)}
    if unknown := set(re.findall(r"\$\{(\w+)\}", values)) - set(texts):
        raise ConfigError(
            f"the path {values!r} names ${{{unknown.pop()}}}, which {PARAMETERS} does not have as "
            f"a text; it has {', '.join(texts) or 'none'}."
        )
    return re.sub(r"\$\{(\w+)\}", lambda match: texts[match[1]], values)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping; lists are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if is_section else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """Content of a YAML file.

    Raises:
        ConfigError: it is no valid YAML, no mapping, or a key stands in it twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path.name} is not valid YAML: {reason}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must be a mapping of keys to values.")
    return values


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice in a mapping; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            problem = f"the key {twice.pop()} is there twice"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _read_profile(name: str | Path) -> dict[str, Any]:
    """Values of a profile file laid over those of its base, and so on."""
    path = _path(name)
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "(none)"
        raise ConfigError(f"There is no profile {str(name)!r}: choose one of {there}.")
    values = read_yaml(path)
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str) or base == path.stem:
        raise ConfigError(f"{path.name}: base names another profile, it is {base!r}.")
    return merge(_read_profile(base), values)


def _path(name: str | Path) -> Path:
    return resolve(name if str(name).endswith((".yaml", ".yml")) else f"profiles/{name}.yaml")
