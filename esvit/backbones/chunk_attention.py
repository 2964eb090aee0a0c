"""Attention of blocks of sliding chunks, which keeps no copies of keys and values and no weights for its backward pass.

Letters: B images, N cells of a map, g global tokens, M chunks of a block, T queries and K keys of a chunk, m width of a head.

Unusual: eager attention is an autograd function of its own. Between forward and backward pass it keeps every query, key and value once;
the backward pass gathers the keys of one block after the other again. A graph of torch.compile is given the plain operations instead,
and decides by itself what to keep.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit.backbones.sliding_chunks import Block, SlidingChunks


def softmax_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """(B, heads, T, m), (B, heads, K, m), bias that broadcasts to (B, heads, T, K) -> weights (B, heads, T, K)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Query (B, heads, T, m), key and value (B, heads, K, m), bias that broadcasts to (B, heads, T, K) -> like the query."""
    # As in Swin: on CPU torch has no fused kernel for a bias that needs a gradient, and its fallback is slower than the plain path.
    if bias is not None and query.device.type == "cpu" and torch.is_grad_enabled() and bias.requires_grad:
        return softmax_weights(query, key, bias).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(query.dtype))


def attend_in_chunks(
    *, first: Tensor, query: Tensor, keys_and_values: Tensor, biases: list[Tensor | None], chunks: SlidingChunks, blocks: list[Block]
) -> Tensor:
    """What global tokens got (B, g, heads, m), queries (B, g + N, heads, m) -> (B, g + N, heads, m).

    keys_and_values  (2, B, tokens, heads, m), as `chunks.framed` gives them
    biases           for each block what is added to its scores, (1, 1 or heads, T, K), or None
    """
    if torch.compiler.is_compiling():
        return _forward(first, query, keys_and_values, biases, chunks, blocks)
    return _ChunkAttention.apply(first, query, keys_and_values, chunks, blocks, *biases)


def _forward(
    first: Tensor, query: Tensor, keys_and_values: Tensor, biases: list[Tensor | None], chunks: SlidingChunks, blocks: list[Block]
) -> Tensor:
    attended = torch.empty_like(query, memory_format=torch.contiguous_format)
    attended[:, : chunks.global_tokens] = first
    for block, bias in zip(blocks, biases, strict=True):
        key, value = chunks.keys(keys_and_values, block).unbind(0)
        chunks.put(attend(chunks.queries(query, block), key, value, bias), attended, block)
    return attended


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, query: Tensor, keys_and_values: Tensor, chunks: SlidingChunks, blocks: list[Block], *biases: Tensor | None
    ) -> Tensor:
        attended = _forward(first, query, keys_and_values, list(biases), chunks, blocks)
        ctx.save_for_backward(query, keys_and_values, attended, *biases)
        ctx.chunks, ctx.blocks = chunks, blocks
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys_and_values, attended, *biases = ctx.saved_tensors
        chunks = ctx.chunks
        of_query, of_keys_and_values = torch.zeros_like(query), torch.zeros_like(keys_and_values)
        of_biases: list[Tensor | None] = []
        backward = _backward if query.device.type == "cpu" else _backward_of_fused
        for block, bias in zip(ctx.blocks, biases, strict=True):
            # On CPU a row of chunks at a time: scores stay in the cache. A GPU wants the whole block.
            parts = block.rows_of_chunks(chunks.window) if query.device.type == "cpu" else [block]
            of_bias: list[Tensor] = []
            for part in parts:
                keys = chunks.keys(keys_and_values, part)
                rows = [chunks.queries(each, part) for each in (query, attended, gradient)]
                found = backward(rows[0], keys, bias, rows[1], rows[2])
                chunks.put(found[0], of_query, part)
                chunks.add_to_keys(found[1], of_keys_and_values, part)
                of_bias += found[2:]
            of_biases.append(sum(of_bias[1:], start=of_bias[0]) if of_bias else None)
        return gradient[:, : chunks.global_tokens], of_query, of_keys_and_values, None, None, *of_biases


def _backward(query: Tensor, keys_and_values: Tensor, bias: Tensor | None, attended: Tensor, gradient: Tensor) -> list[Tensor]:
    """Gradients of query, keys and values together, and the bias if it needs one: `attend` by the formulas.

    With weights P = softmax(S) and outputs O = P V, dS = P * (dO V^T - rowsum(dO * O)) (Dao et al. 2022, "FlashAttention", appendix B).
    """
    key, value = keys_and_values.unbind(0)
    scaled = query * query.shape[-1] ** -0.5
    scores = scaled @ key.mT
    if bias is not None:
        scores = scores.add_(bias) if bias.dtype == scores.dtype else scores + bias
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    of_scores = (gradient @ value.mT).to(weights.dtype)
    of_scores.sub_((gradient * attended).sum(dim=-1, keepdim=True, dtype=weights.dtype)).mul_(weights)
    of_bias = [of_scores.sum(dim=0, keepdim=True).to(bias.dtype)] if bias is not None and bias.requires_grad else []
    weights, of_scores = weights.to(query.dtype), of_scores.to(query.dtype)
    of_keys = torch.stack([of_scores.mT @ scaled, weights.mT @ gradient])
    return [(of_scores @ key).mul_(query.shape[-1] ** -0.5), of_keys, *of_bias]


def _backward_of_fused(query: Tensor, keys_and_values: Tensor, bias: Tensor | None, attended: Tensor, gradient: Tensor) -> list[Tensor]:
    """The same by the fused kernel's own backward pass, after its forward pass once more."""
    with torch.enable_grad():
        inputs = [each.detach().requires_grad_() for each in (query, keys_and_values)]
        if bias is not None and bias.requires_grad:
            bias = bias.detach().requires_grad_()
            inputs.append(bias)
        again = attend(inputs[0], inputs[1][0], inputs[1][1], bias)
    return list(torch.autograd.grad(again, inputs, gradient))
