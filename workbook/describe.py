"""Demands of a profile on a machine before anything is trained: `python -m workbook describe
paper`.

Parameters, operations, memory, time and disk of every variant. Times are operations / (peak of a
GPU * utilization): estimates, no measurements.
"""

from collections.abc import Callable, Mapping, Sequence
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
from workbook.figures.tables import text_table
from workbook.profile import Profile, load_profile

FLOAT32, BF16 = 4, 2  # bytes: weights, gradients, moments; KV cache of sampling
IMAGENET_CLASSES = 1000
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
    def shards(self) -> int:
        return self.engine.world_size if self.engine.strategy == "fsdp" else 1

    @property
    def state_bytes(self) -> int:
        """Two moments and, if there is one, the moving average of the weights; sharded by FSDP."""
        copies = 2 + (self.optimizer.ema_decay > 0)
        return copies * FLOAT32 * self.cost.learning // self.shards

    @property
    def extra_gradient_bytes(self) -> int:
        """Gradients in DDP's buckets, and whole ones of earlier micro-batches."""
        is_ddp = self.engine.strategy == "ddp"
        accumulates = self.engine.accumulation(self.optimizer.batch_size) > 1
        return (is_ddp + accumulates) * FLOAT32 * self.cost.learning

    @property
    def gpu_bytes(self) -> int:
        """All that a step needs, less the weights that other processes hold.

        Gradients are in the peak as they are made, and only then sent away.
        """
        elsewhere = self.cost.weight_bytes - self.cost.weight_bytes // self.shards
        return self.cost.peak_bytes + self.state_bytes + self.extra_gradient_bytes - elsewhere

    @property
    def image_flops(self) -> float:
        """Operations of training on one image."""
        return self.cost.step_flops / self.batch


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
) -> list[Description]:
    """Print what a profile asks of a machine, and return it.

    Args:
        profile: a profile, or the name of one.
        variants: some of its tokenizers and generators; default: all.
        gpu: a key of `GPUS`.
        utilization: share of the GPU's peak that training reaches (MFU).
        num_classes: of the data set, which the profile does not know.

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
    rate = peak * 1e12 * utilization  # operations a second
    print(
        f"Profile {title}: {world} x {gpu}, {engine.strategy}, precision {_computing(engine)[0]}, "
        f"activations {'recomputed' if engine.gradient_checkpointing else 'kept'}.\n"
        f"{rate / 1e12:.0f} TFLOP/s on each: {utilization:.0%} of the {peak:.0f} of its data sheet."
    )

    def show(title: str, group: Sequence[Description], row_of: Callable[..., dict]) -> None:
        rows = [{"": d.name, **row_of(d)} for d in group]
        print("\n" + text_table(rows, title, digits=2) if rows else "", end="\n" if rows else "")

    def of_parts(d: Description) -> dict:
        parts = {part: count / 1e6 for part, count in d.parts.items()}
        return {**parts, "all": d.parameters / 1e6, "tokens": d.tokens}

    def of_memory(d: Description) -> dict:
        gib = {
            "weights": d.cost.weight_bytes,
            "activations, gradients": d.cost.peak_bytes - d.cost.weight_bytes,
            "optimizer": d.state_bytes,
            "more gradients": d.extra_gradient_bytes,
            "all": d.gpu_bytes,
        }
        fits = "yes" if d.gpu_bytes < 0.9 * memory * 1e9 else "no"
        gib = {name: value / 2**30 for name, value in gib.items()}
        return {"at a time": d.batch, **gib, "fits": fits, "KV, MiB": d.cache_bytes / 2**20}

    def of_time(d: Description) -> dict:
        images = rate * world / d.image_flops  # a second
        seconds = d.optimizer.batch_size * d.optimizer.steps / images
        return {
            "GFLOP forward": round(d.cost.forward_flops / d.batch / 1e9),
            "training": round(d.image_flops / 1e9),
            "steps": d.optimizer.steps,
            "batch": d.optimizer.batch_size,
            "images/s": round(images),
            "tokens/s": round(images * d.tokens),
            "GPU-hours": seconds * world / 3600,
            "days": seconds / 86400,
        }

    def of_disk(d: Description) -> dict:
        copies = 3 + (d.optimizer.ema_decay > 0)  # weights, two moments, moving average
        gb = {
            "state to resume from": copies * FLOAT32 * d.cost.learning,
            "model": FLOAT32 * d.parameters,
            "codes of a million views": 0 if d.cache_bytes else 1e6 * 2 * d.tokens,
        }
        return {name: value / 1e9 for name, value in gb.items()}

    show("Parameters of tokenizers, millions", [d for d in rows if not d.cache_bytes], of_parts)
    show("Parameters of models over codes, millions", [d for d in rows if d.cache_bytes], of_parts)
    show(f"Memory of a GPU in training, GiB (of {memory} GB)", rows, of_memory)
    show(f"Operations for an image, and time on {world} x {gpu}", rows, of_time)
    hours = sum(of_time(d)["GPU-hours"] for d in rows)
    print(f"All of it once: {hours:,.0f} GPU-hours, {hours / world / 24:,.1f} days in a row.")
    show("On the disk, GB (two states exist for a moment)", rows, of_disk)
    return rows
