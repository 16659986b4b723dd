"""Evaluations of class- and text-conditional generators, and of prompts."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CAPTIONS, TEXTS, model_of, tokenizer_of
from torch.nn.functional import interpolate

from sitlib import evaluate
from sitlib.files import write_json, write_tensors
from sitlib.metrics import frechet_distance, lite0_features
from sitlib.metrics.generation import jackknife_error
from sitlib.model.dual_encoder import DualEncoder, StoredDualEncoderConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.text import TextTokenizer
from workbook.codes import Codes, captioned, held_out_wide, images_of
from workbook.evaluate import generation, memorisation, text
from workbook.generators import config_over
from workbook.profile import load_profile
from workbook.runs import AutoregressiveRun, DualEncoderRun

PROFILE = load_profile("smoke")


def with_evaluation(profile, section, **changes):
    """A profile with changes of one section's evaluation."""
    values = getattr(profile, section)
    changed = replace(values, evaluation=replace(values.evaluation, **changes))
    return replace(profile, **{section: changed})


class Inception(Counter):
    """Stand-in for `InceptionMetrics` that counts the images of each size."""

    def add(self, images, real, title):
        self[f"{images.shape[-1]} px" + ", real" * real] += len(images)

    def compute(self, seed):
        counts = dict(self)
        self.clear()
        return {"fid": counts}


# -- generators ------------------------------------------------------------------------------------


def test_nats_are_those_of_one_sequence_at_a_time(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 3)  # 7 sequences: a part of a batch at the end
    model, generator = model_of("class"), torch.Generator().manual_seed(0)
    shape = (7, model.config.num_scales, model.config.tokens_per_scale)
    codes = torch.randint(min(model.config.codebook_sizes), shape, generator=generator)
    classes = torch.randint(len(model.config.classes), (7,), generator=generator)
    scores = evaluate.held_out_nats(model, codes, classes)
    with torch.no_grad():
        pairs = zip(codes, classes, strict=True)
        log_p = torch.cat([model(c[None], y[None]) for c, y in pairs])
    log_p = log_p.double().log_softmax(dim=-1)
    expected = -log_p.gather(-1, codes[..., None]).mean(dim=(0, 2, 3))
    assert scores["nats_by_scale"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert scores["nats_per_token"] == pytest.approx(float(expected.mean()), rel=1e-5)
    tokens = shape[1] * shape[2]
    assert scores["nats_per_image"] == pytest.approx(tokens * float(expected.mean()), rel=1e-5)


def test_samples_have_the_classes_of_the_reference_views():
    count = PROFILE.autoregressive.evaluation.reference_views
    _, labels = held_out_wide(PROFILE, next(iter(PROFILE.autoregressive.variants)), count)
    drawn = generation.sampled_labels(PROFILE, 2 * count)
    assert Counter(drawn.tolist()) == Counter(2 * labels.tolist())
    assert torch.equal(generation.sampled_labels(PROFILE, count - 1), labels[:-1])


def test_a_decoder_of_other_codes_is_refused():
    with pytest.raises(ValueError, match="vit_vqgan does not decode the codes"):
        generation.evaluate_generator(PROFILE, "ar_sit5_sc", 7, "vit_vqgan")


def tiny_tokenizer(profile, variant, seed):
    return SimpleNamespace(model=tokenizer_of(variant))


def tiny_codes(profile, variant):
    c = tokenizer_of(profile.autoregressive_variant(variant).tokenizer).config
    shape, rng = (5, c.num_scales, c.tokens_per_scale), torch.Generator().manual_seed(1)
    codes, labels = torch.randint(min(c.codebook_sizes), shape, generator=rng), torch.arange(5)
    if variant in profile.text.variants:
        return Codes(codes, labels, codes, labels, [])
    classes = images_of(profile, variant, "test").class_names
    return Codes(codes, labels, codes, labels % len(classes), classes)


def tiny_generator(profile, variant, seed):
    run, texts = AutoregressiveRun.of(profile, variant, seed), None
    classes, shape = tiny_codes(profile, variant).classes, run.model
    if shape.text is not None:  # room for captions of characters
        shape = replace(shape, text=replace(shape.text, max_tokens=256))
        texts = TextTokenizer.train(CAPTIONS, 300, 256).to_json()
    config = config_over(run.codes.tokenizer.model, shape, classes, texts)
    torch.manual_seed(seed)
    model = AutoregressiveModel(config).eval()
    model.set_codebooks([torch.randn(head.out_features, config.code_dim) for head in model.heads])
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=0.5)
    return SimpleNamespace(model=model)


def tiny_judge(profile):
    config = StoredDualEncoderConfig(DualEncoderRun.of(profile).model, TEXTS.to_json(), 1280)
    return SimpleNamespace(model=DualEncoder(config).eval())


