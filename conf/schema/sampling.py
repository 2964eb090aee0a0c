"""Options of the order of the images."""

from dataclasses import dataclass


@dataclass
class Shuffle:
    _target_: str = "esvit.data.sampling.Shuffle"


@dataclass
class Chunked:
    _target_: str = "esvit.data.sampling.Chunked"
    window: int = 16  # chunks among which images are shuffled; what a step reads lies in so many
    chunk_size: int = 1024  # images per chunk, where the images have no chunks of their own
    own_chunks: bool = True  # a chunk is a shard, or a file of a composite set, where there are such


@dataclass
class Repeated:
    _target_: str = "esvit.data.sampling.Repeated"
    repeats: int = 3  # how often an image occurs in the same step, in other views


@dataclass
class ClassAware:
    _target_: str = "esvit.data.sampling.ClassAware"


SCHEMAS = {
    ("sampler", "shuffle"): Shuffle,
    ("sampler", "chunked"): Chunked,
    ("sampler", "repeated"): Repeated,
    ("sampler", "class_aware"): ClassAware,
}
