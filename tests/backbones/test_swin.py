import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit.backbones import swin as swin_module
from esvit.backbones.swin import PatchMerging, Swin, SwinBlock, WindowAttention
from esvit.errors import OptionError
from tests.backbones.networks import DEMO, MICRO, blocks_of, swin


@pytest.mark.parametrize(
    ("image", "grid"),
    [((100, 37), (4, 2)), ((4, 4), (1, 1))],
)
def test_images_need_not_be_whole_windows_or_quads(image, grid):
    features = swin().eval()(torch.randn(2, 3, *image))
    assert features.grid == grid
    assert features.pooled.shape == (2, 192)
    assert features.regions.shape == (2, grid[0] * grid[1], 192)


@pytest.mark.parametrize("side", [32, 16])
def test_demo_network_takes_global_and_local_crops(side):
    features = Swin(**DEMO)(torch.randn(2, 3, side, side))
    assert features.grid == (side // 8, side // 8) and features.pooled.shape == (2, 64)


@pytest.mark.parametrize(
    ("window_size", "windows_and_shifts"),
    [
        (7, [(7, 0), (7, 3), (7, 0), (7, 3), (7, 0), (7, 3), (7, 0), (7, 0)]),
        (14, [(14, 0), (14, 7), (14, 0), (14, 7), (14, 0), (14, 0), (7, 0), (7, 0)]),
    ],
)
def test_windows_and_shifts_are_frozen_for_the_nominal_image_size(window_size, windows_and_shifts):
    network = swin(window_size=window_size, depths=[2, 2, 2, 2])
    assert [(block.window, block.shift) for block in blocks_of(network)] == windows_and_shifts


def test_attention_of_every_stage_lies_on_its_own_grid():
    network = swin().eval()
    with torch.no_grad():
        attentions = network.attentions(torch.randn(1, 3, 64, 96))
    assert len(attentions) == 6
    for block, heads, weights in zip(range(6), [2, 2, 4, 8, 8, 16], attentions, strict=True):
        stage = [0, 0, 1, 2, 2, 3][block]
        cells = (64 // 4 // 2**stage) * (96 // 4 // 2**stage)
        assert weights.shape == (1, heads, cells, cells)


def test_attention_stays_inside_the_windows_of_the_image():
    """A 4 x 6 map in windows of 2: unshifted they start at even cells, shifted by one at odd cells and never wrap around."""
    y, x = (place.flatten() for place in torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij"))
    network = swin(depths=[2], heads=[2], window_size=2, image_size=16).eval()
    unshifted, shifted = network.attentions(torch.randn(1, 3, 16, 24))
    for weights, rows, columns in ((unshifted, y // 2, x // 2), (shifted, (y + 1) // 2, (x + 1) // 2)):
        together = (rows[:, None] == rows) & (columns[:, None] == columns)
        assert torch.equal(weights[0, 0] > 1e-30, together)


def test_attention_without_padding_is_what_the_block_computed():
    network, images = swin(window_size=4, depths=[1, 1], heads=[2, 4], image_size=32).eval(), torch.randn(1, 3, 32, 32)
    (windows, *_), (on_grid, *_) = network.window_attentions(images), network.attentions(images)
    rows = windows.places[0]
    assert rows.tolist() == [row * 8 + column for row in range(4) for column in range(4)]
    torch.testing.assert_close(on_grid[0][:, rows][:, :, rows], windows.weights[0, 0])


def test_window_attentions_keep_padding_and_sum_to_one_with_it():
    attentions = swin().eval().window_attentions(torch.randn(2, 3, 96, 96))
    last = attentions[-1]
    assert last.weights.shape == (2, 1, 16, 49, 49)
    assert (last.places >= 0).sum() == 9 and last.places.min() == -1
    torch.testing.assert_close(last.weights.sum(dim=-1), torch.ones(2, 1, 16, 49))


def test_shift_mask_hides_cells_that_only_the_shift_brought_together():
    block = SwinBlock(dim=8, heads=2, window=2, shift=1, mlp_ratio=2.0, drop_path_rate=0.0).eval()
    tokens = torch.randn(1, 16, 8)
    changed = tokens.clone()
    changed[:, 15] += 1.0  # the last cell rolls into the window of the first
    with torch.no_grad():
        moved = (block(tokens, (4, 4)) - block(changed, (4, 4))).abs().amax(dim=(0, 2))
    assert moved[:15].max() == 0.0 and moved[15] > 0.1


def padded_attention(block: SwinBlock, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, d) -> (B, N, d) as the original computes it: pad, roll, cut, project everything, and undo it all."""
    attn, window = block.attn, block.window
    rows, columns = (size + -size % window for size in grid)
    cells = F.pad(tokens.unflatten(1, grid), (0, 0, 0, columns - grid[1], 0, rows - grid[0])).roll((-block.shift,) * 2, dims=(1, 2))
    windows = cells.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    value = attn.qkv(windows).unflatten(-1, (3, attn.heads, -1))[:, :, :, 2].transpose(2, 3)
    mixed = attn.proj((attn.weights(windows, block._mask(grid, tokens.device)) @ value).transpose(2, 3).flatten(3))
    cells = mixed.unflatten(2, (window, window)).unflatten(1, (rows // window, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return cells.roll((block.shift,) * 2, dims=(1, 2))[:, : grid[0], : grid[1]].flatten(1, 2)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("grid", [(3, 3), (5, 5), (5, 2), (3, 12), (10, 10), (9, 6)])
def test_attention_and_its_gradients_are_those_of_the_padded_map_to_the_last_digits(grid, shift):
    torch.manual_seed(0)
    block = SwinBlock(dim=8, heads=2, window=5, shift=shift, mlp_ratio=2.0, drop_path_rate=0.0).double()
    for parameter in block.attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(tokens)
    answers = []
    for attended in (block.attn(tokens, grid, shift, block._mask(grid, tokens.device)), padded_attention(block, tokens, grid)):
        answers.append([attended, *torch.autograd.grad(attended, [tokens, *block.attn.parameters()], cotangent)])
    for ours, padded in zip(*answers, strict=True):
        torch.testing.assert_close(ours, padded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [224, 96])
def test_no_layer_runs_on_padding(side):
    network, rows = swin().eval(), []
    for block in blocks_of(network):
        for layer in (block.attn.qkv, block.attn.proj):
            layer.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    network(torch.randn(1, 3, side, side))
    assert rows == [(side // 4 // 2**stage) ** 2 for stage in (0, 0, 1, 2, 2, 3) for _ in range(2)]


def test_hidden_slots_have_no_weight_at_all_rather_than_a_denormal_one():
    """A processor computes with denormal numbers many times slower."""
    for block in swin().eval().window_attentions(torch.randn(1, 3, 96, 96)):
        assert not ((block.weights > 0) & (block.weights < torch.finfo(torch.float32).tiny)).any()


def test_shift_masks_are_made_once_for_a_map_size():
    network = swin()
    swin_module._shift_mask.cache_clear()
    network(torch.randn(1, 3, 96, 96))
    network(torch.randn(2, 3, 96, 96))
    copy.deepcopy(network)(torch.randn(1, 3, 96, 96))
    made = swin_module._shift_mask.cache_info()
    assert made.misses == 2 and made.hits == 4  # two of the six blocks are shifted, on maps of 28 and 7 cells a side
    network(torch.randn(1, 3, 96, 224))
    assert swin_module._shift_mask.cache_info().misses == 4


def test_shift_mask_made_in_evaluation_serves_training():
    swin_module._shift_mask.cache_clear()
    network, images = swin(), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        network.eval()(images)
    network.train()(images).pooled.sum().backward()


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_the_plain_path_with_its_gradients(masked):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(4 if masked else 1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, 3, 9, 8, dtype=torch.float64)
    answers = []
    for attend in (WindowAttention._plain, WindowAttention._fused):
        attended = attend(query, key, value, bias)
        answers.append([attended, *torch.autograd.grad(attended, (query, key, value, bias), cotangent)])
    for plain, fused in zip(*answers, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)


def test_evaluation_equals_training_without_drop_path():
    """On CPU the two take different paths: fused without a gradient, plain with one."""
    network, images = swin(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        evaluated = network(images)
    torch.testing.assert_close(network(images).regions, evaluated.regions, rtol=1e-4, atol=1e-5)


def merge_as_the_paper_says(cells: Tensor) -> Tensor:
    """(B, R, Q, d) -> (B, R / 2 * Q / 2, 4 d) for even R and Q."""
    parts = [cells[:, 0::2, 0::2], cells[:, 1::2, 0::2], cells[:, 0::2, 1::2], cells[:, 1::2, 1::2]]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def test_merging_joins_four_neighbours_and_pads_odd_maps():
    merging = next(module for module in swin().modules() if isinstance(module, PatchMerging))
    cells = torch.randn(2, 5, 3, 24)
    tokens, grid = merging(cells.flatten(1, 2), (5, 3))
    quads = merge_as_the_paper_says(F.pad(cells, (0, 0, 0, 1, 0, 1)))
    assert grid == (3, 2)
    torch.testing.assert_close(tokens, merging.reduction(merging.norm(quads)))


def test_backward_of_a_window_14_block_gives_the_same_bits_every_time_with_two_threads(two_threads):
    """The first stage's shifted block of Swin-T W14: its bias has 196 * 196 * 3 entries; a lookup's backward races above 32,768."""
    torch.manual_seed(0)
    block = SwinBlock(dim=96, heads=3, window=14, shift=7, mlp_ratio=4.0, drop_path_rate=0.0)
    tokens, cotangent = torch.randn(1, 784, 96), torch.randn(1, 784, 96)
    gradients = [torch.autograd.grad(block(tokens, (28, 28)), list(block.parameters()), cotangent) for _ in range(5)]
    for again in gradients[1:]:
        assert all(torch.equal(first, second) for first, second in zip(gradients[0], again, strict=True))


def test_nothing_in_the_backward_adds_in_a_racy_order():
    """A race shows only now and then; the lookups, scatters and gathers that could race are absent from the graph altogether."""
    seen, waiting = set(), [swin(window_size=14)(torch.randn(1, 3, 64, 64)).pooled.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    names = {node.name() for node in seen}
    assert any("Softmax" in name for name in names)
    assert not [name for name in names if any(racy in name for racy in ("Index", "Gather", "Scatter", "Embedding", "Put", "Take"))]


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_stays_near_full_precision(training):
    network, images = swin(), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = network(images).pooled.float()
    expected = network(images).pooled
    assert (pooled - expected).norm() / expected.norm() < 0.05


def test_stochastic_depth_rises_over_the_whole_network():
    network = swin(drop_path_rate=0.5)
    assert [block.drop_path.rate for block in blocks_of(network)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    network.disable_drop_path()
    assert all(block.drop_path.rate == 0 for block in blocks_of(network))


def test_layer_norms_use_the_eps_of_the_original():
    norms = [module for module in swin().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 17 and all(norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"heads": [2, 4]}, "backbone.heads"),
        ({"heads": [5, 4, 8, 16]}, "backbone.heads"),
        ({"depths": [], "heads": []}, "backbone.depths"),
        ({"depths": [2, 0, 2, 1]}, "backbone.depths"),
        ({"window_size": 0}, "backbone.window_size"),
        ({"drop_path_rate": 1.0}, "backbone.drop_path_rate"),
        ({"image_size": 28}, "backbone.image_size"),
        ({"patch_size": 0}, "backbone.image_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, option):
    with pytest.raises(OptionError) as error:
        Swin(**(MICRO | changes))
    assert error.value.option == option