@pytest.fixture
def untrained(monkeypatch, tmp_path, weights_folder):
    """The smoke profile with a few samples, of models that are not trained."""
    for name, replacement in (
        ("trained_tokenizer", tiny_tokenizer),
        ("trained_generator", tiny_generator),
        ("load_codes", tiny_codes),
        ("resolve", lambda path: tmp_path / path),
    ):
        monkeypatch.setattr(generation, name, replacement)
    monkeypatch.setattr(text, "trained_dual_encoder", tiny_judge)
    few = {"kid_subset_size": 2, "neighbors": 1, "top_p_sweep": [], "guidance_sweep": [1.5, 4.0]}
    views = {"samples": 6, "reference_views": 5, "sweep_samples": 6}
    profile = with_evaluation(PROFILE, "autoregressive", **few, **views)
    return with_evaluation(profile, "text", **few, prompts=4, candidates=4)


def test_a_class_conditional_model(untrained, tmp_path, monkeypatch):
    profile, variant = untrained, "ar_sit5_sc"
    sampling, real = profile.sampler(variant), generation.real_features(profile, variant)
    write_tensors(tmp_path / generation.REAL, real, {})
    scores = generation.evaluate_generator(profile, variant, 0, pipeline=True)
    images = generation.load_samples(profile, variant, 0, 1)
    codes = load_file(tmp_path / f"samples/{variant}-seed0.safetensors")["codes"]
    assert all(x.shape == (1, 3, 64, 64) for x in images.values()) and len(codes) == 6
    views = held_out_wide(profile, variant, 5)[0]
    x, y = (lite0_features(i) for i in (tokenizer_of().decode(codes), views))
    of_real = frechet_distance(real["train"], y)
    assert scores["fd_lite0"] == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert scores["real"]["fd_lite0"] == pytest.approx(of_real, rel=1e-4)
    same, other = scores["guidance_sweep"]
    assert same["guidance"] == sampling.guidance and same["fd_lite0"] == scores["fd_lite0"]
    assert other["guidance"] == 4 and other["fd_lite0"] != scores["fd_lite0"]
    z = lite0_features(tokenizer_of().reconstruct(views))
    added, of_model = scores["to_reconstructions"], scores["reconstruction"]
    assert added["fd_lite0"] == pytest.approx(frechet_distance(x, z), rel=1e-3)
    assert of_model["fd_lite0"] == pytest.approx(frechet_distance(z, y), rel=1e-3)
    positions = generation.reference_groups(profile, variant)
    error = jackknife_error(partial(frechet_distance, x), z, positions)
    assert added["jackknife"]["fd_lite0"] == pytest.approx(error, rel=1e-2)
    assert scores["jackknife"]["kid"] > 0 < of_model["jackknife"]["kid"]
    assert {"nats_per_token", "nats_per_image", "parameters", "run"} <= scores.keys()
    assert scores["protocol"]["guidance"] == sampling.guidance
    json.dumps(scores, allow_nan=False)
    # Pairs of `memorisation` are a sample and the training view that is nearest to it.
    pairs = scores["memorisation"]["pairs"]
    assert len(pairs) == 6 and all(i < 6 and row < 5 for i, row in pairs)
    shown = generation.suspicious_pairs(profile, variant, 0, pairs)
    train = tokenizer_of().decode(tiny_codes(profile, variant).train)
    for (first, second), (i, row) in zip(shown, pairs, strict=True):
        torch.testing.assert_close(first, tokenizer_of().decode(codes[[i]])[0])
        torch.testing.assert_close(second, train[row])
    # The pipeline's results are read, not made again.
    monkeypatch.setattr(generation, "generate", None)
    monkeypatch.setattr("workbook.evaluate.resolve", lambda path: tmp_path / path)
    write_json(tmp_path / f"metrics/generation/{variant}-seed0.json", scores)
    stored = generation.evaluate_generator(profile, variant, 0)
    assert stored["run"] == scores["run"] and stored.keys() == scores.keys()
    with pytest.raises(TypeError):
        generation.evaluate_generator(profile, variant, 1)
    # The same samples through a second decoder, with Inception scores.
    monkeypatch.setattr(generation.metrics, "InceptionMetrics", Inception)
    asking = with_evaluation(profile, "tokenizer", inception=True)
    again = generation.evaluate_generator(asking, variant, 0, "sit5_sc_second")
    assert again["fd_lite0"] != scores["fd_lite0"] and again["protocol"] == scores["protocol"]
    assert again["fid"] == {"64 px": 6, "64 px, real": 5} and "sizes" not in again


