"""Backbones whose weights timm calls by the same names; only the arguments of create_model have to be found."""

from typing import cast

from torch import nn

from esvit.backbones.layouts import Layout
from esvit.backbones.resnet import ResNet
from esvit.backbones.timm import Timm
from esvit.backbones.vit import ViT, ViTBlock


def of_vit(backbone: ViT, image_size: int) -> Layout:
    blocks = [cast(ViTBlock, block) for block in backbone.blocks]
    projection = backbone.patch_embed.proj
    arguments = {
        "img_size": backbone.nominal_side * projection.kernel_size[0],
        "patch_size": projection.kernel_size[0],
        "in_chans": projection.in_channels,
        "embed_dim": backbone.dim,
        "depth": len(blocks),
        "num_heads": blocks[0].attn.heads,
        "mlp_ratio": blocks[0].mlp.fc1.out_features / backbone.dim,
    }
    note = "For images of another size, build it with dynamic_img_size=True; timm interpolates position embeddings a little differently."
    return _same_names(backbone, "vit_small_patch16_224", arguments, note)


def of_resnet(backbone: ResNet, image_size: int) -> Layout:
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    arguments = {"layers": [len(cast(nn.Sequential, stage)) for stage in stages], "in_chans": backbone.conv1.in_channels}
    return _same_names(backbone, "resnet50", arguments, "Images may have any size.")


def of_timm(backbone: Timm, image_size: int) -> Layout:
    arguments = {"img_size": backbone.nominal_side} if backbone.model.pretrained_cfg["fixed_input_size"] else {}
    weights = {name.removeprefix("model."): weight for name, weight in backbone.state_dict().items()}
    names = {name: [name.removeprefix("model.")] for name in backbone.state_dict()}
    config = {"model": backbone.name, "norm_eps": None, "arguments": arguments}
    note = "It was timm's network all along; our regions have passed its head one by one, its forward_features have not."
    return Layout(weights=weights, names=names, config=config, note=note, has_regions=False)


def _same_names(backbone: nn.Module, model: str, arguments: dict, note: str) -> Layout:
    weights = dict(backbone.state_dict())
    config = {"model": model, "norm_eps": None, "arguments": arguments}
    return Layout(weights=weights, names={name: [name] for name in weights}, config=config, note=note)
