import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit.backbones.base import AttentionWindows
from esvit.backbones.cvt import ConvProjection, Cvt, Pointwise, QuickGelu, WindowAttention, Windows, _middle
from esvit.backbones.layers import DropPath, relative_position_bias
from esvit.errors import OptionError
from tests.backbones.networks import MICRO_CVT, micro_cvt
from tests.backbones.test_layers import lookup

SHIFTS = ["none", "mask_only", "rolled"]


def first_attention(network: Cvt) -> WindowAttention:
    return next(module for module in network.modules() if isinstance(module, WindowAttention))


@pytest.mark.parametrize(
    ("image", "grid"),
    [((96, 96), (3, 3)), ((224, 224), (7, 7)), ((64, 160), (2, 5)), ((100, 37), (4, 2)), ((4, 4), (1, 1))],
)
def test_any_image_size_gives_features_on_its_own_grid(image, grid):
    features = micro_cvt().eval()(torch.randn(2, 3, *image))
    assert features.grid == grid
    assert features.pooled.shape == (2, 48)
    assert features.regions.shape == (2, grid[0] * grid[1], 48)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("relative_position", [False, True])
@pytest.mark.parametrize("image", [(96, 96), (40, 64)])
def test_relative_positions_and_shifts_work_where_windows_shrink(image, relative_position, shift):
    """The original crashes at 96 pixels with either."""
    network = micro_cvt(depths=[2, 1, 2, 2], relative_position=relative_position, shift=shift)
    network(torch.randn(2, 3, *image)).pooled.sum().backward()
    with torch.no_grad():
        attentions = network.eval().attentions(torch.randn(1, 3, *image))
    for weights in attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("stem", [False, True])
@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_may_have_other_than_three_channels(channels, stem):
    assert micro_cvt(in_channels=channels, residual_stem=stem)(torch.randn(2, channels, 32, 32)).pooled.shape == (2, 48)


def test_residual_stem_gives_maps_of_the_same_size():
    images = torch.randn(2, 3, 100, 36)
    plain, stem = (micro_cvt(residual_stem=residual).encode(images)[0] for residual in (False, True))
    assert plain.grid == stem.grid == (25, 9)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (64, 96)])
def test_attention_rows_sum_to_one_on_the_image_grid(height, width):
    network = micro_cvt().eval()
    with torch.no_grad():
        attentions = network.attentions(torch.randn(1, 3, height, width))
    assert len(attentions) == 4
    for stage, heads, weights in zip(range(4), [1, 2, 2, 4], attentions, strict=True):
        cells = (height // 4 // 2**stage) * (width // 4 // 2**stage)
        assert weights.shape == (1, heads, cells, cells)
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, heads, cells))


