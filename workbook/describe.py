"""Demands of a profile on a machine before anything is trained: `python -m workbook describe
paper`.

Parameters, operations, memory, time and disk of every variant, from the shapes of tensors alone:
the very training step runs on fake tensors, so what is recomputed, kept for the backward pass or
frozen is counted as it happens, and nothing is allocated. Times are operations / (peak of a GPU *
utilization): estimates, no measurements.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)
from tqdm import tqdm

from sitlib.metrics.networks import PerceptualDistance
from sitlib.model.config import TokenizerConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.sequence import Transformer
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import ADTransformer
from sitlib.strict import digest, require, require_known
from sitlib.train.codebooks import take_over_codes
from sitlib.train.config import OptimizerConfig, TokenizerTraining
from sitlib.train.discriminator import Discriminator, discriminator_loss, generator_loss
from sitlib.train.losses import TokenizerLoss
from workbook.figures.tables import text_table
from workbook.generators import config_over
from workbook.profile import Profile, load_profile

FLOAT32, BF16 = 4, 2  # bytes: weights, gradients, moments; KV cache of sampling
CLASSES = [str(number) for number in range(1000)]  # as many as ImageNet has
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

# torch's table, and the CPU's attention, which torch counts from 2.15 on only.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


class Meter(TorchDispatchMode):
    """Count operations, and bytes of the tensors that are alive and their peak, while entered.

    torch's FlopCounterMode has a tree of modules, which would keep activations alive.

    Args:
        held: modules whose tensors are there already.
    """

    def __init__(self, *held: nn.Module):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for module in held:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:  # a view has no memory of its own
            return

        def free(_: weakref.ref) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


def flops(call: Callable[[], Any]) -> int:
    """Operations of a call in matrix products, convolutions and attention (causal: all scores)."""
    with Meter() as meter:
        call()
    return meter.flops


@dataclass(frozen=True)
class Subject:
    """Models with random weights, the trained one first, and what is computed with them."""

    models: list[nn.Module]
    forward: Callable[[], Any]
    step: Callable[[], None]  # leaves gradients in all of them


@dataclass(frozen=True)
class Cost:
    """Cost of one training step of one process."""

    parameters: dict[str, int]  # of the model, by the last word of its parts' names
    learning: int  # parameters that the step trains, the discriminator's too
    forward_flops: int  # of the model alone, without its losses
    step_flops: int  # forward and backward, losses and discriminator included
    weight_bytes: int  # all that is there before the step: model, discriminator, LPIPS
    peak_bytes: int  # at the worst moment: weights, activations, gradients; no moments


def cost(
    subject: Callable[[], Subject],
    precision: Literal["auto", "no", "bf16", "fp16"] = "no",
    gradient_checkpointing: bool = False,
) -> Cost:
    """Cost of a training step; `subject` is called, and its step run, on fake tensors.

    Precision "auto" is bf16. Kernels are those of a CPU. Their
    workspace, and what a GPU's allocator wastes, do not count.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # RMSNorm in mixed precision
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        made = subject()
        for module in (part for model in made.models for part in model.modules()):
            if isinstance(module, (ADTransformer, Transformer)):
                module.gradient_checkpointing = gradient_checkpointing
        parameters: Counter[str] = Counter()
        for name, parameter in made.models[0].named_parameters():  # "code_embedding.0.weight"
            part = name.split(".")[0].split("_")[-1].replace("start", "embedding")
            parameters[part] += parameter.numel()
        learning = sum(p.numel() for m in made.models for p in m.parameters() if p.requires_grad)
        memory = Meter(*made.models)
        weights = memory.now
        # Twice, because autocast keeps the weights that it casts.
        with torch.autocast("cpu", dtype, enabled=precision != "no"), torch.no_grad():
            forward = flops(made.forward)
        with torch.autocast("cpu", dtype, enabled=precision != "no"), memory:
            made.step()
    return Cost(dict(parameters), learning, forward, memory.flops, weights, memory.peak)


