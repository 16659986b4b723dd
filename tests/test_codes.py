"""Codes as shards: the values of one loop over all views, whoever makes which shard, and reads from disk."""

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
from safetensors import SafetensorError

from sitlib import files
from sitlib.data import held_out_views, open_captioned, open_images, training_views
from sitlib.data import token_shards as code_shards
from sitlib.data.token_shards import jobs, make_shards, read_manifest, read_maps
from sitlib.files import DiskError
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.train.checkpoint import StateError
from workbook import codes, generators
from workbook.profile import load_profile


@pytest.fixture(autouse=True)
def locks_elsewhere(tmp_path_factory, monkeypatch):
    project = tmp_path_factory.mktemp("project")
    monkeypatch.setattr(code_shards, "resolve", lambda path: project / path)


def write(folder, sizes=(3, 5, 4), num_codes=512, seconds=0.0, identity="a", made=None):
    """Shards of one batch each, whose codes tell their row."""
    starts = np.cumsum([0, *sizes])

    def make(job):
        time.sleep(seconds)
        if made is not None:
            made.append(job.name)
        rows = torch.arange(starts[job.batches.start], starts[job.batches.stop])
        return rows[:, None, None].expand(-1, 2, 4) % num_codes, rows

    wanted = jobs({"train": len(sizes)}, code_shards.SHARD_BYTES)
    make_shards(folder, identity, wanted, make, {"run": "x"}, num_codes)
    return starts[-1]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestShards:
    def test_rows_are_read_where_they_lie(self, tmp_path):
        count = write(tmp_path / "codes")
        maps = read_maps(tmp_path / "codes", "train")
        assert (
            maps.shape == (12, 2, 4)
            and len(maps) == count
            and maps.labels.tolist() == list(range(12))
        )
        rows = torch.tensor([11, 0, 3, 3, 7, 2])
        assert torch.equal(maps[rows][:, 1, 2], rows) and maps[rows].dtype == torch.int64
        assert maps[rows.numpy()[:0]].shape == (0, 2, 4) and maps[2:9][:, 0, 0].tolist() == list(
            range(2, 9)
        )
        assert maps[np.array([-1])][0, 0, 0] == 11
        with pytest.raises(IndexError):
            maps[torch.tensor([12])]
        assert {part.dtype for part in maps._parts} == {np.dtype(np.uint16)}
        assert not any(part.flags.owndata for part in maps._parts)

    def test_vocabularies_that_need_more_than_two_bytes(self, tmp_path):
        write(tmp_path / "large", num_codes=70_000)
        write(tmp_path / "small", num_codes=65_536)
        assert read_maps(tmp_path / "large", "train")._parts[0].dtype == np.int32
        assert read_maps(tmp_path / "small", "train")._parts[0].dtype == np.uint16

    def test_uint16_holds_its_largest_code(self, tmp_path):
        make_shards(
            tmp_path / "codes",
            "a",
            jobs({"train": 1}, 1),
            lambda job: (torch.full((2, 1, 1), 65_535), torch.zeros(2, dtype=torch.int64)),
            {},
            65_536,
        )
        assert read_maps(tmp_path / "codes", "train")[:].flatten().tolist() == [65_535, 65_535]

    def test_memory_stays_on_disk(self, tmp_path):
        """Reading a few rows of 64 MB does not fetch the rest."""
        if not Path("/proc/self/status").exists():
            pytest.skip("needs Linux to tell whose memory it is")
        make_shards(
            tmp_path / "codes",
            "a",
            jobs({"train": 1}, 1),
            lambda job: (torch.zeros(2**13, 4, 2**10, dtype=torch.int64), torch.zeros(2**13)),
            {},
            512,
        )

        def of_its_own() -> int:  # bytes that are not pages of files
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])

        before = of_its_own()
        maps = read_maps(tmp_path / "codes", "train")
        assert maps[torch.arange(0, 2**13, 512)].shape[0] == 16
        assert of_its_own() - before < 16e6

    def test_finished_is_not_made_again_and_another_run_replaces_it(self, tmp_path):
        made = []
        write(tmp_path / "codes", made=made)
        write(tmp_path / "codes", made=made)
        assert len(made) == 3
        write(tmp_path / "codes", sizes=(2, 2), made=made, identity="b")
        assert len(made) == 5 and len(read_maps(tmp_path / "codes", "train")) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == [".codes.finished", "codes"]
        (tmp_path / "codes/train-00001.safetensors").unlink()
        with pytest.raises(
            FileNotFoundError, match=r"lacks the codes train-00001\.safetensors: extract"
        ):
            read_maps(tmp_path / "codes", "train")

    def test_another_run_of_the_same_folder_is_refused_while_the_first_lives(self, tmp_path):
        """Whichever finished first would remove what the other has made."""
        left = tmp_path / ".codes.c"
        (left / "shards").mkdir(parents=True)
        (left / f"of a process that was killed{code_shards.ALIVE}").touch()
        wanted = jobs({"train": 1}, 1)

        def make(job):
            with pytest.raises(
                StateError, match=r"is being made by another run, .* \(in \.codes\.a\)"
            ):
                write(tmp_path / "codes", identity="b")
            return torch.zeros(2, 1, 1, dtype=torch.int64), torch.zeros(2)

        make_shards(tmp_path / "codes", "a", wanted, make, {}, 512)
        assert not left.exists() and len(read_maps(tmp_path / "codes", "train")) == 2
        write(tmp_path / "codes", identity="b")
        assert len(read_maps(tmp_path / "codes", "train")) == 12

    def test_codes_of_another_run_are_never_taken_for_ones_own(self, tmp_path, monkeypatch):
        write(tmp_path / "codes")
        monkeypatch.setattr(
            code_shards, "_claimed", lambda *_: iter(())
        )  # as if the folder had been cleared away
        with pytest.raises(StateError, match="was made by another run meanwhile"):
            write(tmp_path / "codes", identity="b")

    def test_killed_while_an_older_folder_is_replaced(self, tmp_path, monkeypatch):
        write(tmp_path / "codes")
        real = code_shards.shutil.rmtree

        def killed(folder, **options):
            (folder / "train-00000.safetensors").unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(code_shards.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "codes", identity="b")
        monkeypatch.setattr(code_shards.shutil, "rmtree", real)
        write(tmp_path / "codes")  # the older one again: not taken for whole
        assert len(read_maps(tmp_path / "codes", "train")) == 12

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_without_locks_between_machines_work_is_done_twice_and_not_wrongly(
        self, tmp_path, monkeypatch, number
    ):
        class NoLock:
            def __init__(self, path, timeout=-1): ...
            def __enter__(self): ...
            def __exit__(self, *_): ...

        monkeypatch.setattr(code_shards, "FileLock", NoLock)
        writes, real = [], code_shards.write_tensors

        def and_another(path, *arguments):
            """While a shard is being written, another machine makes everything."""
            writes.append(path)
            if len(writes) == number + 1:
                write(tmp_path / "codes")
            real(path, *arguments)

        monkeypatch.setattr(code_shards, "write_tensors", and_another)
        write(tmp_path / "codes")
        monkeypatch.undo()
        write(tmp_path / "undisturbed")
        assert content(tmp_path / "codes") == content(tmp_path / "undisturbed")
        assert len(set(writes)) == len(writes) > 3
        assert sorted(path.name for path in tmp_path.glob(".codes*")) == [".codes.finished"]

    def test_a_full_disk_leaves_the_finished_shards_and_nothing_else(self, tmp_path, monkeypatch):
        made, real = [], files.save_file

        def full(tensors, path, metadata):
            Path(path).write_bytes(b"as much as there was room for")
            raise SafetensorError("No space left on device (os error 28)")

        def save(tensors, path, metadata):
            (full if len(made) == 2 else real)(tensors, path, metadata)

        monkeypatch.setattr(files, "save_file", save)
        for _ in range(3):
            with pytest.raises(
                DiskError, match=r"train-00001\.safetensors could not be written .*No space left"
            ):
                write(tmp_path / "codes", made=made)
            made[:] = made[:1]
        left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert [name for name in left if not name.endswith((".lock", code_shards.ALIVE))] == [
            made[0]
        ]
        monkeypatch.setattr(files, "save_file", real)
        write(tmp_path / "codes", made=made)
        write(tmp_path / "undisturbed")
        assert len(made) == 3 and content(tmp_path / "codes") == content(tmp_path / "undisturbed")

    def test_shards_are_cut_by_size(self, monkeypatch):
        monkeypatch.setattr(code_shards, "SHARD_BYTES", 100)
        found = jobs({"train": 7, "held_out": 2}, 30)
        assert [(job.name, list(job.batches)) for job in found] == [
            ("train-00000.safetensors", [0, 1, 2]),
            ("train-00001.safetensors", [3, 4, 5]),
            ("train-00002.safetensors", [6]),
            ("held_out-00000.safetensors", [0, 1]),
        ]

    def test_killed_processes_that_share_the_work(self, tmp_path):
        context, sizes = multiprocessing.get_context("fork"), (3,) * 24
        options = {"sizes": sizes, "seconds": 0.03}
        workers = [
            context.Process(target=write, args=(tmp_path / "codes",), kwargs=options)
            for _ in range(3)
        ]
        for worker in workers:
            worker.start()
        shards = tmp_path / ".codes.a/shards"
        while len(list(shards.glob("*.safetensors"))) < 6:
            time.sleep(0.002)
        os.kill(workers[0].pid, signal.SIGKILL)  # the others go on
        while len(list(shards.glob("*.safetensors"))) < 12:
            time.sleep(0.002)
        for worker in workers[1:]:
            os.kill(worker.pid, signal.SIGKILL)
        for worker in workers:
            worker.join()
            assert worker.exitcode == -signal.SIGKILL
        there = {path.name for path in shards.glob("*.safetensors")}
        assert 12 <= len(there) < 24 and not read_manifest(tmp_path / "codes")
        made = []
        write(tmp_path / "codes", sizes, made=made)
        assert set(made) == {f"train-{n:05d}.safetensors" for n in range(24)} - there
        write(tmp_path / "undisturbed", sizes)
        assert content(tmp_path / "codes") == content(tmp_path / "undisturbed")
        assert sorted(path.name for path in tmp_path.glob(".codes*")) == [".codes.finished"]

    def test_processes_share_the_work(self, tmp_path):
        context = multiprocessing.get_context("fork")
        with context.Manager() as manager:
            made = manager.list()
            options = {"sizes": (3,) * 16, "seconds": 0.02, "made": made}
            workers = [
                context.Process(target=write, args=(tmp_path / "codes",), kwargs=options)
                for _ in range(3)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
                assert worker.exitcode == 0
            assert sorted(made) == [f"train-{n:05d}.safetensors" for n in range(16)]  # each once
        assert len(read_maps(tmp_path / "codes", "train")) == 48


@pytest.fixture
def smoke(monkeypatch, tmp_path):
    """The smoke profile with tokenizers that were never trained."""
    profile = load_profile("smoke")

    def untrained(profile, name, seed):
        torch.manual_seed(0)
        model = SpectralTokenizer(profile.tokenizer_variant(name)).eval()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"weights")
        return SimpleNamespace(model=model, path=path)

    monkeypatch.setattr(codes, "trained_tokenizer", untrained)
    return profile


