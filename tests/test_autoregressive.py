"""The next-code model: what a code may depend on, cache against no cache, conditions, checkpoints, sizes of the paper's models."""

import itertools
from dataclasses import replace

import pytest
import torch

from sitlib.files import load_model, save_model
from sitlib.model.config import TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.sequence import rope_freqs
from sitlib.model.text import TextTokenizer
from workbook.profile import load_profile

CLASSES = ["mountain", "water", "city"]
CAPTIONS = ["a red cat", "a blue dog that sleeps", "two green birds", "a cat and a dog"]
TEXTS = TextTokenizer.train(CAPTIONS, 300, 32)
SMOKE = load_profile("smoke").autoregressive_variant("ar_sit4")
LLAMA = {"norm": "rms", "mlp": "swiglu", "bias": False, "qk_norm": True}
CASES = list(itertools.product(["class", "text"], [1, 2, 3], ["learned", "rotary"]))
every_case = pytest.mark.parametrize(("kind", "books", "positions"), CASES)
class_and_text = pytest.mark.parametrize("kind", ["class", "text"])


def model_of(
    kind="class", books=2, positions="learned", num_scales=3, tokens_per_scale=4, **changes
):
    """A small model with weights large enough that every prediction is far from uniform."""
    model = fresh_model_of(kind, books, positions, num_scales, tokens_per_scale, **changes)
    for parameter in model.parameters():
        if parameter.ndim >= 2 or parameter is getattr(model, "start", None):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def fresh_model_of(
    kind="class", books=2, positions="learned", num_scales=3, tokens_per_scale=4, **changes
):
    torch.manual_seed(0)
    is_text = kind == "text"
    text = (
        TextEncoderConfig(layers=1, vocabulary=300, max_tokens=TEXTS.max_tokens)
        if is_text
        else None
    )
    shape = replace(
        SMOKE, layers=2, width=16, mlp_ratio=2.0, positions=positions, text=text, **changes
    )
    classes, tokenizer = ([], TEXTS.to_json()) if is_text else (CLASSES, None)
    config = CodeModelConfig(shape, num_scales, tokens_per_scale, 20, books, classes, tokenizer)
    return AutoregressiveModel(config).eval()


def codes_of(model, batch=2):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        config.num_codes, (batch, config.num_scales, config.tokens_per_scale), generator=generator
    )


def condition_of(model, *numbers):
    """Class ids, or token ids of as many captions."""
    if model.text_tokenizer is None:
        return torch.tensor(numbers)
    return model.text_tokenizer.encode([CAPTIONS[number] for number in numbers])