def test_last_blocks_have_the_widths_of_their_stages_and_are_normed_in_the_last_stage_only():
    network, images = micro_cvt(depths=[1, 1, 1, 2]).eval(), torch.randn(2, 3, 64, 64)
    stages = network.encode(images)
    expected = [
        stages[2].tokens[1].mean(dim=1),
        network.norm(stages[3].tokens[1]).mean(dim=1),
        network.norm(stages[3].tokens[2]).mean(dim=1),
    ]
    assert network.block_dims == [16, 24, 32, 48, 48]
    for ours, theirs in zip(network.last_blocks(images, 3), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_forward_keeps_the_last_tokens_only():
    (stage,) = micro_cvt().encode(torch.randn(1, 3, 64, 64), last_only=True)
    assert len(stage.tokens) == 1 and stage.tokens[0].shape == (1, 4, 48) and stage.grid == (2, 2)


def cells_of(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every cell, row by row."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return y.flatten(), x.flatten()


def seen(shift: str, index: int) -> Tensor:
    """(24, 24) bool: which cells of a 4 x 6 map see which, in windows of 2 and block `index`."""
    network = micro_cvt(dims=[16], depths=[2], heads=[2], window_sizes=[2], shift=shift).eval()
    return network.attentions(torch.randn(1, 3, 16, 24))[index][0, 0] > 1e-30


@pytest.mark.parametrize(("shift", "index"), [("none", 0), ("none", 1), ("rolled", 0)])
def test_attention_stays_inside_the_windows(shift, index):
    y, x = cells_of(4, 6)
    together = (y[:, None] // 2 == y // 2) & (x[:, None] // 2 == x // 2)
    assert torch.equal(seen(shift, index), together)


def test_rolled_windows_start_half_a_window_earlier_in_every_second_block_and_never_wrap_around():
    y, x = cells_of(4, 6)
    together = ((y[:, None] + 1) // 2 == (y + 1) // 2) & ((x[:, None] + 1) // 2 == (x + 1) // 2)
    assert torch.equal(seen("rolled", 1), together)


@pytest.mark.parametrize("index", [0, 1])
def test_mask_only_splits_the_last_windows_in_every_block_and_moves_none(index):
    y, x = cells_of(4, 6)
    rows, columns = y // 2 + (y == 3), x // 2 + (x == 5)
    together = (rows[:, None] == rows) & (columns[:, None] == columns)
    assert torch.equal(seen("mask_only", index), together)


@pytest.mark.parametrize(("grid", "roll"), [((2, 2), (0, 0)), ((2, 6), (0, 1)), ((5, 2), (1, 0)), ((4, 4), (1, 1)), ((1, 4), (0, 0))])
def test_rolled_windows_move_along_a_side_only_where_it_has_more_than_one(grid, roll):
    attention = WindowAttention(dim=8, heads=2, window=2, relative_position=False, shift="rolled")
    windows = attention._windows(torch.zeros(1, *grid, 8))
    assert windows.roll == roll


def test_windows_are_no_larger_than_the_map():
    attention = WindowAttention(dim=8, heads=2, window=7, relative_position=False, shift="none")
    sides = {grid: attention._windows(torch.zeros(1, *grid, 8)).side for grid in [(24, 24), (6, 6), (3, 3), (24, 5)]}
    assert sides == {(24, 24): 7, (6, 6): 6, (3, 3): 3, (24, 5): 5}


@pytest.mark.parametrize("roll", [(0, 0), (2, 0), (1, 2)])
def test_joining_windows_undoes_cutting_them(roll):
    windows, cells = Windows((5, 8), 3, roll, None), torch.randn(2, 5, 8, 4)
    cut = windows.cut(windows.pad(cells))
    assert cut.shape == (2, 6, 9, 4)
    assert torch.equal(windows.join(cut), cells)
    places = windows.places(cells.device)
    assert sorted(places[places >= 0].tolist()) == list(range(40)) and (places == -1).sum() == 14
    assert torch.equal(cut[:, places >= 0], cells.flatten(1, 2)[:, places[places >= 0]])


@pytest.mark.parametrize("side", [1, 3, 6, 7])
def test_a_smaller_window_has_the_biases_of_equal_offsets(side):
    table = torch.randn(13**2, 3)
    whole = lookup(table, 7).view(3, 7, 7, 7, 7)[:, :side, :side, :side, :side].reshape(3, side**2, side**2)
    assert torch.equal(relative_position_bias(_middle(table, 7, side), side), whole)


def attention_by_hand(attention: WindowAttention, cells: Tensor) -> Tensor:
    """(1, R, Q, d) of one whole window, in the words of the paper's code: channels first, one head after another."""
    dim, (rows, columns) = cells.shape[-1], cells.shape[1:3]
    projection = attention.qkv
    maps = F.batch_norm(
        F.conv2d(cells.permute(0, 3, 1, 2), projection.dw.weight, padding=1, groups=dim),
        projection.bn.running_mean,
        projection.bn.running_var,
        projection.bn.weight,
        projection.bn.bias,
    )
    query, key, value = F.conv2d(maps, projection.pw.weight, projection.pw.bias).flatten(2)[0].view(3, attention.heads, -1, rows * columns)
    heads = [v @ (k.t() @ q * dim**-0.5).softmax(dim=0) for q, k, v in zip(query, key, value, strict=True)]
    together = torch.cat(heads).view(1, dim, rows, columns)
    return F.conv2d(together, attention.proj_out.weight, attention.proj_out.bias).permute(0, 2, 3, 1)


def test_attention_of_one_window_is_the_softmax_scaled_by_the_whole_width():
    attention = first_attention(micro_cvt(dims=[16], depths=[1], heads=[2], window_sizes=[4]).eval())
    cells = torch.randn(1, 4, 4, 16)
    torch.testing.assert_close(attention(cells), attention_by_hand(attention, cells))


def test_padding_enters_the_statistics_of_the_batch_norm():
    attention, cells = first_attention(micro_cvt(window_sizes=[4] * 4)).train(), torch.randn(2, 5, 5, 16)
    padded = F.pad(cells, (0, 0, 0, 3, 0, 3)).permute(0, 3, 1, 2)
    mean = F.conv2d(padded, attention.qkv.dw.weight, padding=1, groups=16).mean(dim=(0, 2, 3))
    attention(cells)
    torch.testing.assert_close(attention.qkv.bn.running_mean, 0.1 * mean)


def test_padding_is_a_key_like_any_other():
    windows: AttentionWindows = micro_cvt().eval().window_attentions(torch.randn(2, 3, 96, 96))[1]
    assert windows.weights.shape == (2, 4, 2, 49, 49)  # 12 cells a side in windows of 7
    assert (windows.places >= 0).sum() == 144
    assert (windows.weights.amin(dim=(0, 2, 3))[windows.places < 0] > 0).all()
    torch.testing.assert_close(windows.weights.sum(dim=-1), torch.ones(2, 4, 2, 49))


def test_the_gelu_is_the_quick_one():
    values = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(QuickGelu()(values), values * torch.sigmoid(1.702 * values))


def test_a_pointwise_layer_is_a_convolution():
    layer, cells = Pointwise(4, 6), torch.randn(2, 3, 5, 4)
    expected = F.conv2d(cells.permute(0, 3, 1, 2), layer.weight, layer.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(cells), expected)


@pytest.mark.parametrize("relative_position", [False, True])
@pytest.mark.parametrize("shift", SHIFTS)
def test_fused_attention_equals_the_plain_path_with_its_gradients(relative_position, shift):
    torch.manual_seed(0)
    attention = WindowAttention(dim=24, heads=3, window=3, relative_position=relative_position, shift=shift).double()
    bias = attention._bias(attention._windows(torch.zeros(1, 6, 6, 24)), torch.device("cpu"))
    bias = None if bias is None else bias.double()
    query, key, value = (torch.randn(2, 4, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(2, 4, 3, 9, 8, dtype=torch.float64)
    inputs = [query, key, value, *attention.parameters()] if relative_position else [query, key, value]
    answers = []
    for attend in (attention._plain, attention._fused):
        attended = attend(query, key, value, bias)
        gradients = torch.autograd.grad(attended, inputs, cotangent, retain_graph=True, allow_unused=True)
        answers.append([attended, *(gradient for gradient in gradients if gradient is not None)])
    assert len(answers[0]) == (5 if relative_position else 4)
    for plain, fused in zip(*answers, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)


def test_evaluation_equals_training_apart_from_batch_statistics():
    """On CPU attention with relative positions takes different paths: fused without a gradient, plain with one."""
    network, images = micro_cvt(relative_position=True, shift="rolled", depths=[2, 1, 1, 1]).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        evaluated = network(images)
    torch.testing.assert_close(network(images).regions, evaluated.regions, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"residual_stem": True, "relative_position": True, "shift": "rolled", "depths": [2, 1, 1, 1]}])
def test_gradients_reach_every_parameter(changes):
    network = micro_cvt(**changes)
    sum(network(torch.randn(2, 3, side, side)).regions.square().sum() for side in (64, 96)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_nothing_in_the_backward_adds_in_a_racy_order():
    found, waiting = set(), [micro_cvt(relative_position=True, shift="rolled")(torch.randn(1, 3, 64, 64)).pooled.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    names = {node.name() for node in found}
    assert any("Softmax" in name for name in names)
    assert not [name for name in names if any(racy in name for racy in ("Index", "Gather", "Scatter", "Embedding", "Put", "Take"))]


@pytest.mark.parametrize("changes", [{}, {"relative_position": True, "shift": "rolled"}])
def test_network_compiles_as_one_graph(changes):
    options = MICRO_CVT | {"dims": [16, 24], "depths": [1, 2], "heads": [2, 2], "window_sizes": [4, 4]} | changes
    network, images = Cvt(**options).eval(), torch.randn(2, 3, 40, 32)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    pooled = compiled(images).pooled
    torch.testing.assert_close(pooled, network(images).pooled)
    pooled.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_stays_near_full_precision(training):
    network, images = micro_cvt(relative_position=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = network(images).pooled.float()
    expected = network(images).pooled
    assert (pooled - expected).norm() / expected.norm() < 0.05


def test_layer_norms_use_the_eps_of_the_original():
    norms = [module for module in micro_cvt().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 13 and all(norm.eps == 1e-5 for norm in norms)


def test_layer_norms_inside_the_network_compute_in_float32_and_keep_the_dtype():
    norms = [module for module in micro_cvt().modules() if isinstance(module, nn.LayerNorm)]
    cells = 300 + torch.randn(2, 3, 3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = norms[0](cells)
    assert normed.dtype == torch.bfloat16
    expected = F.layer_norm(cells.float(), (16,), norms[0].weight, norms[0].bias, 1e-5)
    torch.testing.assert_close(normed.float(), expected, rtol=2**-7, atol=2**-8)  # two steps of bfloat16


def test_state_survives_a_round_trip_and_a_copy():
    network, images = micro_cvt(residual_stem=True).train(), torch.randn(2, 3, 64, 64)
    network(images)  # moves the statistics of the batch norms
    torch.manual_seed(1)
    other = Cvt(**(MICRO_CVT | {"residual_stem": True}))
    other.load_state_dict(network.state_dict())
    for each in (other, copy.deepcopy(network)):
        assert torch.equal(network.eval()(images).pooled, each.eval()(images).pooled)


def test_stochastic_depth_rises_over_the_whole_network_and_is_the_same_for_both_branches_of_a_block():
    network = micro_cvt(drop_path_rate=0.5, depths=[1, 2, 1, 2])
    rates = [module.rate for module in network.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([rate for rate in (0, 0.1, 0.2, 0.3, 0.4, 0.5) for _ in range(2)])
    network.disable_drop_path()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(network(images).pooled, network(images).pooled)


def test_convolutions_start_small_and_norms_as_identities():
    torch.manual_seed(0)
    network = Cvt(**(MICRO_CVT | {"dims": [64, 64, 64, 64], "relative_position": True, "residual_stem": True}))
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            assert 0.015 < parameter.std() < 0.025, name
        else:
            constant = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == constant).all(), name


def test_batch_norms_synchronise_across_processes_when_converted():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(micro_cvt(residual_stem=True))
    names = {name for name, module in network.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert len(names) == 3 + 4
    projections = [module for module in network.modules() if isinstance(module, ConvProjection)]
    assert all(isinstance(projection.bn, nn.SyncBatchNorm) for projection in projections)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"dims": [], "depths": [], "heads": [], "window_sizes": []}, "backbone.dims"),
        ({"dims": [16, 24, 0, 48]}, "backbone.dims"),
        ({"depths": [1, 1]}, "backbone.depths"),
        ({"depths": [1, 0, 1, 1]}, "backbone.depths"),
        ({"heads": [1, 2, 2]}, "backbone.heads"),
        ({"heads": [1, 5, 2, 4]}, "backbone.heads"),
        ({"window_sizes": [7]}, "backbone.window_sizes"),
        ({"window_sizes": [7, 7, 7, 0]}, "backbone.window_sizes"),
        ({"drop_path_rate": 1.0}, "backbone.drop_path_rate"),
        ({"shift": "real"}, "backbone.shift"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, option):
    with pytest.raises(OptionError) as error:
        Cvt(**(MICRO_CVT | changes))
    assert error.value.option == option
