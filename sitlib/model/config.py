"""Configuration of the models: tokenizer, generator with its text encoder, and sampling."""

import math
from dataclasses import dataclass
from typing import Literal

import pywt

from sitlib.strict import Strict, nearest, optional_key, require, require_seed

Attention = Literal["full", "scale_causal"]
PATCH_LOCAL_WAVELETS = ("haar", "bior2.2", "bior4.4")  # those of sitlib.model.lifting


def require_heads(width: int, heads: int) -> None:
    require(
        width > 0 and heads > 0 and width % heads == 0,
        f"width {width} must be a multiple of heads {heads}",
    )


def require_text_size(vocabulary: int, max_tokens: int) -> None:
    require(
        vocabulary >= 300,
        f"vocabulary must be at least 300 (256 bytes and some merges), it is {vocabulary}",
    )
    require(max_tokens > 1, f"max_tokens must be at least 2, it is {max_tokens}")


@dataclass(frozen=True)
class TokenizerConfig(Strict):
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
    typed_parameters: (
        bool  # ADTransformer: own q, k, v, norms and MLP for approximation and detail tokens
    )
    scale_mixing: bool  # one linear map across the scales of a place before each transformer; false: as in the paper
    num_codebooks: int  # 2: one for approximation codes, one for detail codes; 1: shared; S: one for every scale
    num_codes: int  # codes in each codebook
    code_dim: int  # dimension of the l2-normalized lookup space
    code_learning: Literal[
        "gradient", "ema"
    ]  # codes follow the codebook loss, or moving averages of what chose them
    code_decay: float  # of these moving averages
    code_gradient: Literal[
        "straight_through", "rotation"
    ]  # how gradients pass the lookup backwards
    # How images are taken apart; the others are for comparison: an average-pooling pyramid, and blocks of raster-scan pixel patches.
    transform: Literal["wavelet", "pyramid", "raster"] = optional_key("wavelet")
    patch_local: bool = optional_key(
        False
    )  # the wavelet transform of every token's part of the image by itself
    neighbour_mixing: bool = optional_key(
        False
    )  # a 3x3 convolution over tokens before the encoder and after the decoder

    def __post_init__(self):
        for name in ("size", "grid", "encoder_layers", "decoder_layers", "num_codes", "code_dim"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require(self.levels >= 0, f"levels must be 0 (ViT-VQGAN) or more, it is {self.levels}")
        require(self.mlp_ratio > 0, f"mlp_ratio must be positive, it is {self.mlp_ratio}")
        unit = self.grid * 2**self.levels
        require(
            self.size % unit == 0,
            f"size {self.size} cannot be cut into {self.grid}x{self.grid} tokens at every scale of {self.levels} levels: "
            f"use a multiple of grid * 2^levels = {unit}",
        )
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            require(
                self.mlp_ratio * width >= 1,
                f"mlp_ratio {self.mlp_ratio} leaves no unit of {part}_width {width}",
            )
            require(
                heads > 0 and width % heads == 0,
                f"{part}_width {width} must be a multiple of {part}_heads {heads}",
            )
        known = pywt.wavelist(kind="discrete")  # pyrefly: ignore[missing-attribute]
        require(
            self.wavelet in known,
            f"wavelet {self.wavelet!r} is not known{nearest(self.wavelet, known)}",
        )
        require(
            self.num_codebooks in (1, 2, self.num_scales),
            f"num_codebooks must be 1 (shared), 2 (approximation, details) or {self.num_scales} (one for every scale), "
            f"it is {self.num_codebooks}",
        )
        require(0 < self.code_decay < 1, f"code_decay must lie in (0, 1), it is {self.code_decay}")
        require(
            self.transform == "wavelet" or self.levels > 0,
            f"transform {self.transform} is about several scales or blocks: give it levels (without, patches of pixels are all there is)",
        )
        require(
            self.transform != "raster" or self.levels == 3,
            f"transform raster cuts a square of patches into {self.num_scales} blocks of {self.tokens_per_scale}: that needs levels: 3",
        )
        require(
            not self.patch_local
            or (self.transform == "wavelet" and self.wavelet in PATCH_LOCAL_WAVELETS),
            f"patch_local is a wavelet transform by {', '.join(PATCH_LOCAL_WAVELETS)}, it is asked of {self.transform} {self.wavelet}",
        )

    @property
    def num_scales(self) -> int:
        return self.levels + 1

    @property
    def tokens_per_scale(self) -> int:
        return self.grid**2


@dataclass(frozen=True)
class TextEncoderConfig(Strict):
    """The text side of a text-conditional model; width, heads and blocks are those of the model (Parti, arXiv 2206.10789)."""

    layers: int
    vocabulary: int  # token ids of the BPE that is trained on the captions
    max_tokens: int  # longest text, its end included

    def __post_init__(self):
        require(self.layers > 0, f"layers must be at least 1, it is {self.layers}")
        require_text_size(self.vocabulary, self.max_tokens)


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
        require_heads(self.width, self.heads)
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
class SamplingConfig(Strict):
    """How codes are sampled. The defaults sample from the model's distribution as it is."""

    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1.0 = off
    min_p: float = 0.0  # least share of the likeliest code's probability (arXiv 2407.01082)
    guidance: float = 1.0  # classifier-free guidance w: uncond + w (cond - uncond); 1.0 = off
    # "linear": from 1.0 in the first scale to w in the last (VAR, arXiv 2404.02905).
    guidance_growth: Literal["constant", "linear"] = "constant"
    batch_size: int = 0  # 0 = as many as half of the free memory holds
    seed: int = 0

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
