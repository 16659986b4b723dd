"""Static caches, whose steps are the same operations again and again, and their CUDA graphs."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import LLAMA, class_and_text, condition_of, copy_of, generator, random_codes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sitlib.model.block import KVCache
from sitlib.model.config import SamplingConfig
from sitlib.sample import generate as sampling
from sitlib.sample.cuda_graphs import GraphedDecoder, kind_of_step
from sitlib.sample.generate import generate, with_cast_layers

CASES = [
    ("class", {}),
    ("text", {"pos_emb": "rotary"}),
    ("class", {"pos_emb": "rotary", **LLAMA}),
    ("text", LLAMA),
    ("class", {"pos_emb": "rotary", "order": "random"}),
]
every_case = pytest.mark.parametrize(("kind", "options"), CASES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LENGTH = 12  # codes: three scales of four


@pytest.fixture(autouse=True)
def _attention_reads_five_positions_at_a_time(monkeypatch):
    monkeypatch.setattr(KVCache, "READ", 5)


def eager(model, state):
    return partial(model.decode_one_token, state)


def decoded(model, static, given=0, decoder=eager):
    """Logits [2, t, K] of the codes after the given ones, and the cache."""
    codes_BT = random_codes(model).flatten(1)
    state, logits = model.prefill(condition_of(model, 0, 1), None, codes_BT[:, :given], static)
    steps, decode_one_token = [logits.clone()], decoder(model, state)
    for position in range(given, LENGTH - 1):
        steps.append(decode_one_token(codes_BT[:, position]).clone())
    assert state.cache.length == LENGTH and (not static or int(state.cache.position) == LENGTH)
    return torch.stack(steps, dim=1), state.cache


# -- static caches ----------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("given", [0, 1, 7, 11])
@torch.no_grad()
def test_static_and_growing_caches_give_the_same_logits(kind, options, given):
    model = generator(kind, **options)
    growing, _ = decoded(model, False, given)
    static, _ = decoded(model, True, given)
    torch.testing.assert_close(static, growing, atol=1e-4, rtol=1e-5)
    assert growing.std() > 0.1


@class_and_text
@torch.no_grad()
def test_weights_that_are_cast_once_compute_what_autocast_computes_logits_in_float32(kind):
    model = generator(kind)
    expected, _ = decoded(model, True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = with_cast_layers(model)
        autocast, _ = decoded(model, True)
        once, _ = decoded(cast, True)
    assert torch.equal(once, autocast)
    assert once.dtype == torch.float32 and not torch.equal(once, once.bfloat16().float())
    assert 0 < (once - expected).abs().mean() < 0.05 * expected.std()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert cast.transformer.blocks[0].mlp_in[0].weight.dtype == torch.bfloat16
    assert cast.heads[0].weight is model.heads[0].weight


class Recorder(TorchDispatchMode):
    """Operations: names, numbers, shapes, and addresses of what lasts."""

    def __init__(self, lasting):
        super().__init__()
        self.calls, self.addresses = [], {x.untyped_storage().data_ptr() for x in lasting}

    def described(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        is_lasting = value.untyped_storage().data_ptr() in self.addresses
        address = value.data_ptr() if is_lasting else None
        return value.shape, value.stride(), value.dtype, address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), tree_map(self.described, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def kinds(model, given=0):
    """Steps by (codebook read, codebook predicted, positions read, five at a time, of twelve)."""
    book = [min(position // 4, 1) for position in model.order.tolist()]
    steps = range(given, LENGTH - 1)  # prefix, code and all before it are read
    return Counter((book[t], book[t + 1], min(-(-(t + 2) // 5) * 5, LENGTH)) for t in steps)


@every_case
@torch.no_grad()
def test_steps_of_a_kind_are_the_same_operations_on_the_same_memory(kind, options):
    model, by_kind = generator(kind, **options), {}

    def recording(model, state):
        def step(codes_B):
            steps = by_kind.setdefault(kind_of_step(model, state), [])
            with Recorder([*state.cache.layers, *model.parameters()]) as recorder:
                logits = model.decode_one_token(state, codes_B)
            steps.append(recorder.calls)
            return logits

        return step

    decoded(model, True, decoder=recording)
    counts = {key: len(steps) for key, steps in by_kind.items()}
    assert counts == kinds(model)
    if "order" not in options:
        assert counts == {(0, 0, 5): 3, (0, 1, 5): 1, (1, 1, 10): 5, (1, 1, 12): 2}
    for steps in by_kind.values():
        assert all(step == steps[0] for step in steps)
        names = {name for name, _ in steps[0]}  # these would wait for a GPU:
        assert not names & {"aten._local_scalar_dense.default", "aten.nonzero.default"}


# -- graphs -----------------------------------------------------------------------------------


@pytest.fixture
def captures(monkeypatch):
    """Captures on a CPU, by the codes that they read; `allowed` succeed, then all fail."""
    fake = SimpleNamespace(made=0, allowed=99)

    def capture(decoder, codes_B):
        model, state = decoder._model, decoder._state
        logits_BK = torch.empty(len(codes_B), max(model.config.codebook_sizes))
        fake.made += 1
        state.cache.length += 1  # Python runs while kernels are recorded, not executed
        if fake.made > fake.allowed:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay():
            state.cache.length -= 1  # kernels run, not Python
            logits_BK.copy_(model.decode_one_token(state, codes_B))

        return SimpleNamespace(replay=replay), logits_BK

    monkeypatch.setattr(GraphedDecoder, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return fake


@every_case
@pytest.mark.parametrize("given", [0, 4])
@torch.inference_mode()
def test_replayed_steps_give_the_same_logits(captures, kind, options, given):
    model = generator(kind, **options)
    expected, _ = decoded(model, True, given)
    logits, _ = decoded(model, True, given, GraphedDecoder)
    torch.testing.assert_close(logits, expected)
    # One for each kind of which there is more than one step.
    assert captures.made == sum(count > 1 for count in kinds(model, given).values()) > 0


@pytest.mark.parametrize("allowed", [0, 2])
@torch.inference_mode()
def test_where_capture_fails_steps_stay_eager(captures, allowed):
    captures.allowed = allowed
    expected, _ = decoded(generator(), True)
    with pytest.warns(UserWarning, match="not permitted") as warned:
        logits, _ = decoded(generator(), True, 0, GraphedDecoder)
    torch.testing.assert_close(logits, expected)
    assert len(warned) == 1 and captures.made == allowed + 1


@needs_gpu
@every_case
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_graphs_draw_on_a_gpu_what_steps_draw(monkeypatch, kind, options, guidance):
    model = copy_of(generator(kind, width=64, **options)).cuda()
    prompts = torch.tensor([0, 1, 1]) if kind == "class" else ["a red cat", "a dog", "a blue cat"]
    config = SamplingConfig(guidance=guidance, batch_size=2)
    drawn = generate(model, prompts, config)
    monkeypatch.setattr(sampling, "GraphedDecoder", eager)
    assert torch.equal(drawn, generate(model, prompts, config))


@needs_gpu
def test_a_gpu_samples_in_its_precision_and_leaves_the_model_and_autocast_as_they_were(monkeypatch):
    model, dtypes, update = copy_of(generator()).cuda(), set(), KVCache.update

    def watched(*arguments):
        k, v = update(*arguments)
        dtypes.update({k.dtype, v.dtype})
        return k, v

    monkeypatch.setattr(KVCache, "update", watched)
    generate(model, torch.tensor([0, 1]), SamplingConfig(guidance=2.0))
    assert dtypes and dtypes <= {torch.bfloat16, torch.float16}
    assert not torch.is_autocast_enabled("cuda")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    codes = random_codes(model).cuda()
    model(codes, torch.tensor([0, 1]).cuda()).sum().backward()
