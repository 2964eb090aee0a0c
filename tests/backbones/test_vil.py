from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.backbones import chunk_attention
from esvit.backbones.chunk_attention import attend, softmax_weights
from esvit.backbones.layers import DropPath
from esvit.backbones.sliding_chunks import ALL, NEIGHBOURS, OWN, Places, SlidingChunks
from esvit.backbones.vil import FullAttention, SlidingChunkAttention, Vil, VilAttentionBlock, VilPatchEmbed, _resample
from esvit.errors import OptionError
from esvit.losses.view import ViewLoss
from esvit.networks import HeadOptions
from esvit.optimizers import SGD
from esvit.runtime import Runtime
from esvit.tasks.distillation import Distillation
from tests.backbones.networks import MICRO_VIL, micro_vil

TWO_STAGES = {
    "patch_sizes": [4, 2],
    "dims": [16, 24],
    "depths": [2, 2],
    "heads": [2, 4],
    "window_sizes": [3, 3],
    "sliding": [True, False],
    "global_tokens": [2, 1],
    "absolute_positions": [False, False],
    "image_size": 32,
}


SLIDING: dict[str, Any] = {
    "dim": 8,
    "heads": 2,
    "global_tokens": 2,
    "window": 2,
    "relative_positions": True,
    "neighbours": "all",
    "reach": "chunks",
}


def sliding_attention(**changes) -> SlidingChunkAttention:
    torch.manual_seed(0)
    attention = SlidingChunkAttention(**(SLIDING | changes))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def sliding_attentions(network: torch.nn.Module) -> list[SlidingChunkAttention]:
    return [module for module in network.modules() if isinstance(module, SlidingChunkAttention)]


def as_one_matrix(attention: SlidingChunkAttention, tokens: Tensor, grid: tuple[int, int], places: Places) -> Tensor:
    """The plain way: softmax weights (B, heads, g + N, g + N), every cell compared with every cell and most of them hidden."""
    window, first = attention.window, attention.global_tokens
    y, x = (each.flatten() for each in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij"))
    rows, columns = ((each // window)[None] - (each // window)[:, None] + 1 for each in (y, x))  # the key's place around the query's chunk
    seen = torch.zeros(len(y), len(y), dtype=torch.bool)
    for row, column in places:
        seen |= (rows == row) & (columns == column)
    if attention.reach == "window":
        seen &= ((y[:, None] - y[None]).abs() <= window) & ((x[:, None] - x[None]).abs() <= window)
    offsets = ((each[:, None] - each[None] + 2 * window - 1).clamp(0, 4 * window - 2) for each in (y, x))
    row_offset, column_offset = offsets
    local = attention.local_relative_position_bias_table[row_offset * (4 * window - 1) + column_offset].permute(2, 0, 1)
    bias = tokens.new_zeros(attention.heads, first + len(y), first + len(y))
    bias[:, first:, first:] = local.masked_fill(~seen, float("-inf"))
    bias[:, :first, :first] = attention.g2g_relative_position_bias
    bias[:, :first, first:] = attention.g2l_relative_position_bias[0][:, :, None]
    bias[:, first:, :first] = attention.g2l_relative_position_bias[1][:, None, :]
    query = attention.query(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    key = attention.kv(tokens).chunk(2, dim=-1)[0].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    return (query @ key.mT * query.shape[-1] ** -0.5 + bias).softmax(dim=-1)


# ---------------------------------------------------------------------- sliding chunks


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3), (2, 2)])
@pytest.mark.parametrize("places", [ALL, OWN, (*OWN, NEIGHBOURS[2])])
def test_sliding_chunks_are_one_attention_with_far_cells_hidden(grid, places):
    attention = sliding_attention()
    tokens = torch.randn(2, 2 + grid[0] * grid[1], 8)
    weights = as_one_matrix(attention, tokens, grid, places)
    value = attention.kv(tokens).chunk(2, dim=-1)[1].unflatten(-1, (2, -1)).transpose(1, 2)
    expected = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention.attend(tokens, grid, places), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (1, 3)])
def test_window_hides_what_is_farther_than_a_chunks_side(grid):
    attention = sliding_attention(reach="window").eval()
    tokens = torch.randn(2, 2 + grid[0] * grid[1], 8)
    torch.testing.assert_close(attention.weights(tokens, grid), as_one_matrix(attention, tokens, grid, ALL), rtol=1e-4, atol=1e-6)


