"""Views come in epochs, every image once, whoever makes them and wherever a run resumes."""

import hashlib
import os
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import python

from sitlib.data import DataError, held_out_views, open_images, prefetch, training_views
from sitlib.data.images import EpochOrder
from workbook.evaluate.text import degrade
from workbook.paths import ROOT

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


def items(order: EpochOrder, seed: int, first: int, last: int) -> list[int]:
    """Items of a run, as views and codes take them."""
    places = (divmod(item, len(order)) for item in range(first, last))
    return [int(order.permutation(seed, 0, epoch)[place]) for epoch, place in places]


class TestEpochOrder:
    @settings(max_examples=60, deadline=None)
    @given(
        sizes=SHARDS,
        window=st.integers(1, 40),
        ranks=st.integers(1, 4),
        per_rank=st.integers(1, 4),
        killed_after=st.integers(0, 12),
        other_ranks=st.sampled_from([1, 2, 4]),
    )
    def test_every_item_once_an_epoch(
        self, sizes, window, ranks, per_rank, killed_after, other_ranks
    ):
        """Rank r of R takes part R * t + r; a run resumes with another number of ranks."""
        order, batch = EpochOrder(sizes, window), ranks * per_rank
        steps = -(-2 * len(order) // batch)

        def run(first_step, last_step, ranks):
            fresh, size = EpochOrder(sizes, window), batch // ranks  # as in another process
            parts = range(first_step * ranks, last_step * ranks)
            return sum((items(fresh, 7, part * size, (part + 1) * size) for part in parts), [])

        killed_after = min(killed_after, steps)
        other_ranks = other_ranks if batch % other_ranks == 0 else 1
        seen = run(0, killed_after, ranks) + run(killed_after, steps, other_ranks)
        assert seen == items(order, 7, 0, steps * batch)
        for epoch in range(2):
            of_epoch = seen[epoch * len(order) : (epoch + 1) * len(order)]
            assert sorted(of_epoch) == list(range(len(order)))


def write(root, *pictures: np.ndarray):
    """Images root/train/<number>.png, opened."""
    (root / "train").mkdir()
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"train/{number:02}.png")
    return open_images(root)


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures that differ, every third one without a class."""
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "train" / ("" if i % 3 == 0 else "ab"[i % 2])
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8))
        noise.resize((128, 64), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return open_images(tmp_path)


class TestViews:
    @pytest.mark.parametrize("kind", ["crops", "wide"])
    def test_pure_in_seed_and_step(self, photos, kind):
        first = [training_views(photos, step, 6, 16, seed=3, kind=kind) for step in range(5)]
        for step in (4, 0, 2):  # any order, as after a restart
            again = training_views(photos, step, 6, 16, seed=3, kind=kind)
            assert all(torch.equal(a, b) for a, b in zip(first[step][:2], again[:2], strict=True))
            assert first[step][2] == again[2]
        views, labels, keys = first[0]
        assert labels.tolist() == [int(photos.labels[photos.position_of[key]]) for key in keys]
        assert views.shape == (6, 3, 16, 16) and views.dtype == torch.float32
        assert labels.dtype == torch.int64 and views.min() >= 0 and views.max() <= 1
        assert not torch.equal(views, first[1][0])
        assert not torch.equal(views, training_views(photos, 0, 6, 16, seed=4, kind=kind)[0])

    def test_side_position_and_flip_of_crops(self, tmp_path):
        """The picture encodes its coordinates, so that a view tells where it was taken."""
        y, x = np.mgrid[0:128, 0:256]
        source = write(tmp_path, np.stack([x, y, y], -1))

        def measure(**options):
            views = training_views(source, 0, 600, 16, seed=0, **options)[0] * 255
            # Source pixels for a view pixel, negative if mirrored.
            slope = (views[:, 0, 8, 12] - views[:, 0, 8, 4]) / 8
            return slope.abs() * 16, slope < 0, views[:, 0, 8, 8], views[:, 1, 8, 8]

        side, mirrored, center_x, center_y = measure(min_crop=0.25)
        assert 31 <= side.min() < 35 and 122 < side.max() <= 130
        assert abs(side.log().mean().exp() - 64) < 5  # log-uniform between 32 and 128
        assert 0.42 < mirrored.float().mean() < 0.58
        assert center_x.min() < 40 and center_x.max() > 215
        assert center_y.min() < 30 and center_y.max() > 98
        assert not measure(flip=False)[1].any()
        side, _, center_x, _ = measure(kind="wide")
        assert side.min() >= 113 and side.max() <= 130
        assert center_x.min() < 70 and center_x.max() > 185
        assert measure(min_crop=0.01)[0].min() >= 15  # not enlarged while the picture is larger

    def test_views_are_antialiased(self, tmp_path):
        board = np.indices((128, 128)).sum(0) % 2 * 255
        views = training_views(write(tmp_path, board), 0, 20, 16, seed=0, kind="wide")[0]
        assert (views[:, :, 2:-2, 2:-2] - 0.5).abs().max() < 0.1

    def test_small_images_are_enlarged_with_a_warning(self, photos):
        with pytest.warns(UserWarning, match="smaller than 100x100; they are enlarged"):
            assert training_views(photos, 0, 8, 100, seed=0)[0].shape == (8, 3, 100, 100)

    def test_held_out_views_take_the_images_in_turn(self, photos):
        views, labels, keys = held_out_views(photos, 50, 16, seed=0)
        assert views.shape == (50, 3, 16, 16) and {keys.count(k) for k in photos.keys} == {2, 3}
        assert labels.tolist() == [int(photos.labels[photos.position_of[key]]) for key in keys]
        assert torch.equal(views[:30], held_out_views(photos, 30, 16, seed=0)[0])
        assert torch.equal(views[20:], held_out_views(photos, 30, 16, seed=0, first=20)[0])
        assert not torch.equal(views[:20], views[20:40])

    @pytest.mark.parametrize(
        "wrong", [{"kind": "narrow"}, {"min_crop": 0}, {"batch_size": 0}, {"size": 0}]
    )
    def test_refusals(self, photos, wrong):
        sentence = r"kind is 'crops', 'wide', 'center'; min_crop in \(0, 1\]"
        with pytest.raises(ValueError, match=sentence):
            training_views(photos, 0, **{"batch_size": 2, "size": 16, "seed": 0} | wrong)


def test_degraded_copies_are_worse_and_follow_from_seed_and_index():
    torch.manual_seed(0)
    noise = torch.rand(24, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(noise, (32, 48), mode="bicubic").clamp(0, 1)
    worse = degrade(smooth, seed=3)
    assert worse.shape == smooth.shape and worse.dtype == torch.float32
    assert worse.min() >= 0 and worse.max() <= 1
    assert ((worse - smooth).square().mean(dim=(1, 2, 3)) > 1e-5).all()
    distances = (worse[:, None] - smooth[None]).square().mean(dim=(2, 3, 4))
    assert torch.equal(distances.argmin(1), torch.arange(len(smooth)))  # still like the original
    assert torch.equal(degrade(smooth[:5], seed=3), worse[:5])
    assert not torch.equal(degrade(smooth, seed=4), worse)
    same = degrade(smooth[:1].expand(8, -1, -1, -1), seed=0)
    assert len({tuple(x.flatten()[:50].tolist()) for x in same}) == 8  # each in its own way


class TestPrefetch:
    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_batches_come_in_order_whoever_makes_them(self, tmp_path, workers):
        images = write(tmp_path, *(np.full((10, 10), n) for n in range(20)))

        def make(step):
            return (*training_views(images, step, 4, 8, seed=1), os.getpid())

        state, pids = torch.random.get_rng_state(), set()
        for step, (views, _, keys, pid) in prefetch(make, 3, 17, workers=workers):
            halves = [training_views(images, 2 * step + rank, 2, 8, seed=1) for rank in range(2)]
            assert torch.equal(views, torch.cat([half[0] for half in halves]))  # of two processes
            assert keys == halves[0][2] + halves[1][2]
            pids.add(pid)
        assert step == 16 and len(pids) == max(1, workers)
        assert (os.getpid() in pids) == (workers == 0)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert list(prefetch(make, 5, 5, workers=workers)) == []

    @pytest.mark.parametrize("workers", [0, 2])
    def test_exceptions_reach_the_consumer_at_their_step(self, workers):
        def make(step):
            if step == 4:
                raise DataError("the image of step 4 is gone")
            return step

        seen = []
        with pytest.raises(DataError, match="^the image of step 4 is gone$"):
            for step, _ in prefetch(make, 0, 10, workers=workers):
                seen.append(step)
        assert seen == [0, 1, 2, 3]

    def test_more_tensors_on_their_way_than_files_may_be_open(self):
        """96 tensors a step, as the paper's text models have them, each a file of shared memory."""
        program = """if True:
            import resource, torch
            from sitlib.data import prefetch
            files = resource.RLIMIT_NOFILE
            resource.setrlimit(files, (128, resource.getrlimit(files)[1]))
            make = lambda step: [torch.full((4,), step) for _ in range(96)]
            steps = list(prefetch(make, 0, 8, workers=2))
            print(all(sum(int(t[0]) for t in tensors) == 96 * step for step, tensors in steps))
        """
        done = python(program, timeout=60)
        assert done.stdout == "True\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("source", "expected", "means"),
    [
        ("landscapes", "df27cee32f31daa0", [0.488, 0.489, 0.2315, 0.5359]),
        ("emoji", "1f548d51d7d349ed", [0.5752, 0.4417, 0.6633, 0.6109]),
    ],
)
def test_views_of_the_sets_of_the_repository_never_change(source, expected, means):
    """Results depend on them. Keys and labels are exact, pixels as far as decoders agree."""
    images = open_images(ROOT / "data" / source, "train")
    digest = hashlib.sha256()
    for step, (subset, seed) in product((0, 3, 40, 200), ((images, 0), (images.labeled(), 1))):
        _, labels, keys = training_views(subset, step, 16, 8, seed)
        digest.update(f"{keys} {labels.tolist()}".encode())
    assert digest.hexdigest()[:16] == expected
    views, *_ = training_views(images, 200, 4, 32, 0, min_crop=0.4)
    assert views.mean((1, 2, 3)).tolist() == pytest.approx(means, abs=5e-4)
