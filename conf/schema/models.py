"""Options of backbones, heads and losses."""

from dataclasses import dataclass, field


@dataclass
class Swin:
    _target_: str = "esvit.backbones.swin.Swin"
    in_channels: int = 3  # channels of the images
    image_size: int = 224  # nominal side (pixels) that fixes windows and shifts; any other size can be fed
    patch_size: int = 4  # side of a patch (pixels)
    dim: int = 96  # width of the first stage; doubles from stage to stage
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # blocks per stage
    heads: list[int] = field(default_factory=lambda: [3, 6, 12, 24])  # attention heads per stage
    window_size: int = 7  # side of an attention window (tokens)
    mlp_ratio: float = 4.0  # hidden width of the MLP over its width
    drop_path_rate: float = 0.1  # stochastic depth of the last block; linear from 0 at the first


@dataclass
class Projection:
    _target_: str = "esvit.networks.HeadOptions"
    hidden_dim: int = 2048  # width of the hidden layers
    bottleneck_dim: int = 256  # width of the embedding
    layers: int = 3  # linear layers
    batch_norm: bool = False  # batch norm before every GELU; helps short runs and small batches
    prototypes: int = 65536  # outputs of the last layer, K
    norm_last_layer: bool = True  # keep every prototype at unit norm; false often gains accuracy in long runs, true is steadier


@dataclass
class View:
    _target_: str = "esvit.losses.view.ViewLoss"
    student_temperature: float = 0.1  # of the student's softmax
    center_momentum: float = 0.9  # of the centre's moving average


@dataclass
class ViewRegion:
    _target_: str = "esvit.losses.combined.ViewRegionLoss"
    student_temperature: float = 0.1  # of the student's softmax
    center_momentum: float = 0.9  # of the centres' moving averages
    view_weight: float = 0.5  # weight of the view-level loss
    region_weight: float = 0.5  # weight of the region-level loss


SCHEMAS = {
    ("backbone", "swin"): Swin,
    ("head", "projection"): Projection,
    ("loss", "view"): View,
    ("loss", "view_region"): ViewRegion,
}
