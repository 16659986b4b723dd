"""Order at scale: every sample once an epoch, whoever reads it and wherever a run goes on; cached indexes; workers."""

import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sitlib.data import DataError, index_cache, open_images, prefetch, sources, training_views
from sitlib.data.index import index_shard
from sitlib.data.order import EpochOrder, random_generator

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def items(order: EpochOrder, seed: int, first: int, last: int) -> list[int]:
    """Items of a run, as views and code maps take them."""
    return [
        int(order.permutation(seed, 0, epoch)[place])
        for epoch, place in (divmod(item, len(order)) for item in range(first, last))
    ]


class TestEpochOrder:
    @settings(max_examples=150, deadline=None)
    @given(SHARDS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
    def test_every_item_once(self, sizes, window, seed, epoch):
        order = EpochOrder(sizes, window)
        found = order.permutation(seed, epoch)
        assert sorted(found.tolist()) == list(range(sum(sizes)))
        again = EpochOrder(sizes, window).permutation(seed, epoch)  # of another process
        assert (found == again).all()

    @settings(max_examples=100, deadline=None)
    @given(
        sizes=SHARDS,
        window=st.integers(1, 40),
        ranks=st.integers(1, 4),
        workers=st.integers(1, 3),
        per_rank=st.integers(1, 4),
        killed_after=st.integers(0, 12),
        other=st.sampled_from([1, 2, 4]),
    )
    def test_ranks_workers_and_restarts(
        self, sizes, window, ranks, workers, per_rank, killed_after, other
    ):
        """Steps are shared out to workers, batches to ranks; a run goes on with other numbers of both."""
        order, batch = EpochOrder(sizes, window), ranks * per_rank
        steps = -(-2 * len(order) // batch)

        def run(first_step, last_step, ranks, workers):
            """Batches by step, each of the parts of all ranks; step t is computed by worker t % workers."""
            by_step = {}
            for worker in range(workers):
                for step in range(first_step + worker, last_step, workers):
                    part = batch // ranks
                    by_step[step] = sum(
                        (
                            items(
                                order,
                                7,
                                (step * ranks + rank) * part,
                                (step * ranks + rank + 1) * part,
                            )
                            for rank in range(ranks)
                        ),
                        [],
                    )
            return [item for step in sorted(by_step) for item in by_step[step]]

        killed_after = min(killed_after, steps)
        other = other if batch % other == 0 else 1
        seen = run(0, killed_after, ranks, workers) + run(killed_after, steps, other, workers + 1)
        assert seen == items(order, 7, 0, steps * batch)  # whatever the number of ranks
        for epoch in range(2):
            of_epoch = seen[epoch * len(order) : (epoch + 1) * len(order)]
            assert sorted(of_epoch) == list(range(len(order)))

    def test_small_sets_are_shuffled_whole(self):
        order = EpochOrder([100] * 10, window=1000)
        assert (order.permutation(3, 0, 2) == random_generator(3, 0, 2).permutation(1000)).all()

    def test_large_sets_stay_near(self):
        order = EpochOrder([100] * 50, window=500)
        first, second = (order.permutation(0, epoch) for epoch in range(2))
        for begin in range(0, 5000, 500):
            window = first[begin : begin + 500]
            assert len(set(window // 100)) == 5  # shards that are read at a time
            assert len(set(window[:100] // 100)) == 5  # and mixed
        assert (first != second).any() and len(
            set(first[:500] // 100) ^ set(second[:500] // 100)
        ) > 0
        assert not (np.diff([first[b] // 100 for b in range(0, 5000, 500)]) >= 0).all()


def write_shards(folder, sizes, first=0):
    number = first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for _ in range(size):
                file = io.BytesIO()
                Image.new("RGB", (10, 10), (number, 0, 0)).save(file, "PNG")
                record = json.dumps(
                    {"class": None if number % 5 == 0 else f"class {number % 3}"}
                ).encode()
                for suffix, content in (("png", file.getvalue()), ("json", record)):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return folder


class TestViewsOfLargeSets:
    @pytest.fixture
    def large(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "CHECK_AT_MOST", 0)
        monkeypatch.setattr(EpochOrder.__init__, "__defaults__", (16,))
        return open_images(write_shards(tmp_path, [8] * 6))

    def test_an_epoch_in_windows_of_shards(self, large):
        keys = [key for step in range(6) for key in training_views(large, step, 8, 8, seed=1)[2]]
        assert sorted(keys) == large.keys
        assert all(len({int(key) // 8 for key in keys[b : b + 16]}) == 2 for b in range(0, 48, 16))

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_parts_of_a_batch(self, large, ranks):
        whole = training_views(large, 5, 8, 8, seed=1)
        parts = [
            training_views(large, 5 * ranks + rank, 8 // ranks, 8, seed=1) for rank in range(ranks)
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert sum((part[2] for part in parts), []) == whole[2]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_worker_processes_give_the_same_batches_in_order(self, large, workers):
        steps = list(
            prefetch(lambda step: training_views(large, step, 4, 8, seed=1), 3, 17, 2, workers)
        )
        assert [step for step, _ in steps] == list(range(3, 17))
        for step, (views, labels, keys) in steps:
            expected = training_views(large, step, 4, 8, seed=1)
            assert (
                torch.equal(views, expected[0])
                and torch.equal(labels, expected[1])
                and keys == expected[2]
            )


class TestWorkers:
    def test_they_are_processes_and_share_the_steps(self):
        found = dict(prefetch(lambda step: os.getpid(), 0, 8, workers=2))
        assert len(set(found.values())) == 2 and os.getpid() not in found.values()

    def test_exceptions_reach_the_consumer_at_their_step(self):
        def fail_at_four(step):
            if step == 4:
                raise DataError("the image of step 4 is gone")
            return step

        seen = []
        with pytest.raises(DataError, match="^the image of step 4 is gone$"):
            for step, _ in prefetch(fail_at_four, 0, 10, workers=2):
                seen.append(step)
        assert seen == [0, 1, 2, 3]

    def test_wrong_numbers(self):
        with pytest.raises(ValueError, match="workers is -1"):
            prefetch(abs, 0, 1, workers=-1)
        with pytest.raises(ValueError, match="depth is 0"):
            prefetch(abs, 0, 1, depth=0)


class TestIndexCache:
    @pytest.fixture
    def shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(index_cache, "CACHE_FROM", 0)
        monkeypatch.setattr(index_cache, "user_cache_path", lambda name: tmp_path / "cache" / name)
        folder = tmp_path / "set"
        folder.mkdir()
        return sorted(write_shards(folder, [5, 0, 7]).glob("*.tar"))

    def equal(self, one, two):
        assert (one.files, one.keys, one.suffixes, one.class_of) == (
            two.files,
            two.keys,
            two.suffixes,
            two.class_of,
        )
        assert (one.spans == two.spans).all() and one.problems == two.problems

    def test_what_is_read_is_what_was_written(self, shards, monkeypatch):
        first = index_cache.index_shards(shards)
        assert [*first.class_of][:4] == [None, "class 1", "class 2", "class 0"]
        monkeypatch.setattr(index_cache, "index_shard", None)  # the shards are not read again
        self.equal(index_cache.index_shards(shards), first)
        assert len(open_images(shards[0].parent)) == 12

    def test_changed_shards_and_damaged_files_are_indexed_again(self, shards):
        index_cache.index_shards(shards)
        write_shards(shards[0].parent, [5, 3, 4], first=20)
        changed = index_cache.index_shards(shards)
        assert changed.keys[0] == "0020" and len(changed) == 12
        for content in (b"", b"PK damaged", index_cache.cache_file(shards).read_bytes()[:-100]):
            index_cache.cache_file(shards).write_bytes(content)
            self.equal(index_cache.index_shards(shards), changed)
            assert index_cache.cache_file(shards).stat().st_size > 500

    def test_incomplete_shards_are_not_kept(self, shards):
        shards[0].write_bytes(shards[0].read_bytes()[:2000])
        for _ in range(2):
            assert index_cache.index_shards(shards).problems
        assert not index_cache.cache_file(shards).exists()

    def test_a_cache_that_cannot_be_written_is_a_warning(self, shards, tmp_path):
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.warns(UserWarning, match="cannot be kept in .*cache"):
            assert len(index_cache.index_shards(shards)) == 12

    def test_small_sets_leave_no_file(self, shards, tmp_path, monkeypatch):
        monkeypatch.setattr(index_cache, "CACHE_FROM", 10**9)
        assert index_cache.index_shards(shards).keys == sum(
            (index_shard(path).keys for path in shards), []
        )
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("source", "expected", "means", "deviations"),
    [
        (
            "data/landscapes",
            "df27cee32f31daa0",
            [0.488, 0.489, 0.2315, 0.5359],
            [0.2416, 0.1734, 0.1224, 0.1026],
        ),
        (
            "data/emoji",
            "682d9de3f8dd488f",
            [0.5163, 0.7536, 0.5814, 0.7077],
            [0.3888, 0.2886, 0.3177, 0.2612],
        ),
    ],
)
def test_views_of_the_sets_that_travel_with_the_repository_never_change(
    source, expected, means, deviations
):
    """Trained results depend on them. Exact for keys and labels, and for pixels as far as decoders of several versions agree."""
    images = open_images(source, "train")
    digest = hashlib.sha256()
    for step in (0, 3, 40, 200):
        for chosen, seed in ((images, 0), (images.labelled(), 1)):
            _, labels, keys = training_views(chosen, step, 16, 8, seed)
            digest.update(f"{keys} {labels.tolist()}".encode())
    assert digest.hexdigest()[:16] == expected
    views, *_ = training_views(images, 200, 4, 32, 0, min_crop=0.4)
    assert views.mean((1, 2, 3)).tolist() == pytest.approx(means, abs=5e-4)
    assert views.std((1, 2, 3)).tolist() == pytest.approx(deviations, abs=5e-4)
