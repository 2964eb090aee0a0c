"""Which image stands at which position of an epoch: the samplers.

A sampler is a pure function of the seed and the epoch. It gives the order of a whole epoch at once; which process reads what, and from
which step on, is the loader's business. So every sampler can be resumed at any step, and is the same for any number of processes and
workers.

Letters: n images, G images per optimizer step (all processes and micro-batches together).
"""

from abc import ABC, abstractmethod

import numpy as np

from esvit.data.base import ImageSet
from esvit.errors import OptionError

ORDER, VIEWS = 0, 1  # what a generator is for: the first number of its key


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


class Sampler(ABC):
    """The order of the images in an epoch. `name` is what a user chooses it by."""

    name: str

    def check(self, images: ImageSet) -> None:
        """Raises OptionError for images that it cannot order, or that would be fetched from a server over and over in this order."""
        if images.chunks_at_hand is not None and images.chunk_ends is not None and images.chunks_at_hand < len(images.chunk_ends):
            found = f"reads all {len(images.chunk_ends)} shards at a time, but data.cache_gb has room for {images.chunks_at_hand}"
            remedy = f"use sampler=chunk sampler.window={max(1, images.chunks_at_hand // 2)}, or a larger data.cache_gb"
            raise OptionError("sampler", found, remedy)

    @abstractmethod
    def order(self, images: ImageSet, *, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
        """Of each position of `epoch`, the number of the image there: (n,) int64.

        images_per_step  G: step s takes the positions from s * G up to (s + 1) * G
        """


class Shuffle(Sampler):
    """Every image once, in any order."""

    name = "shuffle"

    def order(self, images: ImageSet, *, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
        return generator(seed, ORDER, epoch).permutation(len(images))


SHUFFLE = Shuffle()


class Chunked(Sampler):
    """Every image once, chunk after chunk: the images of `window` chunks are shuffled among each other, then come the next ones.

    A chunk is a run of neighbouring images. All chunks come in an order drawn anew for each epoch, so that `window` chunks meet others
    every time. Reading stays within `window` chunks at a time, which a disk, its cache, or the shards fetched from a server can hold.

    window      chunks among which images are shuffled; all of them make it a plain shuffle
    chunk_size  images per chunk, where the images have no chunks of their own
    own_chunks  use the chunks that the images come in (shards, files of a composite set), where they have any

    Raises OptionError for a value that cannot work.
    """

    name = "chunk"

    def __init__(self, *, window: int, chunk_size: int, own_chunks: bool):
        for option, value in (("window", window), ("chunk_size", chunk_size)):
            if value < 1:
                raise OptionError(f"sampler.{option}", f"{value}", "use at least 1")
        self._window = window
        self._chunk_size = chunk_size
        self._own_chunks = own_chunks

    def check(self, images: ImageSet) -> None:
        if not self._own_chunks:
            return super().check(images)
        room, ends = images.chunks_at_hand, images.chunk_ends
        if room is None or ends is None:
            return None
        needed = min(len(ends), 2 * self._window)  # the next window is read from before the last batch of this one is done
        if room < needed:
            found = f"two windows of {self._window} shards do not fit into data.cache_gb, which has room for {room}"
            smaller = f"sampler.window={room // 2}, or " if room >= 2 else ""
            raise OptionError("sampler.window", found, f"use {smaller}a larger data.cache_gb")
        return None

    def order(self, images: ImageSet, *, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
        rng = generator(seed, ORDER, epoch)
        ends = self._ends(images)
        begins = np.concatenate([[0], ends[:-1]])
        chunks = rng.permutation(len(ends))
        order = np.empty(len(images), dtype=np.int64)
        filled = 0
        for first in range(0, len(chunks), self._window):
            together = np.concatenate([np.arange(begins[chunk], ends[chunk]) for chunk in chunks[first : first + self._window]])
            order[filled : filled + len(together)] = rng.permutation(together)
            filled += len(together)
        return order

    def _ends(self, images: ImageSet) -> np.ndarray:
        """Where each chunk ends, rising; the last one is n."""
        if self._own_chunks and images.chunk_ends is not None:
            return np.asarray(images.chunk_ends, dtype=np.int64)
        return np.append(np.arange(self._chunk_size, len(images), self._chunk_size), len(images))


class Repeated(Sampler):
    """Repeated augmentation (Hoffer et al. 2020; as in DeiT): every image that a step shows occurs in it `repeats` times, in other views.

    An epoch keeps its length, so it shows one in `repeats` of the images, others every time. The copies of an image are as far from each
    other as the step allows: on different processes, where there are several. Where `repeats` does not divide G, one or more images of a
    step occur once less.

    Raises OptionError for a value that cannot work.
    """

    name = "repeated"

    def __init__(self, *, repeats: int):
        if repeats < 1:
            raise OptionError("sampler.repeats", f"{repeats}", "use 1 or more; 3 is the published value")
        self._repeats = repeats

    def order(self, images: ImageSet, *, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
        count = len(images)
        shuffled = generator(seed, ORDER, epoch).permutation(count)
        distinct = -(-images_per_step // self._repeats)  # images of a step
        steps = -(-count // images_per_step)
        places = np.arange(steps)[:, None] * distinct + np.arange(images_per_step) % distinct  # (steps, G)
        return shuffled[places.ravel()[:count] % count]


class ClassAware(Sampler):
    """Every class equally often (Shen et al. 2016): round after round, each class gives one image of its own.

    The classes of a round come in any order; the images of a class are shuffled, and once all of them have been shown they are shuffled
    again. An epoch keeps its length: images of large classes are left out, others in each epoch, those of small ones come several times.
    Images with a label below 0 have no class and are left out.
    """

    name = "class_aware"

    def check(self, images: ImageSet) -> None:
        super().check(images)
        if images.labels is None or not (images.labels >= 0).any():
            raise OptionError("sampler", "class_aware needs labels, and these images have none", "use sampler=shuffle")

    def order(self, images: ImageSet, *, images_per_step: int, seed: int, epoch: int) -> np.ndarray:
        assert images.labels is not None
        rng = generator(seed, ORDER, epoch)
        by_class = np.argsort(images.labels, kind="stable")
        classes, begins, sizes = np.unique(images.labels[by_class], return_index=True, return_counts=True)
        begins, sizes = begins[classes >= 0], sizes[classes >= 0]
        rounds = -(-len(images) // len(sizes))
        turns = rng.permuted(np.tile(np.arange(len(sizes)), (rounds, 1)), axis=1)  # (rounds, classes): the order of each round
        shown = np.empty((rounds, len(sizes)), dtype=np.int64)  # the image that a class gives in each round
        for number, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
            passes = [rng.permutation(size) for _ in range(-(-rounds // size))]
            shown[:, number] = by_class[begin + np.concatenate(passes)[:rounds]]
        return np.take_along_axis(shown, turns, axis=1).ravel()[: len(images)]
