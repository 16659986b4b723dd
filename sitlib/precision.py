"""The device that models run on, and its mixed precision: what it computes in where they are used, and layers that stay precise."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(wanted: Literal["auto", "no", "bf16", "fp16"] = "auto") -> Literal["no", "fp16", "bf16"]:
    """Mixed precision of this device; "auto": bf16 on GPUs and CPUs (AMX) that have it, fp16 with loss scaling on older GPUs, else none.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; set auto, no or bf16.")
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
        return "bf16" if has_amx else "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def mixed(device: torch.device) -> AbstractContextManager:
    """Around the use of a trained model: on a GPU autocast in its precision, on a CPU nothing, so that results stay as precise as they are.

    Until it ends, casts of weights are kept, but only of weights that require gradients: autocast takes others for activations.
    """
    return torch.autocast("cuda", _DTYPES[precision()]) if device.type == "cuda" else nullcontext()


def product_dtype(weight: Tensor) -> torch.dtype:
    """Of products with a weight and of the attention to them: on a GPU that of the autocast around, elsewhere the weight's own."""
    is_cast = weight.is_cuda and weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if is_cast else weight.dtype


def precisely(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers(x)` in the precision of their weights, also under autocast: for small layers whose rounding no other layer can mend."""
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(next(layers.parameters()).dtype))
