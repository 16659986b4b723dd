"""Both transformers against plain float64 versions with masks; the cache against no cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.model.block import (
    BlockOptions,
    KVCache,
    attend,
    rope_freqs,
    scale_causal,
    sdpa,
)
from sitlib.model.sequence import Transformer
from sitlib.model.transformer import ADTransformer

OPTIONS = {
    "default": BlockOptions(),
    "qk_norm": BlockOptions(qk_norm=True),
    "cross": BlockOptions(cross_attention=True),
    "llama": BlockOptions(norm="rms", mlp="swiglu", bias=False),
    "all": BlockOptions("rms", "swiglu", bias=False, qk_norm=True, cross_attention=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
learned_and_rotary = pytest.mark.parametrize("rotary", [False, True], ids=["learned", "rotary"])
CONTEXT_MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])


def mask_of(attention, num_scales, tokens_per_scale):
    """[T, T], True where the row may see the column, from the definitions."""
    position = torch.arange(num_scales * tokens_per_scale)
    scale = position // tokens_per_scale
    return {
        "full": torch.ones(len(position), len(position), dtype=torch.bool),
        "scale_causal": scale[:, None] >= scale[None],
        "causal": position[:, None] >= position[None],
    }[attention]


def naive_attention(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def loud(module):
    """In float64, with parameters away from their start, so that every bias and norm counts."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def randn(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def assert_same_with_gradients(ours, reference, inputs):
    torch.testing.assert_close(ours, reference)
    torch.manual_seed(5)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, reference)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["full", "scale_causal", "causal"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_attention_without_a_mask_equals_masked_attention(attention, scales, tokens, seed):
    torch.manual_seed(seed)
    q, k, v = randn(3, 2, 2, scales * tokens, 4, requires_grad=True)
    reference = naive_attention(q, k, v, mask_of(attention, scales, tokens))
    sight = scale_causal(scales, tokens) if attention == "scale_causal" else None
    ours = attend(q, k, v, sight, is_causal=attention == "causal")
    assert_same_with_gradients(ours, reference, (q, k, v))


def test_attention_on_a_cpu_is_in_float32_under_autocast_and_so_are_its_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, 16).bfloat16().requires_grad_() for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = sdpa(*wide)
    with torch.autocast("cpu", torch.bfloat16):
        y = sdpa(q, k, v)
    assert y.dtype == torch.float32 and torch.equal(y, expected)
    grads = torch.autograd.grad(y.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(grads, wanted, strict=True))


# -- transformers, from the definitions of their parts ---------------------------------------------


def naive_angles(places, head_dim):
    """float64 [T, D / 2]: coordinate p of a token times 10000^(-j / F), F frequencies each."""
    count = head_dim // 2 // len(places[0])
    rows = [[p * 10_000.0 ** (-j / count) for p in place for j in range(count)] for place in places]
    return torch.tensor(rows, dtype=torch.float64)


