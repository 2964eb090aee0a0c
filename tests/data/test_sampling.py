"""Samplers: which image stands where in an epoch, and that the loader's promises hold for each of them."""

import itertools

import numpy as np
import pytest
import torch

from esvit.data.base import ImageSet
from esvit.data.folder import FolderImages
from esvit.data.loading import TrainLoader
from esvit.data.sampling import SHUFFLE, Chunked, ClassAware, Repeated, Shuffle, generator
from esvit.data.subsets import Subset
from esvit.errors import OptionError
from tests.data.pictures import CornerAndNoise, write_classes

SAMPLERS = {
    "shuffle": SHUFFLE,
    "chunk": Chunked(window=2, chunk_size=3, own_chunks=True),
    "repeated": Repeated(repeats=3),
    "class_aware": ClassAware(),
}


class Numbers(ImageSet):
    """Images that nobody looks at."""

    def __init__(self, count, labels=None, chunk_ends=None):
        self.labels = None if labels is None else np.array(labels)
        self.class_names = []
        self.chunk_ends = None if chunk_ends is None else np.array(chunk_ends)
        self._count = count

    def __len__(self):
        return self._count

    def read(self, index, decode=None):
        raise NotImplementedError

    def name(self, index):
        return str(index)


def order(sampler, images, *, images_per_step=4, seed=3, epoch=0):
    return sampler.order(images, images_per_step=images_per_step, seed=seed, epoch=epoch)


def test_shuffle_is_the_permutation_that_runs_of_the_past_had():
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence(3, spawn_key=(0, 2)))).permutation(10)
    assert order(Shuffle(), Numbers(10), epoch=2).tolist() == expected.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_order_depends_on_seed_and_epoch_alone(name):
    images = Numbers(60, labels=np.arange(60) % 7)
    same = [order(SAMPLERS[name], images).tolist() for _ in range(2)]
    assert same[0] == same[1] and len(same[0]) == 60
    assert same[0] != order(SAMPLERS[name], images, epoch=1).tolist()
    assert same[0] != order(SAMPLERS[name], images, seed=4).tolist()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_images_are_shuffled_inside_a_window_of_chunks(window):
    shown = order(Chunked(window=window, chunk_size=4, own_chunks=True), Numbers(20))
    assert sorted(shown) == list(range(20))
    assert any((shown[begin : begin + 4] != np.sort(shown[begin : begin + 4])).any() for begin in range(0, 20, 4))
    for begin in range(0, 20, 4 * window):
        together = shown[begin : begin + 4 * window]
        assert len(set(together // 4)) == min(window, (20 - begin) // 4)


def test_chunks_of_their_own_may_differ_in_size():
    ends = [4, 6, 15, 16, 20]
    shown = order(Chunked(window=1, chunk_size=1, own_chunks=True), Numbers(20, chunk_ends=ends))
    runs = [name for name, _ in itertools.groupby(np.searchsorted(ends, shown, side="right"))]
    assert sorted(runs) == [0, 1, 2, 3, 4] and sorted(shown) == list(range(20))


def test_without_chunks_of_their_own_images_are_cut_into_equal_ones():
    for images, own in ((Numbers(10), True), (Numbers(10, chunk_ends=[1, 10]), False)):
        shown = order(Chunked(window=1, chunk_size=4, own_chunks=own), images)
        assert sorted([name for name, _ in itertools.groupby(shown // 4)]) == [0, 1, 2]
        assert sorted(shown) == list(range(10))


def test_a_subset_has_the_chunks_that_are_left_in_it():
    images = Numbers(10, chunk_ends=[3, 5, 10])
    assert Subset(images, np.array([0, 2, 6, 9])).chunk_ends.tolist() == [2, 4]  # the chunk of 3 and 4 is gone
    assert Subset(images, np.array([4])).chunk_ends.tolist() == [1]
    assert Subset(images, np.array([6, 2])).chunk_ends is None


def test_repeated_images_are_in_the_same_step_and_far_apart():
    shown = order(Repeated(repeats=3), Numbers(30), images_per_step=6).reshape(5, 6)
    permutation = order(Shuffle(), Numbers(30))
    for step, row in enumerate(shown):
        assert row.tolist() == permutation[2 * step : 2 * step + 2].tolist() * 3


def test_where_the_repeats_do_not_divide_the_step_some_images_come_once_less():
    shown = order(Repeated(repeats=3), Numbers(16), images_per_step=8)
    for step in shown.reshape(2, 8):
        assert sorted(np.unique(step, return_counts=True)[1]) == [2, 3, 3]
    assert len(set(shown)) == 6
    assert order(Repeated(repeats=1), Numbers(16)).tolist() == order(Shuffle(), Numbers(16)).tolist()


def test_classes_come_equally_often_and_small_ones_in_full_passes():
    labels = [0] * 20 + [1] * 3 + [4] * 7 + [-1] * 2  # two images without a class
    images = Numbers(32, labels=labels)
    shown = order(ClassAware(), images)[:30]
    of_class = np.array(labels)[shown]
    for begin in range(0, 30, 3):
        assert sorted(of_class[begin : begin + 3]) == [0, 1, 4]
    of_the_second = shown[of_class == 1]
    assert sorted(of_the_second[:3]) == sorted(of_the_second[3:6]) == [20, 21, 22]
    assert len(set(shown[of_class == 0])) == 10  # none twice, where there are enough


def test_what_cannot_work_is_told_by_the_options_name():
    with pytest.raises(OptionError, match=r"^sampler: class_aware needs labels"):
        ClassAware().check(Numbers(3))
    with pytest.raises(OptionError, match=r"^sampler\.repeats: 0"):
        Repeated(repeats=0)
    with pytest.raises(OptionError, match=r"^sampler\.window: 0"):
        Chunked(window=0, chunk_size=1, own_chunks=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_processes_accumulation_and_the_first_step_change_nothing(tmp_path, name):
    write_classes(tmp_path, {"a": 14, "b": 5})
    images = FolderImages(str(tmp_path), option="data.root", class_names=None)

    def loader(batch_size=4, rank=0, world_size=1, accumulation=1):
        return TrainLoader(images=images, transform=CornerAndNoise(), batch_size=batch_size, workers=0, seed=5, rank=rank,
                           world_size=world_size, accumulation=accumulation, max_bad_fraction=0.5, sampler=SAMPLERS[name])  # fmt: skip

    whole = list(itertools.islice(loader().from_step(0), 7))
    parts = [loader(batch_size=1, rank=rank, world_size=2, accumulation=2).from_step(2) for rank in range(2)]
    for expected in whole[2:]:
        joined = [next(part) for _ in range(2) for part in parts]
        assert torch.cat([views.indices for views in joined]).equal(expected.indices)
        assert torch.cat([views.crops[2] for views in joined]).equal(expected.crops[2])
    again = loader().redraw(whole[5].epoch, whole[5].positions)
    assert again.crops[2].equal(whole[5].crops[2]) and again.indices.equal(whole[5].indices)


def test_the_copies_of_an_image_are_other_views():
    draws = [generator(5, 1, 0, position).random() for position in range(3)]
    assert len(set(draws)) == 3
