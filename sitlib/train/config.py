"""Configuration of training: data, optimizer, losses, captions, devices.

Defaults of the tokenizer's training are the paper's (SIT, arXiv 2412.09607); where it says nothing,
those of ViT-VQGAN (arXiv 2110.04627). "Inferred" marks what no text states.
"""

from dataclasses import field, fields
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from sitlib.model.config import STRICT, Probability, TwoOrMore, VocabularySize
from sitlib.model.dual_encoder import DualEncoderShape
from sitlib.strict import require

Precision = Literal["auto", "no", "bf16", "fp16"]
Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Images, and the training views that are cut from them."""

    # Folder of WebDataset shards (<split>-*.tar) or of images (split/class/name.jpg, or
    # class/name.jpg); or several, each with how often its images come in an epoch.
    source: str | Annotated[dict[str, PositiveInt], Field(min_length=1)]
    size: PositiveInt = 256  # side of a view, px
    # Smallest side of a random crop / short side of the photograph (inferred).
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.8
    flip: bool = True  # random horizontal flips (inferred)
    recolor: Probability = 0.0  # share of training views with other colors, drawn at random (ours)
    # Training views from which each scale's mean and deviation are measured (ours).
    normalization_views: PositiveInt = 4096
    # Of the training images, kept apart: settings are chosen by these, never by held-out ones.
    validation_percent: Annotated[int, Field(ge=0, le=50)] = 0

    @property
    def sources(self) -> dict[str, int]:
        """How often the images of each folder come in an epoch."""
        return {self.source: 1} if isinstance(self.source, str) else self.source

    @property
    def folder(self) -> str:
        """The first folder: generators are trained on, and held-out views are of, its images."""
        return next(iter(self.sources))


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """Optimizer, warm-up, decay, clipping by norm; defaults of ViT-VQGAN's tokenizer."""

    # muon: for the matrices of transformer blocks, AdamW for all others (ours); adafactor: VIM's.
    algorithm: Literal["adamw", "muon", "adafactor"] = "adamw"
    muon_learning_rate: PositiveFloat = 3e-3  # peak, of these matrices; it falls with the other
    steps: PositiveInt = 500_000
    batch_size: PositiveInt = 256  # of one update, on all devices
    learning_rate: PositiveFloat = 1e-4  # peak
    final_learning_rate: NonNegativeFloat = 5e-5  # at the last step
    warmup_steps: NonNegativeInt = 50_000
    schedule: Literal["cosine", "exponential"] = "cosine"  # of the decay from peak to final rate
    decay_start: NonNegativeInt = 0  # step at which it begins, if that is after the warm-up
    beta1: Probability = 0.9
    beta2: Probability = 0.99
    weight_decay: NonNegativeFloat = 1e-4
    clip_norm: PositiveFloat = 1.0  # inferred
    # Of the moving average of the weights that is kept in the end (inferred); 0 = the last weights.
    ema_decay: Probability = 0.999
    log_every: PositiveInt = 100  # steps between rows of the training curve
    checkpoint_every: PositiveInt = 5000  # steps between resumable checkpoints

    def __post_init__(self):
        pairs = {"warmup_steps": "steps", "decay_start": "steps"}
        for small, large in (pairs | {"final_learning_rate": "learning_rate"}).items():
            a, b = getattr(self, small), getattr(self, large)
            require(a <= b, f"{small} {a} must lie in 0 ... {large} = {b}")
        sentence = "schedule exponential never reaches 0: set final_learning_rate above it"
        require(self.schedule != "exponential" or self.final_learning_rate > 0, sentence)
        a, b = self.checkpoint_every, self.log_every
        require(a % b == 0, f"checkpoint_every {a} must be a multiple of log_every {b}")


