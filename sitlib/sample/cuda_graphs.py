"""Decoding steps as CUDA graphs: starting the kernels of a step takes Python longer than the step.

Call 1 of a kind of step runs eagerly (warm-up), call 2 captures a graph, later calls replay it.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from sitlib.model.generator import AutoregressiveModel, DecodeState


def kind_of_step(model: AutoregressiveModel, state: DecodeState) -> tuple[int, int, int]:
    """Steps of one kind run the same kernels: codebooks of the code that the next step takes and of
    the one that it predicts, and positions that attention reads.
    """
    length = state.cache.length  # the prefix is in the cache, too
    return model.codebook_of[length - 1], model.codebook_of[length], state.cache.span(1)[1]


class GraphedDecoder:
    """`model.decode_one_token(state, codes_B)` for a state with a static cache on a GPU.

    Where capture fails, steps stay eager, with a warning. The returned logits [B, K] are
    overwritten by the next call.
    """

    def __init__(self, model: AutoregressiveModel, state: DecodeState):
        self._model, self._state = model, state
        # Graphs are replayed in the order of their capture, so they may share one memory pool.
        self._pool = torch.cuda.graph_pool_handle()
        self._codes_B: Tensor | None = None  # the memory that graphs read codes from
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self._can_capture = True

    def __call__(self, codes_B: Tensor) -> Tensor:
        kind, cache = kind_of_step(self._model, self._state), self._state.cache
        if self._codes_B is None:
            self._codes_B = codes_B.clone()
        self._codes_B.copy_(codes_B)
        if kind not in self._graphs:  # call 1
            self._graphs[kind] = None
        elif self._graphs[kind] is not None:
            cache.length += 1  # Python's count; the graph advances the one on the GPU
        elif self._can_capture:  # call 2
            length = cache.length
            try:
                self._graphs[kind] = self._capture(self._codes_B)
            except RuntimeError as error:
                warnings.warn(f"Sampling goes on without CUDA graphs: {error}", stacklevel=2)
                self._can_capture, cache.length = False, length
        if (graph := self._graphs[kind]) is None:
            return self._model.decode_one_token(self._state, codes_B)
        graph[0].replay()
        return graph[1]

    def _capture(self, codes_B: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the next step, which is not executed yet, and its logits."""
        graph, device = torch.cuda.CUDAGraph(), codes_B.device
        with torch.cuda.device(device):
            stream_before = torch.cuda.current_stream(device)
            try:
                # "thread_local": other threads, such as a loader that pins memory, may go on.
                with torch.cuda.graph(
                    graph, self._pool, _capture_stream(device), capture_error_mode="thread_local"
                ):
                    logits_BK = self._model.decode_one_token(self._state, codes_B)
            finally:
                torch.cuda.set_stream(stream_before)  # a capture that fails does not restore it
        return graph, logits_BK


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
