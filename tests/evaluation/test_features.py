"""Features of a whole set: order, modes and sharding."""

import pytest
import torch
from torch import Tensor, nn

from esvit.backbones.base import Backbone
from esvit.backbones.swin import Swin
from esvit.evaluation.features import extract_features, in_dataset_order


def swin() -> Backbone:
    torch.manual_seed(0)
    return Swin(
        in_channels=3, patch_size=4, dim=12, depths=[1, 1], heads=[2, 2], window_size=4, mlp_ratio=2.0, drop_path_rate=0.5, image_size=16
    )  # fmt: skip


def images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalize(crops: Tensor) -> Tensor:
    return crops.float() / 128 - 1


def extract(backbone: Backbone, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return extract_features(backbone=backbone, batches=batches, normalize=normalize, device=torch.device("cpu"))[0]


def test_rows_come_in_dataset_order_whatever_the_order_of_the_batches() -> None:
    backbone, crops = swin(), images(7)
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    features = extract(backbone, [(crops[part], part) for part in order.split(3)])
    assert features.dtype == torch.float32 and features.device.type == "cpu" and not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(normalize(crops)).pooled.detach())


def test_every_submodule_is_back_in_its_own_mode() -> None:
    backbone = swin().train()
    frozen = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    for module in frozen:
        module.eval()
    flags = [module.training for module in backbone.modules()]
    assert len(set(flags)) == 2
    extract(backbone, [(images(2), torch.arange(2))])
    assert [module.training for module in backbone.modules()] == flags


def test_modes_are_restored_after_an_error_too() -> None:
    backbone = swin().train()
    with pytest.raises(RuntimeError):
        extract(backbone, [(images(2)[:, :1], torch.arange(2))])  # one channel where three are expected
    assert all(module.training for module in backbone.modules())


def test_drop_path_of_the_training_mode_is_off() -> None:
    backbone = swin().train()
    batches = [(images(6), torch.arange(6))]
    torch.testing.assert_close(extract(backbone, batches), extract(backbone, batches), rtol=0, atol=0)


def test_two_overlapping_shards_become_one_set() -> None:
    """A sharding sampler pads with repeated images; the rows of both ranks are concatenated by rank."""
    rows = torch.arange(5.0)[:, None].expand(5, 3)
    first, second = torch.tensor([0, 2, 4]), torch.tensor([1, 3, 0])
    places = torch.cat([first, second])
    ordered, ordered_places = in_dataset_order(rows[places], places)
    torch.testing.assert_close(ordered, rows)
    assert ordered_places.tolist() == [0, 1, 2, 3, 4]


def test_an_unreadable_image_leaves_a_gap_in_the_places() -> None:
    backbone, crops = swin(), images(4)
    kept = torch.tensor([3, 0, 2])
    features, places = extract_features(backbone=backbone, batches=[(crops[kept], kept)], normalize=normalize, device=torch.device("cpu"))
    assert places.tolist() == [0, 2, 3]
    torch.testing.assert_close(features, backbone.eval()(normalize(crops[places])).pooled.detach())
