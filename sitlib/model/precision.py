"""The device that models run on, and its mixed precision: what it computes in where they are used, and layers that stay precise."""

import copy
from typing import Literal, TypeVar

import torch
from torch import nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Model = TypeVar("Model", bound=nn.Module)


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision(
    wanted: Literal["auto", "no", "bf16", "fp16"] = "auto",
) -> Literal["no", "fp16", "bf16"]:
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


def with_cast_layers(model: Model, dtype: torch.dtype, inside: type[nn.Module]) -> Model:
    """A copy whose linear layers within modules `inside` have weights of a type already; everything else is shared with `model`.

    Under autocast of that type it computes the same, without a cast of every weight at every use: autocast keeps casts only outside of
    inference mode, and for as long as no thread leaves its autocast. The copy is not compiled.
    """
    layers = [
        layer
        for part in model.modules()
        if isinstance(part, inside)
        for layer in part.modules()
        if isinstance(layer, nn.Linear)
    ]
    shared = [*model.parameters(), *model.buffers(), *vars(model).values()]
    known = {id(value): value for value in shared if not isinstance(value, dict)}
    for layer in layers:
        for parameter in layer.parameters():
            known[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, known)
