"""Codes as shards: the values of one loop over all views, whoever makes which shard."""

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sitlib import data
from sitlib.files import DiskError
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train import generator
from workbook import codes
from workbook.profile import load_profile
from workbook.runs import CodesRun


def write(folder, sizes=(3, 5, 4), num_codes=512, seconds=0.0, run="a", made=None, **ranks):
    """Shards of one batch each, whose codes tell their row."""
    starts = np.cumsum([0, *sizes])

    def make(split, batches):
        time.sleep(seconds)
        if made is not None:
            made.append(batches.start)
        rows = torch.arange(starts[batches.start], starts[batches.stop])
        return rows[:, None, None].expand(-1, 2, 4) % num_codes, rows

    data.make_shards(folder, {"train": len(sizes)}, 1, make, {"run": run}, num_codes, **ranks)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def start(folder, sizes, **options):
    """Three ranks that share the shards of a folder."""
    context = multiprocessing.get_context("fork")
    ranks = [{**options, "rank": rank, "world_size": 3} for rank in range(3)]
    processes = [context.Process(target=write, args=(folder, sizes), kwargs=r) for r in ranks]
    for process in processes:
        process.start()
    return processes


class TestShards:
    def test_rows_are_read_where_they_lie(self, tmp_path):
        write(tmp_path / "codes")
        codes = data.TokenShards(tmp_path / "codes", "train")
        assert codes.shape == (12, 2, 4) and codes.labels.tolist() == list(range(12))
        rows = torch.tensor([11, 0, 3, 3, 7, 2])
        assert torch.equal(codes[rows][:, 1, 2], rows) and codes[rows].dtype == torch.int64
        assert codes[rows.numpy()[:0]].shape == (0, 2, 4)
        assert codes[2:9][:, 0, 0].tolist() == list(range(2, 9))
        assert codes[np.array([-1])][0, 0, 0] == 11
        with pytest.raises(IndexError):
            codes[torch.tensor([12])]

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
    def test_memory_stays_on_disk(self, tmp_path):
        """Reading a few rows of 64 MB does not fetch the rest."""

        def anonymous_bytes() -> int:  # that are not pages of files
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

        zeros = torch.zeros(2**13, 4, 2**10, dtype=torch.int64), torch.zeros(2**13)
        data.make_shards(tmp_path / "codes", {"train": 1}, 1, lambda *_: zeros, {}, 512)
        before = anonymous_bytes()
        codes = data.TokenShards(tmp_path / "codes", "train")
        assert codes[torch.arange(0, 2**13, 512)].shape[0] == 16
        assert anonymous_bytes() - before < 16e6

    def test_finished_is_not_made_again_and_another_run_replaces_it(self, tmp_path):
        made = []
        precise = {"crop": 0.12345678, "size": (8, 8)}  # JSON has fewer types
        for run, sizes in 2 * [("a", (3, 5, 4))] + 2 * [(precise, (2, 2))]:
            write(tmp_path / "codes", sizes, made=made, run=run)
        assert len(made) == 5 and len(data.TokenShards(tmp_path / "codes", "train")) == 4
        assert [path.name for path in tmp_path.iterdir()] == ["codes"]
        (tmp_path / "codes/train-00001.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks the codes .*train-00001.*: extract"):
            data.TokenShards(tmp_path / "codes", "train")

    def test_unfinished_shards_of_another_run_are_refused(self, tmp_path):
        work, made = tmp_path / ".codes.unfinished", []
        work.mkdir()
        (work / ".train-00001.safetensors.partial").touch()  # where a folder has to be made
        with pytest.raises(DiskError, match="train-00001.safetensors could not be written"):
            write(tmp_path / "codes", run="a")
        with pytest.raises(data.DataError, match="unfinished codes of another run"):
            write(tmp_path / "codes", run="b")
        (work / ".train-00001.safetensors.partial").unlink()
        write(tmp_path / "codes", run="a", made=made)
        assert made == [1, 2]

    def test_killed_ranks_are_continued_by_any_number(self, tmp_path):
        sizes, work = (3,) * 24, tmp_path / ".codes.unfinished"
        ranks = start(tmp_path / "codes", sizes, seconds=0.3)
        while len(list(work.glob("*.safetensors"))) < 8:
            time.sleep(0.002)
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        there, made = {path.name for path in work.glob("*.safetensors")}, []
        assert 8 <= len(there) < 24 and not data.read_manifest(tmp_path / "codes")
        write(tmp_path / "codes", sizes, made=made)
        assert {f"train-{n:05d}.safetensors" for n in range(24) if n not in made} == there
        write(tmp_path / "undisturbed", sizes)
        assert content(tmp_path / "codes") == content(tmp_path / "undisturbed")
        assert {path.name for path in tmp_path.iterdir()} == {"codes", "undisturbed"}

    def test_ranks_share_the_work_and_all_wait_for_the_folder(self, tmp_path):
        with multiprocessing.get_context("fork").Manager() as manager:
            made = manager.list()
            for process in start(tmp_path / "codes", (3,) * 16, seconds=0.02, made=made):
                process.join(60)
                assert process.exitcode == 0
            assert sorted(made) == list(range(16))  # each once
        assert len(data.TokenShards(tmp_path / "codes", "train")) == 48


