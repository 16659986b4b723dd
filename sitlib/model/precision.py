"""The device of this machine, and models whose weights are cast once."""

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
