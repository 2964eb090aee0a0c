"""From an image set to batches of views whose order and content depend on the seed and the step alone.

Each epoch has one order of the images, which a sampler draws from (seed, epoch). A step takes the next G positions of it, where
G = batch_size * world_size * accumulation: micro-batch after micro-batch, rank after rank. The views at a position are drawn from
(seed, epoch, position). So any number of loading processes gives the same views, any split of G over ranks and accumulation the same
joined batches, and a run can start at any step or draw a past batch again.

Randomness comes from generators made for the purpose; the state of Python's, numpy's and torch's global ones is neither read nor changed.

Letters: B images, C channels, h and w the sides of a crop in pixels.
"""

import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from esvit.data.base import BadImage, Decoder, ImageSet
from esvit.data.prefetching import Prefetcher
from esvit.data.sampling import SHUFFLE, VIEWS, Sampler, generator
from esvit.errors import OptionError
from esvit.records import Views

log = logging.getLogger(__name__)

_ALWAYS_TRIED = 100  # neighbours of a bad image that are tried however small the tolerated share is

_SECONDS_AFTER_SIGTERM = 30  # that a loading process goes on, for the step in progress

Key = tuple[int, int, int]  # epoch, position in the epoch's order, index of the image there


class ViewTransform(Protocol):
    """What makes views.

    global_count  how many of the first ones are global
    decode        what an image set is to make of an image's file, see `ImageSet.read`; None: an RGB image of Pillow
    """

    global_count: int

    @property
    def decode(self) -> Decoder | None: ...

    # uint8 (C, h, w) each, or uint16; then, of a transform that leaves changes to the device, a vector for each
    def __call__(self, image: Any, rng: np.random.Generator) -> list[Tensor]: ...


class TrainLoader:
    """Endless batches of views of `images`.

    batch_size        images per process in one forward pass (a micro-batch)
    workers           loading processes; 0 loads in this process
    seed              0 or more; with the epoch and the position it decides everything
    accumulation      micro-batches per optimizer step
    max_bad_fraction  share of the images that may be unreadable in a row before loading gives up
    sampler           which image stands at which position of an epoch
    option            the config group that errors name

    Raises OptionError if the images do not fill one step, or cannot be ordered by the sampler.
    """

    def __init__(
        self,
        *,
        images: ImageSet,
        transform: ViewTransform,
        batch_size: int,
        workers: int,
        seed: int,
        rank: int,
        world_size: int,
        accumulation: int,
        max_bad_fraction: float,
        sampler: Sampler = SHUFFLE,
        option: str = "data",
    ):
        if seed < 0:
            raise OptionError("seed", f"{seed}", "use 0 or more")
        self.images_per_step = batch_size * world_size * accumulation
        self.steps_per_epoch = len(images) // self.images_per_step
        if self.steps_per_epoch == 0:
            product = f"{batch_size} per process x {world_size} processes x {accumulation} micro-batches"
            largest = len(images) // (world_size * accumulation)
            raise OptionError(
                f"{option}.batch_size",
                f"one step takes {self.images_per_step} images ({product}) but there are {len(images)}",
                f"use at most {option}.batch_size={largest}" if largest else "use more images, fewer processes or less accumulation",
            )
        sampler.check(images)
        self._sampler = sampler
        self._draws = _Draws(images, transform, seed, max_bad_fraction, option)
        self._batch_size = batch_size
        self._workers = workers
        self._rank = rank
        self._world_size = world_size
        self._accumulation = accumulation
        self._option = option

    def from_step(self, start: int) -> Iterator[Views]:
        """Micro-batches of this rank without end, `accumulation` of them per step, from the first one of optimizer step `start`.

        Raises OptionError if a loading process dies or too many images in a row are unreadable.
        """
        keys = self._keys(start)
        if self._draws.images.chunks_at_hand is not None:
            keys = self._prefetched(keys)
        return _results(self._draws, keys, self._workers, self._option)

    def redraw(self, epoch: int, positions: Iterable[int] | Tensor) -> Views:
        """The very views that `from_step` gave, or would give, at `positions` of `epoch`, drawn in this process."""
        order = self._order(epoch)
        return self._draws.views([(epoch, int(position), int(order[int(position)])) for position in positions])

    def redraw_step(self, step: int) -> list[Views]:
        """This rank's micro-batches of optimizer step `step`, drawn again in this process."""
        return [self._draws.views(keys) for keys in itertools.islice(self._keys(step), self._accumulation)]

    def _prefetched(self, keys: Iterator[list[Key]]) -> Iterator[list[Key]]:
        """The same keys; the shards of those to come are on their way meanwhile."""
        prefetcher = Prefetcher(self._draws.images)
        current = None
        try:
            for micro_batch in keys:
                epoch, position, _ = micro_batch[0]
                if epoch != current:
                    current = epoch
                    prefetcher.begin(self._order(epoch))
                prefetcher.reach(position)
                yield micro_batch
        finally:
            prefetcher.close()

    def _order(self, epoch: int) -> np.ndarray:
        """The image at each position of `epoch`: (n,) int64."""
        draws = self._draws
        return self._sampler.order(draws.images, images_per_step=self.images_per_step, seed=draws.seed, epoch=epoch)

    def _keys(self, start: int) -> Iterator[list[Key]]:
        """The keys of this rank's micro-batches, from the first one of step `start`."""
        epoch, first_step = divmod(start, self.steps_per_epoch)
        while True:
            order = self._order(epoch)
            for micro_batch in range(first_step * self._accumulation, self.steps_per_epoch * self._accumulation):
                begin = (micro_batch * self._world_size + self._rank) * self._batch_size
                yield [(epoch, position, int(order[position])) for position in range(begin, begin + self._batch_size)]
            epoch, first_step = epoch + 1, 0


