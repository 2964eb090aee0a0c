"""How a pre-training step would scale over ranks: bytes that go over the links, and what of their time the backward pass hides.

A model: its assumptions are in `Link`, `LINKS` and `seconds_of_step`. The bytes are counted (tests/tasks/test_sharding.py), the seconds
were never measured. Every rank has the batch that one has, so perfect is n times the images per second.

Letters: n ranks, E embedding width, K prototypes.
"""

import math
from dataclasses import dataclass

from esvit.losses.chunked import DEVICE_CHUNK_BYTES

BUCKET_BYTES = 25 * 2**20  # of gradients that DistributedDataParallel sends together
_USABLE = 0.8  # of a link's stated rate


@dataclass(frozen=True)
class Link:
    """What the ring of all ranks goes through where it is slowest: between machines, once there are several.

    gigabytes   a second, in one direction, as stated
    latency     seconds from one rank to the next
    most_ranks  that it can join, or None
    """

    name: str
    gigabytes: float
    latency: float
    most_ranks: int | None = None

    def all_reduce(self, size: int, ranks: int) -> float:
        """Seconds for `size` bytes on a ring: every rank sends and gets each of n shares 2 (n - 1) times."""
        hops = 2 * (ranks - 1)
        return hops / ranks * size / (_USABLE * self.gigabytes * 1e9) + hops * self.latency

    def all_gather(self, size: int, ranks: int, *, messages: int = 1) -> float:
        """Seconds until `size` bytes of each rank, in so many messages, are on all of them; or, summed on the way, where they belong."""
        hops = ranks - 1
        return hops * size / (_USABLE * self.gigabytes * 1e9) + messages * hops * self.latency


LINKS = (
    Link("NVLink 4, one machine", 450.0, 2e-6, most_ranks=8),
    Link("InfiniBand NDR, 8 each", 8 * 50.0, 5e-6),  # adapters of a machine: the library makes a ring through each of them
    Link("InfiniBand NDR, 1 each", 50.0, 5e-6),
    Link("InfiniBand HDR, 1 each", 25.0, 5e-6),
    Link("100 Gb Ethernet", 12.5, 30e-6),
    Link("25 Gb Ethernet", 3.125, 30e-6),
)
RANKS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of each collective of one step, the same on every rank and, but for the rows, for any number of micro-batches.

    gradients   of backbone and heads, sent bucket by bucket during the last pass of backward
    prototypes  their gradients, which come after it
    centres     E numbers of each head; one all-reduce each
    flag        whether the loss was finite
    rows        with prototypes in shares: what each rank has for every other one, see `rows_of_step`
    logsumexps  with prototypes in shares: one for each of these rows; a rank has those of all ranks' rows for every other one
    messages    in which rows and logsumexps go
    norms       with prototypes in shares: of their gradients
    logits      with prototypes in shares: of the mean teacher embedding, gathered from all ranks
    """

    gradients: int
    prototypes: int
    centres: tuple[int, ...]
    flag: int = 4
    rows: int = 0
    logsumexps: int = 0
    messages: int = 0
    norms: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All-reduced."""
        return self.gradients + self.prototypes + sum(self.centres) + self.flag + self.norms


@dataclass(frozen=True, kw_only=True)
class HeadRows:
    """Embeddings of one head and micro-batch on a rank: of the student in all its passes together, and of the teacher."""

    students: int
    teachers: int


def rows_of_step(rows: HeadRows, *, width: int, product_bytes: int) -> int:
    """Bytes of one head that a rank has for every other one in a micro-batch, with prototypes in shares; but for logsumexps.

    width          E
    product_bytes  of a number in the matrix products: 2 under bf16, else 4

    Of a teacher row its embedding and pull go out and its mean prototype comes back; of a student row its embedding and mass, and its
    gradient.
    """
    teacher = 2 * width * product_bytes + 4 * width
    student = width * product_bytes + 4 + 4 * width
    return rows.teachers * teacher + rows.students * student


def messages_of_step(rows: HeadRows, *, passes: int, prototypes: int) -> int:
    """In which `rows_of_step` go: four for the teacher, three for each pass of the student, and the logsumexps of each chunk."""
    chunks = math.ceil(4 * rows.students * prototypes / DEVICE_CHUNK_BYTES / passes)
    return 4 + passes * (3 + chunks)


def seconds_of_step(*, compute: float, last_backward: float, traffic: Traffic, link: Link, ranks: int) -> float:
    """Of n ranks, each with the batch of one.

    compute        seconds of a step on one rank
    last_backward  of these, the last pass of backward, behind which gradients hide but for the last bucket
    """
    if ranks == 1:
        return compute
    sent = link.all_reduce(traffic.gradients, ranks)
    last_bucket = link.all_reduce(min(traffic.gradients, BUCKET_BYTES), ranks)
    small = sum(link.all_reduce(size, ranks) for size in (*traffic.centres, traffic.flag))
    shared = 0.0
    if traffic.rows:
        rows = traffic.rows + ranks * traffic.logsumexps
        shared = link.all_gather(rows, ranks, messages=traffic.messages) + link.all_reduce(traffic.norms, ranks)
        shared += link.all_gather(traffic.logits // ranks, ranks, messages=len(traffic.centres))
    return compute + max(sent - last_backward, last_bucket) + link.all_reduce(traffic.prototypes, ranks) + small + shared


def efficiency_lines(*, compute: float, last_backward: float, traffic: Traffic, basis: str) -> list[str]:
    """Images per second of n ranks over n times those of one, for every link. basis: how `compute` is known."""
    lines = [
        f"communication  {traffic.total / 1e6:.1f} MB all-reduced per step: gradients {traffic.gradients / 1e6:.1f}, of the prototypes "
        f"{traffic.prototypes / 1e6:.1f}, mean embeddings {sum(traffic.centres)} bytes, flag {traffic.flag} bytes",
        *_of_rows(traffic),
        f"               {compute * 1e3:.0f} ms per step on one GPU ({basis}), "
        f"{last_backward * 1e3:.0f} ms of them the last pass of backward",
        "",
        f"{'efficiency':<24}" + "".join(f"{ranks:>8}" for ranks in RANKS[1:]) + "  GPUs, modelled (docs/scaling.md)",
    ]
    for link in LINKS:
        cells = []
        for ranks in RANKS[1:]:
            if link.most_ranks is not None and ranks > link.most_ranks:
                cells.append("-")
                continue
            seconds = seconds_of_step(compute=compute, last_backward=last_backward, traffic=traffic, link=link, ranks=ranks)
            cells.append(f"{compute / seconds:.1%}")
        lines.append(f"{link.name:<24}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def _of_rows(traffic: Traffic) -> list[str]:
    if not traffic.rows:
        return []
    return [
        f"               {traffic.rows / 1e6:.1f} MB of rows from each GPU to each other one, in {traffic.messages} messages: "
        "prototypes are in shares (task.shard_prototypes)"
    ]
