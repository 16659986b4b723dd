"""The block against a plain float64 version with masks, for every option; and its cache against no cache."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.model.transformer import (
    Block,
    BlockOptions,
    Context,
    CrossAttention,
    SequenceLayout,
    Transformer,
    apply_rotary_emb,
    attend,
    attention,
    rope_freqs,
)

OPTIONS = {
    "default": BlockOptions(),
    "rms": BlockOptions(norm="rms"),
    "swiglu": BlockOptions(mlp="swiglu"),
    "no_bias": BlockOptions(bias=False),
    "qk_norm": BlockOptions(qk_norm=True),
    "cross": BlockOptions(cross_attention=True),
    "llama": BlockOptions(norm="rms", mlp="swiglu", bias=False),
    "all": BlockOptions("rms", "swiglu", bias=False, qk_norm=True, cross_attention=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
learned_and_rotary = pytest.mark.parametrize("rotary", [False, True], ids=["learned", "rotary"])


def mask_of(layout):
    """[T, T], True where the row may see the column, from the definitions."""
    position = torch.arange(layout.num_scales * layout.tokens_per_scale)
    scale = position // layout.tokens_per_scale
    return {
        "full": torch.ones(len(position), len(position), dtype=torch.bool),
        "scale_causal": scale[:, None] >= scale[None],
        "causal": position[:, None] >= position[None],
    }[layout.attention]


def naive_attention(q, k, v, mask):
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


layouts = st.builds(
    SequenceLayout,
    num_scales=st.integers(1, 4),
    tokens_per_scale=st.integers(1, 5),
    attention=st.sampled_from(["full", "scale_causal", "causal"]),
)


@settings(max_examples=30, deadline=None)
@given(layouts, st.integers(0, 1000))
def test_attention_without_mask_equals_masked_attention_and_so_do_gradients(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    length = layout.num_scales * layout.tokens_per_scale
    q, k, v = (
        torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    weight = torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64)
    ours, reference = attend(q, k, v, layout), naive_attention(q, k, v, mask_of(layout))
    torch.testing.assert_close(ours, reference)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (ours, reference)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# -- the block, from the definitions of its parts --------------------------------------------------------------------------------------


def naive_norm(module, x):
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        out = (
            centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight
        )
        return out if module.bias is None else out + module.bias
    assert isinstance(module, nn.RMSNorm)
    return x / x.square().mean(-1, keepdim=True).sqrt() * module.weight


def naive_linear(module, x):
    out = torch.einsum("...i,oi->...o", x, module.weight)
    return out if module.bias is None else out + module.bias


def naive_activation(x, options):
    if options.mlp == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    half = x.shape[-1] // 2
    return x[..., :half] / (1 + torch.exp(-x[..., :half])) * x[..., half:]


def naive_angles(places, head_dim):
    """float64 [T, head_dim / 2]: coordinate p of token t times 10000^(-j / F), F frequencies for each coordinate."""
    coordinates = len(places[0])
    count = head_dim // 2 // coordinates
    rows = [[p * 10_000.0 ** (-j / count) for p in place for j in range(count)] for place in places]
    return torch.tensor(rows, dtype=torch.float64)


def naive_turn(x_BHTD, angles_TF):
    """Dimensions d and d + D / 2 are real and imaginary part of a number that is multiplied by exp(i angle)."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.complex(x_BHTD[..., :half], x_BHTD[..., half:]) * torch.exp(1j * angles_TF)
    return torch.cat([turned.real, turned.imag], dim=-1)