def tokenizer_subject(config: TokenizerConfig, training: TokenizerTraining, batch: int) -> Subject:
    """The training step of `sitlib.train.tokenizer`: reconstruction, LPIPS, discriminator."""
    model = SpectralTokenizer(config).train()
    if training.codes_from is not None:
        take_over_codes(model, SpectralTokenizer(config))
    loss = TokenizerLoss(replace(training.loss, lpips=0.0))
    if training.loss.lpips:
        loss.config, loss.perceptual = training.loss, PerceptualDistance(training.loss.lpips_net)
    weight = training.adversarial.weight
    discriminator = Discriminator(config.size, training.adversarial.channels) if weight else None
    images = torch.rand(batch, 3, config.size, config.size)
    # Of the sizes that take turns, the dearest.
    preview_scales = config.levels if training.loss.multiscale else 0

    def step() -> None:
        output = model(images, preview_scales=preview_scales)
        total, _ = loss(output, images)
        if discriminator is not None:
            discriminator.requires_grad_(False)
            total = total + weight * generator_loss(discriminator(output.reconstruction))
        reconstruction = output.reconstruction.detach()
        total.backward()
        del output, total
        if discriminator is not None:
            discriminator.requires_grad_(True)
            discriminator_loss(discriminator(images), discriminator(reconstruction)).backward()

    models: list[nn.Module | None] = [model, discriminator, loss.perceptual]
    return Subject([m for m in models if m is not None], lambda: model(images), step)


def autoregressive_subject(config: CodeModelConfig, batch: int) -> Subject:
    """The training step of a generator over codes [batch, S, N], texts at their longest."""
    model = AutoregressiveModel(config).train()
    codes = torch.zeros(batch, config.num_scales, config.tokens_per_scale, dtype=torch.int64)
    text = config.transformer.text
    condition = torch.ones(batch, *([] if text is None else [text.max_tokens]), dtype=torch.int64)

    def step() -> None:
        code_nats(model(codes, condition), codes).mean().backward()

    return Subject([model], lambda: model(codes, condition), step)


def subject_of(profile: Profile, variant: str, batch: int) -> Subject:
    """The training step of a variant of a profile; class-conditional models are told CLASSES."""
    if variant in profile.tokenizer.variants:
        config, training = profile.tokenizer_variant(variant), profile.tokenizer_training(variant)
        return tokenizer_subject(config, training, batch)
    shape, texts = profile.autoregressive_variant(variant), None
    if (text := shape.text) is not None:
        texts = TextTokenizer.of_size(text.vocab_size, text.max_tokens).to_json()
    codes, classes = profile.tokenizer_variant(shape.tokenizer), [] if text else CLASSES
    return autoregressive_subject(config_over(codes, shape, classes, texts), batch)


# -- variants ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """One variant; bytes are those of one process."""

    name: str
    tokens: int  # codes of an image
    batch: int  # images of a process at a time
    optimizer: OptimizerConfig
    cost: Cost
    copies: int  # in a state: weights, moments (the second of Adafactor is small), an average
    state_bytes: int  # all but the weights
    extra_gradient_bytes: int  # in DDP's buckets, and whole ones of earlier micro-batches
    gpu_bytes: int  # all that a step needs
    cache_bytes: int  # KV cache of one sample; 0 for tokenizers

    @property
    def parameters(self) -> int:
        return sum(self.cost.parameters.values())

    @property
    def image_flops(self) -> float:
        """Operations of training on one image."""
        return self.cost.step_flops / self.batch


def descriptions(profile: Profile, variants: Sequence[str] | None = None) -> list[Description]:
    """Describe every variant of a profile, or those named."""
    generators = [*profile.autoregressive.variants, *profile.text.variants]
    names = [*profile.tokenizer.variants, *generators]
    variants = names if variants is None else variants
    for name in variants:
        require_known(name, names, "variant")
    costs: dict[str, Cost] = {}  # variants that differ in their data cost the same
    engine, described = profile.engine, []
    for name in tqdm(variants, "describing", unit="model", leave=False, disable=None):
        if name in profile.tokenizer.variants:
            codes, training = profile.tokenizer_variant(name), profile.tokenizer_training(name)
            optimizer, cache = training.optimizer, 0
            about = [codes, training.loss, training.adversarial, training.codes_from is None]
        else:
            shape = profile.autoregressive_variant(name)
            optimizer = profile.generator_optimizer(name)
            codes = profile.tokenizer_variant(shape.tokenizer)
            # Every layer keeps keys and values of all codes, and of the text.
            length = codes.num_scales * codes.tokens_per_scale
            length += shape.text.max_tokens if shape.text else 0
            cache = 2 * shape.layers * shape.width * length * BF16
            about = [replace(shape, tokenizer=""), replace(codes, wavelet="haar")]
        parts = engine.accumulation(optimizer.batch_size)
        batch = optimizer.batch_size // engine.world_size // parts
        if (key := digest(about, batch)) not in costs:
            subject = partial(subject_of, profile, name, batch)
            costs[key] = cost(subject, engine.precision, engine.gradient_checkpointing)
        found = costs[key]
        copies = 2 + (optimizer.algorithm != "adafactor") + (optimizer.ema_decay > 0)
        state = (copies - 1) * FLOAT32 * found.learning
        gradients = ((engine.world_size > 1) + (parts > 1)) * FLOAT32 * found.learning
        gpu = found.peak_bytes + state + gradients
        tokens = codes.num_scales * codes.tokens_per_scale
        demands = found, copies, state, gradients, gpu, cache
        described.append(Description(name, tokens, batch, optimizer, *demands))
    return described


