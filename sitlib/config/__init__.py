"""Typed configuration: what a profile file (`profiles/*.yaml`) may say, and nothing else.

Every key has a type and, but for a few optional ones, no default, so that two profiles hold the same keys. Unknown keys, wrong
types and impossible combinations are refused with a sentence that says what to do. The classes know nothing of models or data.
"""

from sitlib.config.ablations import AblationRow, Ablations, Rung, TextTrial, changed, load_ablations
from sitlib.config.applications import ApplicationsConfig
from sitlib.config.engine import EngineConfig
from sitlib.config.generation import (
    AutoregressiveConfig,
    AutoregressiveSection,
    CaptionsConfig,
    CodesConfig,
    DiffusionConfig,
    DualEncoderConfig,
    GenerationEvaluationConfig,
    SamplingConfig,
    TextEncoderConfig,
    TextEvaluationConfig,
    TextSection,
)
from sitlib.config.profile import (
    Profile,
    load_profile,
)
from sitlib.config.strict import (
    ConfigError,
    digest,
    from_dict,
    to_dict,
)
from sitlib.config.tokenizer import (
    AdversarialConfig,
    DataConfig,
    EvaluationSet,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerEvaluationConfig,
    TokenizerLossConfig,
    TokenizerSection,
    TokenizerTraining,
)

__all__ = [
    "AblationRow",
    "Ablations",
    "AdversarialConfig",
    "ApplicationsConfig",
    "AutoregressiveConfig",
    "AutoregressiveSection",
    "CaptionsConfig",
    "CodesConfig",
    "ConfigError",
    "DataConfig",
    "DiffusionConfig",
    "DualEncoderConfig",
    "EngineConfig",
    "EvaluationSet",
    "GenerationEvaluationConfig",
    "OptimizerConfig",
    "Profile",
    "Rung",
    "SamplingConfig",
    "TextEncoderConfig",
    "TextEvaluationConfig",
    "TextSection",
    "TextTrial",
    "TokenizerConfig",
    "TokenizerEvaluationConfig",
    "TokenizerLossConfig",
    "TokenizerSection",
    "TokenizerTraining",
    "changed",
    "digest",
    "from_dict",
    "load_ablations",
    "load_profile",
    "to_dict",
]