def heads_of(x, num_heads):
    """[B, T, C] -> [B, H, T, D]: head h has the dimensions h D ... (h + 1) D."""
    return torch.stack(x.split(x.shape[-1] // num_heads, dim=-1), dim=1)


def naive_block(block, options, x, mask, kinds=None, angles=None, context=None, context_mask=None):
    """The block token by token, each with the parameters of its type.

    Args:
        mask: bool [T, T] or [B, 1, T, T], True where the row may see the column.
        kinds: type of each token; angles: of rotary positions; context, context_mask: [B, L, C] and bool [B, L].
    """
    kinds = kinds or [0] * x.shape[1]

    def typed(function, modules, x):
        return torch.stack(
            [function(modules[kind], x[:, i]) for i, kind in enumerate(kinds)], dim=1
        )

    q, k, v = typed(naive_linear, block.qkv, typed(naive_norm, block.attention_norm, x)).chunk(
        3, dim=-1
    )
    q, k, v = (heads_of(part, block.num_heads) for part in (q, k, v))
    if options.qk_norm:
        q, k = naive_norm(block.qk_norm[0], q), naive_norm(block.qk_norm[1], k)
    if angles is not None:
        q, k = naive_turn(q, angles), naive_turn(k, angles)
    attended = torch.cat(naive_attention(q, k, v, mask).unbind(1), dim=-1)
    x = x + naive_linear(block.attention_out, attended)
    if options.cross_attention:
        cross = block.cross
        q = heads_of(naive_linear(cross.query, naive_norm(cross.norm, x)), block.num_heads)
        k, v = (
            heads_of(part, block.num_heads)
            for part in naive_linear(cross.key_value, context).chunk(2, -1)
        )
        read = naive_attention(q, k, v, context_mask[:, None, None])
        x = x + naive_linear(cross.out, torch.cat(read.unbind(1), dim=-1))
    hidden = naive_activation(
        typed(naive_linear, block.mlp_in, typed(naive_norm, block.mlp_norm, x)), options
    )
    return x + typed(naive_linear, block.mlp_out, hidden)


def loud(module):
    """Parameters away from their start, so that every bias and every norm counts."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def places_of(length):
    return [(i // 4, i % 4) for i in range(length)]


CONTEXT_MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])


def assert_same_with_gradients(ours, reference, inputs):
    torch.testing.assert_close(ours, reference)
    torch.manual_seed(5)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, reference)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@every_option
@learned_and_rotary
@pytest.mark.parametrize("attention", ["full", "scale_causal", "causal"])
def test_a_block_and_its_gradients_are_those_of_the_definitions(options, rotary, attention):
    torch.manual_seed(0)
    layout = SequenceLayout(3, 4, attention)
    block = loud(Block(16, 2, 2.5, options=options).double())
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    angles = naive_angles(places_of(12), 8) if rotary else None
    context, read, inputs = None, None, [x, *block.parameters()]
    if options.cross_attention:
        context = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
        read = Context([block.cross.encode_context(context)], CONTEXT_MASK)
        inputs.append(context)
    turned = torch.stack([angles.cos(), angles.sin()]) if rotary else None
    (ours,) = block([x], layout, rope_2TF=turned, context=read)
    reference = naive_block(
        block,
        options,
        x,
        mask_of(layout),
        angles=angles,
        context=context,
        context_mask=CONTEXT_MASK,
    )
    assert_same_with_gradients(ours, reference, inputs)


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if not o.cross_attention])
@learned_and_rotary
@pytest.mark.parametrize("attention", ["full", "scale_causal"])
@pytest.mark.parametrize("num_types", [1, 2])
def test_typed_parameters_and_their_gradients_are_those_of_each_tokens_type(
    options, rotary, attention, num_types
):
    torch.manual_seed(0)
    layout = SequenceLayout(3, 4, attention)
    block = loud(Block(16, 2, 2.0, num_types, options=options).double())
    x = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    angles = naive_angles(places_of(12), 8) if rotary else None
    turned = torch.stack([angles.cos(), angles.sin()]) if rotary else None
    kinds = [0] * 4 + [num_types - 1] * 8
    x_by_type = block(list(x.split(layout.lengths(num_types), dim=1)), layout, rope_2TF=turned)
    reference = naive_block(block, options, x, mask_of(layout), kinds, angles)
    assert_same_with_gradients(torch.cat(x_by_type, dim=1), reference, [x, *block.parameters()])


@every_option
def test_a_transformer_is_its_blocks_one_after_another_and_a_norm(options):
    """Every layer reads the context with keys and values of its own."""
    torch.manual_seed(0)
    transformer = loud(Transformer(3, 16, 2, 2.0, options=options).double())
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    layout, angles = SequenceLayout(1, 8, "causal"), naive_angles(places_of(8), 8)
    read = transformer.encode_context(context, CONTEXT_MASK) if options.cross_attention else None
    turned = torch.stack([angles.cos(), angles.sin()])
    ours, reference = transformer(x, layout, rope_2TF=turned, context=read), x
    for block in transformer.blocks:
        reference = naive_block(
            block, options, reference, mask_of(layout), None, angles, context, CONTEXT_MASK
        )
    inputs = [x, *transformer.parameters(), *([context] if options.cross_attention else [])]
    assert_same_with_gradients(ours, naive_norm(transformer.norm[0], reference), inputs)


def test_the_default_block_is_the_pre_norm_layer_of_torch():
    torch.manual_seed(0)
    block = loud(Block(16, 2, 2.0).double())
    layer = nn.TransformerEncoderLayer(
        16,
        2,
        32,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    pairs = {
        "self_attn.in_proj": block.qkv[0],
        "self_attn.out_proj": block.attention_out,
        "linear1": block.mlp_in[0],
        "linear2": block.mlp_out[0],
        "norm1": block.attention_norm[0],
        "norm2": block.mlp_norm[0],
    }
    join = {name: "_" if name.endswith("in_proj") else "." for name in pairs}
    layer.load_state_dict(
        {
            f"{n}{join[n]}{kind}": getattr(m, kind)
            for n, m in pairs.items()
            for kind in ("weight", "bias")
        }
    )
    x, layout = torch.randn(2, 6, 16, dtype=torch.float64), SequenceLayout(1, 6, "causal")
    torch.testing.assert_close(block([x], layout)[0], layer(x, src_mask=~mask_of(layout)))


def test_cross_attention_is_the_multi_head_attention_of_torch():
    torch.manual_seed(0)
    cross = loud(CrossAttention(16, 4, BlockOptions(cross_attention=True)).double())
    reference = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([cross.query.weight, cross.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([cross.query.bias, cross.key_value.bias]))
        reference.out_proj.load_state_dict(cross.out.state_dict())
    x, context = (torch.randn(2, length, 16, dtype=torch.float64) for length in (7, 5))
    for mask in (CONTEXT_MASK, None):
        hidden = None if mask is None else ~mask
        expected, _ = reference(cross.norm(x), context, context, key_padding_mask=hidden)
        torch.testing.assert_close(cross(x, *cross.encode_context(context), mask), expected)


def test_typed_blocks_have_own_norms_qkv_and_mlp_but_one_output_projection():
    for options in (BlockOptions(), OPTIONS["llama"], OPTIONS["qk_norm"]):
        block = Block(16, 2, 2.0, 2, options=options)
        names = {name.split(".")[0] for name, _ in block.named_parameters() if ".1." in name}
        # Queries and keys have a norm each, whatever the type.
        shared = {"qk_norm"} if options.qk_norm else set()
        assert names - shared == {"attention_norm", "qkv", "mlp_norm", "mlp_in", "mlp_out"}


@every_option
def test_options_decide_which_parameters_there_are(options):
    """Against counts by hand, of width 16, heads of 8 and hidden width 40."""
    counts = {
        "matrices": 4 * 16 * 16 + (3 if options.mlp == "swiglu" else 2) * 16 * 40,
        "norms": 2 * 16 * (2 if options.norm == "layer" and options.bias else 1),
        "biases": (3 * 16 + 16 + 16 + (80 if options.mlp == "swiglu" else 40))
        if options.bias
        else 0,
        "qk_norm": 2 * 8 if options.qk_norm else 0,
        "cross": (
            4 * 16 * 16
            + 16 * (2 if options.norm == "layer" and options.bias else 1)
            + (4 * 16 if options.bias else 0)
            if options.cross_attention
            else 0
        ),
    }
    block = Block(16, 2, 2.5, options=options)
    assert sum(p.numel() for p in block.parameters()) == sum(counts.values())
    assert options.bias or not any(name.endswith("bias") for name, _ in block.named_parameters())


@pytest.mark.parametrize("options", [BlockOptions(), OPTIONS["all"]], ids=["default", "all"])
@torch.no_grad()
def test_a_fresh_transformer_has_unit_gain_small_branches_and_keys_like_queries(options):
    torch.manual_seed(0)
    transformer = Transformer(6, 128, 4, 2.0, options=options)
    branches = 6 * (3 if options.cross_attention else 2)
    for block in transformer.blocks:
        query, key, value = block.qkv[0].weight.chunk(3)
        inner = [block.mlp_in[0].weight, query, key, value]
        outer = [block.attention_out.weight, block.mlp_out[0].weight]
        if options.cross_attention:
            inner += [block.cross.query.weight, block.cross.key_value.weight]
            outer.append(block.cross.out.weight)
        for weight in inner:
            assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
        for weight in outer:
            assert float(weight.std()) * (weight.shape[1] * branches) ** 0.5 == pytest.approx(
                1, abs=0.05
            )
        correlation = torch.corrcoef(torch.stack([query.flatten(), key.flatten()]))[0, 1]
        assert float(correlation) == pytest.approx(0.5**0.5, abs=0.05)
        assert all(
            m.bias is None or not m.bias.any() for m in block.modules() if isinstance(m, nn.Linear)
        )


def test_attention_of_normalized_queries_and_keys_does_not_see_how_large_they_are():
    torch.manual_seed(0)
    options = replace(OPTIONS["qk_norm"], bias=False)
    block, layout = Block(16, 2, 2.0, options=options).double(), SequenceLayout(1, 6, "full")
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    before = block([x], layout)[0]
    with torch.no_grad():
        block.qkv[0].weight[:32] *= 1000
    torch.testing.assert_close(block([x], layout)[0], before)
    with torch.no_grad():
        block.qk_norm[0].weight *= 3  # unlike the learned weights, which can sharpen it
    assert not torch.allclose(block([x], layout)[0], before)


# -- rotary positions ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_rotation_is_multiplication_by_complex_numbers(places, quarter):
    head_dim = 4 * quarter
    torch.manual_seed(0)
    x = torch.randn(2, 3, len(places), head_dim, dtype=torch.float64)
    ours = apply_rotary_emb(x, rope_freqs(torch.tensor(places).float(), head_dim))
    expected = naive_turn(x, naive_angles(places, head_dim))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)  # angles of up to 40 in float32
    torch.testing.assert_close(ours.norm(dim=-1), x.norm(dim=-1), atol=1e-6, rtol=1e-6)


def test_rotation_of_a_sequence_has_one_coordinate():
    cos, sin = rope_freqs(torch.arange(5.0)[:, None], 6)
    angles = naive_angles([(i,) for i in range(5)], 6).float()
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert torch.equal(cos[0], torch.ones(3)) and torch.equal(sin[0], torch.zeros(3))


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_products_of_rotated_queries_and_keys_depend_on_the_distance_only(one, other, shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(first, second):
        turned = [
            apply_rotary_emb(x, rope_freqs(torch.tensor([p], dtype=torch.float64), 16))
            for x, p in ((q, first), (k, second))
        ]
        return (turned[0] * turned[1]).sum()

    def moved(place):
        return (place[0] + shift[0], place[1] + shift[1])

    torch.testing.assert_close(
        product(one, other), product(moved(one), moved(other)), atol=1e-5, rtol=0
    )
    if one != other:
        assert not torch.isclose(product(one, other), (q * k).sum(), atol=1e-5)


@pytest.mark.parametrize(
    ("coordinates", "head_dim", "wanted"), [(1, 7, 2), (2, 6, 4), (2, 10, 4), (3, 8, 6)]
)
def test_heads_that_cannot_be_rotated_are_refused(coordinates, head_dim, wanted):
    with pytest.raises(ValueError, match=f"a multiple of {wanted} dimensions, not {head_dim}"):
        rope_freqs(torch.zeros(1, coordinates), head_dim)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float64,
    ],
)
@torch.no_grad()
def test_rotation_keeps_the_precision_of_queries_and_keys(dtype):
    x = torch.randn(1, 1, 3, 8, dtype=dtype)
    assert apply_rotary_emb(x, rope_freqs(torch.arange(3.0)[:, None], 8)).dtype == dtype


# -- hidden keys -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7).filter(any), st.integers(0, 1000))
def test_a_key_mask_gives_what_the_sequence_without_these_keys_gives(seen, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, 2, len(seen), 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    mask = torch.tensor(seen)
    ours = attend(q, k, v, SequenceLayout(1, len(seen), "full"), mask[None])
    everything = torch.ones(len(seen), int(mask.sum()), dtype=torch.bool)
    torch.testing.assert_close(ours, naive_attention(q, k[:, :, mask], v[:, :, mask], everything))


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if not o.cross_attention])
def test_hidden_keys_change_nothing_whatever_they_are(options):
    torch.manual_seed(0)
    transformer, layout = loud(Transformer(2, 16, 2, options=options)), SequenceLayout(1, 6, "full")
    mask = torch.tensor(
        [[True, True, True, True, False, False], [True, False, True, True, True, True]]
    )
    x = torch.randn(2, 6, 16, requires_grad=True)
    changed = torch.where(mask[..., None], x, 100 * torch.randn(2, 6, 16))
    ours = transformer(x, layout, key_mask=mask)
    assert torch.equal(ours[mask], transformer(changed, layout, key_mask=mask)[mask])
    for row in range(2):  # and they need not be there
        alone = transformer(
            x[row : row + 1, mask[row]], SequenceLayout(1, int(mask[row].sum()), "full")
        )
        torch.testing.assert_close(alone[0], ours[row, mask[row]], atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(ours[mask].square().sum(), x)
    assert not gradient[~mask].any() and gradient[mask].any(dim=-1).all()


@pytest.mark.parametrize("rotary", [False, True])
def test_hidden_places_of_a_context_change_nothing(rotary):
    torch.manual_seed(0)
    transformer = loud(
        Transformer(2, 16, 2, options=OPTIONS["all"] if rotary else OPTIONS["cross"])
    )
    x, context = torch.randn(2, 6, 16), torch.randn(2, 5, 16, requires_grad=True)
    turned = rope_freqs(torch.tensor(places_of(6)).float(), 8) if rotary else None
    layout = SequenceLayout(1, 6, "causal")

    def out(x, context, mask):
        return transformer(
            x, layout, rope_2TF=turned, context=transformer.encode_context(context, mask)
        )

    ours = out(x, context, CONTEXT_MASK)
    other = torch.where(CONTEXT_MASK[..., None], context, 100 * torch.randn(2, 5, 16))
    assert torch.equal(ours, out(x, other, CONTEXT_MASK))
    for row, mask in enumerate(CONTEXT_MASK):
        alone = out(x[row : row + 1], context[row : row + 1, mask], None)
        torch.testing.assert_close(alone[0], ours[row], atol=1e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(ours.square().sum(), context)
    assert not gradient[~CONTEXT_MASK].any() and gradient[CONTEXT_MASK].any(dim=-1).all()


@pytest.mark.parametrize("attention", ["causal", "scale_causal"])
def test_keys_can_be_hidden_in_full_attention_only(attention):
    with pytest.raises(ValueError, match=f"full attention only, not in {attention} attention"):
        Transformer(1, 16, 2)(
            torch.randn(1, 4, 16), SequenceLayout(2, 2, attention), key_mask=torch.ones(1, 4).bool()
        )


def test_cross_attention_needs_a_context_and_tokens_of_one_type():
    layout, x = SequenceLayout(2, 2, "full"), torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="needs a context, and tokens of one type"):
        Transformer(1, 16, 2, options=OPTIONS["cross"])(x, layout)
    typed = Transformer(1, 16, 2, num_types=2, options=OPTIONS["cross"])
    with pytest.raises(ValueError, match="needs a context, and tokens of one type"):
        typed(x, layout, context=typed.encode_context(torch.randn(1, 3, 16)))


# -- what may depend on what -----------------------------------------------------------------------------------------------------------


@every_option
@learned_and_rotary
@torch.no_grad()
def test_scale_causal_outputs_ignore_finer_scales(options, rotary):
    torch.manual_seed(0)
    num_types = 1 if options.cross_attention else 2
    transformer = loud(Transformer(2, 16, 2, num_types=num_types, options=options))
    context = transformer.encode_context(torch.randn(1, 5, 16)) if options.cross_attention else None
    x = torch.randn(1, 12, 16)
    turned = (
        rope_freqs(torch.tensor(places_of(12)).float(), 8)
        if rotary
        else torch.stack([torch.ones(12, 4)] * 2)
    )

    def out(x, num_scales):
        layout = SequenceLayout(num_scales, 4, "scale_causal")
        return transformer(x, layout, rope_2TF=turned[:, : 4 * num_scales], context=context)

    changed = x.clone()
    changed[:, 8:] = torch.randn(1, 4, 16)
    one, other = out(x, 3), out(changed, 3)
    torch.testing.assert_close(one[:, :8], other[:, :8], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one[:, 8:], other[:, 8:])
    torch.testing.assert_close(out(x[:, :8], 2), one[:, :8], atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_on_residual_branches_only():
    torch.manual_seed(0)
    transformer, x = (
        Transformer(1, 16, 2, dropout=0.5, options=OPTIONS["cross"]),
        torch.randn(1, 6, 16),
    )
    layout, context = (
        SequenceLayout(1, 6, "causal"),
        transformer.encode_context(torch.randn(1, 3, 16)),
    )

    def out():
        return transformer(x, layout, context=context)

    assert not torch.equal(out(), out())
    transformer.eval()
    assert torch.equal(out(), out())
    transformer.train()
    for block in transformer.blocks:
        block.dropout = 1.0  # nothing is added: the input is left, normalized
    torch.testing.assert_close(out(), transformer.norm[0](x))


# -- cache -----------------------------------------------------------------------------------------------------------------------------


@every_option
@learned_and_rotary
@pytest.mark.parametrize("prefix", [1, 5])
@torch.no_grad()
def test_cache_gives_what_no_cache_gives(options, rotary, prefix):
    torch.manual_seed(0)
    transformer = loud(Transformer(3, 16, 2, options=options)).double().eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    turned = rope_freqs(torch.tensor(places_of(9)).double(), 8) if rotary else None
    context = None
    if options.cross_attention:
        context = transformer.encode_context(
            torch.randn(2, 5, 16, dtype=torch.float64), CONTEXT_MASK
        )
    whole = transformer(x, SequenceLayout(1, 9, "causal"), rope_2TF=turned, context=context)
    cache = transformer.new_cache(2, 9)
    storage, parts = cache.store.data_ptr(), []
    for start, stop in [(0, prefix), *((i, i + 1) for i in range(prefix, 9))]:
        layout = SequenceLayout(1, stop - start, "causal")
        part = None if turned is None else turned[:, start:stop]
        parts.append(transformer(x[:, start:stop], layout, cache, rope_2TF=part, context=context))
        assert cache.length == stop and cache.store.data_ptr() == storage
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_a_cache_has_the_models_shape_and_precision():
    cache = Transformer(3, 16, 2).double().new_cache(5, 7)
    assert cache.store.shape == (3, 2, 5, 2, 7, 8) and cache.store.dtype == torch.float64
    assert (cache.capacity, cache.length) == (7, 0)


@torch.no_grad()
def test_cache_refuses_what_it_cannot_hold():
    transformer = Transformer(1, 16, 2)
    cache = transformer.new_cache(1, 3)
    with pytest.raises(ValueError, match="holds 3 positions"):
        transformer(torch.randn(1, 4, 16), SequenceLayout(1, 4, "causal"), cache)
    transformer(torch.randn(1, 1, 16), SequenceLayout(1, 1, "causal"), cache)
    with pytest.raises(ValueError, match="only be the first"):
        transformer(torch.randn(1, 2, 16), SequenceLayout(1, 2, "causal"), cache)


def test_attention_on_a_cpu_is_in_float32_under_autocast_and_so_are_its_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 8, 16).bfloat16().requires_grad_() for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention(*wide)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(q, k, v)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    grads = torch.autograd.grad(found.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    for ours, theirs in zip(grads, wanted, strict=True):
        assert torch.equal(ours, theirs.bfloat16())
