"""Configuration of models over codes and texts: generator, text encoder, sampling, dual encoder.

Defaults are the paper's (SIT, arXiv 2412.09607), which takes them over from VIM, the generator of
ViT-VQGAN (arXiv 2110.04627).
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT, check_width

Probability = Annotated[float, Field(ge=0, lt=1)]
VocabularySize = Annotated[int, Field(ge=300)]  # 256 bytes and some merges
TextLength = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, config=STRICT)
class TextEncoderConfig:
    """Text side of a text-conditional model, of the model's width, heads and kind of blocks.

    Defaults are those of Parti-350M (arXiv 2206.10789).
    """

    layers: PositiveInt = 12
    vocab_size: VocabularySize = 16000  # token ids of the BPE that is trained on the captions
    max_tokens: TextLength = 128  # longest text, its end included


@dataclass(frozen=True, config=STRICT)
class AutoregressiveConfig:
    """A transformer over the codes of a tokenizer, told a class or (with `text`) a text.

    Defaults are VIM-Base: 24 blocks, width 1536, 16 heads, MLP 6144, dropout 0.1 (the paper's 650M
    model, inferred).
    """

    tokenizer: str  # variant whose codes it models
    layers: PositiveInt = 24
    width: PositiveInt = 1536
    heads: PositiveInt = 16
    mlp_ratio: PositiveFloat = 4.0
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True  # of linear layers and LayerNorm
    qk_norm: bool = False  # normalized queries and keys
    # Of places in the grid (inferred); those of scales are learned either way.
    pos_emb: Literal["learned", "rotary"] = "learned"
    dropout: Probability = 0.1
    # Probability that a training sample's class or text is hidden, for classifier-free guidance
    # (inferred, as LlamaGen, arXiv 2406.06525).
    condition_dropout: Probability = 0.1
    # Ours: up to this share of the codes that training reads (not of those that it predicts) are
    # replaced by random ones, so that the model does not trust what it drew before too much. Each
    # sequence draws its own share.
    code_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    # Ours: at most so many random tokens before a training text, half as many after it, so that new
    # words around a name mean nothing.
    text_noise: NonNegativeInt = 0
    text: TextEncoderConfig | None = None  # None: told a class

    def __post_init__(self):
        check_width(self.width, self.heads, self.mlp_ratio)
        if self.pos_emb == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                "rotary pos_emb of rows and columns needs heads of a multiple of 4 dimensions, "
                f"not {self.width // self.heads}"
            )


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """Sampling of codes; by default from the model's distribution as it is."""

    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 0  # only the k likeliest codes; 0 = off, 1 = greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus; 1 = off
    # Leave out codes less likely than this share of the likeliest (arXiv 2407.01082); 0 = off.
    min_p: Probability = 0.0
    guidance: float = 1.0  # classifier-free: uncond + guidance * (cond - uncond); 1 = off
    # linear: from 1 in the first scale to `guidance` in the last (VAR, arXiv 2404.02905).
    guidance_growth: Literal["constant", "linear"] = "constant"
    batch_size: NonNegativeInt = 0  # 0 = as many as fit half of the free memory
    seed: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class DualEncoderShape:
    """An image and a text encoder with a common space, which judge text-conditional samples.

    Ours; defaults are those of the profile quick.
    """

    layers: PositiveInt = 1  # of the text encoder
    width: PositiveInt = 128
    heads: PositiveInt = 4
    dim: PositiveInt = 128  # of the common space
    dropout: Probability = 0.2

    def __post_init__(self):
        check_width(self.width, self.heads)
