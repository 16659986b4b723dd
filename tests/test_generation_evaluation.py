"""Judging class-conditional samples: likelihoods beside a naive version, the mix of classes, and results that are not there."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_applications import model_of

from sitlib.model.tokenizer import SpectralTokenizer
from workbook import generation_evaluation
from workbook.codes import held_out_wide
from workbook.generation_evaluation import (
    held_out_nats,
    inception_scores,
    load_second_scores,
    real_features,
    sampled_labels,
    second_decoder_scores,
)
from workbook.profile import load_profile

PROFILE = load_profile("smoke")


def test_held_out_nats_are_those_of_a_float64_model_one_sequence_at_a_time(monkeypatch):
    monkeypatch.setattr(
        generation_evaluation, "BATCH", 3
    )  # 7 sequences: a part of a batch at the end
    model = model_of("class")
    scales, tokens = model.config.num_scales, model.config.tokens_per_scale
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.config.num_codes, (7, scales, tokens), generator=generator)
    classes = torch.randint(len(model.config.classes), (7,), generator=generator)
    found = held_out_nats(model, codes, classes)
    wanted = torch.zeros(scales, dtype=torch.float64)
    with torch.no_grad():
        for one, told in zip(codes, classes, strict=True):
            logits = model(one[None], told[None])[0].double()
            for scale in range(scales):
                for token in range(tokens):
                    right = logits[scale, token, one[scale, token]]
                    wanted[scale] += (logits[scale, token].logsumexp(0) - right) / (7 * tokens)
    torch.testing.assert_close(
        torch.tensor(found["nats_by_scale"]).double(), wanted, atol=1e-5, rtol=1e-5
    )
    assert found["nats_per_token"] == pytest.approx(float(wanted.mean()), rel=1e-5)


def test_samples_have_the_classes_of_the_reference_views():
    count = PROFILE.autoregressive.evaluation.reference_views
    variant = next(iter(PROFILE.autoregressive.variants))
    _, labels = held_out_wide(PROFILE, variant, count)
    assert Counter(sampled_labels(PROFILE, 2 * count).tolist()) == {
        label: 2 * times for label, times in Counter(labels.tolist()).items()
    }
    assert sampled_labels(PROFILE, count - 1).tolist() == labels[:-1].tolist()


def test_features_do_not_depend_on_the_parts_in_which_views_are_made(monkeypatch):
    variant, most = next(iter(PROFILE.autoregressive.variants)), []

    def brightness(images, *_, **__):  # in place of a network
        most.append(len(images))
        return images.mean(dim=(2, 3))

    monkeypatch.setattr(generation_evaluation, "load_lite0", torch.nn.Identity)
    monkeypatch.setattr(generation_evaluation, "lite0_features", brightness)
    whole = real_features(PROFILE, variant)
    views = PROFILE.autoregressive.evaluation.reference_views
    assert most == [views, views]
    most.clear()
    monkeypatch.setattr(generation_evaluation, "PART", views // 2 - 1)
    parts = real_features(PROFILE, variant)
    assert max(most) == views // 2 - 1 and sum(most) == 2 * views
    for name, features in whole.items():
        assert torch.equal(parts[name], features)


def test_the_inception_network_judges_all_samples_against_all_views_where_it_is_asked_for(
    monkeypatch,
):
    judged, originals = [], []

    class Judge:
        def add(self, images, real, **_):
            (originals if real else judged).append(images)

        def compute(self, seed):
            return {"fid": 3.0, "inception_score": 1.5, "inception_score_originals": 2.0}

    monkeypatch.setattr(generation_evaluation, "InceptionMetrics", Judge)
    monkeypatch.setattr(generation_evaluation, "PART", 3)
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(PROFILE.tokenizer_variant("vit_vqgan")).eval()
    codes, views = torch.randint(tokenizer.config.num_codes, (7, 1, 64)), torch.rand(5, 3, 64, 64)
    assert inception_scores(tokenizer, codes, [views], PROFILE, 0) == {} and not judged
    evaluation = replace(PROFILE.tokenizer.evaluation, inception=True)
    asking = replace(PROFILE, tokenizer=replace(PROFILE.tokenizer, evaluation=evaluation))
    assert inception_scores(tokenizer, codes, views.split(2), asking, 0)["fid"] == 3.0
    assert torch.equal(torch.cat(judged), tokenizer.decode(codes)) and max(map(len, judged)) == 3
    assert torch.equal(torch.cat(originals), views)


def test_a_second_decoder_of_other_codes_and_missing_results_are_refused(tmp_path, monkeypatch):
    codes = torch.zeros(2, 4, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="vit_vqgan does not decode the codes that ar_sit4 models"):
        second_decoder_scores(PROFILE, "ar_sit4", "vit_vqgan", 0, codes, torch.zeros(2, 8))
    monkeypatch.setattr(generation_evaluation, "resolve", lambda path: tmp_path / path)
    with pytest.raises(ValueError, match="dvc repro decode_again makes it"):
        load_second_scores(PROFILE, "ar_sit5_sc", "sit5_sc_second", 0)
