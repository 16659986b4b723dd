"""Configuration of the models: tokenizer, generator, sampling.

Defaults are SIT's (arXiv 2412.09607), or said beside them. Those of the generator SIT takes over
from VIM, the generator of ViT-VQGAN (arXiv 2110.04627).
"""

from math import log2
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.quantizer import QUANTIZERS
from sitlib.model.wavelets import filters_of
from sitlib.strict import require

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # no silent conversions
Attention = Literal["full", "scale_causal"]
Probability = Annotated[float, Field(ge=0, lt=1)]
VocabularySize = Annotated[int, Field(ge=300)]  # 256 bytes and some merges
TwoOrMore = Annotated[int, Field(ge=2)]


def check_width(width: int, heads: int, mlp_ratio: float = 1.0, prefix: str = "") -> None:
    """Raise ValueError unless a block of this width can have such heads and such an MLP."""
    if width % heads:
        raise ValueError(f"{prefix}width {width} must be a multiple of {prefix}heads {heads}")
    if mlp_ratio * width < 1:
        raise ValueError(f"mlp_ratio {mlp_ratio} leaves no unit of {prefix}width {width}")


@dataclass(frozen=True, config=STRICT)
class TokenizerConfig:
    """A tokenizer: its scales, transformers and codebooks. Defaults are SIT-4 at 256 px.

    `levels=0` is ViT-VQGAN: no DWT, one scale of `grid_size` x `grid_size` patches of pixels.
    """

    size: PositiveInt = 256  # side of the images, px
    levels: NonNegativeInt = 3  # L of the DWT; the model has S = L + 1 scales
    grid_size: PositiveInt = 16  # tokens per side, in every scale
    wavelet: str = "haar"  # any discrete one of PyWavelets; better than LeGall 5/3, CDF 9/7 in SIT
    # ViT-VQGAN Small: 8 blocks, 8 heads, width 512, MLP 2048.
    encoder_layers: PositiveInt = 8
    encoder_width: PositiveInt = 512
    encoder_heads: PositiveInt = 8
    encoder_attention: Attention = "full"  # scale_causal: SCE, a token sees no finer scale
    decoder_layers: PositiveInt = 8
    decoder_width: PositiveInt = 512
    decoder_heads: PositiveInt = 8
    decoder_attention: Attention = "full"  # scale_causal: SCD
    mlp_ratio: PositiveFloat = 4.0  # width of a block's MLP / width of the block
    # ADTransformer: own q, k, v, norms and MLP for approximation and for detail tokens. For
    # comparison, mlp: own MLP and its norm alone; separate: two transformers with cross-attention.
    typed_parameters: bool | Literal["mlp", "separate"] = True
    # Ours: a linear map across the scales at each place of the grid, before each transformer.
    scale_mixing: bool = False
    # 2: approximation, details (SIT); 1: shared; S: one for every scale.
    num_codebooks: PositiveInt = 2
    quantizer: str = "codebook"  # a name in sitlib.model.quantizer.QUANTIZERS
    # In each codebook (SIT, ViT-VQGAN); or in that of every scale, the coarsest first (ours).
    num_codes: TwoOrMore | list[TwoOrMore] = 8192
    code_dim: PositiveInt = 32  # of the l2-normalized lookup space (ViT-VQGAN)
    # Others are for comparison, and described in sitlib.model.transforms.
    transform: Literal["wavelet", "lifted_wavelet", "pyramid", "pyramid_nearest"] = "wavelet"
    # For comparison: tokens per side of every scale, multiples of grid_size. S of codes [B, S, N]
    # then counts runs of N = grid_size^2 tokens, of which a scale has one or more.
    grid_sizes: list[PositiveInt] | None = None
    standardize: bool = True  # ours: of each band; if not, coefficients are of pixels in [-1, 1]
    # Ours: a token also writes half a patch around its own, which is added to its neighbors'.
    overlap: bool = False
    # Ours: channels of two convolutions behind the inverse transform, which smooth what blocks of
    # coefficients leave; 0 = none. Images of the first scales alone are as they come.
    refine: NonNegativeInt = 0

    def __post_init__(self):
        unit, kind = self.grid_size * 2**self.levels, f"transform {self.transform}"
        require(self.size % unit == 0, f"size must be a multiple of grid_size * 2^levels = {unit}")
        check_width(self.encoder_width, self.encoder_heads, self.mlp_ratio, "encoder_")
        check_width(self.decoder_width, self.decoder_heads, self.mlp_ratio, "decoder_")
        sentence = f"quantizer {self.quantizer!r} is not known: take {', '.join(QUANTIZERS)}"
        require(self.quantizer in QUANTIZERS, sentence)
        require(not self.refine or self.size % 2 == 0, "refine needs a size that is even")
        filters_of(self.wavelet)  # raises ValueError where PyWavelets does not know it
        sentence = "num_codebooks must be 1 (shared), 2 (approximation, details) or "
        sentence += f"{self.levels + 1} (one for every scale), it is {self.num_codebooks}"
        require(self.num_codebooks in (1, 2, self.levels + 1), sentence)
        if isinstance(self.num_codes, list):
            sentence = f"num_codes is one number, or num_codebooks = {self.num_codebooks} of them"
            is_each = len(self.num_codes) == self.num_codebooks == self.levels + 1
            require(is_each, f"{sentence}, one for every scale: {self.num_codes}")
        if self.transform != "wavelet":
            require(self.levels > 0, f"{kind} needs levels, and there are none")
        sentence = f"{kind} is of haar, not {self.wavelet}"
        require(self.transform != "lifted_wavelet" or self.wavelet == "haar", sentence)
        is_full = self.encoder_attention == self.decoder_attention == "full"
        if self.typed_parameters == "separate":
            sentence = "typed_parameters separate needs details, and full attention on both sides"
            require(is_full and self.levels > 0, sentence)
        if (grids := self.grid_sizes) is not None:
            # Details of wavelets are as large as the scale before, those of a pyramid twice.
            lag = 0 if self.transform.startswith("pyramid") else 1
            sides = [self.size >> self.levels - max(s - lag, 0) for s in range(self.levels + 1)]
            pairs = zip(sides, grids, strict=False)
            fits = all(side % grid == grid % self.grid_size == 0 for side, grid in pairs)
            sentence = f"grid_sizes must be {len(sides)} multiples of grid_size {self.grid_size}"
            sentence += f" that divide {sides}, the sides of the scales: {grids}"
            require(len(grids) == len(sides) and fits, sentence)
            sentence = "grid_sizes needs full attention and no mixing"
            require(is_full and not self.scale_mixing, sentence)

    @property
    def num_scales(self) -> int:
        return len(self.codebook_of)

    @property
    def tokens_per_scale(self) -> int:
        return self.grid_size**2

    @property
    def codebook_of(self) -> list[int]:
        """Number of the codebook of each scale; with `grid_sizes`, of each run of tokens."""
        sides = self.grid_sizes or [self.grid_size] * (self.levels + 1)
        runs = enumerate((side // self.grid_size) ** 2 for side in sides)
        return [min(scale, self.num_codebooks - 1) for scale, n in runs for _ in range(n)]

    @property
    def codebook_sizes(self) -> list[int]:
        """Number of codes K_s that a token of each scale can have."""
        K = self.num_codes
        return [K if isinstance(K, int) else K[book] for book in self.codebook_of]

    def bits(self, scales: int | None = None) -> float:
        """Bits of the codes of an image, of its first scales or all, without entropy coding."""
        return self.tokens_per_scale * sum(map(log2, self.codebook_sizes[:scales]))


# -- models over codes and texts --------------------------------------------------------------


@dataclass(frozen=True, config=STRICT)
class TextEncoderConfig:
    """Text side, of its model's width and blocks; defaults of Parti-350M (arXiv 2206.10789)."""

    layers: PositiveInt = 12
    vocab_size: VocabularySize = 16000  # token ids of the BPE that is trained on the captions
    max_tokens: TwoOrMore = 128  # longest text, its end included


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
    # Of the codes of an image in the sequence; those beside SIT's for comparison. by_place: all
    # scales of one place, then of the next; random: one permutation, fixed for each shape [S, N].
    order: Literal["coarse_to_fine", "fine_to_coarse", "by_place", "random"] = "coarse_to_fine"
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
    # Ours: writes a scale at a time, in `SamplingConfig.steps_per_scale` passes. It learns to predict
    # hidden codes of a scale from its others (MaskGIT, arXiv 2202.04200) and all coarser scales.
    masked: bool = False
    # Ours: codes are read and scored through their vectors in the tokenizer's codebooks; otherwise
    # every code has an embedding and output weights of its own alone.
    code_vectors: bool = False
    text: TextEncoderConfig | None = None  # None: told a class

    def __post_init__(self):
        check_width(self.width, self.heads, self.mlp_ratio)
        sentence = f"masked models write coarse_to_fine, order is {self.order}"
        require(not self.masked or self.order == "coarse_to_fine", sentence)
        size = self.width // self.heads
        sentence = f"rotary pos_emb needs heads of a multiple of 4 dimensions, not {size}"
        require(self.pos_emb != "rotary" or size % 4 == 0, sentence)


@dataclass(frozen=True, config=STRICT)
class SamplingConfig:
    """Sampling of codes; by default from the model's distribution as it is."""

    temperature: Annotated[float, Field(gt=1e-6)] = 1.0  # nearly 0 = greedy
    top_k: NonNegativeInt = 0  # only the k likeliest codes; 0 = off, 1 = greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus; 1 = off
    # Leave out codes less likely than this share of the likeliest (arXiv 2407.01082); 0 = off.
    min_p: Probability = 0.0
    guidance: Annotated[float, Field(gt=-1e6, lt=1e6)] = 1.0  # of the condition; 1 = off
    # Of masked models: passes for each scale; 1: all of its codes at once (VAR, arXiv 2404.02905).
    steps_per_scale: PositiveInt = 8
    # Of masked models: noise on the choice of the codes that are kept first, MaskGIT's; 0 = none.
    choice_temperature: Annotated[float, Field(ge=0, lt=1e6)] = 4.5
    batch_size: NonNegativeInt = 0  # 0 = as many as fit half of the free memory
    seed: NonNegativeInt = 0
