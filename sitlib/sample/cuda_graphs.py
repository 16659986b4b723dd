"""Steps of sampling as CUDA graphs: on a GPU a step of a small batch takes less time than Python takes to start its kernels."""

import warnings
from functools import cache

import torch
from torch import Tensor

from sitlib.model.generator import AutoregressiveModel, Writing


class CapturedSteps:
    """`model.proceed(writing, codes_B)`, for a static cache on a GPU, with as many codes at every call.

    Each kind of step runs as it is the first time, which also does all that only a first time needs; the second time it is recorded, and
    from then on replayed. Where recording fails, steps run as they are, with a warning. The logits [B, K] are valid until the next call.
    """

    def __init__(self, model: AutoregressiveModel, writing: Writing):
        store = writing.cache.store
        self._model, self._writing = model, writing
        self._codes_B = torch.zeros(store.shape[2], dtype=torch.int64, device=store.device)
        self._pool = (
            torch.cuda.graph_pool_handle()
        )  # one for all: they are replayed in the order in which they were recorded
        self._begun: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._records = True

    def __call__(self, codes_B: Tensor) -> Tensor:
        kind = self._model.kind_of_step(self._writing)
        if kind not in self._begun or not (kind in self._graphs or self._records):
            self._begun.add(kind)
            return self._model.proceed(self._writing, codes_B)
        self._codes_B.copy_(codes_B)
        if kind in self._graphs:
            self._writing.cache.length += 1  # of which a graph knows nothing
        else:
            length = self._writing.cache.length
            try:
                self._graphs[kind] = self._record()
            except (
                RuntimeError
            ) as error:  # of a driver or an operation that cannot be recorded: it only costs time
                warnings.warn(
                    f"Steps of sampling are not repeated as CUDA graphs here: {error}", stacklevel=2
                )
                self._records, self._writing.cache.length = False, length
                return self._model.proceed(self._writing, codes_B)
        graph, logits_BK = self._graphs[kind]
        graph.replay()
        return logits_BK

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step that is next, recorded and not yet run."""
        graph, device = torch.cuda.CUDAGraph(), self._codes_B.device
        # Other threads may go on, such as the one that pins the next batches while a model that is being trained is shown.
        options = {
            "pool": self._pool,
            "stream": _stream(device),
            "capture_error_mode": "thread_local",
        }
        with torch.cuda.device(device):
            before = torch.cuda.current_stream(device)
            try:
                with torch.cuda.graph(graph, **options):
                    logits_BK = self._model.proceed(self._writing, self._codes_B)
            finally:
                torch.cuda.set_stream(before)  # which a recording that fails does not do
        return graph, logits_BK


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which everything is recorded: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)
