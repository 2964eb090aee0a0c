"""Options of backbones, heads and losses."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


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


class CvtShift(Enum):
    none = "none"
    mask_only = "mask_only"
    rolled = "rolled"


@dataclass
class Cvt:
    _target_: str = "esvit.backbones.cvt.Cvt"
    in_channels: int = 3  # channels of the images
    dims: list[int] = field(default_factory=lambda: [64, 192, 384, 768])  # width of each stage
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # blocks per stage
    heads: list[int] = field(default_factory=lambda: [1, 3, 6, 12])  # attention heads per stage
    window_sizes: list[int] = field(default_factory=lambda: [7, 7, 7, 7])  # side of an attention window per stage (tokens)
    mlp_ratio: float = 4.0  # hidden width of the MLP over its width
    drop_path_rate: float = 0.1  # stochastic depth of the last block; linear from 0 at the first
    residual_stem: bool = False  # three small convolutions with batch norm instead of one of 7 x 7 at the input
    relative_position: bool = False  # learned bias per head and relative position
    shift: CvtShift = CvtShift.none  # rolled: windows of every second block move; mask_only: the paper's code, which masks as if they did


class VilNeighbours(Enum):
    all = "all"
    own = "own"
    random = "random"


class VilReach(Enum):
    chunks = "chunks"
    window = "window"
    wrapped = "wrapped"


@dataclass
class Vil:
    _target_: str = "esvit.backbones.vil.Vil"
    in_channels: int = 3  # channels of the images
    image_size: int = 224  # nominal side (pixels) that fixes the sizes of positions and biases; any other size can be fed
    patch_sizes: list[int] = field(default_factory=lambda: [4, 2, 2, 2])  # side of the patches of each stage, in cells of the one before
    dims: list[int] = field(default_factory=lambda: [96, 192, 384, 768])  # width of each stage
    depths: list[int] = field(default_factory=lambda: [1, 2, 8, 1])  # blocks per stage
    heads: list[int] = field(default_factory=lambda: [3, 3, 6, 12])  # attention heads per stage
    window_sizes: list[int] = field(default_factory=lambda: [7, 7, 7, 7])  # side of a chunk (tokens), where attention slides
    sliding: list[bool] = field(default_factory=lambda: [True, True, False, False])  # between sliding chunks instead of all tokens
    global_tokens: list[int] = field(default_factory=lambda: [1, 1, 1, 0])  # tokens of each stage that see and are seen by every cell
    absolute_positions: list[bool] = field(default_factory=lambda: [True, True, True, True])  # instead of biases by relative position
    neighbours: VilNeighbours = VilNeighbours.all  # chunks that a cell sees: all nine, own, or random (own and one other, in training)
    all_neighbours_from: float = 1.0  # share of training from which random means all; 1 for never, as the original's code
    reach: VilReach = VilReach.chunks  # whole chunks; window (cells at most a chunk's side away); wrapped (over the image's edges)
    mlp_ratio: float = 4.0  # hidden width of the MLP over its width
    drop_path_rate: float = 0.1  # stochastic depth of the last block; linear from 0 at the first


@dataclass
class ViT:
    _target_: str = "esvit.backbones.vit.ViT"
    in_channels: int = 3  # channels of the images
    image_size: int = 224  # nominal side (pixels) that fixes the number of position embeddings; any other size can be fed
    patch_size: int = 16  # side of a patch (pixels)
    dim: int = 384  # width
    depth: int = 12  # blocks
    heads: int = 6  # attention heads
    mlp_ratio: float = 4.0  # hidden width of the MLP over its width
    drop_path_rate: float = 0.1  # stochastic depth of the last block; linear from 0 at the first


@dataclass
class ResNet:
    _target_: str = "esvit.backbones.resnet.ResNet"
    in_channels: int = 3  # channels of the images
    depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])  # blocks of each of the four stages


@dataclass
class Timm:
    _target_: str = "esvit.backbones.timm.Timm"
    name: str = MISSING  # network of timm, e.g. convnextv2_tiny
    pretrained: bool = False  # start from timm's published weights (downloaded) instead of random ones
    in_channels: int = 3  # channels of the images
    image_size: int | None = None  # nominal side (pixels) of a network that has one; null means timm's
    drop_path_rate: float = 0.0  # stochastic depth, spread over the blocks as timm does


@dataclass
class Projection:
    _target_: str = "esvit.networks.HeadOptions"
    hidden_dim: int = 2048  # width of the hidden layers
    bottleneck_dim: int = 256  # width of the embedding
    layers: int = 3  # linear layers
    batch_norm: bool = False  # batch norm before every GELU; helps short runs and small batches
    prototypes: int = 65536  # outputs of the last layer, K
    norm_last_layer: bool = True  # keep every prototype at unit norm; false often gains accuracy in long runs, true is steadier


class LossKernel(Enum):
    auto = "auto"
    chunked = "chunked"
    fused = "fused"


@dataclass
class View:
    _target_: str = "esvit.losses.view.ViewLoss"
    student_temperature: float = 0.1  # of the student's softmax
    center_momentum: float = 0.9  # of the centre's moving average
    kernel: LossKernel = LossKernel.auto  # softmax over prototypes: chunked, fused (a GPU's kernels; bf16, fp16), or auto: fused if it can


@dataclass
class ViewRegion:
    _target_: str = "esvit.losses.combined.ViewRegionLoss"
    student_temperature: float = 0.1  # of the student's softmax
    center_momentum: float = 0.9  # of the centres' moving averages
    view_weight: float = 0.5  # weight of the view-level loss
    region_weight: float = 0.5  # weight of the region-level loss
    kernel: LossKernel = LossKernel.auto  # softmax over prototypes: chunked, fused (a GPU's kernels; bf16, fp16), or auto: fused if it can


SCHEMAS = {
    ("backbone", "swin"): Swin,
    ("backbone", "cvt"): Cvt,
    ("backbone", "vil"): Vil,
    ("backbone", "vit"): ViT,
    ("backbone", "resnet"): ResNet,
    ("backbone", "timm"): Timm,
    ("head", "projection"): Projection,
    ("loss", "view"): View,
    ("loss", "view_region"): ViewRegion,
}
