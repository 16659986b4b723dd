"""Configuration of training: data, optimizer, losses, captions, devices."""

from dataclasses import dataclass
from typing import Literal

from sitlib.model.config import require_heads, require_text_size
from sitlib.strict import Strict, optional_key, require, require_seed

Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]


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
        require(self.size > 0, f"size must be positive, it is {self.size}")
        require(0 < self.min_crop <= 1, f"min_crop is a fraction in (0, 1], it is {self.min_crop}")
        require(self.normalization_views > 0, "normalization_views must be at least 1")


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
class CodesConfig(Strict):
    """Wide views from which codes are extracted once, flips and crops included."""

    views_per_image: int  # of every training image that has a class or a caption
    mirrored: bool  # each view's mirror image too; not where captions say left or right
    held_out_views: int
    seed: int

    def __post_init__(self):
        require(
            self.views_per_image > 0 and self.held_out_views > 0,
            "views_per_image and held_out_views must be at least 1",
        )
        require_seed(self.seed)


@dataclass(frozen=True)
class CaptionsConfig(Strict):
    """Texts of the images that the tokenizer of a text-conditional model was trained on."""

    # "records": the captions in the records of the shards; "names": sentences built from the names there; or a COCO captions file, with
    # {split} in its path filled in, and `${name}` as in `data.source`
    source: str
    per_image: int  # sentences for an image, where they are built
    seed: int

    def __post_init__(self):
        require(self.per_image > 0, f"per_image must be at least 1, it is {self.per_image}")
        require_seed(self.seed)


@dataclass(frozen=True)
class DualEncoderConfig(Strict):
    """An image and a text encoder with a common space, by which text-conditional samples are judged."""

    layers: int  # of the text encoder
    width: int
    heads: int
    dim: int  # of the common space
    dropout: float
    vocabulary: int
    max_tokens: int
    image_size: int  # px at which EfficientNet-Lite0 sees an image; small ones cost little
    # Of every training image, besides the clean one, so that it also knows what is blurred or blocky.
    degraded_views: int
    reconstructions: list[
        str
    ]  # tokenizer variants whose reconstructions of the training images it learns from too
    optimizer: OptimizerConfig

    def __post_init__(self):
        require_text_size(self.vocabulary, self.max_tokens)
        require(
            self.degraded_views >= 0,
            f"degraded_views must not be negative, it is {self.degraded_views}",
        )
        require(
            32 <= self.image_size <= 224,
            f"image_size must lie in 32 ... 224 px, it is {self.image_size}",
        )
        for name in ("layers", "dim"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require_heads(self.width, self.heads)
        require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), it is {self.dropout}")


@dataclass(frozen=True)
class EngineConfig(Strict):
    """Devices, precision and memory of training.

    It is no part of what names a run: a model trained on eight GPUs is found again by a notebook on one. Batches are split over processes
    and accumulated steps, so `batch_size` of an optimizer is always the number of samples of one update.
    """

    precision: Literal[
        "auto", "no", "bf16", "fp16"
    ]  # auto: bf16 on GPUs and CPUs (AMX) that have it, fp16 on other GPUs, no on other CPUs
    # single: one process. ddp: each process has a whole model and a part of the batch. fsdp: the weights, gradients and moments of
    # autoregressive models are sharded too; tokenizers, whose codebooks change between the steps, are trained as with ddp.
    strategy: Literal["single", "ddp", "fsdp"]
    processes: int  # on every machine, one for each GPU
    machines: int
    # Most samples that pass a model at a time in one process. Of a larger share of a batch the parts pass one after another, and their
    # gradients are accumulated before the update; 0 = the whole share at once.
    micro_batch_size: int
    data_workers: (
        int  # processes that make batches ahead, for each process that trains; 0 = a thread of it
    )
    activation_checkpointing: bool  # blocks compute their activations again on the way back: less memory, a third more work
    compile: bool  # torch.compile of the transformer blocks, on GPUs
    trackers: list[Tracker]  # besides the training curve's CSV file
    images_every: int  # steps between sample grids or reconstructions, under scratch/images and in trackers that show images; 0 = none

    def __post_init__(self):
        for name in ("processes", "machines"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require(
            self.micro_batch_size >= 0,
            f"micro_batch_size must be 0 (all) or more, it is {self.micro_batch_size}",
        )
        require(
            self.data_workers >= 0,
            f"data_workers must be 0 (a thread) or more processes, it is {self.data_workers}",
        )
        require(
            self.strategy != "single" or self.world_size == 1,
            f"{self.world_size} processes need strategy: ddp or fsdp, it is single",
        )
        require(
            self.strategy != "fsdp" or self.world_size > 1,
            "strategy: fsdp shards over several processes, and there is one: set single",
        )
        require(
            self.strategy != "fsdp" or not self.images_every,
            "images_every needs whole models, and strategy fsdp shards them: set images_every: 0",
        )
        require(
            self.images_every >= 0,
            f"images_every must be 0 (none) or more, it is {self.images_every}",
        )

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines

    def accumulation(self, batch_size: int) -> int:
        """Equal parts, as few as `micro_batch_size` permits, in which each process's share of a batch passes a model."""
        share = batch_size // self.world_size
        parts = -(-share // self.micro_batch_size) if self.micro_batch_size else 1
        while share % parts:
            parts += 1
        return parts
