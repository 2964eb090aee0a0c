"""The loader's promise: order and content depend on the seed and the step alone; and what happens to bad images."""

import itertools
import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit.augmentations.erasing import RandomErasing
from esvit.augmentations.evaluation import EvaluationCrop
from esvit.augmentations.multicrop import MultiCrop
from esvit.augmentations.randaugment import RandAugment
from esvit.data.bad_images import BadImages
from esvit.data.folder import FolderImages
from esvit.data.loading import TrainLoader, evaluation_batches
from esvit.errors import OptionError
from esvit.records import Views
from tests.data.pictures import CornerAndNoise, write_classes

ROOT = Path(__file__).parents[2]
COUNT = 21  # images: two steps of 8 and five left over


@pytest.fixture
def files(tmp_path):
    return write_classes(tmp_path / "images", {"a": 10, "b": COUNT - 10})


@pytest.fixture
def images(files, tmp_path):
    return FolderImages(str(tmp_path / "images"), option="data.root", class_names=None)


def loader(images, *, batch_size=8, workers=0, seed=5, rank=0, world_size=1, accumulation=1, transform=None, max_bad_fraction=0.5):
    return TrainLoader(images=images, transform=transform or CornerAndNoise(), batch_size=batch_size, workers=workers, seed=seed, rank=rank,
                       world_size=world_size, accumulation=accumulation, max_bad_fraction=max_bad_fraction)  # fmt: skip


def take(train_loader, count, start=0) -> list[Views]:
    return list(itertools.islice(train_loader.from_step(start), count))