# -- likelihood ------------------------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_logits_are_those_of_a_loop_over_positions_with_the_codebook_of_their_scale(
    kind, books, positions
):
    """Embeddings, heads and rotation of every position from the definitions; the transformer itself is tested elsewhere."""
    model = model_of(kind, books, positions).double()
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    book_of = {1: [0, 0, 0], 2: [0, 1, 1], 3: [0, 1, 2]}[books]
    context = None
    if kind == "text":
        context = model.transformer.encode_context(*model.text_encoder(condition))
        inputs = [model.start.expand(2, -1)]
    else:
        inputs = [model.class_embedding.weight[condition]]
    places = [(0.0, 0.0)]
    for scale, place in itertools.product(range(3), range(4)):
        x = model.code_embedding[book_of[scale]].weight[codes[:, scale, place]]
        x = x + model.scale_embedding.weight[scale]
        if positions == "learned":
            x = x + model.position_embedding.weight[place]
        inputs.append(x)
        places.append(
            (1.0 + place // 2, 1.0 + place % 2)
        )  # the prefix is at (0, 0), the grid begins at (1, 1)
    turned = rope_freqs(torch.tensor(places[:-1]), 8) if positions == "rotary" else None
    hidden = model.transformer(
        torch.stack(inputs[:-1], dim=1),
        causal=True,
        rope_2TF=turned,
        context=context,
    )
    logits = model(codes, condition)
    assert logits.shape == (2, 3, 4, 20) and len(model.heads) == len(model.code_embedding) == books
    for scale, place in itertools.product(range(3), range(4)):
        expected = model.heads[book_of[scale]](hidden[:, 4 * scale + place])
        torch.testing.assert_close(logits[:, scale, place], expected)
    assert logits.std() > 0.1  # the comparison is not one of zeros


@every_case
@torch.no_grad()
def test_a_code_depends_on_earlier_codes_and_the_condition_only(kind, books, positions):
    model = model_of(kind, books, positions)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    before = model(codes, condition).flatten(1, 2)
    for position in range(12):
        changed = codes.flatten(1).clone()
        changed[:, position] = (changed[:, position] + 1) % model.config.num_codes
        after = model(changed.view_as(codes), condition).flatten(1, 2)
        assert torch.equal(after[:, : position + 1], before[:, : position + 1])
        if position < 11:
            difference = (after - before).abs().amax((0, 2))
            assert difference[position + 1 :].min() > 1e-4  # all later ones: none is cut off
    other = model(codes, condition_of(model, 1, 1)).flatten(1, 2)
    assert (other - before).abs().amax(2).min() > 1e-4


@every_case
@torch.no_grad()
def test_no_information_flows_from_finer_to_coarser_scales(kind, books, positions):
    model = model_of(kind, books, positions)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    before = model(codes, condition)
    for finer in (1, 2):
        changed = codes.clone()
        changed[:, finer:] = (
            changed[:, finer:] + torch.randint(1, 20, changed[:, finer:].shape)
        ) % 20
        after = model(changed, condition)
        assert torch.equal(after[:, :finer], before[:, :finer])
        assert torch.equal(
            after[:, finer, 0], before[:, finer, 0]
        )  # the first of a scale is drawn before it
        assert not torch.allclose(after[:, finer, 1:], before[:, finer, 1:])


@every_case
@torch.no_grad()
def test_codebooks_have_own_embeddings_and_heads(kind, books, positions):
    model = model_of(kind, books, positions)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    before = model(codes, condition)
    scales_of = {1: [[0, 1, 2]], 2: [[0], [1, 2]], 3: [[0], [1], [2]]}[books]
    for book, scales in enumerate(scales_of):
        others = [scale for scale in range(3) if scale not in scales]
        model.heads[book].weight *= 2
        after = model(codes, condition)
        assert torch.equal(after[:, others], before[:, others])
        assert not torch.isclose(after[:, scales], before[:, scales]).all(-1).any()
        model.heads[book].weight /= 2
        before = model(codes, condition)
        model.code_embedding[book].weight *= 2
        after = model(codes, condition)
        first = scales[
            0
        ]  # the first scale whose inputs change; its first code is drawn before any of them
        assert torch.equal(after[:, :first], before[:, :first])
        assert torch.equal(after[:, first, 0], before[:, first, 0])
        assert not torch.allclose(after[:, first, 1:], before[:, first, 1:])
        before = after


@every_case
def test_every_parameter_learns(kind, books, positions):
    model = model_of(kind, books, positions).train()
    codes, condition = codes_of(model, 8), condition_of(model, *[0, 1, 2, 0, 1, 2, 0, 1])
    model.nats_per_token(codes, condition).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@class_and_text
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["default", "llama"])
@torch.no_grad()
def test_the_first_predictions_of_a_fresh_model_are_uniform(kind, options):
    for books in (1, 2, 3):
        fresh = fresh_model_of(kind, books, **options)
        codes, condition = codes_of(fresh), condition_of(fresh, 0, 2)
        assert not fresh(codes, condition).any()
        torch.testing.assert_close(
            fresh.nats_per_token(codes, condition), torch.full((3,), 20.0).log()
        )


@class_and_text
@torch.no_grad()
def test_nats_are_cross_entropy(kind):
    model = model_of(kind)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    logits = model(codes, condition)
    log_probability = logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    nats = code_nats(logits, codes)
    assert nats.shape == codes.shape
    torch.testing.assert_close(nats.double(), -log_probability, atol=1e-5, rtol=0)
    mean = model.nats_per_token(codes, condition).double()
    torch.testing.assert_close(mean, -log_probability.mean((0, 2)), atol=1e-5, rtol=0)


