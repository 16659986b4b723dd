"""Device and mixed precision of this machine."""

import copy
from typing import Literal, TypeVar

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Model = TypeVar("Model", bound=nn.Module)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(
    wanted: Literal["auto", "no", "bf16", "fp16"] = "auto",
) -> Literal["no", "fp16", "bf16"]:
    """Mixed precision of this machine.

    "auto" is bf16 on GPUs and CPUs (AMX) that have it, fp16 with loss scaling on older GPUs.

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


def with_cast_layers(model: Model, dtype: torch.dtype, inside: type[nn.Module]) -> Model:
    """A copy whose linear layers inside modules of a type have weights of `dtype` already.

    Under autocast it computes the same without casting every weight at every step: autocast keeps
    casts only outside of inference mode. Everything else is shared with `model`.
    """
    memo = {}  # of deepcopy: objects found here are not copied
    for value in [*model.parameters(), *model.buffers(), *vars(model).values()]:
        if not isinstance(value, dict):
            memo[id(value)] = value
    for part in model.modules():
        if isinstance(part, inside):
            linears = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
            for weight in [parameter for linear in linears for parameter in linear.parameters()]:
                memo[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, memo)
