"""What a profile says of images and tokenizers."""

from dataclasses import dataclass
from typing import Any, Literal

import pywt

from sitlib.config.folders import filled_in
from sitlib.config.strict import Strict, nearest, optional_key, require, require_seed

Attention = Literal["full", "scale_causal"]
Kind = Literal["crops", "wide"]
PATCH_LOCAL_WAVELETS = ("haar", "bior2.2", "bior4.4")  # those of sitlib.model.lifting


@dataclass(frozen=True)
class DataConfig(Strict):
    """Which images, and how training views are cut from them."""

    # Folder of WebDataset shards (`<split>-*.tar`), or an image folder (`split/class/name.jpg`, `class/name.jpg`); `${name}` in it is
    # filled in from params.yaml, so that the pipeline depends on the very folder.
    source: str
    size: int  # side of a view, px
    min_crop: float  # smallest side of a random crop, as a fraction of the photograph's short side
    flip: bool  # random horizontal flips
    normalization_views: (
        int  # training views from which the per-scale mean and deviation are measured
    )

    def __post_init__(self):
        object.__setattr__(self, "source", filled_in(self.source))
        require(self.size > 0, f"size must be positive, it is {self.size}")
        require(0 < self.min_crop <= 1, f"min_crop is a fraction in (0, 1], it is {self.min_crop}")
        require(self.normalization_views > 0, "normalization_views must be at least 1")


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
class OptimizerConfig(Strict):
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
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require(
            0 <= self.warmup_steps <= self.steps,
            f"warmup_steps {self.warmup_steps} must lie in 0 ... steps = {self.steps}",
        )
        require(
            0 <= self.final_learning_rate <= self.learning_rate,
            f"final_learning_rate {self.final_learning_rate} must lie in 0 ... learning_rate = {self.learning_rate}",
        )
        require(
            self.checkpoint_every % self.log_every == 0,
            f"checkpoint_every {self.checkpoint_every} must be a multiple of log_every {self.log_every}",
        )
        require(
            self.learning_rate > 0, f"learning_rate must be positive, it is {self.learning_rate}"
        )
        for name in ("beta1", "beta2"):
            require(
                0 <= getattr(self, name) < 1,
                f"{name} must lie in [0, 1), it is {getattr(self, name)}",
            )
        require(
            self.weight_decay >= 0, f"weight_decay must not be negative, it is {self.weight_decay}"
        )
        require(self.clip_norm > 0, f"clip_norm must be positive, it is {self.clip_norm}")
        require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), it is {self.ema_decay}")


@dataclass(frozen=True)
class TokenizerLossConfig(Strict):
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
    # Of L2 and LPIPS of the image that the first scales alone give, another number of scales at each step; 0 = only whole images.
    smaller: float

    def __post_init__(self):
        for name in (
            "l2",
            "lpips",
            "commitment",
            "codebook",
            "restart_after",
            "quantization_ramp",
            "smaller",
        ):
            require(
                getattr(self, name) >= 0,
                f"{name} must not be negative, it is {getattr(self, name)}",
            )


@dataclass(frozen=True)
class AdversarialConfig(Strict):
    """The adversarial term: a discriminator that learns beside the tokenizer, and when it may speak (SIT section 4)."""

    weight: (
        float  # of the term in the tokenizer's loss, at the end of the ramp; 0 = no discriminator
    )
    start: int  # step at which the discriminator begins to learn
    warmup: int  # steps for which it learns alone
    ramp: int  # steps over which the weight then grows from 0
    channels: (
        int  # of the discriminator at full size; they double with every halving, up to 8 times
    )
    learning_rate: float
    r1: float  # weight of the penalty on the gradient at real images (gamma / 2); 0 = off
    r1_every: int  # steps between penalties, each weighted with this number
    spectral_norm: bool = optional_key(True)  # of the discriminator's layers

    def __post_init__(self):
        for name in ("weight", "start", "warmup", "ramp", "r1"):
            require(
                getattr(self, name) >= 0,
                f"{name} must not be negative, it is {getattr(self, name)}",
            )
        for name in ("channels", "r1_every"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require(
            self.learning_rate > 0, f"learning_rate must be positive, it is {self.learning_rate}"
        )


@dataclass(frozen=True)
class TokenizerTraining(Strict):
    """How a variant is trained; `codes_from` names the variant whose encoder and codebooks it takes over, frozen."""

    loss: TokenizerLossConfig
    adversarial: AdversarialConfig
    optimizer: OptimizerConfig
    codes_from: str | None = None

    def __post_init__(self):
        ramp, steps = self.loss.quantization_ramp, self.optimizer.steps
        require(
            ramp < steps, f"quantization_ramp {ramp} must be shorter than training, {steps} steps"
        )
        alone = self.adversarial.start + self.adversarial.warmup
        require(
            not self.adversarial.weight or alone < steps,
            f"the adversarial term would never act: start + warmup = {alone} of {steps} steps",
        )


@dataclass(frozen=True)
class EvaluationSet(Strict):
    """Held-out views of one kind of images."""

    source: str  # as data.source; its test split
    views: int
    kind: Kind  # multi-scale crops, or wide views of whole images

    def __post_init__(self):
        object.__setattr__(self, "source", filled_in(self.source))
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