class TestExtraction:
    @pytest.mark.parametrize(
        ("variant", "shard_bytes", "workers"),
        [("ar_sit5_sc", 1, 0), ("ar_captioned_vit_vqgan", 2**20, 2)],
    )
    def test_codes_are_those_of_one_loop(
        self, smoke, tmp_path, monkeypatch, variant, shard_bytes, workers
    ):
        monkeypatch.setattr(code_shards, "SHARD_BYTES", shard_bytes)
        found = codes.extract_codes(smoke, variant, tmp_path / "codes", workers)
        name = smoke.autoregressive_variant(variant).tokenizer
        section, data = smoke.generator_section(variant), smoke.tokenizer_data(name)
        model = codes.trained_tokenizer(smoke, name, 0).model
        is_text = variant in smoke.text.variants
        images = {
            split: open_captioned(data.source, split, "names").images
            if is_text
            else open_images(data.source, split).labeled()
            for split in ("train", "test")
        }
        place_of = {
            split: {key: row for row, key in enumerate(found.keys)}
            for split, found in images.items()
        }
        total = section.codes.views_per_image * len(images["train"])
        expected, labels = [], []
        for step in range(-(-total // 64)):
            views, classes, keys = training_views(
                images["train"], step, 64, data.size, section.codes.seed, kind="wide", flip=False
            )
            rows = [place_of["train"][key] for key in keys] if is_text else classes.tolist()
            count = min(64, total - step * 64)
            for shown in [views, views.flip(-1)][: 1 + section.codes.mirrored]:
                expected.append(model.encode(shown[:count]))
                labels += rows[:count]
        assert (
            torch.equal(found.train[:], torch.cat(expected))
            and found.train_labels.tolist() == labels
        )
        count = section.codes.held_out_views
        views, classes, keys = held_out_views(
            images["test"], count, data.size, section.codes.seed, kind="wide"
        )
        assert torch.equal(found.held_out, model.encode(views))
        rows = [place_of["test"][key] for key in keys] if is_text else classes.tolist()
        assert found.held_out_labels.tolist() == rows
        assert found.classes == ([] if is_text else images["train"].class_names)
        shards = sorted(path.name for path in (tmp_path / "codes").glob("train-*"))
        assert len(shards) == (len(expected) // 2 if shard_bytes == 1 else 1)

    def test_they_are_found_again_by_their_run(self, smoke, tmp_path, monkeypatch):
        monkeypatch.setattr(codes, "resolve", lambda path: tmp_path / path)
        own = codes.load_codes(smoke, "ar_vit_vqgan")  # extracted now
        folder = next((tmp_path / "scratch/codes").glob("*/[!.]*"))
        assert len(own.train) and read_manifest(folder)["run"] == folder.name
        monkeypatch.setattr(codes, "extract_codes", None)
        again = codes.load_codes(smoke, "ar_vit_vqgan")
        assert torch.equal(again.train[:], own.train[:]) and again.classes == own.classes


class TestDraws:
    def test_those_of_small_sets_are_as_they_ever_were(self, tmp_path):
        write(tmp_path / "codes", sizes=(30, 30))
        maps = read_maps(tmp_path / "codes", "train")
        labels = torch.from_numpy(np.random.default_rng(0).integers(0, 20, 60))
        names = [f"name {image % 7}" for image in range(20)]
        for known in (None, names):
            of_codes = SimpleNamespace(train=maps, train_labels=labels)
            draw = generators.code_map_draws(of_codes, known, 16, seed=3)
            if known is None:
                maps_of = [np.array([row]) for row in range(60)]
            else:
                said = np.array([names[image] for image in labels.tolist()])
                maps_of = [np.flatnonzero(said == name) for name in np.unique(said)]
            for step in range(20):
                ours, theirs = np.random.default_rng([3, step]), np.random.default_rng([3, step])
                kinds = [maps_of[kind] for kind in theirs.integers(len(maps_of), size=16)]
                expected = [theirs.choice(rows) for rows in kinds]
                assert draw(step, ours).tolist() == expected and ours.random() == theirs.random()

    def test_large_sets_come_in_epochs(self, tmp_path, monkeypatch):
        write(tmp_path / "codes", sizes=(30, 30, 36))
        monkeypatch.setattr(generators, "WINDOW", 50)
        of_codes = SimpleNamespace(train=read_maps(tmp_path / "codes", "train"), train_labels=None)
        draw = generators.code_map_draws(of_codes, None, 12, seed=3)
        epochs = [
            np.concatenate([draw(step, None) for step in range(8 * e, 8 * e + 8)]) for e in range(2)
        ]
        assert (
            all(sorted(epoch) == list(range(96)) for epoch in epochs)
            and (epochs[0] != epochs[1]).any()
        )
        assert (draw(5, None) == epochs[0][60:72]).all()
        # Names with more images than others are drawn, as often as the others.
        unequal = SimpleNamespace(train=of_codes.train, train_labels=torch.arange(96))
        draw = generators.code_map_draws(unequal, ["often"] * 90 + ["seldom"] * 6, 1000, seed=3)
        assert 400 < (draw(0, np.random.default_rng(0)) < 90).sum() < 600
