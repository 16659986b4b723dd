"""The block against a plain float64 version with masks, and its cache against no cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.transformer import Block, SequenceLayout, Transformer, attend


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


def naive_block(block, x, layout, kinds):
    """The block token by token, each with the parameters of its type."""

    def typed(modules, x):
        return torch.stack([modules[kind](x[:, i]) for i, kind in enumerate(kinds)], dim=1)

    def mlp(x):
        hidden = torch.nn.functional.gelu(typed(block.mlp_in, x))
        return typed(block.mlp_out, hidden)

    batch, length, width = x.shape
    q, k, v = typed(block.qkv, typed(block.attention_norm, x)).chunk(3, dim=-1)
    heads = [part.view(batch, length, block.num_heads, -1).transpose(1, 2) for part in (q, k, v)]
    attended = naive_attention(*heads, mask_of(layout)).transpose(1, 2).reshape(batch, length, width)
    x = x + block.attention_out(attended)
    return x + mlp(typed(block.mlp_norm, x))


@pytest.mark.parametrize("attention", ["full", "scale_causal"])
@pytest.mark.parametrize("num_types", [1, 2])
def test_typed_parameters_and_their_gradients_are_those_of_each_tokens_type(attention, num_types):
    torch.manual_seed(0)
    layout = SequenceLayout(3, 4, attention)
    block = Block(16, 2, 2.0, num_types).double()
    for parameter in block.parameters():  # away from zero, so that every bias counts
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    kinds = [0] * 4 + [num_types - 1] * 8
    streams = block(list(x.split(layout.lengths(num_types), dim=1)), layout)
    ours, reference = torch.cat(streams, dim=1), naive_block(block, x, layout, kinds)
    torch.testing.assert_close(ours, reference)
    weight, parameters = torch.randn_like(x), list(block.parameters())
    gradients = [torch.autograd.grad((out * weight).sum(), parameters) for out in (ours, reference)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_typed_blocks_have_own_norms_qkv_and_mlp_but_one_output_projection():
    names = {name.split(".")[0] for name, _ in Block(16, 2, 2.0, 2).named_parameters() if ".1." in name}
    assert names == {"attention_norm", "qkv", "mlp_norm", "mlp_in", "mlp_out"}


def test_scale_causal_outputs_ignore_finer_scales():
    torch.manual_seed(0)
    transformer, layout = Transformer(2, 16, 2, num_types=2), SequenceLayout(3, 4, "scale_causal")
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 8:] = torch.randn(1, 4, 16)
    one, other = transformer(x, layout), transformer(changed, layout)
    torch.testing.assert_close(one[:, :8], other[:, :8])
    assert not torch.allclose(one[:, 8:], other[:, 8:])
    torch.testing.assert_close(transformer(x[:, :8], SequenceLayout(2, 4, "scale_causal")), one[:, :8])


@pytest.mark.parametrize("prefix", [1, 5])
@torch.no_grad()
def test_cache_gives_what_no_cache_gives(prefix):
    torch.manual_seed(0)
    transformer, x = Transformer(3, 16, 2).eval(), torch.randn(2, 9, 16)
    whole = transformer(x, SequenceLayout(1, 9, "causal"))
    cache = transformer.new_cache(2, 9)
    parts = [transformer(x[:, :prefix], SequenceLayout(1, prefix, "causal"), cache)]
    parts += [transformer(x[:, i : i + 1], SequenceLayout(1, 1, "causal"), cache) for i in range(prefix, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_refuses_what_it_cannot_hold():
    transformer = Transformer(1, 16, 2)
    cache = transformer.new_cache(1, 3)
    with pytest.raises(ValueError, match="holds 3 positions"):
        transformer(torch.randn(1, 4, 16), SequenceLayout(1, 4, "causal"), cache)
    transformer(torch.randn(1, 1, 16), SequenceLayout(1, 1, "causal"), cache)
    with pytest.raises(ValueError, match="only be the first"):
        transformer(torch.randn(1, 2, 16), SequenceLayout(1, 2, "causal"), cache)
