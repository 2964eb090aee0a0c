"""The fixed crop that features are measured on, and the normalisation that every image passes on its way into a network.

Letters: B images, C channels, h and w the sides of a crop in pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esvit.errors import OptionError

_WHITE = {torch.uint8: 255, torch.uint16: 65535}


class EvaluationCrop:
    """The short side resized to `resize` pixels (bicubic), then the central square of `crop` pixels. Published: 256 and 224.

    Raises OptionError, naming `option`, unless 1 <= crop <= resize.
    """

    def __init__(self, *, resize: int, crop: int, option: str = "task.online_knn.crop"):
        if not 1 <= crop <= resize:
            found = f"a crop of {crop} pixels from a short side of {resize}"
            raise OptionError(option, found, "use 1 <= crop <= resize")
        self._resize = resize
        self.crop = crop

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """uint8 (C, crop, crop) of an RGB image; of an array (h, w, C), uint8 or uint16, as many channels of its type."""
        if isinstance(image, np.ndarray):
            return torch.from_numpy(np.stack([self._of_channel(image[:, :, channel]) for channel in range(image.shape[2])]))
        return torch.from_numpy(self._square(image)).permute(2, 0, 1)

    def _of_channel(self, values: np.ndarray) -> np.ndarray:
        """(crop, crop), by the same arithmetic as a channel of an RGB image; 16 bits in float32, which has room for their rounding."""
        if values.dtype == np.uint8:
            return self._square(Image.fromarray(values))
        square = self._square(Image.fromarray(values.astype(np.float32)))
        return square.round().clip(0, np.iinfo(values.dtype).max).astype(values.dtype)

    def _square(self, image: Image.Image) -> np.ndarray:
        size, (left, top) = self.window(image.size)
        return np.array(image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + self.crop, top + self.crop)))

    def window(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """What an image of (width, height) is resized to, and the left and top edge of the square in that."""
        short = min(size)
        width, height = int(self._resize * size[0] / short), int(self._resize * size[1] / short)
        return (width, height), (round((width - self.crop) / 2), round((height - self.crop) / 2))


class Normalize:
    """uint8 or uint16 (B, C, h, w) on any device -> float32 (x / white - mean) / std there, where white is 255 or 65535.

    ImageNet: [0.485, 0.456, 0.406], [0.229, 0.224, 0.225].
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float]):
        if min(std) <= 0 or len(mean) != len(std):
            raise OptionError("task.normalize.std", f"{list(std)} for means {list(mean)}", "give one positive number for each channel")
        self.mean, self.std = list(mean), list(std)
        self._mean_and_std = torch.tensor([list(mean), list(std)]).view(2, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if self._mean_and_std.device != images.device:  # once: a copy in every step would make the host wait
            self._mean_and_std = self._mean_and_std.to(images.device)
        mean, std = self._mean_and_std
        return images.to(torch.float32).div_(_WHITE[images.dtype]).sub_(mean).div_(std)

    def check_channels(self, channels: int) -> None:
        """Raises OptionError unless there is one mean for each of `channels`."""
        if len(self.mean) != channels:
            found = f"{list(self.mean)} are {len(self.mean)} means, the images have data.channels={channels}"
            remedy = f"give one for each channel, as in normalize.mean={_list(0.5, channels)} normalize.std={_list(0.25, channels)}"
            raise OptionError("task.normalize.mean", found, remedy)


def _list(value: float, count: int) -> str:
    return "[" + ",".join([str(value)] * count) + "]"