def test_dropout_acts_in_training_only():
    model = model_of(dropout=0.5)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    assert torch.equal(model(codes, condition), model(codes, condition))
    model.train()
    assert not torch.equal(model(codes, condition), model(codes, condition))


def test_one_scale_has_one_codebook_whatever_the_tokenizer_says():
    model = model_of(num_scales=1, books=2)
    assert len(model.heads) == 1 and model(codes_of(model), torch.tensor([0, 1])).shape == (
        2,
        1,
        4,
        20,
    )


# -- state one code after another ----------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("options", [{}, LLAMA], ids=["default", "llama"])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(kind, books, positions, options):
    model = model_of(kind, books, positions, **options).double()
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    whole, codes_BT = model(codes, condition).flatten(1, 2), codes.flatten(1)
    for given in (0, 1, 4, 5, 11):
        state, logits = model.prefill(condition, codes_Bt=codes_BT[:, :given] if given else None)
        steps = [logits]
        for position in range(given, 11):
            steps.append(model.decode_one_token(state, codes_BT[:, position]))
        torch.testing.assert_close(torch.stack(steps, dim=1), whole[:, given:])
        assert state.cache.length == state.cache.capacity == 12
    assert whole.std() > 0.1


@class_and_text
@torch.no_grad()
def test_one_scale_is_written_too(kind):
    model = model_of(kind, 1, "rotary", num_scales=1, tokens_per_scale=9)
    codes, condition = codes_of(model), condition_of(model, 0, 2)
    state, logits = model.prefill(condition)
    steps = [logits, *(model.decode_one_token(state, codes[:, 0, i]) for i in range(8))]
    torch.testing.assert_close(
        torch.stack(steps, dim=1), model(codes, condition)[:, 0], atol=1e-4, rtol=0
    )


@torch.no_grad()
def test_no_more_codes_are_written_than_room_was_asked_for():
    model = model_of()
    state, _ = model.prefill(torch.tensor([0]), 3)
    assert state.cache.capacity == 3
    for _ in range(2):
        model.decode_one_token(state, torch.tensor([1]))
    with pytest.raises(ValueError, match="holds 3 positions"):
        model.decode_one_token(state, torch.tensor([1]))


@torch.no_grad()
def test_a_text_is_read_once_however_many_codes_follow():
    model = model_of("text")
    calls = []
    model.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    state, _ = model.prefill(condition_of(model, 0, 1))
    context = state.context
    for position in range(11):
        model.decode_one_token(state, torch.tensor([position, 3]))
    assert len(calls) == 1 and state.context is context


# -- conditions ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_padding_of_a_text_changes_nothing(positions):
    model = model_of("text", positions=positions)
    codes, tokens = codes_of(model), condition_of(model, 0, 1)
    used = int((tokens != TEXTS.pad).sum(1).max())
    assert (
        used < TEXTS.max_tokens and (tokens[0, :used] == TEXTS.pad).any()
    )  # one is shorter than the other
    together = model(codes, tokens)
    torch.testing.assert_close(model(codes, tokens[:, :used]), together, atol=1e-4, rtol=0)
    alone = model(codes[:1], tokens[:1, : int((tokens[0] != TEXTS.pad).sum())])
    torch.testing.assert_close(alone, together[:1], atol=1e-4, rtol=0)
    # And exactly: what padding is embedded as does not matter.
    model.text_encoder.token_embedding.weight[TEXTS.pad] += 100
    assert torch.equal(model(codes, tokens), together)


@torch.no_grad()
def test_the_caption_matters_and_so_does_the_order_of_its_words():
    model = model_of("text")
    codes = codes_of(model, 1)
    captions = ["a red cat", "a blue cat", "cat red a", "a red cat a red cat"]
    logits = torch.cat([model(codes, TEXTS.encode([caption])) for caption in captions])
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().amax(-1).min() > 1e-3  # at every code
    assert torch.equal(model(codes, TEXTS.encode(["  A RED cat "])), logits[:1])


