"""Decoding steps as CUDA graphs: starting the kernels of a step takes Python longer than the step.

Call 1 of a kind of step runs eagerly (warm-up), call 2 captures a graph, later calls replay it.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from sitlib.model.generator import AutoregressiveModel, DecodeState


class GraphedDecoder:
    """`model.decode_one_token(state, codes_B)` for a state with a static cache on a GPU.

    Steps of one kind have the same `model.graph_key`. Where capture fails, steps stay eager, with a
    warning. The returned logits [B, K] are overwritten by the next call.
    """

    def __init__(self, model: AutoregressiveModel, state: DecodeState):
        store = state.cache.store  # [layers, 2, B, H, capacity, D]
        self._model, self._state = model, state
        self._codes_B = torch.zeros(store.shape[2], dtype=torch.int64, device=store.device)
        # Graphs are replayed in the order of their capture, so they may share one memory pool.
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._can_capture = True

    def __call__(self, codes_B: Tensor) -> Tensor:
        key, cache = self._model.graph_key(self._state), self._state.cache
        if key not in self._warm or not (key in self._graphs or self._can_capture):
            self._warm.add(key)
            return self._model.decode_one_token(self._state, codes_B)
        self._codes_B.copy_(codes_B)
        if key in self._graphs:
            cache.length += 1  # Python's count; the graph advances the one on the GPU
        else:
            length = cache.length
            try:
                self._graphs[key] = self._capture()
            except RuntimeError as error:
                warnings.warn(f"Sampling goes on without CUDA graphs: {error}", stacklevel=2)
                self._can_capture, cache.length = False, length
                return self._model.decode_one_token(self._state, codes_B)
        graph, logits_BK = self._graphs[key]
        graph.replay()
        return logits_BK

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the next step, which is not executed yet."""
        graph, device = torch.cuda.CUDAGraph(), self._codes_B.device
        with torch.cuda.device(device):
            stream_before = torch.cuda.current_stream(device)
            try:
                # "thread_local": other threads, such as a loader that pins memory, may go on.
                with torch.cuda.graph(
                    graph, self._pool, _capture_stream(device), capture_error_mode="thread_local"
                ):
                    logits_BK = self._model.decode_one_token(self._state, self._codes_B)
            finally:
                torch.cuda.set_stream(stream_before)  # a capture that fails does not restore it
        return graph, logits_BK


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)