@pytest.fixture
def smoke(monkeypatch, tmp_path):
    """The smoke profile with tokenizers that were never trained."""
    profile = load_profile("smoke")

    def untrained(profile, variant):
        torch.manual_seed(0)
        name = profile.autoregressive_variant(variant).tokenizer
        model = SpectralTokenizer(profile.tokenizer_variant(name)).eval()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"weights")
        return SimpleNamespace(model=model, path=path)

    monkeypatch.setattr(codes, "tokenizer_of_codes", untrained)
    return profile


class TestExtraction:
    @pytest.mark.parametrize(
        ("variant", "shard_bytes", "workers"),
        [("ar_sit5_sc", 1, 0), ("ar_captioned_vit_vqgan", 2**20, 2)],
    )
    def test_codes_are_those_of_one_loop(
        self, smoke, tmp_path, monkeypatch, variant, shard_bytes, workers
    ):
        monkeypatch.setattr(codes, "SHARD_BYTES", shard_bytes)
        extracted = codes.extract_codes(smoke, variant, tmp_path / "codes", workers)
        run, model = CodesRun.of(smoke, variant), codes.tokenizer_of_codes(smoke, variant).model
        size, seed, wide = run.tokenizer.data.size, run.codes.seed, {"kind": "wide"}
        train, test = (codes.images_of(smoke, variant, split) for split in ("train", "test"))

        def labels_of(images, classes, keys):
            captioned = run.captions is not None
            return [images.position_of[key] for key in keys] if captioned else classes.tolist()

        total = run.codes.views_per_image * len(train)
        expected, labels = [], []
        for step in range(-(-total // 64)):
            place = step, 64, size, seed
            views, classes, keys = data.training_views(train, *place, **wide, flip=False)
            count = min(64, total - step * 64)
            for shown in [views, views.flip(-1)][: 1 + run.codes.mirrored]:
                expected.append(model.encode(shown[:count]))
                labels += labels_of(train, classes, keys)[:count]
        assert torch.equal(extracted.train[:], torch.cat(expected))
        assert extracted.train_labels.tolist() == labels
        count = run.codes.held_out_views
        views, classes, keys = data.held_out_views(test, count, size, seed, **wide)
        assert torch.equal(extracted.held_out, model.encode(views))
        assert extracted.held_out_labels.tolist() == labels_of(test, classes, keys)
        assert extracted.classes == ([] if run.captions else train.class_names)
        num_shards = len(list((tmp_path / "codes").glob("train-*")))
        assert num_shards == (len(expected) // 2 if shard_bytes == 1 else 1)


class TestDraws:
    @pytest.mark.parametrize("names", [None, [f"name {image % 7}" for image in range(20)]])
    def test_those_of_small_sets_are_as_they_ever_were(self, tmp_path, names):
        write(tmp_path / "codes", sizes=(30, 30))
        labels = torch.from_numpy(np.random.default_rng(0).integers(0, 20, 60))
        shards = data.TokenShards(tmp_path / "codes", "train")
        draw = generator.code_map_draws(shards, labels, names, 16, seed=3)
        rows_of = [np.array([row]) for row in range(60)]
        if names is not None:
            name_of = np.array([names[image] for image in labels.tolist()])
            rows_of = [np.flatnonzero(name_of == name) for name in np.unique(name_of)]
        for step in range(20):
            ours, theirs = np.random.default_rng([3, step]), np.random.default_rng([3, step])
            kinds = [rows_of[kind] for kind in theirs.integers(len(rows_of), size=16)]
            expected = [theirs.choice(rows) for rows in kinds]
            assert draw(step, ours).tolist() == expected and ours.random() == theirs.random()

    def test_large_sets_come_in_epochs(self, tmp_path, monkeypatch):
        write(tmp_path / "codes", sizes=(30, 30, 36))
        monkeypatch.setattr(generator, "WINDOW", 50)
        shards = data.TokenShards(tmp_path / "codes", "train")
        draw = generator.code_map_draws(shards, shards.labels, None, 12, seed=3)
        first, second = (
            np.concatenate([draw(8 * e + s, None) for s in range(8)]) for e in range(2)
        )
        assert sorted(first) == sorted(second) == list(range(96)) and (first != second).any()
        assert (draw(5, None) == first[60:72]).all()
        # Names with more images than others are drawn, as often as the others.
        names = ["often"] * 90 + ["seldom"] * 6
        draw = generator.code_map_draws(shards, torch.arange(96), names, 1000, seed=3)
        assert 400 < (draw(0, np.random.default_rng(0)) < 90).sum() < 600