def test_copies_of_training_views_are_told_from_new_images(monkeypatch):
    """Codes stand for features: eight copies, and samples as far away as held-out views are."""
    monkeypatch.setattr(memorisation, "features_of_codes", lambda _, codes, title, size: codes)
    rng = np.random.default_rng(0)
    train, held_out, new = (torch.from_numpy(rng.normal(size=(n, 6))) for n in (90, 300, 300))
    copied = [3, 14, 15, 9, 26, 5, 35, 8]
    copies = train[copied] + 1e-3 * torch.arange(8)[:, None]
    sampled = torch.cat([new, copies])
    codes = Codes(train, train[:, 0], held_out, held_out[:, 0], [])
    found = memorisation.memorisation(sampled, None, codes)
    assert found["pairs"] == [[300 + i, row] for i, row in enumerate(copied)]

    def nearest(points):
        return np.array([np.linalg.norm(train.numpy() - p, axis=1).min() for p in points.numpy()])

    distances, unseen = nearest(sampled), nearest(held_out)
    assert found["nearest"] == pytest.approx(np.median(distances))
    assert found["nearest_held_out"] == pytest.approx(np.median(unseen))
    share = np.mean(distances < np.quantile(unseen, 0.05))
    assert found["share_below_5th"] == pytest.approx(share) and share > 8 / 308
    monkeypatch.setattr(memorisation, "SEEN", 15)
    fewer = memorisation.memorisation(sampled, None, codes)
    assert max(row for _, row in fewer["pairs"]) < 15 and "15 training views" in fewer["protocol"]


def test_text_conditional_samples_at_smaller_sizes_from_small_images_and_by_another_decoder(
    untrained, monkeypatch
):
    monkeypatch.setattr(generation.metrics, "InceptionMetrics", Inception)
    profile = with_evaluation(untrained, "tokenizer", inception=True)
    second = {"captioned_sit4_sc_second": {"codes_from": "captioned_sit4_sc"}}
    variants = profile.tokenizer.variants | second
    profile = replace(profile, tokenizer=replace(profile.tokenizer, variants=variants))
    for variant in ("ar_captioned_vit_vqgan", "ar_captioned_sit4_sc"):
        model, tokenizer = generation.load_models(profile, variant, 0)
        samples = generation.draw_all(model, profile, variant)
        real = generation.real_features(profile, variant)["held_out"]
        scores = generation.measure_codes(samples, tokenizer, real, profile, variant)
        expected = {n: {"fid": {f"{n} px": 4, f"{n} px, real": 4}} for n in ("64", "16", "8")}
        assert scores["fid"] == expected["64"]["fid"]
        assert scores["sizes"] == {"16": expected["16"], "8": expected["8"]}
        assert ("upsampled" in scores) == ("upsampled" in samples) == ("sit4" in variant)
    assert scores["upsampled"] == expected["64"]
    small = interpolate(text.prompts(profile, "held_out").images, 8, mode="area")
    assert torch.equal(samples["upsampled"][:, :1], tokenizer.encode(small))
    assert not torch.equal(samples["upsampled"][:, 1:], samples["held_out"][:, 1:])
    first = lambda p, v, seed: tiny_tokenizer(p, v.removesuffix("_second"), seed)  # noqa: E731
    monkeypatch.setattr(generation, "trained_tokenizer", first)
    again = generation.evaluate_generator(profile, variant, 0, "captioned_sit4_sc_second")
    assert again["fd_lite0"] == pytest.approx(scores["fd_lite0"], rel=1e-4)
    assert again["sizes"] == scores["sizes"] and "kinds" not in again


# -- prompts ---------------------------------------------------------------------------------------


def test_each_kind_of_prompts_is_what_its_title_says():
    train = captioned(PROFILE, "train")
    captions = {caption for captions in train.captions for caption in captions}
    asked = {kind: text.prompts(PROFILE, kind) for kind in text.KINDS}
    for kind, told in asked.items():
        count = PROFILE.text.evaluation.prompts
        assert len(told.captions) == len(set(told.names)) == len(told.images) == count
        assert (set(told.names) <= set(train.groups)) == (kind != "held_out")
    held_out, seen, known = asked.values()
    assert not set(held_out.names) & set(train.groups) and held_out.captions == held_out.known
    assert seen.names == known.names and torch.equal(seen.images, known.images)
    assert seen.known == known.captions and set(known.captions) <= captions
    assert not set(seen.captions) & captions


def test_r_precision_is_the_share_of_right_samples(monkeypatch):
    """Image i shows caption i by its brightness, but for three that show none."""
    captions, names = [f"known {i}" for i in range(8)], [str(i) for i in range(8)]
    positions = SimpleNamespace(encode=lambda x, **_: torch.tensor([captions.index(t) for t in x]))
    model = SimpleNamespace(
        text_tokenizer=positions, similarity=lambda shown, asked: (shown[:, None] == asked).float()
    )
    monkeypatch.setattr(text, "trained_dual_encoder", lambda _: SimpleNamespace(model=model))
    monkeypatch.setattr(text.Judge, "features", lambda self, images, _: images[:, 0, 0, 0])
    shown = torch.tensor([100.0, 100, 100, 3, 4, 5, 6, 7])
    told = text.Prompts(["new words"] * 8, captions, names, shown.view(8, 1, 1, 1))
    profile = with_evaluation(PROFILE, "text", candidates=4, prompts=8, kid_subset_size=2)
    scores = text.Judge(profile).retrieved(told.images, told)
    # Where nothing fits, all four candidates share the first place.
    assert scores["chance"] == 25 and scores["by_prompt"] == [25.0] * 3 + [100.0] * 5
    low, high = scores["interval"]
    assert low < scores["r_precision"] == np.mean(scores["by_prompt"]) < high