def joined(batches) -> Views:
    """Micro-batches or ranks as one batch."""
    return Views(
        crops=[torch.cat(crops) for crops in zip(*(batch.crops for batch in batches), strict=True)],
        global_count=batches[0].global_count,
        indices=torch.cat([batch.indices for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        epoch=batches[0].epoch,
        bad_images=[name for batch in batches for name in batch.bad_images],
    )


def assert_equal(ours: Views, theirs: Views):
    assert (ours.epoch, ours.global_count, ours.bad_images) == (theirs.epoch, theirs.global_count, theirs.bad_images)
    assert ours.positions.equal(theirs.positions)
    assert ours.indices.equal(theirs.indices)
    assert len(ours.crops) == len(theirs.crops)
    for crop, other in zip(ours.crops, theirs.crops, strict=True):
        assert crop.equal(other)


def test_an_epoch_shows_each_image_at_most_once_in_an_order_of_its_own(images):
    batches = take(loader(images), 4)
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    assert batches[1].positions.tolist() == list(range(8, 16))
    epochs = [torch.cat([batch.indices for batch in batches[first : first + 2]]).tolist() for first in (0, 2)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_views_are_uint8_of_the_image_that_the_indices_name(images):
    (batch,) = take(loader(images), 1)
    assert [tuple(crop.shape) for crop in batch.crops] == [(8, 3, 4, 4), (8, 3, 4, 4), (8, 3, 2, 2)]
    assert all(crop.dtype == torch.uint8 for crop in batch.crops)
    assert len(batch.global_crops) == 2
    for row, index in enumerate(batch.indices.tolist()):
        corner = np.array(images.read(index))[:4, :4].transpose(2, 0, 1)
        assert (batch.crops[0][row].numpy() == corner).all()


def test_another_epoch_and_another_seed_draw_other_views(images):
    one, _, two = take(loader(images), 3)
    other = take(loader(images, seed=6), 1)[0]
    assert not one.crops[2].equal(two.crops[2])
    assert not one.crops[2].equal(other.crops[2])
    assert not one.indices.equal(other.indices)


def test_random_numbers_belong_to_the_position_whatever_image_is_there(images, tmp_path):
    fewer = FolderImages(str(tmp_path / "images" / "a"), option="data.root", class_names=None)
    (ours,), (theirs,) = take(loader(images), 1), take(loader(fewer), 1)
    assert not ours.indices.equal(theirs.indices)
    assert ours.crops[2].equal(theirs.crops[2])


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(images, workers):
    for ours, theirs in zip(take(loader(images, workers=workers), 5), take(loader(images), 5), strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_ranks_and_accumulation_join_to_the_batches_of_one_process(images, world_size, accumulation):
    whole = loader(images)
    parts = [
        loader(images, batch_size=8 // world_size // accumulation, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    assert all(part.steps_per_epoch == whole.steps_per_epoch == 2 for part in parts)
    streams = [part.from_step(0) for part in parts]
    for expected in take(whole, 5):
        assert_equal(joined([next(stream) for _ in range(accumulation) for stream in streams]), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2, 5])
def test_starting_at_a_step_equals_skipping_the_steps_before(images, start, workers):
    train_loader = loader(images, batch_size=2, accumulation=4, workers=workers)
    expected = take(train_loader, 6 + 4 * start)[4 * start :]
    for ours, theirs in zip(take(train_loader, 6, start), expected, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("engine", ["reference", "fast", "device"])
def test_redraw_gives_the_very_same_views_of_real_crops(images, engine):
    crops = MultiCrop(
        global_crops_size=16, global_crops_scale=[0.4, 1.0], local_crops_number=2, local_crops_size=8, local_crops_scale=[0.05, 0.4],
        jitter_probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, gamma=0.5, grayscale_probability=0.2,
        global_blur_probabilities=[1.0, 0.1], global_solarize_probabilities=[0.0, 0.2], local_blur_probability=0.5, blur_radius=[0.1, 2.0],
        flip_probability=0.5, engine=engine, randaugment=RandAugment(layers=0, magnitude=9.0, magnitude_std=0.5, probability=0.5),
        erasing=RandomErasing(probability=0.0, scale=[0.02, 0.33], ratio=0.3, fill="pixel", count=1),
    )  # fmt: skip
    train_loader = loader(images, transform=crops, workers=1)
    for batch in take(train_loader, 3, start=1):
        assert_equal(train_loader.redraw(batch.epoch, batch.positions), batch)
    last = train_loader.redraw(batch.epoch, [3])
    assert last.crops[0][0].equal(train_loader.redraw(batch.epoch, [1, 3]).crops[0][1])


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_random_state_is_touched(images, workers):
    before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    train_loader = loader(images, workers=workers)
    take(train_loader, 3)
    train_loader.redraw(0, [1])
    list(evaluation_batches(images=images, transform=EvaluationCrop(resize=8, crop=8), batch_size=4, workers=workers, rank=0, world_size=1))
    assert random.getstate() == before[0]
    assert pickle.dumps(np.random.get_state()) == before[1]
    assert torch.get_rng_state().equal(before[2])


def damage(files):
    """Four bad files of different kinds, two of them side by side; their names as the set knows them."""
    files[3].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:200])
    files[12].write_bytes(b"not an image at all")
    corrupt = bytearray(files[20].read_bytes())
    corrupt[100:400] = bytes(300)
    files[20].write_bytes(corrupt)
    return ["a/003.png", "a/004.png", "b/002.png", "b/010.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_its_next_readable_neighbour_and_named(files, images, workers):
    good = take(loader(images, batch_size=COUNT), 1)[0]
    bad_names = damage(files)
    batch = take(loader(images, batch_size=COUNT, workers=workers), 1)[0]
    replacement = {3: 5, 4: 5, 12: 13, 20: 0}
    for row, index in enumerate(good.indices.tolist()):
        index_read = replacement.get(index, index)
        assert batch.indices[row] == index_read
        source = good.indices.tolist().index(index_read)
        assert batch.crops[0][row].equal(good.crops[0][source])
        assert batch.crops[2][row].equal(good.crops[2][row])  # the random numbers are the position's
    assert sorted(set(batch.bad_images)) == bad_names


def test_bad_images_are_counted_once_and_kept_over_a_resume(tmp_path, files, images):
    bad_names = damage(files)
    options: dict[str, Any] = {"folder": tmp_path, "image_count": len(images), "max_bad_fraction": 0.5}
    record = BadImages(**options, writes=True)
    for batch in take(loader(images, batch_size=COUNT), 3):
        record.add(batch.bad_images)
    assert record.count == 4
    assert sorted((tmp_path / "bad_images.txt").read_text().splitlines()) == bad_names
    again = BadImages(**options, writes=True)
    again.add([bad_names[0]])
    assert again.count == 4
    again.add(["new\nline.png"])
    BadImages(**options, writes=False).add(["seen by another rank.png"])
    assert (tmp_path / "bad_images.txt").read_text().splitlines()[4:] == ["new line.png"]


def test_too_many_bad_images_stop_the_run(tmp_path):
    record = BadImages(folder=tmp_path, image_count=100, max_bad_fraction=0.02, writes=True)
    record.add(["a", "b", "a"])
    with pytest.raises(OptionError, match=r"^data\.max_bad_fraction: 3 of 100 images cannot be read, more than the share of 0\.02[^\n]*$"):
        record.add(["b", "c"])
    assert (tmp_path / "bad_images.txt").read_text() == "a\nb\nc\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_any_readable_image_stops_with_one_line(files, images, workers):
    for file in files:
        file.unlink()
    with pytest.raises(OptionError, match=r"^data\.max_bad_fraction: 21 images in a row cannot be read, [^\n]*FileNotFoundError[^\n]*$"):
        take(loader(images, workers=workers), 1)


def test_a_stop_signal_to_the_whole_process_group_leaves_the_loading_processes_alive(images):
    others = multiprocessing.active_children()
    stream = loader(images, batch_size=2, workers=1).from_step(0)
    first = next(stream)
    (worker,) = [process for process in multiprocessing.active_children() if process not in others]
    for name in ("TERM", "USR1", "INT"):
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {worker.pid}"], check=True)  # from a process that is not the worker's parent
    rest = [next(stream) for _ in range(30)]
    for ours, theirs in zip([first, *rest], take(loader(images, batch_size=2), 31), strict=True):
        assert_equal(ours, theirs)
    stream.close()
    worker.join(timeout=20)
    assert worker.exitcode == 0


def load_and_end(root: str, killed: bool) -> None:
    """What a rank does: it ends while its loading processes are busy."""
    stream = loader(FolderImages(root, option="data.root", class_names=None), batch_size=2, workers=2).from_step(0)
    next(stream)
    STREAMS.append(stream)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)


STREAMS: list = []  # still open at the end of the process


@pytest.mark.parametrize("killed", [False, True])
def test_no_loading_process_outlives_or_holds_up_the_training_process(files, tmp_path, killed):
    reading, writing = os.pipe()  # inherited by every process below; read to its end once the last of them is gone
    call = f"from tests.data.test_loading import load_and_end; load_and_end({str(tmp_path / 'images')!r}, {killed})"
    process = subprocess.Popen([sys.executable, "-c", call], pass_fds=[writing], cwd=ROOT)  # a fork of the tests would inherit their locks
    os.close(writing)
    readable, _, _ = select.select([reading], [], [], 120)
    assert readable and os.read(reading, 1) == b""
    os.close(reading)
    assert process.wait() == (-signal.SIGKILL if killed else 0)


class KillsItsProcess(CornerAndNoise):
    def __call__(self, image, rng):
        os._exit(3)


class HasABug(CornerAndNoise):
    def __call__(self, image, rng):
        raise KeyError("the bug's own words")


def test_a_dead_worker_is_one_line_with_a_remedy(images):
    with pytest.raises(OptionError, match=r"^data\.workers: a loading process died \(DataLoader worker [^\n]*; give the job more[^\n]*$"):
        take(loader(images, workers=1, transform=KillsItsProcess()), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_transform_keeps_its_type_and_words(images, workers):
    with pytest.raises(KeyError, match="the bug's own words"):
        take(loader(images, workers=workers, transform=HasABug()), 1)


def test_too_few_images_for_a_step_name_the_batch_size(images):
    with pytest.raises(OptionError, match=r"^data\.batch_size: one step takes 24 images [^\n]*; use at most data\.batch_size=10$"):
        loader(images, batch_size=12, world_size=2)
    with pytest.raises(OptionError, match=r"^data\.batch_size: [^\n]*fewer processes"):
        loader(images, batch_size=1, world_size=30)
    with pytest.raises(OptionError, match=r"^seed: -1"):
        loader(images, seed=-1)


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 4)])
def test_evaluation_covers_every_image_once_in_order(images, workers, world_size):
    crop = EvaluationCrop(resize=8, crop=8)
    batches = [
        batch
        for rank in range(world_size)
        for batch in evaluation_batches(images=images, transform=crop, batch_size=4, workers=workers, rank=rank, world_size=world_size)
    ]
    assert torch.cat([indices for _, indices in batches]).tolist() == list(range(COUNT))
    assert torch.cat([crops for crops, _ in batches]).equal(torch.stack([crop(images.read(index)) for index in range(COUNT)]))


def test_evaluation_leaves_bad_images_out_and_names_them(files, images, caplog):
    bad_names = damage(files)
    told: list[str] = []
    crop = EvaluationCrop(resize=8, crop=8)
    options: dict[str, Any] = {"images": images, "transform": crop, "batch_size": 1, "workers": 0, "rank": 0, "world_size": 1}
    batches = list(evaluation_batches(**options, on_bad_images=told.extend))
    assert told == bad_names
    assert [int(indices) for _, indices in batches] == [index for index in range(COUNT) if index not in (3, 4, 12, 20)]
    list(evaluation_batches(**options))
    assert "a/003.png" in caplog.text
