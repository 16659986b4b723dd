"""What a training step costs, without making one: operations and the peak of memory, from the shapes of its tensors alone.

The very step is run on fake tensors, which have shapes and no content, so nothing is allocated and nothing has to be modelled by hand: what
is recomputed, kept for the way back or frozen is counted as it happens. Kernels are those of a CPU; their workspace, and what a GPU's
allocator wastes between tensors, are not in it.
"""

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import lpips
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

Step = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """Of one training step of one process."""

    learning: int  # parameters that the step trains, the discriminator's too
    forward_flops: int  # of the model alone, without its losses
    step_flops: int  # forwards and backwards, losses and discriminator included
    weight_bytes: (
        int  # of everything that is on the device before the step: model, discriminator, LPIPS
    )
    peak_bytes: int  # at the worst moment of the step, weights and gradients included, moments of the optimizer not


@dataclass(frozen=True)
class Subject:
    """Models with random weights and what is computed with them."""

    models: list[nn.Module]  # that are trained
    forward: Step
    step: Step  # leaves gradients in all of them


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive while it is entered, and their peak; tensors share storage as they do.

    Args:
        held: modules whose tensors are there already.
    """

    def __init__(self, *held: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        for module in held:
            for tensor in (*module.parameters(), *module.buffers()):
                self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _attention(q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backwards(grad, q, k, v, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# What torch counts, and the kernels of a CPU, which it counts from 2.15 on only.
FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        _attention_backwards
    ),
}


class _Operations(TorchDispatchMode):
    """torch's FlopCounterMode without its tree of modules, which keeps recomputed activations alive."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(call: Step) -> int:
    """Operations of one call in matrix products, convolutions and attention. (Of causal attention all scores are counted.)"""
    with _Operations() as operations:
        call()
    return operations.total


def cost(
    subject: Callable[[], Subject],
    precision: Literal["no", "bf16", "fp16"] = "no",
    gradient_checkpointing: bool = False,
) -> Cost:
    """What a training step of a subject costs; `subject` is called on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Mismatch dtype between input and weight"
        )  # RMSNorm in mixed precision
        made = subject()
        for module in (part for model in made.models for part in model.modules()):
            if isinstance(module, (ADTransformer, Transformer)):
                module.gradient_checkpointing = gradient_checkpointing

        def autocast(call: Step) -> Step:
            def run() -> None:
                dtype = torch.float16 if precision == "fp16" else torch.bfloat16
                with torch.autocast("cpu", dtype) if precision != "no" else nullcontext():
                    call()

            return run

        with torch.no_grad():
            forward = flops(autocast(made.forward))
        learning = sum(p.numel() for m in made.models for p in m.parameters() if p.requires_grad)
        tracker = LiveBytes(*made.models)
        weights = tracker.now
        with tracker:
            step = flops(autocast(made.step))
    return Cost(learning, forward, step, weights, tracker.peak)


def tokenizer_subject(config: TokenizerConfig, training: TokenizerTraining, batch: int) -> Subject:
    """A tokenizer's training step: reconstruction, LPIPS, and the discriminator if there is one, as `sitlib.train.tokenizer` makes it."""
    model = SpectralTokenizer(config).train()
    if training.codes_from is not None:
        model.freeze_encoder_from(SpectralTokenizer(config))
    loss = TokenizerLoss(replace(training.loss, lpips=0.0))
    if training.loss.lpips:
        loss.config, loss.perceptual = training.loss, _random_lpips(training.loss.lpips_net)
    weight = training.adversarial.weight
    discriminator = Discriminator(config.size, training.adversarial.channels) if weight else None
    images = torch.rand(batch, 3, config.size, config.size)
    smaller = (
        config.levels if training.loss.multiscale else 0
    )  # the dearest of the sizes that take turns

    def step() -> None:
        output = model(images, preview_scales=smaller)
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

    models: list[nn.Module] = [model, *([discriminator] if discriminator is not None else [])]
    return Subject(
        [*models, loss] if loss.perceptual is not None else models, lambda: model(images), step
    )


def autoregressive_subject(config: CodeModelConfig, batch: int) -> Subject:
    """An autoregressive model's training step over codes [batch, S, N], texts at their longest."""
    model = AutoregressiveModel(config).train()
    codes = torch.zeros(batch, config.num_scales, config.tokens_per_scale, dtype=torch.int64)
    text = config.transformer.text
    condition = torch.ones(
        (batch,) if text is None else (batch, text.max_tokens), dtype=torch.int64
    )
    return Subject(
        [model],
        lambda: model(codes, condition),
        lambda: code_nats(model(codes, condition), codes).mean().backward(),
    )


def _random_lpips(net: str) -> PerceptualDistance:
    """LPIPS of the right shapes, whose pretrained weights need not be there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision: `pretrained` is deprecated
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return PerceptualDistance(network, net)