@class_and_text
@torch.no_grad()
def test_a_hidden_condition_says_nothing(kind):
    model = model_of(kind)
    codes, condition = codes_of(model, 3)[:1].repeat(3, 1, 1), condition_of(model, 0, 1, 2)
    hidden = model.unconditional(condition)
    assert hidden.shape == condition.shape and hidden.dtype == condition.dtype
    logits = model(codes, hidden)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    for one in model(codes, condition):
        assert not torch.allclose(one, logits[0])
    if kind == "class":
        assert hidden.tolist() == [model.no_class] * 3 == [3, 3, 3]
    else:
        assert torch.equal(hidden, TEXTS.no_text(3))
        cut = model.unconditional(condition[:, :5])
        assert cut.tolist() == [[TEXTS.end, 0, 0, 0, 0]] * 3
        torch.testing.assert_close(model(codes, cut), logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_some_of_a_batch_may_be_hidden():
    """As in training, where each is hidden with some probability."""
    for kind in ("class", "text"):
        model = model_of(kind)
        codes, condition = codes_of(model, 3), condition_of(model, 0, 1, 2)
        hidden = torch.tensor([False, True, False])
        mixed = torch.where(
            hidden if kind == "class" else hidden[:, None],
            model.unconditional(condition),
            condition,
        )
        expected = torch.stack(
            [
                model(codes[i : i + 1], condition[i : i + 1])[0]
                if not hidden[i]
                else model(codes[i : i + 1], model.unconditional(condition[i : i + 1]))[0]
                for i in range(3)
            ]
        )
        torch.testing.assert_close(model(codes, mixed), expected, atol=1e-4, rtol=0)


def test_a_condition_is_a_class_or_a_text():
    with pytest.raises(ValueError, match="at least one class name"):
        CodeModelConfig(SMOKE, 3, 4, 20, 2, [], None)
    with pytest.raises(ValueError, match="and no other, needs a text tokenizer"):
        CodeModelConfig(SMOKE, 3, 4, 20, 2, CLASSES, TEXTS.to_json())
    text = replace(SMOKE, text=TextEncoderConfig(1, 300, 32))
    with pytest.raises(ValueError, match="needs a text tokenizer"):
        CodeModelConfig(text, 3, 4, 20, 2, [], None)
    with pytest.raises(ValueError, match="not a text tokenizer that to_json has written"):
        AutoregressiveModel(CodeModelConfig(text, 3, 4, 20, 2, [], "{}"))


# -- files -----------------------------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_a_checkpoint_knows_its_condition_and_predicts_the_same(tmp_path, kind, books, positions):
    model = model_of(kind, books, positions)
    save_model(tmp_path / "model.safetensors", model, name="a run")
    again = load_model(tmp_path / "model.safetensors", AutoregressiveModel)
    assert again.config == model.config and not again.training
    assert again.text_tokenizer == model.text_tokenizer
    assert again.text_tokenizer is None or again.text_tokenizer == TEXTS
    codes, condition = codes_of(model), condition_of(again, 0, 1)
    assert torch.equal(again(codes, condition), model(codes, condition))


# -- sizes of the paper's models -------------------------------------------------------------------------------------------------------


def block_parameters(layers, width, hidden, swiglu=False, bias=True, rms=False, cross=False):
    """Of blocks and final norm, by hand: four projections, two or three MLP matrices, and the same four again to read a text."""
    norm = width * (1 if rms or not bias else 2)
    matrices = 4 * width**2 + (3 if swiglu else 2) * width * hidden + (4 * width**2 if cross else 0)
    biases = (
        4 * width + (2 if swiglu else 1) * hidden + width + (4 * width if cross else 0)
        if bias
        else 0
    )
    return layers * (matrices + biases + (3 if cross else 2) * norm) + norm


def paper_model(variant, classes, tokenizer=None):
    """On the meta device: a model of the paper's size without its memory."""
    profile = load_profile("paper")
    shape = profile.autoregressive_variant(variant)
    codes = profile.tokenizer_variant(shape.tokenizer)
    with torch.device("meta"):
        return AutoregressiveModel(
            CodeModelConfig(
                shape,
                codes.num_scales,
                codes.tokens_per_scale,
                codes.num_codes,
                codes.num_codebooks,
                classes,
                tokenizer,
            )
        )


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


IMAGENET = [f"class {i}" for i in range(1000)]
NUM_CODES, SCALES, PLACES, BOOKS = 8192, 4, 256, 2


def test_the_class_conditional_model_of_the_paper_has_vim_bases_blocks():
    """VIM-Base (arXiv 2110.04627) is said to have 650M, but its 24 blocks of width 1536 alone are 680M, to which embeddings and heads of
    two codebooks are added. So the nominal size holds to 5% for the blocks and to 13% for everything."""
    model, width = paper_model("ar_sit4", IMAGENET), 1536
    blocks = block_parameters(24, width, 4 * width)
    vocabularies = BOOKS * (
        NUM_CODES * width + (width + 1) * NUM_CODES
    )  # embeddings, and heads with biases
    places = (1001 + SCALES + PLACES) * width
    print(f"\nar_sit4: {count(model):,} parameters, {count(model.transformer):,} of them in blocks")
    assert count(model.transformer) == blocks
    assert count(model) == blocks + vocabularies + places
    assert blocks == pytest.approx(650e6, rel=0.05)
    assert count(model) == pytest.approx(650e6, rel=0.13)


def test_the_improved_class_conditional_model_of_the_paper_has_llamagen_ls_size():
    """LlamaGen-L (arXiv 2406.06525) has 343M with one codebook of 16,384 codes, where this has two of 8,192: the same to all three digits,
    which is 0.2%."""
    model, width = paper_model("ar_sit4_improved", IMAGENET), 1024
    blocks = block_parameters(24, width, 2816, swiglu=True, bias=False, rms=True)
    vocabularies = BOOKS * 2 * NUM_CODES * width
    print(
        f"\nar_sit4_improved: {count(model):,} parameters, {count(model.transformer):,} of them in blocks"
    )
    assert count(model.transformer) == blocks
    assert (
        count(model) == blocks + vocabularies + (1001 + SCALES) * width
    )  # places in the grid are rotary
    assert count(model) == pytest.approx(343e6, rel=0.002)


def test_the_text_conditional_model_of_the_paper_has_parti_350ms_blocks():
    """Parti-350M (arXiv 2206.10789): 12 + 12 layers of width 1024. Their blocks, of which half read the text with a second attention, are
    353M, so the nominal size holds to 1% for the blocks and to 16% with all embeddings and heads. The text vocabulary that is trained here
    is smaller than the paper's 16,000: the embeddings that it lacks are added by hand."""
    tokenizer = TextTokenizer.train(CAPTIONS, 300, 128)
    model, width = paper_model("ar_captioned_sit4_scd", [], tokenizer.to_json()), 1024
    encoder = block_parameters(12, width, 4 * width)
    decoder = block_parameters(12, width, 4 * width, cross=True)
    assert count(model.text_encoder.transformer) == encoder and count(model.transformer) == decoder
    vocabularies = BOOKS * (NUM_CODES * width + (width + 1) * NUM_CODES)
    words = (tokenizer.vocabulary + 128) * width
    others = (1 + SCALES + PLACES) * width  # the learned start, scales, places
    assert count(model) == encoder + decoder + vocabularies + words + others
    whole = count(model) + (16_000 - tokenizer.vocabulary) * width
    print(f"\nar_captioned_sit4_scd: {whole:,} parameters, {encoder + decoder:,} of them in blocks")
    assert encoder + decoder == pytest.approx(350e6, rel=0.01)
    assert whole == pytest.approx(350e6, rel=0.16)
