"""Activations that are computed again in the backward pass instead of being kept from the forward pass (Chen et al. 2016).

Unusual: the part keeps its class, its name and its parameters' names; only its `forward` is another one. Random draws repeat, and buffers,
such as the statistics of a batch norm, move once, in the forward pass.
"""

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(part: nn.Module) -> None:
    """From now on, `part` keeps nothing but its inputs for the backward pass."""
    part.forward = MethodType(_forward, part)  # a bound method: a copy of the part gets one that is bound to the copy


def _forward(part: nn.Module, *inputs: Any) -> Any:
    forward = type(part).forward
    if not torch.is_grad_enabled():
        return forward(part, *inputs)
    if torch.compiler.is_compiling():  # a graph moves buffers once by itself
        return checkpoint(forward, part, *inputs, use_reentrant=False, preserve_rng_state=True)
    return checkpoint(
        forward,
        part,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=lambda: (contextlib.nullcontext(), _unmoved_buffers(part)),
    )


@contextlib.contextmanager
def _unmoved_buffers(part: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in part.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
