"""The throughput table: equal tokens, the right sizes, ratios of what was measured."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sitlib.model.generator import AutoregressiveModel
from workbook import throughput
from workbook.profile import load_profile

PROFILE = load_profile("smoke")


def test_both_models_have_as_many_tokens_in_both_geometries():
    for geometry in throughput.geometries(load_profile("quick")):
        models = [
            throughput.Subject(name, geometry, load_profile("quick")) for name in throughput.MODELS
        ]
        lengths = {subject.model.num_tokens for subject in models}
        assert lengths == ({64} if geometry.name == "profile" else {1024})
        sizes = [
            {name: tuple(p.shape) for name, p in s.model.transformer.named_parameters()}
            for s in models
        ]
        assert sizes[0] == sizes[1]


def test_images_have_the_size_that_was_asked_for_and_smaller_ones_take_fewer_codes(monkeypatch):
    geometry = throughput.geometries(PROFILE)[0]
    steps = []
    forward = AutoregressiveModel._next_logits
    monkeypatch.setattr(
        AutoregressiveModel,
        "_next_logits",
        lambda self, writing, x: steps.append(x.shape[1]) or forward(self, writing, x),
    )
    for name in throughput.MODELS:
        subject = throughput.Subject(name, geometry, PROFILE)
        for share in throughput.SHARES:
            steps.clear()
            assert subject.images(share).shape == (geometry.batch_size, 3, 64 // share, 64 // share)
            scales = {1: 4, 2: 3, 4: 2, 8: 1}[share]
            assert sum(steps) == (16 * scales if name == "ar_sit4_scd" else 64)


def test_the_table_holds_ratios_of_medians_and_the_papers(monkeypatch):
    monkeypatch.setattr(throughput, "geometries", lambda profile: [geometry])
    geometry = replace(throughput_geometry(), batch_size=2)
    monkeypatch.setattr(
        throughput,
        "_memory_elsewhere",
        lambda name, geometry, profile: {share: 10.0 * share for share in (1, 2, 4, 8)},
    )
    clock = {"ar_sit4_scd": 1.0, "ar_vit_vqgan": 4.0}
    monkeypatch.setattr(throughput, "seconds", lambda subject, share: clock[subject.name] / share)
    monkeypatch.setattr(
        throughput,
        "Subject",
        lambda name, geometry, profile: SimpleNamespace(name=name, model=None),
    )
    found = throughput.measure(PROFILE, "smoke", rounds=3)
    assert [row["size"] for row in found["rows"]] == [64, 32, 16, 8]
    assert [row["ratio"] for row in found["rows"]] == pytest.approx([4.0, 8.0, 16.0, 32.0])
    assert {row["images_per_second"]["ar_vit_vqgan"] for row in found["rows"]} == {
        0.5
    }  # measured once
    assert found["rows"][0]["images_per_second"] == {"ar_sit4_scd": 2.0, "ar_vit_vqgan": 0.5}
    paper = [row["paper_ratio"] for row in found["rows"]]
    assert paper[1] is None and paper[0] == pytest.approx(0.83, abs=0.005)
    assert paper[2] == pytest.approx(3.2, abs=0.03) and paper[3] == pytest.approx(9.7, abs=0.03)


def throughput_geometry():
    return throughput.Geometry(
        "profile", 64, 4, 8, replace(PROFILE.autoregressive_variant("ar_vit_vqgan"), dropout=0.0), 4
    )


def test_the_peak_of_another_process_is_its_own_and_not_that_of_this_one():
    ballast = torch.ones(
        300_000_000, dtype=torch.uint8
    )  # this process has had a peak of 300 MB more
    used = throughput._memory_elsewhere("ar_vit_vqgan", "profile", "smoke")[1]
    assert 0.5 < used < 200 and len(ballast)