def test_wrapped_chunks_meet_over_the_edges():
    attention = sliding_attention(reach="wrapped").eval()
    weights = attention.weights(torch.randn(1, 2 + 64, 8), (8, 8))
    seen = weights[0, 0, 2, 2:].view(8, 8) > 0  # what the first cell looks at
    edge = torch.tensor([True, True, True, True, False, False, True, True])
    assert torch.equal(seen, edge[:, None] & edge[None])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, 66))


def test_wrapped_attention_may_meet_a_cell_twice():
    attention = sliding_attention(reach="wrapped").eval()
    weights = attention.weights(torch.randn(1, 2 + 4, 8), (2, 2))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 2, 6))


@pytest.mark.parametrize("global_tokens", [0, 1, 3])
def test_weights_are_those_of_the_plain_matrix(global_tokens):
    attention = sliding_attention(global_tokens=global_tokens).eval()
    if global_tokens == 0:
        attention.g2l_relative_position_bias = torch.nn.Parameter(torch.empty(2, 2, 0))  # for the plain way only
        attention.g2g_relative_position_bias = torch.nn.Parameter(torch.empty(2, 0, 0))
    tokens = torch.randn(2, global_tokens + 35, 8)
    torch.testing.assert_close(attention.weights(tokens, (5, 7)), as_one_matrix(attention, tokens, (5, 7), ALL), rtol=1e-4, atol=1e-6)


def cut(grid: tuple[int, int], window: int, places: Places = ALL, *, wraps: bool = False, global_tokens: int = 0) -> SlidingChunks:
    return SlidingChunks(grid, window, places, wraps, global_tokens)


@pytest.mark.parametrize("grid", [(5, 7), (3, 4), (9, 2)])
def test_queries_of_all_blocks_are_every_cell_once(grid):
    tokens, chunks = torch.randn(2, 1 + grid[0] * grid[1], 3, 4), cut(grid, 2, global_tokens=1)
    again = torch.full_like(tokens, torch.nan)
    for block in chunks.blocks():
        chunks.put(chunks.queries(tokens, block), again, block)
    assert torch.equal(again[:, 1:], tokens[:, 1:]) and again[:, 0].isnan().all()


def test_keys_are_the_chunks_at_the_places():
    numbers = torch.arange(1, 37).view(1, 36, 1, 1)
    chunks = cut((6, 6), 3, ((0, 1), (1, 1)))
    top, bottom = (chunks.keys(numbers, block)[:, 0, :, 0].tolist() for block in chunks.blocks())
    assert top == [[1, 2, 3, 7, 8, 9, 13, 14, 15], [4, 5, 6, 10, 11, 12, 16, 17, 18]]  # nothing above
    assert bottom[0] == [*top[0], 19, 20, 21, 25, 26, 27, 31, 32, 33]
    wrapped = cut((6, 6), 3, ((0, 0),), wraps=True)
    (block,) = wrapped.blocks()
    assert wrapped.keys(wrapped.framed(numbers), block)[0, 0, :, 0].tolist() == [22, 23, 24, 28, 29, 30, 34, 35, 36]


