"""What a profile asks of a machine, before anything is trained: `python -m workbook.describe paper`.

Parameters by part, operations, memory of a GPU, the cache of sampling, time and disk, for every variant. Nothing is allocated: models are
built of fake tensors (`workbook.estimates`), so a laptop describes what only a cluster can train. Times are operations divided by what a GPU
does in a second at a stated utilisation (MFU); they are estimates, and no measurement of ours.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TextIO

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.strict import digest
from sitlib.train.config import EngineConfig, OptimizerConfig
from workbook.errors import command
from workbook.estimates import Cost, autoregressive_subject, cost, tokenizer_subject
from workbook.profile import Profile, load_profile

FLOAT32 = 4  # bytes: weights, gradients and moments
BF16 = 2  # bytes: the cache of sampling on a GPU
GIB = 2**30
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000


@dataclass(frozen=True)
class GPU:
    """A GPU after its maker's data sheet; dense products, for which some sheets give twice as much, with sparsity."""

    memory: int  # GB
    bf16: float  # 10^12 operations a second
    tf32: float


GPUS = {
    "A100": GPU(80, 312.0, 156.0),  # NVIDIA A100 80GB SXM
    "A100-40GB": GPU(40, 312.0, 156.0),
    "H100": GPU(80, 989.4, 494.7),  # NVIDIA H100 SXM
    "H200": GPU(141, 989.4, 494.7),
    "L40S": GPU(48, 362.0, 183.0),
    "L4": GPU(24, 121.0, 60.0),
    "A10": GPU(24, 125.0, 62.5),
    "RTX4090": GPU(24, 165.2, 82.6),  # with sums in float32
}