def naive_rotation(x_BHTD, angles_TF):
    """Dimensions d and d + D / 2 are a complex number that is multiplied by exp(i angle)."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.complex(x_BHTD[..., :half], x_BHTD[..., half:]) * torch.exp(1j * angles_TF)
    return torch.cat([turned.real, turned.imag], dim=-1)


def heads_of(x, num_heads):
    """[B, T, C] -> [B, H, T, D]: head h has the dimensions h D ... (h + 1) D."""
    return torch.stack(x.split(x.shape[-1] // num_heads, dim=-1), dim=1)


def typed(modules, types, x):
    """Every token through the module of its type; types None: one type for all."""
    one_each = [modules[kind] for kind in types or x.shape[1] * [0]]
    return torch.stack([module(x[:, i]) for i, module in enumerate(one_each)], dim=1)


def naive_block(block, options, x, mask, types=None, angles=None, context=None, seen=CONTEXT_MASK):
    """A block token by token, each with the parameters of its type; context [B, L, C]."""
    of_qkv = types and [min(kind, len(block.qkv) - 1) for kind in types]
    qkv = typed(block.qkv, of_qkv, typed(block.attention_norm, of_qkv, x))
    q, k, v = (heads_of(part, block.num_heads) for part in qkv.chunk(3, dim=-1))
    if options.qk_norm:
        q, k = block.qk_norm[0](q), block.qk_norm[1](k)
    if angles is not None:
        q, k = naive_rotation(q, angles), naive_rotation(k, angles)
    x = x + block.attention_out(torch.cat(naive_attention(q, k, v, mask).unbind(1), dim=-1))
    if options.cross_attention:
        cross = block.cross
        parts = cross.query(cross.norm(x)), *cross.key_value(context).chunk(2, -1)
        q, k, v = (heads_of(part, block.num_heads) for part in parts)
        read = naive_attention(q, k, v, seen[:, None, None])
        x = x + cross.attention_out(torch.cat(read.unbind(1), dim=-1))
    hidden = typed(block.mlp_in, types, typed(block.mlp_norm, types, x))
    if options.mlp == "swiglu":
        gate, hidden = hidden.chunk(2, dim=-1)
        return x + typed(block.mlp_out, types, gate / (1 + torch.exp(-gate)) * hidden)
    return x + typed(block.mlp_out, types, hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))


def places_of(length):
    return [(i // 4, i % 4) for i in range(length)]


@every_option
@learned_and_rotary
@pytest.mark.parametrize("attention", ["full", "causal"])
def test_a_transformer_and_its_gradients_are_those_of_the_definitions(options, rotary, attention):
    torch.manual_seed(0)
    model, mask = loud(Transformer(2, 16, 2, 2.5, options=options)), mask_of(attention, 1, 8)
    x, context = randn(2, 8, 16, requires_grad=True), randn(2, 5, 16, requires_grad=True)
    angles = naive_angles(places_of(8), 8) if rotary else None
    rope = torch.stack([angles.cos(), angles.sin()]) if rotary else None
    read = model.encode_context(context, CONTEXT_MASK) if options.cross_attention else None
    reference = x
    for block in model.blocks:
        reference = naive_block(block, options, reference, mask, None, angles, context)
    inputs = [x, *model.parameters(), *([context] if options.cross_attention else [])]
    ours = model(x, attention == "causal", rope_2TF=rope, context=read)
    assert_same_with_gradients(ours, model.norm(reference), inputs)


@pytest.mark.parametrize("attention", ["full", "scale_causal"])
@pytest.mark.parametrize(("num_types", "own"), [(1, True), (2, True), (2, "mlp")])
def test_an_adtransformer_is_mixing_positions_typed_blocks_and_norms(attention, num_types, own):
    torch.manual_seed(0)
    options = (attention, num_types, True, own)
    model = loud(ADTransformer(3, 2, 16, 2, 2, 2.0, *options))
    assert len(model.blocks[0].qkv) == (1 if own == "mlp" else num_types)
    x, types = randn(2, 12, 16, requires_grad=True), [0] * 4 + [num_types - 1] * 8
    mask, weight = mask_of(attention, 3, 4), model.scale_mixing.weight
    if attention == "scale_causal":
        weight = weight * torch.ones(3, 3).tril()[:, None, :, None]
    mixed = torch.einsum("scid,bind->bsnc", weight, x.unflatten(1, (3, 4))).flatten(1, 2)
    reference = x + mixed + model.pos_emb
    for block in model.blocks:
        reference = naive_block(block, BlockOptions(), reference, mask, types)
    reference = typed(model.norm, types, reference)
    assert_same_with_gradients(model(x), reference, [x, *model.parameters()])


def test_separate_transformers_read_each_other_as_they_come_into_a_block():
    torch.manual_seed(0)
    # 16 tokens of approximation, 4 of details
    model = loud(ADTransformer(5, 2, 16, 2, 2, 2.0, "full", 2, typed="separate", grids=[4, 2]))
    x = randn(2, 20, 16, requires_grad=True)
    parts = (x + model.pos_emb).split([16, 4], dim=1)
    for blocks in model.blocks:
        outputs = []
        for block, own, other in zip(blocks, parts, parts[::-1], strict=True):
            centred = other - other.mean(-1, keepdim=True)
            context = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            everything = torch.ones(16, 16, dtype=torch.bool)
            (_, T, _), (_, L, _) = own.shape, other.shape
            seen = {"mask": everything[:T, :T], "context": context, "seen": everything[:2, :L]}
            outputs.append(naive_block(block, OPTIONS["cross"], own, **seen))
        parts = outputs
    reference = torch.cat([norm(x) for norm, x in zip(model.norm, parts, strict=True)], dim=1)
    assert_same_with_gradients(model(x), reference, [x, *model.parameters()])


@pytest.mark.parametrize(
    ("make", "branches"),
    [
        (lambda: ADTransformer(2, 2, 128, 6, 4, 2.0, typed="separate"), 3),
        (lambda: Transformer(6, 128, 4, 2.0), 2),
    ],
)
@torch.no_grad()
def test_a_fresh_transformer_has_unit_gain_small_branches_and_keys_like_queries(make, branches):
    torch.manual_seed(0)
    modules = make().blocks.named_modules()
    for name, linear in ((name, x) for name, x in modules if isinstance(x, nn.Linear)):
        is_output = name.endswith("attention_out") or ".mlp_out" in name
        gain = float(linear.weight.std()) * linear.in_features**0.5
        assert gain == pytest.approx((branches * 6) ** -0.5 if is_output else 1, rel=0.05)
        assert not linear.bias.any()
        if ".qkv" in name:
            query, key, _ = (part.flatten() for part in linear.weight.chunk(3))
            correlation = torch.corrcoef(torch.stack([query, key]))[0, 1]
            assert float(correlation) == pytest.approx(0.5**0.5, abs=0.05)


# -- one token after another -----------------------------------------------------------------------


@every_option
@learned_and_rotary
@pytest.mark.parametrize("prefix", [1, 5])
@torch.no_grad()
def test_a_cache_gives_what_no_cache_gives(options, rotary, prefix):
    torch.manual_seed(0)
    transformer, x = loud(Transformer(3, 16, 2, options=options)).eval(), randn(2, 9, 16)
    rope = rope_freqs(torch.tensor(places_of(9)).double(), 8) if rotary else None
    context = None
    if options.cross_attention:
        context = transformer.encode_context(randn(2, 5, 16), CONTEXT_MASK)
    whole = transformer(x, True, rope_2TF=rope, context=context)
    cache, outputs, places = KVCache(9), [], set()
    for start, stop in [(0, prefix), *((i, i + 1) for i in range(prefix, 9))]:
        outputs.append(transformer(x[:, start:stop], True, cache, rope_2TF=rope, context=context))
        places |= {layer.data_ptr() for layer in cache.layers}
        assert cache.length == stop
    assert len(places) == len(cache.layers) == 3  # allocated once
    assert {layer.shape for layer in cache.layers} == {(2, 2, 2, 9, 8)}
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    with pytest.raises(AssertionError):  # it is full
        transformer(x[:, :1], True, cache, rope_2TF=rope, context=context)