def test_wrapped_chunks_see_padding_beyond_the_edge_only():
    numbers = torch.arange(1, 6).view(1, 5, 1, 1)
    chunks = cut((1, 5), 2, ((1, 0), (1, 1)), wraps=True)
    seen = [keys for block in chunks.blocks() for keys in chunks.keys(chunks.framed(numbers), block)[:, 0, :, 0].tolist()]
    assert seen == [[5, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize(("size", "counts"), [(3, [(1, 3, 3)]), (12, [(1, 12, 12)]), (21, [(1, 7, 14), (1, 7, 21), (1, 7, 14)])])
def test_chunks_that_see_the_same_are_one(size, counts):
    spans = [block.columns for block in cut((1, size), 7).blocks()]
    assert [(span.count, span.queries, sum(number for _, number in span.keys[0])) for span in spans] == counts


def test_scores_are_computed_for_no_cell_beyond_the_map():
    chunks = cut((24, 24), 7)
    seen = sum(block.rows.count * block.columns.count * chunks.bias(torch.randn(27**2, 1), block).numel() for block in chunks.blocks())
    assert seen == (7 * 14 + 7 * 21 + 7 * 17 + 3 * 10) ** 2


@pytest.mark.parametrize("places", [ALL, (*OWN, NEIGHBOURS[5])])
@pytest.mark.parametrize("wraps", [False, True])
def test_adding_to_keys_is_the_gradient_of_gathering_them(places, wraps):
    chunks = cut((8, 7), 3, places, wraps=wraps, global_tokens=2)
    tokens = torch.randn(2, 3, 2 + 56, 2, 4, dtype=torch.float64)
    framed = chunks.framed(tokens).clone().requires_grad_()
    ours = torch.zeros_like(framed)
    gathered, cotangents = [], []
    for block in chunks.blocks():
        gathered.append(chunks.keys(framed, block))
        cotangents.append(torch.randn_like(gathered[-1]))
        chunks.add_to_keys(cotangents[-1], ours, block)
    expected = torch.autograd.grad(gathered, framed, cotangents)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("places", [ALL, (*OWN, NEIGHBOURS[5])])
def test_bias_and_its_gradient_equal_a_lookup(places):
    chunks = cut((9, 9), 3, places)
    block = next(
        block for block in chunks.blocks() if block.rows.start <= 3 < block.rows.start + 3 * block.rows.count and block.columns.start == 3
    )
    table = torch.randn(11**2, 2, dtype=torch.float64, requires_grad=True)
    numbers = torch.arange(81).view(1, 81, 1, 1)
    queries, keys = chunks.queries(numbers, block)[0, 0], chunks.keys(numbers, block)[0, 0].mT
    rows, columns = queries // 9 - keys // 9 + 5, queries % 9 - keys % 9 + 5
    lookup, ours = table[rows * 11 + columns].permute(2, 0, 1), chunks.bias(table, block)
    assert torch.equal(ours, lookup)
    cotangent = torch.randn_like(lookup)
    expected, gradient = (torch.autograd.grad(each, table, cotangent)[0] for each in (lookup, ours))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias_shape", [(1, 3, 9, 11), (1, 1, 1, 11), None])
def test_fused_attention_equals_the_plain_path(bias_shape):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (9, 11, 11))
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
    plain = softmax_weights(query, key, bias) @ value
    torch.testing.assert_close(attend(query, key, value, bias), plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relative_positions", [False, True])
@pytest.mark.parametrize("reach", ["chunks", "window", "wrapped"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_plain_operations(relative_positions, reach, fused, monkeypatch):
    """`fused` is the way of a GPU, whose kernel's own backward pass is asked; here it runs on the CPU."""
    if fused:
        monkeypatch.setattr(chunk_attention, "_backward", chunk_attention._backward_of_fused)
    attention = sliding_attention(relative_positions=relative_positions, reach=reach).double()
    tokens = torch.randn(2, 2 + 35, 8, dtype=torch.float64, requires_grad=True)
    inputs = [tokens, *attention.parameters()]
    gradients = []
    for compiling in (False, True):  # a graph is given the plain operations
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        leaving = attention.attend(tokens, (5, 7), ALL)
        gradients.append([leaving, *torch.autograd.grad(leaving.square().sum(), inputs, allow_unused=True)])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_no_copy_of_a_key_is_kept_for_the_backward_pass():
    attention, tokens = sliding_attention(global_tokens=0), torch.randn(1, 144, 8)
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        attention.attend(tokens, (12, 12), ALL)
    assert sum(size == 4 * 144 * 16 for size in kept.values()) == 1  # keys and values, once
    assert max(kept.values()) == 4 * 144 * 16


# ---------------------------------------------------------------------- neighbours


def chunks_seen(attention: SlidingChunkAttention) -> set[tuple[int, int]]:
    """Of a map of 3 x 3 chunks, those that the middle chunk's cells give weight to."""
    with torch.no_grad():
        weights = attention.weights(torch.randn(1, 2 + 36, 8), (6, 6))
    y, x = torch.nonzero(weights[0, 0, 2 + 14, 2:].view(6, 6)).t() // 2
    return set(zip(y.tolist(), x.tolist(), strict=True))


def test_a_random_neighbour_joins_the_own_chunk_in_training_and_all_do_in_evaluation():
    attention = sliding_attention(neighbours="random").train()
    drawn = [chunks_seen(attention) for _ in range(100)]
    assert all(len(seen) == 2 and (1, 1) in seen for seen in drawn)
    assert {place for seen in drawn for place in seen} == set(ALL)
    assert chunks_seen(attention.eval()) == set(ALL)


@pytest.mark.parametrize("training", [True, False])
def test_own_means_own(training):
    assert chunks_seen(sliding_attention(neighbours="own").train(training)) == {(1, 1)}


def test_the_neighbour_is_drawn_by_torchs_generator_and_anew_for_each_call():
    network, images = micro_vil(neighbours="random").train(), torch.randn(1, 3, 224, 224)
    answers = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        answers.append([network(images).pooled.detach() for _ in range(2)])
    (first, second), again, other = answers
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second) and not torch.equal(first, other[0])


def test_all_neighbours_follow_at_their_share_of_training():
    network = micro_vil(neighbours="random", all_neighbours_from=0.75)
    for share, neighbours in ((0.0, "random"), (0.74, "random"), (0.75, "all"), (0.99, "all"), (0.2, "random")):
        network.set_progress(share)
        assert [attention.neighbours for attention in sliding_attentions(network)] == [neighbours] * 2


@pytest.mark.parametrize(("neighbours", "switch"), [("random", 1.0), ("own", 0.5)])
def test_neighbours_stay_where_no_switch_is_asked_for(neighbours, switch):
    network = micro_vil(neighbours=neighbours, all_neighbours_from=switch)
    network.set_progress(0.999)
    assert {attention.neighbours for attention in sliding_attentions(network)} == {neighbours}


def test_student_and_teacher_hear_of_the_progress():
    head = HeadOptions(hidden_dim=8, bottleneck_dim=4, layers=1, batch_norm=False, prototypes=8, norm_last_layer=True)
    network = head.attach(micro_vil(neighbours="random", all_neighbours_from=0.5), regions=False)
    sgd = SGD(learning_rate=0.1, momentum=0.9, clip="none", clip_norm=1.0)
    distillation = Distillation(
        network=network,
        loss=ViewLoss(student_temperature=0.1, center_momentum=0.9, kernel="auto"),
        optimizer=sgd.build(network, precision="fp32", device=torch.device("cpu")),
        runtime=Runtime(device="cpu", precision="fp32", seed=0, deterministic=None, threads=1, timeout_minutes=1.0, stall_minutes=0),
        global_count=2,
        accumulation=1,
        parts=2,
        mixing=None,
    )
    for share, neighbours in ((0.49, "random"), (0.5, "all")):
        distillation.set_progress(share)
        for each in (distillation.network, distillation.teacher.network):
            assert {attention.neighbours for attention in sliding_attentions(each)} == {neighbours}


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("image", "grid"), [((96, 96), (3, 3)), ((128, 128), (4, 4)), ((256, 256), (8, 8)), ((64, 160), (2, 5)), ((100, 37), (3, 1))]
)
@pytest.mark.parametrize("absolute", [False, True])
def test_any_image_size_gives_features_on_its_own_grid(image, grid, absolute):
    features = micro_vil(absolute_positions=[absolute] * 4).eval()(torch.randn(2, 3, *image))
    assert features.grid == grid
    assert features.pooled.shape == (2, 48)
    assert features.regions.shape == (2, grid[0] * grid[1], 48)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_may_have_other_than_three_channels(channels):
    assert micro_vil(in_channels=channels)(torch.randn(1, channels, 32, 32)).pooled.shape == (1, 48)


@pytest.mark.parametrize(
    ("old_size", "size", "scale"), [(196, 36, 36 / 196), (196, 100, 100 / 196), (14, 14, (197 / 196) ** 0.5), (7, 9, 9 / 7)]
)
def test_resampling_is_torchs_bicubic_interpolation(old_size, size, scale):
    picture = torch.randn(2, 3, old_size, old_size, dtype=torch.float64)
    expected = F.interpolate(picture, scale_factor=scale, mode="bicubic")
    ours = _resample(_resample(picture, size, scale=scale).mT, size, scale=scale).mT
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_bias_of_the_nominal_map_is_the_table_itself():
    attention = FullAttention(dim=8, heads=2, global_tokens=1, nominal_size=3)
    bias = attention._bias(9)
    assert bias is not None and bias.shape == (1, 2, 10, 10)
    centre = attention.local_relative_position_bias_table[12]
    assert torch.equal(bias[0, :, 1:, 1:].diagonal(dim1=1, dim2=2), centre[:, None].expand(2, 9))
    assert torch.equal(bias[0, :, 0, 1:], attention.g2l_relative_position_bias[0].expand(2, 9))
    assert torch.equal(bias[0, :, 1:, 0], attention.g2l_relative_position_bias[1].expand(2, 9))


def test_positions_without_global_tokens_stay_as_they_are_on_the_nominal_map():
    embed = VilPatchEmbed(in_channels=3, patch_size=2, dim=4, global_tokens=0, nominal_size=5)
    positions = embed._positions((5, 5), 25).view(5, 5, 4)
    torch.testing.assert_close(positions[:, 2, :2], embed.x_pos_embed[0])
    torch.testing.assert_close(positions[3, :, 2:], embed.y_pos_embed[0])


# ---------------------------------------------------------------------- the interface


def test_the_first_global_token_stands_for_the_image_where_a_stage_has_any():
    network, images = micro_vil().eval(), torch.randn(2, 3, 96, 96)
    stages, blocks = network.encode(images), network.last_blocks(images, 4)
    assert [stage.tokens[0].shape[1] for stage in stages] == [577, 145, 37, 9]
    assert [stage.grid for stage in stages] == [(24, 24), (12, 12), (6, 6), (3, 3)]
    for stage, block in zip(stages[:3], blocks[:3], strict=True):
        assert torch.equal(block, stage.tokens[-1][:, 0])
    torch.testing.assert_close(blocks[3], network.norm(stages[3].tokens[-1]).mean(dim=1))
    assert torch.equal(network(images).pooled, blocks[3])


def test_regions_leave_all_global_tokens_out():
    network, images = micro_vil(global_tokens=[1, 1, 1, 2]).eval(), torch.randn(2, 3, 64, 96)
    (stage,) = network.encode(images, last_only=True)
    features = network(images)
    assert stage.tokens[0].shape == (2, 2 + 6, 48)
    assert torch.equal(features.regions, network.norm(stage.tokens[0])[:, 2:])
    assert torch.equal(features.pooled, network.norm(stage.tokens[0])[:, 0])


@pytest.mark.parametrize(("height", "width"), [(96, 96), (64, 128)])
def test_attention_rows_sum_to_one_on_the_image_grid(height, width):
    network = micro_vil().eval()
    with torch.no_grad():
        attentions = network.attentions(torch.randn(1, 3, height, width))
        windows = network.window_attentions(torch.randn(1, 3, height, width))
    for stage, (heads, weights) in enumerate(zip([2, 2, 4, 4], attentions, strict=True)):
        cells = (height // 4 // 2**stage) * (width // 4 // 2**stage)
        assert weights.shape == (1, heads, cells, cells)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, heads, cells))
        tokens = cells + (stage < 3)
        assert windows[stage].places.tolist() == [[-1] * (stage < 3) + list(range(cells))]
        torch.testing.assert_close(windows[stage].weights.sum(dim=-1), torch.ones(1, 1, heads, tokens))


def test_attention_is_what_the_block_computed():
    network, images = micro_vil(**TWO_STAGES).eval(), torch.randn(1, 3, 32, 40)
    for blocks, stage in zip(network.attention_blocks(), network.encode(images), strict=True):
        for block, tokens in zip(blocks, stage.tokens[:-1], strict=True):
            assert isinstance(block, VilAttentionBlock)
            weights = block.attention(tokens, stage.grid).weights[:, 0]
            normed = block.norm(tokens)
            attention = block.attn
            assert isinstance(attention, FullAttention | SlidingChunkAttention)
            projected = attention.qkv(normed) if isinstance(attention, FullAttention) else attention.kv(normed)
            value = projected[..., -tokens.shape[2] :].unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            mixed = attention.proj((weights @ value).transpose(1, 2).flatten(2))
            torch.testing.assert_close(block(tokens, stage.grid), tokens + mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_gradients_reach_every_parameter(absolute):
    """All but the biases of the last block's global queries, whose answer leaves with the stage's global tokens."""
    network = micro_vil(absolute_positions=[absolute] * 4)
    sum(network(torch.randn(2, 3, side, side)).regions.square().sum() for side in (64, 224)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("g2g_relative_position_bias") or parameter.numel() == 0 or parameter.grad.abs().sum() > 0, name


def test_gradients_reach_the_biases_between_global_tokens_before_the_last_block():
    network = micro_vil(**TWO_STAGES)
    network(torch.randn(2, 3, 32, 32)).pooled.square().sum().backward()
    reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    expected = {f"layer{place}.attn.g2g_relative_position_bias" for place in ("1.1", "2.1", "2.3")}
    assert {name for name in reached if "g2g" in name} == expected  # not 1.3: its global tokens are dropped


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("neighbours", ["all", "random"])
def test_nothing_in_the_backward_adds_in_a_racy_order(absolute, neighbours):
    """The lookups, scatters and resizings that could race are absent from the graph altogether."""
    network = micro_vil(neighbours=neighbours, absolute_positions=[absolute] * 4)
    seen, waiting = set(), [network(torch.randn(1, 3, 96, 64)).pooled.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    names = {node.name() for node in seen}
    assert any("LayerNorm" in name for name in names)
    racy = ("Index", "Gather", "Scatter", "Embedding", "Put", "Take", "Upsample")
    assert not [name for name in names if any(word in name for word in racy)]


def test_evaluation_equals_training():
    """On CPU the two take different paths: fused without a gradient, plain with one."""
    network, images = micro_vil(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        evaluated = network.eval()(images)
    torch.testing.assert_close(network.train()(images).regions, evaluated.regions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absolute", [False, True])
def test_network_compiles_as_one_graph(absolute):
    network, images = micro_vil(**(TWO_STAGES | {"absolute_positions": [absolute] * 2})), torch.randn(2, 3, 48, 40)
    pooled = torch.compile(network, fullgraph=True, backend="eager")(images).pooled
    torch.testing.assert_close(pooled, network(images).pooled)
    pooled.sum().backward()
    assert network.get_submodule("layer1.0.proj").weight.grad is not None


def test_random_neighbours_train_when_compiled():
    network, images = micro_vil(**TWO_STAGES, neighbours="random").train(), torch.randn(2, 3, 48, 40)
    compiled = torch.compile(network, backend="eager")
    torch.manual_seed(1)
    expected = network(images).pooled
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(images).pooled, expected)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_stays_near_full_precision(training):
    network, images = micro_vil(), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = network(images).pooled.float()
    expected = network(images).pooled
    assert (pooled - expected).norm() / expected.norm() < 0.05


def test_state_survives_a_round_trip():
    network, images = micro_vil(), torch.randn(1, 3, 64, 64)
    torch.manual_seed(1)
    other = Vil(**MICRO_VIL)
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(images).pooled, other(images).pooled)


def test_stochastic_depth_rises_over_the_whole_network_and_is_the_same_for_both_branches_of_a_block():
    network = micro_vil(depths=[2, 1, 2, 1], drop_path_rate=0.5)
    drops = [module for module in network.modules() if isinstance(module, DropPath)]
    assert [drop.rate for drop in drops] == pytest.approx([rate for rate in (0, 0.1, 0.2, 0.3, 0.4, 0.5) for _ in range(2)])
    network.disable_drop_path()
    assert all(drop.rate == 0 for drop in drops)


def test_layer_norms_use_the_eps_of_the_original():
    norms = [module for module in micro_vil().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 13 and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"dims": []}, "backbone.dims"),
        ({"heads": [2, 4]}, "backbone.heads"),
        ({"heads": [5, 2, 4, 4]}, "backbone.heads"),
        ({"depths": [2, 0, 2, 1]}, "backbone.depths"),
        ({"sliding": [True]}, "backbone.sliding"),
        ({"window_sizes": [7, 0, 7, 7]}, "backbone.window_sizes"),
        ({"global_tokens": [1, -1, 1, 0]}, "backbone.global_tokens"),
        ({"dims": [15, 24, 32, 48], "heads": [1, 1, 1, 1], "absolute_positions": [True] * 4}, "backbone.dims"),
        ({"image_size": 28}, "backbone.image_size"),
        ({"neighbours": "none"}, "backbone.neighbours"),
        ({"reach": "far"}, "backbone.reach"),
        ({"reach": "window", "neighbours": "random"}, "backbone.reach"),
        ({"all_neighbours_from": 75}, "backbone.all_neighbours_from"),
        ({"drop_path_rate": 1.0}, "backbone.drop_path_rate"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(changes, option):
    with pytest.raises(OptionError) as error:
        Vil(**(MICRO_VIL | changes))
    assert error.value.option == option