# Parts of a model for the reader, by the first name of a parameter.
TOKENIZER_PARTS = {
    "embed": ("embed",),
    "encoder": ("encoder",),
    "codebooks": ("codebooks", "pre_quant", "post_quant"),
    "decoder": ("decoder",),
    "heads": ("unembed",),
}
AUTOREGRESSIVE_PARTS = {
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
    """One variant."""

    name: str
    parts: dict[str, int]  # parameters
    tokens: int  # codes of an image
    cost: Cost
    batch: int  # images of a process at a time
    optimizer: OptimizerConfig
    cache_bytes: int  # keys and values of one sample; 0 for tokenizers
    engine: EngineConfig

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> int:
        """Two moments, and the moving average of the weights where there is one; a share of them where they are sharded."""
        copies = 2 + (self.optimizer.ema_decay > 0)
        return copies * FLOAT32 * self.cost.learning // self._shards

    @property
    def bucket_bytes(self) -> int:
        """DDP keeps gradients a second time, in the buckets that it sends."""
        return FLOAT32 * self.cost.learning if self.engine.strategy == "ddp" else 0

    @property
    def accumulated_bytes(self) -> int:
        """Gradients of earlier parts of the batch, which are there while the next part passes; whole ones, also of sharded models."""
        parts = self.engine.accumulation(self.optimizer.batch_size)
        return FLOAT32 * self.cost.learning if parts > 1 else 0

    @property
    def activation_bytes(self) -> int:
        """The peak of a step over weights: what is kept for the way back, with the gradients that are there at that moment."""
        return self.cost.peak_bytes - self.cost.weight_bytes

    @property
    def gpu_bytes(self) -> int:
        """The most that a step needs. Sharded, of weights and gradients only a share is there, but for the block at work."""
        held = self.state_bytes + self.bucket_bytes + self.accumulated_bytes
        return self.cost.peak_bytes + held - self._elsewhere

    @property
    def checkpoint_bytes(self) -> int:
        """A resumable state on the disk: weights, two moments, and the moving average."""
        return (3 + (self.optimizer.ema_decay > 0)) * FLOAT32 * self.cost.learning

    @property
    def training_flops(self) -> float:
        """Of all steps on all GPUs; each part of the batch costs as much as this one."""
        per_image = self.cost.step_flops / self.batch
        return per_image * self.optimizer.batch_size * self.optimizer.steps

    @property
    def _shards(self) -> int:
        return self.engine.world_size if self.cache_bytes and self.engine.strategy == "fsdp" else 1

    @property
    def _elsewhere(self) -> int:
        """Weights that other processes hold; gradients are in the peak as they are made, and only then sent away."""
        return self.cost.weight_bytes - self.cost.weight_bytes // self._shards


def descriptions(
    profile: Profile, variants: Sequence[str] | None = None, num_classes: int = IMAGENET_CLASSES
) -> list[Description]:
    """Every variant of a profile, or those named.

    Args:
        num_classes: of the class-conditional models; the profile does not know its data.

    Raises:
        ConfigError: a variant that the profile does not have.
    """
    generators = [*profile.autoregressive.variants, *profile.text.variants]
    names = [*profile.tokenizer.variants, *generators] if variants is None else list(variants)
    costs: dict[str, Cost] = {}  # variants that differ in their data cost the same
    found = []
    for name in tqdm(names, "describing", unit="model", leave=False, disable=None):
        if name in generators:
            found.append(_of_generator(profile, name, num_classes, costs))
        else:
            found.append(_of_tokenizer(profile, name, costs))
    return found


def _of_tokenizer(profile: Profile, name: str, costs: dict[str, Cost]) -> Description:
    config, training, engine = (
        profile.tokenizer_variant(name),
        profile.tokenizer_training(name),
        profile.engine,
    )
    batch = _at_a_time(training.optimizer, engine)
    key = digest(
        config, training.loss, training.adversarial.weight, training.codes_from is None, batch
    )
    if key not in costs:
        costs[key] = cost(lambda: tokenizer_subject(config, training, batch), *_computing(engine))
    with FakeTensorMode():
        parts = _parts(SpectralTokenizer(config), TOKENIZER_PARTS)
    tokens = config.num_scales * config.tokens_per_scale
    engine = replace(engine, strategy="ddp") if engine.strategy == "fsdp" else engine
    return Description(name, parts, tokens, costs[key], batch, training.optimizer, 0, engine)


def _of_generator(
    profile: Profile, name: str, num_classes: int, costs: dict[str, Cost]
) -> Description:
    shape, optimizer, engine = (
        profile.autoregressive_variant(name),
        profile.generator_optimizer(name),
        profile.engine,
    )
    codes = profile.tokenizer_variant(shape.tokenizer)
    text = shape.text
    config = CodeModelConfig(
        shape,
        codes.num_scales,
        codes.tokens_per_scale,
        codes.num_codes,
        min(codes.num_codebooks, codes.num_scales),
        [] if text is not None else [str(number) for number in range(num_classes)],
        TextTokenizer.of_size(text.vocab_size, text.max_tokens).to_json()
        if text is not None
        else None,
    )
    batch = _at_a_time(optimizer, engine)
    key = digest(
        replace(shape, tokenizer=""),
        config.num_scales,
        config.tokens_per_scale,
        config.num_codes,
        batch,
    )
    key += digest(config.num_codebooks, num_classes)
    if key not in costs:
        costs[key] = cost(lambda: autoregressive_subject(config, batch), *_computing(engine))
    with FakeTensorMode():
        model = AutoregressiveModel(config)
    tokens = config.num_scales * config.tokens_per_scale
    positions = tokens + (
        text.max_tokens if text is not None else 0
    )  # those of the text are kept for every layer too
    cache = 2 * shape.layers * shape.width * positions * BF16
    parts = _parts(model, AUTOREGRESSIVE_PARTS)
    return Description(name, parts, tokens, costs[key], batch, optimizer, cache, engine)


def _computing(engine: EngineConfig) -> tuple[Literal["no", "bf16", "fp16"], bool]:
    """Precision and recomputation on a GPU, which is what a description is about."""
    return (
        "bf16" if engine.precision == "auto" else engine.precision,
        engine.gradient_checkpointing,
    )


def _at_a_time(optimizer: OptimizerConfig, engine: EngineConfig) -> int:
    """Samples that pass a model at once in one process."""
    return optimizer.batch_size // engine.world_size // engine.accumulation(optimizer.batch_size)


def _parts(model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        (part,) = [part for part, members in names.items() if first in members]
        counts[part] += parameter.numel()
    return counts


def describe(
    profile: Profile | str,
    variants: Sequence[str] | None = None,
    *,
    gpu: str = "H100",
    utilisation: float = 0.35,
    num_classes: int = IMAGENET_CLASSES,
    num_images: int = IMAGENET_IMAGES,
    file: TextIO | None = None,
) -> list[Description]:
    """Prints what a profile asks of a machine, and returns it.

    Args:
        profile: a profile, or the name of one.
        variants: some of its tokenizers and autoregressive models; default: all.
        gpu: a key of `GPUS`.
        utilisation: share of the GPU's peak that training reaches (MFU).
        num_classes, num_images: of the data set, which the profile does not know.
        file: where to print; default: standard output.

    Raises:
        ValueError: an unknown GPU or a utilisation outside (0, 1].
        ConfigError: an unknown profile or variant.
    """
    if gpu not in GPUS:
        raise ValueError(f"There is no GPU {gpu!r} here: choose one of {', '.join(GPUS)}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is a share of the peak in (0, 1], it is {utilisation}.")
    title = profile if isinstance(profile, str) else "as given"
    profile = load_profile(profile) if isinstance(profile, str) else profile
    found = descriptions(profile, variants, num_classes)
    out = file or sys.stdout
    engine, sheet = profile.engine, GPUS[gpu]
    rate = (sheet.tf32 if engine.precision == "no" else sheet.bf16) * 1e12 * utilisation
    world = engine.world_size
    print(
        f"Profile {title}: {world} x {gpu} ({engine.machines} machine{'s' * (engine.machines > 1)}, {engine.strategy}), "
        f"precision {_computing(engine)[0]}, activations "
        f"{'recomputed' if engine.gradient_checkpointing else 'kept'}.\n"
        f"{rate / 1e12:.0f} TFLOP/s on each: {utilisation:.0%} of the {rate / utilisation / 1e12:.0f} of its data sheet.",
        file=out,
    )
    tokenizers = [item for item in found if not item.cache_bytes]
    generators = [item for item in found if item.cache_bytes]
    for kind, items in (("tokenizers", tokenizers), ("models over codes", generators)):
        if items:
            rows = [
                [d.name, *map(_millions, d.parts.values()), _millions(d.parameters), d.tokens]
                for d in items
            ]
            header = ["", *items[0].parts, "all", "tokens"]
            _print_table(f"Parameters of {kind}, millions", header, rows, out)
    rows = [
        [
            d.name,
            d.batch,
            f"{d.cost.weight_bytes / GIB:.2f}",
            f"{d.activation_bytes / GIB:.2f}",
            f"{d.state_bytes / GIB:.2f}",
            f"{(d.bucket_bytes + d.accumulated_bytes) / GIB:.2f}",
            f"{d.gpu_bytes / GIB:.1f}",
            "yes" if d.gpu_bytes < 0.9 * sheet.memory * 1e9 else "no",
            f"{d.cache_bytes / 2**20:.0f}" if d.cache_bytes else "",
        ]
        for d in found
    ]
    header = [
        "",
        "at a time",
        "weights",
        "activations and gradients",
        "optimizer",
        "more gradients",
        "all",
        "fits",
        "KV, MiB",
    ]
    _print_table(
        f"Memory of a GPU in training, GiB (of {sheet.memory} GB); cache of a sample",
        header,
        rows,
        out,
    )
    rows = []
    for d in found:
        images = rate / (d.cost.step_flops / d.batch)  # a second, on one GPU
        hours = d.training_flops / rate / 3600
        rows.append(
            [
                d.name,
                f"{d.cost.forward_flops / d.batch / 1e9:,.0f}",
                f"{d.cost.step_flops / d.batch / 1e9:,.0f}",
                f"{d.optimizer.steps:,}",
                f"{d.optimizer.batch_size:,}",
                f"{images * world:,.0f}",
                f"{images * world * d.tokens:,.0f}",
                f"{hours:,.1f}",
                f"{hours / world / 24:,.2f}",
            ]
        )
    header = [
        "",
        "GFLOP forward",
        "training",
        "steps",
        "batch",
        "images/s",
        "tokens/s",
        "GPU-hours",
        "days",
    ]
    _print_table(
        f"Operations an image; images and codes that {world} x {gpu} take a second, and for how long",
        header,
        rows,
        out,
    )
    print(
        f"All of it once: {sum(d.training_flops for d in found) / rate / 3600:,.0f} GPU-hours, "
        f"{sum(d.training_flops for d in found) / rate / 3600 / world / 24:,.1f} days one after another.",
        file=out,
    )
    rows = [
        [
            d.name,
            f"{d.checkpoint_bytes / 1e9:.2f}",
            f"{d.parameters * FLOAT32 / 1e9:.2f}",
            f"{num_images * d.tokens * 2 / 1e9:.1f}" if not d.cache_bytes else "",
        ]
        for d in found
    ]
    header = ["", "state to resume from", "model", f"codes of {num_images:,} views"]
    _print_table(
        "On the disk, GB (two states exist for a moment; codes of two bytes each)",
        header,
        rows,
        out,
    )
    return found


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}" if count else ""


def _print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], file: TextIO
) -> None:
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}", file=file)
    for number, row in enumerate(cells):
        first, *others = (
            cell.ljust(w) if not i else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *others]).rstrip(), file=file)
        if number == 0:
            print("  " + "-" * (sum(widths) + 2 * (len(widths) - 1)), file=file)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workbook.describe", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "profile", nargs="?", default="quick", help="name, or path of a .yaml file (quick)"
    )
    parser.add_argument("--variants", nargs="+", help="some of its variants (all)")
    parser.add_argument("--gpu", default="H100", choices=GPUS, help="after its data sheet (H100)")
    parser.add_argument(
        "--utilisation", type=float, default=0.35, help="MFU, a share of the peak (0.35)"
    )
    parser.add_argument(
        "--classes", type=int, default=IMAGENET_CLASSES, help="of the data (ImageNet's 1000)"
    )
    parser.add_argument(
        "--images", type=int, default=IMAGENET_IMAGES, help="of the data (ImageNet's 1,281,167)"
    )
    options = parser.parse_args(arguments)
    describe(
        options.profile,
        options.variants,
        gpu=options.gpu,
        utilisation=options.utilisation,
        num_classes=options.classes,
        num_images=options.images,
    )


if __name__ == "__main__":
    command(main)