# -- the report --------------------------------------------------------------------------------


def describe(
    profile: Profile | str = "quick",
    variants: Sequence[str] | None = None,
    *,
    gpu: str = "H100",
    utilization: float = 0.35,
) -> None:
    """Print what a profile asks of a machine.

    Args:
        profile: a profile, or the name of one.
        variants: some of its tokenizers and generators; default: all.
        gpu: a key of `GPUS`.
        utilization: share of the GPU's peak that training reaches (MFU).
    """
    require_known(gpu, GPUS, "GPU")
    sentence = f"utilization is a share of the peak in (0, 1], it is {utilization}."
    require(0 < utilization <= 1, sentence)
    title = profile if isinstance(profile, str) else "as given"
    profile = load_profile(profile) if isinstance(profile, str) else profile
    engine, world = profile.engine, profile.engine.world_size
    memory, bf16, tf32 = GPUS[gpu]
    peak = tf32 if engine.precision == "no" else bf16
    rate = peak * 1e12 * utilization  # operations a second
    tables: dict[str, list[dict[str, Any]]] = {
        "Parameters of tokenizers, millions": [],
        "Parameters of models over codes, millions": [],
        f"Memory of a GPU in training, GiB (of {memory} GB)": [],
        f"Operations for an image, and time on {world} x {gpu}": [],
        "On the disk, GB (two states exist for a moment)": [],
    }
    tokenizers, generators, memories, times, disk = tables.values()
    for d in descriptions(profile, variants):
        parts = {part: count / 1e6 for part, count in d.cost.parameters.items()}
        row = {"": d.name, "tokens": d.tokens, "all": d.parameters / 1e6, **parts}
        (generators if d.cache_bytes else tokenizers).append(row)
        activations = d.cost.peak_bytes - d.cost.weight_bytes
        memories.append(
            {
                "": d.name,
                "at a time": d.batch,
                "weights": d.cost.weight_bytes / 2**30,
                "activations, gradients": activations / 2**30,
                "optimizer": d.state_bytes / 2**30,
                "more gradients": d.extra_gradient_bytes / 2**30,
                "all": d.gpu_bytes / 2**30,
                "fits": "yes" if d.gpu_bytes < 0.9 * memory * 1e9 else "no",
                "KV, MiB": d.cache_bytes / 2**20,
            }
        )
        images = rate * world / d.image_flops  # a second
        seconds = d.optimizer.batch_size * d.optimizer.steps / images
        times.append(
            {
                "": d.name,
                "GFLOP forward": round(d.cost.forward_flops / d.batch / 1e9),
                "training": round(d.image_flops / 1e9),
                "steps": d.optimizer.steps,
                "batch": d.optimizer.batch_size,
                "images/s": round(images),
                "tokens/s": round(images * d.tokens),
                "GPU-hours": seconds * world / 3600,
                "days": seconds / 86400,
            }
        )
        disk.append(
            {
                "": d.name,
                "state to resume from": d.copies * FLOAT32 * d.cost.learning / 1e9,
                "model": FLOAT32 * d.parameters / 1e9,
                "codes of a million views": 0.0 if d.cache_bytes else 2e-3 * d.tokens,
            }
        )
    precision = "bf16" if engine.precision == "auto" else engine.precision
    print(
        f"Profile {title}: {world} x {gpu}, precision {precision}, "
        f"activations {'recomputed' if engine.gradient_checkpointing else 'kept'}.\n"
        f"{rate / 1e12:.0f} TFLOP/s on each: {utilization:.0%} of the {peak:.0f} of its data sheet."
    )
    for title, rows in tables.items():
        print("\n" + text_table(rows, title, digits=2) + "\n" if rows else "", end="")
    hours = sum(row["GPU-hours"] for row in times)
    print(f"\nAll of it once: {hours:,.0f} GPU-hours, {hours / world / 24:,.1f} days in a row.")
