"""Cost of a training step from the shapes of its tensors alone: operations and peak of memory.

The very step runs on fake tensors, so what is recomputed, kept for the backward pass or frozen is
counted as it happens, and nothing is allocated.
"""

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
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

from sitlib.metrics.networks import PerceptualDistance
from sitlib.model.config import TokenizerConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.sequence import Transformer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import ADTransformer
from sitlib.train.config import TokenizerTraining
from sitlib.train.discriminator import Discriminator, discriminator_loss, generator_loss
from sitlib.train.losses import TokenizerLoss


@dataclass(frozen=True)
class Cost:
    """Cost of one training step of one process."""

    learning: int  # parameters that the step trains, the discriminator's too
    forward_flops: int  # of the model alone, without its losses
    step_flops: int  # forward and backward, losses and discriminator included
    weight_bytes: int  # all that is there before the step: model, discriminator, LPIPS
    peak_bytes: int  # at the worst moment: weights, activations, gradients; no moments


@dataclass(frozen=True)
class Subject:
    """Models with random weights, and what is computed with them."""

    models: list[nn.Module]
    forward: Callable[[], Any]
    step: Callable[[], None]  # leaves gradients in all of them


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that are alive, and their peak, while it is entered.

    Args:
        held: modules whose tensors are there already.
    """

    def __init__(self, *held: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for module in held:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
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


def _attention(q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad, q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch's table, and the CPU's attention, which torch counts from 2.15 on only.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FORMULAS = flop_registry | {
    FLASH: shape_wrapper(_attention),
    FLASH_BACKWARD: shape_wrapper(_attention_backward),
}


class _Flops(TorchDispatchMode):
    """torch's FlopCounterMode without its tree of modules, which keeps activations alive."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Callable[[], Any]) -> int:
    """Operations of a call in matrix products, convolutions and attention (causal: all scores)."""
    with _Flops() as counter:
        call()
    return counter.total


def cost(
    subject: Callable[[], Subject],
    precision: Literal["no", "bf16", "fp16"] = "no",
    gradient_checkpointing: bool = False,
) -> Cost:
    """Cost of a training step; `subject` is called, and its step run, on fake tensors.

    Kernels are those of a CPU. Their workspace, and what a GPU's allocator wastes, do not count.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # RMSNorm in mixed precision
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        made = subject()
        for module in (part for model in made.models for part in model.modules()):
            if isinstance(module, (ADTransformer, Transformer)):
                module.gradient_checkpointing = gradient_checkpointing

        def run(call: Callable[[], Any]) -> None:
            with torch.autocast("cpu", dtype) if precision != "no" else nullcontext():
                call()

        with torch.no_grad():
            forward = flops(lambda: run(made.forward))
        learning = sum(p.numel() for m in made.models for p in m.parameters() if p.requires_grad)
        memory = LiveBytes(*made.models)
        weights = memory.now
        with memory:
            step = flops(lambda: run(made.step))
    return Cost(learning, forward, step, weights, memory.peak)


def tokenizer_subject(config: TokenizerConfig, training: TokenizerTraining, batch: int) -> Subject:
    """The training step of `sitlib.train.tokenizer`: reconstruction, LPIPS, discriminator."""
    model = SpectralTokenizer(config).train()
    if training.codes_from is not None:
        model.freeze_encoder_from(SpectralTokenizer(config))
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

    modules = [model, discriminator, loss if loss.perceptual is not None else None]
    return Subject([m for m in modules if m is not None], lambda: model(images), step)


def autoregressive_subject(config: CodeModelConfig, batch: int) -> Subject:
    """The training step of a generator over codes [batch, S, N], texts at their longest."""
    model = AutoregressiveModel(config).train()
    codes = torch.zeros(batch, config.num_scales, config.tokens_per_scale, dtype=torch.int64)
    text = config.transformer.text
    condition = torch.ones(batch, *([] if text is None else [text.max_tokens]), dtype=torch.int64)

    def step() -> None:
        code_nats(model(codes, condition), codes).mean().backward()

    return Subject([model], lambda: model(codes, condition), step)