@dataclass(frozen=True, config=STRICT)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss on pixels in [-1, 1] (SIT, section 4; the range inferred)."""

    l2: NonNegativeFloat = 1.0  # the same as 4.0 in [0, 1]: if SIT means that range, set 0.25
    lpips: NonNegativeFloat = 0.1
    lpips_net: Literal["alex", "vgg"] = "vgg"  # ViT-VQGAN's; SIT says "perceptual"
    commitment: NonNegativeFloat = 0.25  # beta: pulls the encoder's outputs to their codes
    codebook: NonNegativeFloat = 1.0  # pulls codes to the outputs that chose them (ViT-VQGAN)
    # Ours, all off: steps without use after which a code moves onto an output of the encoder;
    reset_dead_codes_after: NonNegativeInt = 0
    # L2 and LPIPS of the image that the first k scales alone give, another k at each step;
    multiscale: NonNegativeFloat = 0.0
    # how wrong the differences of pixels are across borders of tokens, so that no grid shows.
    border: NonNegativeFloat = 0.0


@dataclass(frozen=True, config=STRICT)
class AdversarialConfig:
    """A discriminator that learns beside the tokenizer, and when it counts (SIT section 4)."""

    weight: NonNegativeFloat = 0.1  # in the tokenizer's loss, after the ramp; 0 = no discriminator
    start: NonNegativeInt = 0  # step at which the discriminator begins to learn
    # Steps for which it learns alone (inferred: an untrained one ruins reconstructions), then steps
    # over which its weight grows from 0 (inferred).
    warmup: NonNegativeInt = 10_000
    ramp: NonNegativeInt = 10_000
    # At full size; they double with every halving, up to 8 times (inferred).
    channels: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-4  # inferred: the tokenizer's
    # Penalty on the gradient at real images, gamma / 2, weighted with `r1_every` in one of so many
    # steps (StyleGAN2's number). Off, inferred: SIT has spectral normalization against instability
    # and does not say that R1 stays beside it.
    r1: NonNegativeFloat = 0.0
    r1_every: PositiveInt = 16
    spectral_norm: bool = True  # of the discriminator's layers


@dataclass(frozen=True, config=STRICT)
class TokenizerTraining:
    """Training of a tokenizer; with `codes_from`, of a decoder for the codes of another."""

    loss: TokenizerLossConfig = TokenizerLossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    codes_from: str | None = None  # tokenizer variant
    # Tokenizer whose weights training starts with: a variant, or a name for `from_pretrained`. Only
    # `size`, `grid_size`, `refine` may differ; positions are interpolated.
    starts_from: str | None = None

    def __post_init__(self):
        sentence = "codes_from and starts_from exclude each other"
        require(self.codes_from is None or self.starts_from is None, sentence)
        steps, weight = self.optimizer.steps, self.adversarial.weight
        alone = self.adversarial.start + self.adversarial.warmup
        never = f"the adversarial term would never act: start + warmup = {alone} of {steps} steps"
        require(not weight or alone < steps, never)


@dataclass(frozen=True, config=STRICT)
class CodesConfig:
    """Views whose codes are extracted once: ten an image, as LlamaGen (arXiv 2406.06525)."""

    views_per_image: PositiveInt = 5  # of every training image with a class or caption
    mirrored: bool = True  # each view's mirror image too; not where captions say left or right
    held_out_views: PositiveInt = 50_000
    seed: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class CaptionsConfig:
    """Texts of images."""

    # records: captions in the records of the shards. names: sentences built from names in them.
    # Else a captions file of COCO, with {split} in its path.
    source: str = "records"
    per_image: PositiveInt = 5  # sentences for an image, where they are built
    seed: NonNegativeInt = 0


@dataclass(frozen=True, config=STRICT)
class DualEncoderConfig(DualEncoderShape):
    """Training of the dual encoder: its vocabulary and the views of images that it learns from."""

    optimizer: OptimizerConfig = field(kw_only=True)
    vocab_size: VocabularySize = 1024
    max_tokens: TwoOrMore = 48
    image_size: Annotated[int, Field(ge=32, le=224)] = 96  # px at which EfficientNet-Lite0 looks
    # Blurred or blocky versions of every training image, besides the clean one.
    degraded_views: NonNegativeInt = 3
    # Tokenizer variants whose reconstructions of the training images it learns from too.
    reconstructions: list[str] = field(default_factory=list)

    @property
    def shape(self) -> DualEncoderShape:
        """The part of it that a checkpoint stores."""
        names = [f.name for f in fields(DualEncoderShape)]
        return DualEncoderShape(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """Devices, precision and memory of training: speed, and results up to rounding.

    No part of what names a run: a model trained on eight GPUs is found again on one.
    """

    # auto: bf16 on GPUs and CPUs (AMX, AVX512-BF16) that have it, fp16 on other GPUs, no on other CPUs.
    precision: Precision = "auto"
    # On every machine, one for each GPU; each has a whole model, and its share of every batch (DDP).
    processes: PositiveInt = 1
    machines: PositiveInt = 1
    # Most samples that pass a model at a time in one process; gradients of the rest are accumulated
    # before the update. 0 = a process's whole share of a batch.
    micro_batch_size: NonNegativeInt = 0
    data_workers: NonNegativeInt = 0  # processes that load batches, for each one that trains
    gradient_checkpointing: bool = False  # less memory, a third more work
    compile: bool = False  # torch.compile of the transformer blocks, on GPUs
    trackers: list[Tracker] = field(default_factory=list)  # besides the curve's CSV file
    # Steps between sample grids or reconstructions, under scratch/images and in trackers; 0 = none.
    images_every: NonNegativeInt = 0

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines

    def accumulation(self, batch_size: int) -> int:
        """Number of equal micro-batches, as few as `micro_batch_size` permits, of each process."""
        share = batch_size // self.world_size
        count = -(-share // self.micro_batch_size) if self.micro_batch_size else 1
        while share % count:
            count += 1
        return count


ONE_PROCESS = EngineConfig(precision="no")
