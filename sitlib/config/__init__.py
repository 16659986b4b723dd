"""Typed configuration: what a profile file (`profiles/*.yaml`) may say, and nothing else.

Every key has a type and a default-free place in the profile, so that two profiles always hold the same keys. Unknown keys, wrong
types and impossible combinations are refused with a sentence that says what to do. The classes know nothing of models or data.
"""

from sitlib.config.applications import ApplicationsConfig
from sitlib.config.engine import EngineConfig
from sitlib.config.generation import (
    AutoregressiveConfig,
    AutoregressiveSection,
    CaptionsConfig,
    CodesConfig,
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
    OptimiserConfig,
    TokenizerConfig,
    TokenizerEvaluationConfig,
    TokenizerLossConfig,
    TokenizerSection,
    TokenizerTraining,
)

__all__ = [
    "AdversarialConfig",
    "ApplicationsConfig",
    "AutoregressiveConfig",
    "AutoregressiveSection",
    "CaptionsConfig",
    "CodesConfig",
    "ConfigError",
    "DataConfig",
    "DualEncoderConfig",
    "EngineConfig",
    "EvaluationSet",
    "GenerationEvaluationConfig",
    "OptimiserConfig",
    "Profile",
    "SamplingConfig",
    "TextEncoderConfig",
    "TextEvaluationConfig",
    "TextSection",
    "TokenizerConfig",
    "TokenizerEvaluationConfig",
    "TokenizerLossConfig",
    "TokenizerSection",
    "TokenizerTraining",
    "digest",
    "from_dict",
    "load_profile",
    "to_dict",
]