def evaluation_batches(
    *,
    images: ImageSet,
    transform: Callable[[Image.Image], Tensor],
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    on_bad_images: Callable[[list[str]], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's contiguous share of `images`, once and in order: uint8 crops (B, C, h, w) and their indices (B,) int64.

    Unreadable images are left out, since a neighbour in their place would count twice: go by the indices. Their names go to
    `on_bad_images` (for example `BadImages.add`), or to the log. Raises OptionError if a loading process dies.
    """
    draws = _EvaluationDraws(images, transform)
    batches = sharded_batches(draws, count=len(images), batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)
    for crops, indices, bad_images in batches:
        if bad_images and on_bad_images is not None:
            on_bad_images(bad_images)
        elif bad_images:
            log.warning("left out %d unreadable images: %s", len(bad_images), ", ".join(bad_images))
        if len(indices):
            yield crops, indices


def sharded_batches(draws: Dataset, *, count: int, batch_size: int, workers: int, rank: int, world_size: int) -> Iterator[Any]:
    """What `draws.__getitems__` makes of this rank's contiguous share of the numbers below `count`: once and in order, batch by batch.

    It may return an OptionError, which is raised here. Raises OptionError too if a loading process dies.
    """
    first, end = count * rank // world_size, count * (rank + 1) // world_size
    shares = (list(range(begin, min(begin + batch_size, end))) for begin in range(first, end, batch_size))
    return _results(draws, shares, workers, "data")


class _Draws(Dataset):
    """The work of a loading process: keys in, Views out. An OptionError comes out as a value, since torch re-raises by text only."""

    def __init__(self, images: ImageSet, transform: ViewTransform, seed: int, max_bad_fraction: float, option: str):
        self.images = images
        self.transform = transform
        self.seed = seed
        self._tried = max(_ALWAYS_TRIED, int(max_bad_fraction * len(images)) + 1)
        self._option = option

    def __getitems__(self, keys: list[Key]) -> Views | OptionError:
        try:
            return self.views(keys)
        except OptionError as error:
            return error

    def views(self, keys: list[Key]) -> Views:
        samples, indices, bad_images = [], [], []
        for epoch, position, index in keys:
            image, index_read, bad = self._readable(index)
            samples.append(self.transform(image, generator(self.seed, VIEWS, epoch, position)))
            indices.append(index_read)
            bad_images += bad
        batches = [torch.stack(each) for each in zip(*samples, strict=True)]
        return Views(
            crops=[batch for batch in batches if batch.ndim == 4],
            changes=[batch for batch in batches if batch.ndim == 2],
            global_count=self.transform.global_count,
            indices=torch.tensor(indices),
            positions=torch.tensor([position for _, position, _ in keys]),
            epoch=keys[0][0],
            bad_images=bad_images,
        )

    def _readable(self, index: int) -> tuple[Any, int, list[str]]:
        """The first readable image from `index` on (after the last comes the first), its index, and the names of the bad ones before."""
        bad: list[str] = []
        reason = ""
        for candidate in range(index, index + min(self._tried, len(self.images))):
            try:
                return self.images.read(candidate % len(self.images), self.transform.decode), candidate % len(self.images), bad
            except BadImage as error:
                bad.append(self.images.name(candidate % len(self.images)))
                reason = str(error)
        found = f"{len(bad)} images in a row cannot be read, '{bad[0]}' to '{bad[-1]}' ({reason})"
        raise OptionError(f"{self._option}.max_bad_fraction", found, f"check that {self._option}.root is still there and intact")


class _EvaluationDraws(Dataset):
    """Indices in; crops (B, C, h, w), indices (B,) and the names of the unreadable images out."""

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]):
        self._images = images
        self._transform = transform

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]]:
        crops, kept, bad_images = [], [], []
        for index in indices:
            try:
                crops.append(self._transform(self._images.read(index)))
                kept.append(index)
            except BadImage:
                bad_images.append(self._images.name(index))
        return torch.stack(crops) if crops else torch.empty(0), torch.tensor(kept, dtype=torch.int64), bad_images


def _results(draws: Dataset, keys: Iterable[Any], workers: int, option: str) -> Iterator[Any]:
    """What `draws` makes of each list of keys, in order, by one DataLoader: its processes live as long as this iterator."""
    loader = DataLoader(
        draws,
        batch_sampler=keys,
        num_workers=workers,  # torch gives each of them one thread
        collate_fn=_unchanged,
        worker_init_fn=_shield_from_signals,
        pin_memory=torch.cuda.is_initialized(),  # CUDA is in use, not merely there
        generator=torch.Generator(),  # or DataLoader would draw from torch's global generator
    )
    with _sigterm_blocked():
        results = iter(loader)
    while True:
        try:
            result = next(results)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise OptionError(
                f"{option}.workers",
                f"a loading process died ({str(error).splitlines()[0]})",
                f"give the job more memory or shared memory, or use fewer workers; {option}.workers=0 shows an error's cause",
            ) from error
        if isinstance(result, OptionError):
            raise result
        yield result


def _unchanged(result: Any) -> Any:
    return result


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Processes started inside keep SIGTERM blocked, in every thread that torch makes in them; this thread goes back to what it was."""
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shield_from_signals(worker: int) -> None:
    """Stop signals are the training process's business: sent to the whole job, they would kill its loaders under it.

    Only the training process's own SIGTERM still ends a loader: that is how Python ends such processes when it exits.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere a signal does not tell its sender
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
