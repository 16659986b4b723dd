"""Demands of a profile on a machine before anything is trained: `python -m workbook describe
paper`.

Parameters, operations, memory, time and disk of every variant. Times are operations / (peak of a
GPU * utilization): estimates, no measurements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import digest, require, require_known
from sitlib.train.config import EngineConfig, OptimizerConfig
from workbook.estimates import Cost, autoregressive_subject, cost, tokenizer_subject
from workbook.profile import Profile, load_profile

FLOAT32, BF16 = 4, 2  # bytes: weights, gradients, moments; KV cache of sampling
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
# Memory in GB, and 10^12 dense operations a second in bf16 and tf32, after the makers' data sheets.
GPUS = {
    "A100": (80, 312.0, 156.0),  # NVIDIA A100 80GB SXM
    "A100-40GB": (40, 312.0, 156.0),
    "H100": (80, 989.4, 494.7),  # NVIDIA H100 SXM
    "H200": (141, 989.4, 494.7),
    "L40S": (48, 362.0, 183.0),
    "L4": (24, 121.0, 60.0),
    "A10": (24, 125.0, 62.5),
    "RTX4090": (24, 165.2, 82.6),  # with sums in float32
}
# Parts of a model, by the first names of its parameters.
TOKENIZER_PARTS = {
    "embed": ("embed",),
    "encoder": ("encoder",),
    "codebooks": ("codebooks", "pre_quant", "post_quant"),
    "decoder": ("decoder",),
    "heads": ("unembed",),
}
GENERATOR_PARTS = {
    "embeddings": (
        "start",
        "class_embedding",
        "code_embedding",
        "scale_embedding",
        "position_embedding",
    ),
    "text encoder": ("text_encoder",),
    "blocks": ("transformer",),
    "heads": ("heads",),
}


@dataclass(frozen=True)
class Description:
    """One variant; bytes are those of one process."""

    name: str
    parts: dict[str, int]  # parameters
    tokens: int  # codes of an image
    cost: Cost
    batch: int  # images of a process at a time
    optimizer: OptimizerConfig
    cache_bytes: int  # KV cache of one sample; 0 for tokenizers
    engine: EngineConfig

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> int:
        """Two moments and, if there is one, the moving average of the weights; sharded by FSDP."""
        copies = 2 + (self.optimizer.ema_decay > 0)
        return copies * FLOAT32 * self.cost.learning // self._shards

    @property
    def bucket_bytes(self) -> int:
        """DDP keeps gradients a second time, in the buckets that it sends."""
        return FLOAT32 * self.cost.learning if self.engine.strategy == "ddp" else 0

    @property
    def accumulated_bytes(self) -> int:
        """Gradients of earlier micro-batches; whole ones, also of sharded models."""
        micro_batches = self.engine.accumulation(self.optimizer.batch_size)
        return FLOAT32 * self.cost.learning if micro_batches > 1 else 0

    @property
    def activation_bytes(self) -> int:
        """Activations and gradients at the peak of a step."""
        return self.cost.peak_bytes - self.cost.weight_bytes

    @property
    def gpu_bytes(self) -> int:
        """All that a step needs, less the weights that other processes hold.

        Gradients are in the peak as they are made, and only then sent away.
        """
        elsewhere = self.cost.weight_bytes - self.cost.weight_bytes // self._shards
        held = self.state_bytes + self.bucket_bytes + self.accumulated_bytes
        return self.cost.peak_bytes + held - elsewhere

    @property
    def checkpoint_bytes(self) -> int:
        """A resumable state: weights, two moments, and the moving average."""
        return (3 + (self.optimizer.ema_decay > 0)) * FLOAT32 * self.cost.learning

    @property
    def training_flops(self) -> float:
        """All steps on all GPUs."""
        images = self.optimizer.batch_size * self.optimizer.steps
        return self.cost.step_flops / self.batch * images

    @property
    def _shards(self) -> int:
        return self.engine.world_size if self.engine.strategy == "fsdp" else 1


def descriptions(
    profile: Profile, variants: Sequence[str] | None = None, num_classes: int = IMAGENET_CLASSES
) -> list[Description]:
    """Describe every variant of a profile, or those named.

    Args:
        num_classes: of the class-conditional models; the profile does not know its data.

    Raises:
        ConfigError: a variant that the profile does not have.
    """
    generators = [*profile.autoregressive.variants, *profile.text.variants]
    names = [*profile.tokenizer.variants, *generators] if variants is None else list(variants)
    costs: dict[str, Cost] = {}  # variants that differ in their data cost the same
    progress = tqdm(names, "describing", unit="model", leave=False, disable=None)
    return [
        _of_generator(profile, name, num_classes, costs)
        if name in generators
        else _of_tokenizer(profile, name, costs)
        for name in progress
    ]


def _of_tokenizer(profile: Profile, name: str, costs: dict[str, Cost]) -> Description:
    config, training = profile.tokenizer_variant(name), profile.tokenizer_training(name)
    engine = profile.engine
    if engine.strategy == "fsdp":
        engine = replace(engine, strategy="ddp")
    batch = _micro_batch(training.optimizer, engine)
    weight, is_whole = training.adversarial.weight, training.codes_from is None
    key = digest(config, training.loss, weight, is_whole, batch)
    if key not in costs:
        costs[key] = cost(lambda: tokenizer_subject(config, training, batch), *_computing(engine))
    with FakeTensorMode():
        parts = _parts(SpectralTokenizer(config), TOKENIZER_PARTS)
    tokens = config.num_scales * config.tokens_per_scale
    return Description(name, parts, tokens, costs[key], batch, training.optimizer, 0, engine)


def _of_generator(
    profile: Profile, name: str, num_classes: int, costs: dict[str, Cost]
) -> Description:
    shape, optimizer = profile.autoregressive_variant(name), profile.generator_optimizer(name)
    codes, text, engine = profile.tokenizer_variant(shape.tokenizer), shape.text, profile.engine
    texts = TextTokenizer.of_size(text.vocab_size, text.max_tokens).to_json() if text else None
    classes = [] if text else [str(number) for number in range(num_classes)]
    books = min(codes.num_codebooks, codes.num_scales)
    sizes = (codes.num_scales, codes.tokens_per_scale, codes.num_codes, books)
    config = CodeModelConfig(shape, *sizes, classes, texts)
    batch = _micro_batch(optimizer, engine)
    key = digest(replace(shape, tokenizer=""), sizes, len(classes), batch)
    if key not in costs:
        costs[key] = cost(lambda: autoregressive_subject(config, batch), *_computing(engine))
    with FakeTensorMode():
        parts = _parts(AutoregressiveModel(config), GENERATOR_PARTS)
    tokens = codes.num_scales * codes.tokens_per_scale
    # Every layer keeps keys and values of the text, too.
    cache = 2 * shape.layers * shape.width * (tokens + (text.max_tokens if text else 0)) * BF16
    return Description(name, parts, tokens, costs[key], batch, optimizer, cache, engine)


def _computing(engine: EngineConfig) -> tuple[Literal["no", "bf16", "fp16"], bool]:
    """Precision and recomputation on a GPU."""
    precision = "bf16" if engine.precision == "auto" else engine.precision
    return precision, engine.gradient_checkpointing


def _micro_batch(optimizer: OptimizerConfig, engine: EngineConfig) -> int:
    return optimizer.batch_size // engine.world_size // engine.accumulation(optimizer.batch_size)


def _parts(model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    part_of = {member: part for part, members in names.items() for member in members}
    counts = dict.fromkeys(names, 0)
    for name, parameter in model.named_parameters():
        counts[part_of[name.split(".")[0]]] += parameter.numel()
    return counts


# -- the report ------------------------------------------------------------------------------------


def describe(
    profile: Profile | str = "quick",
    variants: Sequence[str] | None = None,
    *,
    gpu: str = "H100",
    utilization: float = 0.35,
    num_classes: int = IMAGENET_CLASSES,
    num_images: int = IMAGENET_IMAGES,
) -> list[Description]:
    """Print what a profile asks of a machine, and return it.

    Args:
        profile: a profile, or the name of one.
        variants: some of its tokenizers and generators; default: all.
        gpu: a key of `GPUS`.
        utilization: share of the GPU's peak that training reaches (MFU).
        num_classes, num_images: of the data set, which the profile does not know.

    Raises:
        ValueError: an unknown GPU, profile or variant, or a utilization outside (0, 1].
    """
    require_known(gpu, GPUS, "GPU")
    require(
        0 < utilization <= 1,
        f"utilization is a share of the peak in (0, 1], it is {utilization}.",
    )
    title = profile if isinstance(profile, str) else "as given"
    profile = load_profile(profile) if isinstance(profile, str) else profile
    rows = descriptions(profile, variants, num_classes)
    engine, world = profile.engine, profile.engine.world_size
    memory, bf16, tf32 = GPUS[gpu]
    peak = tf32 if engine.precision == "no" else bf16
    rate = peak * 1e12 * utilization
    print(
        f"Profile {title}: {world} x {gpu}, {engine.strategy}, precision {_computing(engine)[0]}, "
        f"activations {'recomputed' if engine.gradient_checkpointing else 'kept'}.\n"
        f"{rate / 1e12:.0f} TFLOP/s on each: {utilization:.0%} of the {peak:.0f} of its data sheet."
    )
    for kind, is_kind in (("tokenizers", False), ("models over codes", True)):
        if group := [d for d in rows if bool(d.cache_bytes) is is_kind]:
            columns = {
                part: [f"{d.parts[part] / 1e6:.1f}" for d in group] for part in group[0].parts
            }
            columns["all"] = [f"{d.parameters / 1e6:.1f}" for d in group]
            columns["tokens"] = [str(d.tokens) for d in group]
            _print_table(f"Parameters of {kind}, millions", group, columns)
    _print_table(
        f"Memory of a GPU in training, GiB (of {memory} GB); KV cache of a sample, MiB",
        rows,
        {
            "at a time": [d.batch for d in rows],
            "weights": [f"{d.cost.weight_bytes / 2**30:.2f}" for d in rows],
            "activations, gradients": [f"{d.activation_bytes / 2**30:.2f}" for d in rows],
            "optimizer": [f"{d.state_bytes / 2**30:.2f}" for d in rows],
            "more gradients": [
                f"{(d.bucket_bytes + d.accumulated_bytes) / 2**30:.2f}" for d in rows
            ],
            "all": [f"{d.gpu_bytes / 2**30:.1f}" for d in rows],
            "fits": ["yes" if d.gpu_bytes < 0.9 * memory * 1e9 else "no" for d in rows],
            "KV": [f"{d.cache_bytes / 2**20:.0f}" if d.cache_bytes else "" for d in rows],
        },
    )
    images = [rate * world / (d.cost.step_flops / d.batch) for d in rows]  # a second
    hours = [d.training_flops / rate / 3600 for d in rows]
    _print_table(
        f"Operations for an image; images and codes a second, and time, on {world} x {gpu}",
        rows,
        {
            "GFLOP forward": [f"{d.cost.forward_flops / d.batch / 1e9:,.0f}" for d in rows],
            "training": [f"{d.cost.step_flops / d.batch / 1e9:,.0f}" for d in rows],
            "steps": [f"{d.optimizer.steps:,}" for d in rows],
            "batch": [f"{d.optimizer.batch_size:,}" for d in rows],
            "images/s": [f"{n:,.0f}" for n in images],
            "tokens/s": [f"{n * d.tokens:,.0f}" for n, d in zip(images, rows, strict=True)],
            "GPU-hours": [f"{h:,.1f}" for h in hours],
            "days": [f"{h / world / 24:,.2f}" for h in hours],
        },
    )
    print(
        f"All of it once: {sum(hours):,.0f} GPU-hours, {sum(hours) / world / 24:,.1f} days one "
        "after another."
    )
    _print_table(
        "On the disk, GB (two states exist for a moment; codes of two bytes each)",
        rows,
        {
            "state to resume from": [f"{d.checkpoint_bytes / 1e9:.2f}" for d in rows],
            "model": [f"{d.parameters * FLOAT32 / 1e9:.2f}" for d in rows],
            f"codes of {num_images:,} views": [
                "" if d.cache_bytes else f"{num_images * d.tokens * 2 / 1e9:.1f}" for d in rows
            ],
        },
    )
    return rows


def _print_table(title: str, rows: Sequence[Description], columns: Mapping[str, Sequence]) -> None:
    texts = [["", *(d.name for d in rows)]]
    texts += [[name, *map(str, values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in texts]
    print(f"\n{title}")
    for number, cells in enumerate(zip(*texts, strict=True)):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  " + "  ".join([cells[0].ljust(widths[0]), *aligned[1:]]).rstrip())
        if number == 0:
            print("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)))
