"""Static caches, whose steps are the same operations again and again, and the CUDA graphs that repeat them."""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sitlib.model.config import TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.precision import with_cast_layers
from sitlib.model.sequence import KVCache, Transformer
from sitlib.model.text import TextTokenizer
from sitlib.sample import cuda_graphs as captured
from sitlib.sample import generate as sampling
from sitlib.sample.cuda_graphs import GraphedDecoder
from sitlib.sample.generate import generate
from workbook.profile import load_profile

TEXTS = TextTokenizer.train(["a red cat", "a blue dog"], 300, 16)
SMOKE = load_profile("smoke")
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}
CASES = list(itertools.product(["class", "text"], ["learned", "rotary"], [{}, LLAMA]))
every_case = pytest.mark.parametrize(("kind", "positions", "options"), CASES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LENGTH = 12  # codes: three scales of four


@pytest.fixture(autouse=True)
def _attention_reads_five_positions_at_a_time(monkeypatch):
    monkeypatch.setattr(KVCache, "READ", 5)


@cache
def model_of(kind="class", positions="learned", llama=False, width=16):
    """With two codebooks, and weights large enough that every prediction is far from uniform."""
    torch.manual_seed(0)
    text = TextEncoderConfig(layers=1, vocabulary=300, max_tokens=16) if kind == "text" else None
    changes = {"layers": 2, "width": width, "heads": 2, "positions": positions, "text": text}
    shape = replace(SMOKE.autoregressive_variant("ar_sit4"), **changes, **(LLAMA if llama else {}))
    classes, texts = ([], TEXTS.to_json()) if text else (["cat", "dog"], None)
    model = AutoregressiveModel(CodeModelConfig(shape, 3, 4, 20, 2, classes, texts)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def on_gpu(model):
    """A copy, with the same weights."""
    copy = AutoregressiveModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval().cuda()


def condition_of(model):
    return (
        torch.tensor([0, 1])
        if model.text_tokenizer is None
        else TEXTS.encode(["a red cat", "a dog"])
    )


def codes_of():
    return torch.randint(20, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def written(
    model, static, given=0, steps_of=lambda model, state: partial(model.decode_one_token, state)
):
    """Logits [2, t, K] of the codes after the given ones, when those of `codes_of` are drawn; and how they were written."""
    codes_BT, device = codes_of(), next(model.parameters()).device
    prefix = codes_BT[:, :given].to(device) if given else None
    state, logits = model.prefill(condition_of(model).to(device), codes_Bt=prefix, static=static)
    steps, proceed = [logits.clone()], steps_of(model, state)
    for position in range(given, LENGTH - 1):
        steps.append(proceed(codes_BT[:, position].to(device)).clone())
    return torch.stack(steps, dim=1), state


class Recorder(TorchDispatchMode):
    """Operations and their arguments; what they change is put back in the end, as if they were recorded only."""

    def __init__(self):
        super().__init__()
        self.calls, self._before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def put_back(self):
        for tensor, value in reversed(self._before):
            tensor.copy_(value)


# -- the static form -------------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("given", [0, 1, 4, 7, 11])
@torch.no_grad()
def test_static_and_growing_caches_give_the_same_logits(kind, positions, options, given):
    model = model_of(kind, positions, bool(options))
    growing, _ = written(model, False, given)
    static, state = written(model, True, given)
    torch.testing.assert_close(static, growing, atol=1e-4, rtol=1e-5)
    assert state.cache.length == int(state.cache.position) == LENGTH and growing.std() > 0.1


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["class", "text"])
@torch.no_grad()
def test_logits_are_float32_in_whatever_precision_the_blocks_compute(kind, static):
    model = model_of(kind)
    expected, _ = written(model, static)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = written(model, static)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()


def casts_of_weights(model):
    """Casts of parameters in two steps under autocast, as sampling makes them."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        state, _ = model.prefill(condition_of(model), static=True)
        with Recorder() as recorder:
            for code in (1, 2):
                model.decode_one_token(state, torch.tensor([code, code]))
    casts = [args for func, args, _, _ in recorder.calls if func is torch.ops.aten.to.dtype]
    return sum(args[0].data_ptr() in weights and args[1] == torch.bfloat16 for args in casts)


@pytest.mark.parametrize("kind", ["class", "text"])
@torch.no_grad()
def test_weights_that_are_cast_once_compute_what_autocast_computes(kind):
    model = model_of(kind)
    cast = with_cast_layers(model, torch.bfloat16, Transformer)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = written(model, True)
        found, _ = written(cast, True)
    assert torch.equal(found, expected)
    layers = 2 * (6 if kind == "text" else 4)
    assert (casts_of_weights(model), casts_of_weights(cast)) == (2 * 2 * layers, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert cast.heads[0].weight.data_ptr() == model.heads[0].weight.data_ptr()
    assert cast.heads[0].weight.dtype == torch.float32


@torch.no_grad()
def test_a_static_cache_refuses_what_it_cannot_hold():
    model = model_of()
    state, _ = model.prefill(torch.tensor([0]), 3, static=True)
    for _ in range(2):
        model.decode_one_token(state, torch.tensor([1]))
    with pytest.raises(ValueError, match="holds 3 positions"):
        model.decode_one_token(state, torch.tensor([1]))


def operations(model, static):
    """Kind of step -> what each of its steps did: operations, shapes, numbers, and addresses of what outlives a step."""
    found = {}

    def recorded(state, codes_B):
        kind, lasting = model.graph_key(state), [state.cache.store, *model.parameters()]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in lasting}

        def described(value):
            if not isinstance(value, torch.Tensor):
                return value
            is_lasting = value.untyped_storage().data_ptr() in addresses
            return (
                value.shape,
                value.stride(),
                value.dtype,
                value.data_ptr() if is_lasting else None,
            )

        with Recorder() as recorder:
            logits = model.decode_one_token(state, codes_B)
        calls = [
            (str(func), tree_map(described, (args, kwargs)))
            for func, args, kwargs, _ in recorder.calls
        ]
        found.setdefault(kind, []).append(calls)
        return logits

    written(model, static, steps_of=lambda model, state: partial(recorded, state))
    return found


@every_case
@torch.no_grad()
def test_steps_of_a_kind_on_a_static_cache_are_the_same_operations_on_the_same_memory(
    kind, positions, options
):
    found = operations(model_of(kind, positions, bool(options)), static=True)
    # (codebook read, codebook predicted, positions read); five are read at a time, of which there are twelve.
    assert {name: len(steps) for name, steps in found.items()} == {
        (0, 0, 5): 3,
        (0, 1, 5): 1,
        (1, 1, 10): 5,
        (1, 1, 12): 2,
    }
    for steps in found.values():
        assert all(step == steps[0] for step in steps)
        names = {name for name, _ in steps[0]}
        assert not names & {
            "aten._local_scalar_dense.default",
            "aten.nonzero.default",
        }  # they would wait for a GPU


@torch.no_grad()
def test_steps_on_a_growing_cache_are_not_the_same():
    steps = [step for of_kind in operations(model_of(), static=False).values() for step in of_kind]
    assert len(steps) == 11 and all(one != other for one, other in itertools.combinations(steps, 2))


# -- graphs ----------------------------------------------------------------------------------------------------------------------------


class FakeGraph:
    """A CUDA graph as far as a CPU can imitate one: the recorded operations on the very same tensors, without any of the Python around."""

    made = 0

    def __init__(self):
        FakeGraph.made += 1

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def fake_capture(graph, *_, **options):
    with Recorder() as recorder:
        yield
    recorder.put_back()
    graph.calls = recorder.calls


@pytest.fixture
def fake_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(captured, "_capture_stream", lambda device: "recording")
    current = ["own"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(FakeGraph, "made", 0)
    return current


@pytest.mark.parametrize("recorded", [0, 2])
@torch.inference_mode()
def test_where_recording_fails_steps_run_as_they_are(monkeypatch, fake_graphs, recorded):
    @contextmanager
    def failing(graph, pool, stream, **options):
        torch.cuda.set_stream(stream)
        with fake_capture(graph):
            yield
        if FakeGraph.made > recorded:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    expected, _ = written(model_of(), True)
    with pytest.warns(UserWarning, match="not permitted") as told:
        found, state = written(model_of(), True, 0, GraphedDecoder)
    assert len(told) == 1 and FakeGraph.made == recorded + 1 and fake_graphs == ["own"]
    torch.testing.assert_close(found, expected)
    assert state.cache.length == int(state.cache.position) == LENGTH


@every_case
@pytest.mark.parametrize("given", [0, 4])
@torch.inference_mode()
def test_captured_steps_give_the_same_logits(fake_graphs, kind, positions, options, given):
    model = model_of(kind, positions, bool(options))
    expected, _ = written(model, True, given)
    found, state = written(model, True, given, GraphedDecoder)
    torch.testing.assert_close(found, expected)
    assert state.cache.length == int(state.cache.position) == LENGTH
    assert FakeGraph.made == (
        3 if given == 0 else 2
    )  # one for each kind of which there is more than one step


@needs_gpu
@pytest.mark.parametrize("kind", ["class", "text"])
@torch.inference_mode()
def test_steps_do_not_wait_for_the_gpu(kind):
    model = on_gpu(model_of(kind))
    state, _ = model.prefill(condition_of(model).cuda())
    codes_B = torch.tensor([3, 4], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(LENGTH - 1):
            model.decode_one_token(state, codes_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@every_case
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_graphs_draw_on_a_gpu_what_steps_draw(monkeypatch, kind, positions, options, guidance):
    model = on_gpu(model_of(kind, positions, bool(options), width=64))
    prompts = torch.tensor([0, 1, 1]) if kind == "class" else ["a red cat", "a dog", "a blue cat"]
    config = replace(SMOKE.autoregressive.sampling, guidance=guidance, batch_size=2)
    found = generate(model, prompts, config)
    monkeypatch.setattr(
        sampling, "GraphedDecoder", lambda model, state: partial(model.decode_one_token, state)
    )
    assert torch.equal(found, generate(model, prompts, config))


@needs_gpu
def test_a_gpu_samples_in_its_precision_and_leaves_the_model_and_autocast_as_they_were(monkeypatch):
    model, seen = on_gpu(model_of()), []
    new_cache = Transformer.new_cache

    def noted(self, *arguments):
        seen.append(new_cache(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Transformer, "new_cache", noted)
    generate(model, torch.tensor([0, 1]), SMOKE.autoregressive.sampling)
    assert {cache.store.dtype for cache in seen} <= {torch.bfloat16, torch.float16}
    assert not torch.is_autocast_enabled("cuda")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = model(
        torch.zeros(2, 3, 4, dtype=torch.int64, device="cuda"), torch.tensor([0, 1]).cuda()
    )
    logits.sum().backward()
