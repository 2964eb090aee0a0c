"""The fixed crop and the normalisation, against torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from esvit.augmentations.evaluation import EvaluationCrop, Normalize
from esvit.errors import OptionError

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (40, 40), (41, 97)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (36, 32), (33, 32), (40, 40)])
def test_crop_and_normalisation_equal_torchvision(size, resize, crop):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = transforms.Compose([
        transforms.Resize(resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(crop), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])(image)  # fmt: skip
    ours = EvaluationCrop(resize=resize, crop=crop)(image)
    assert ours.dtype == torch.uint8
    assert Normalize(mean=MEAN, std=STD)(ours[None])[0].equal(expected)


@pytest.mark.parametrize("white", [255, 65535])
def test_arrays_are_cropped_and_normalised_like_rgb_images_in_either_depth(white):
    image = np.random.default_rng(0).integers(64, 192, (37, 50, 3), dtype=np.uint8)
    crop, normalize = EvaluationCrop(resize=36, crop=32), Normalize(mean=[0.5] * 4, std=[0.25] * 4)
    of_rgb = crop(Image.fromarray(image))
    values = np.concatenate([image, image[:, :, :1]], axis=2)
    ours = crop(values if white == 255 else values.astype(np.uint16) * 257)
    assert ours.shape == (4, 32, 32) and ours[3].equal(ours[0])
    assert ours.dtype == (torch.uint8 if white == 255 else torch.uint16)
    expected = normalize(torch.cat([of_rgb, of_rgb[:1]])[None])
    assert (normalize(torch.stack([ours])) - expected).abs().max() <= (0 if white == 255 else 2 / 255 / 0.25)  # Pillow rounds 8 bits twice


def test_means_for_another_number_of_channels_are_one_line_with_the_remedy():
    found = r"^task\.normalize\.mean: .* 3 means, the images have data\.channels=2; .*normalize\.mean=\[0\.5,0\.5\] normalize\.std="
    with pytest.raises(OptionError, match=found):
        Normalize(mean=MEAN, std=STD).check_channels(2)


def test_normalisation_leaves_its_input_and_gives_float32():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    before = images.clone()
    assert Normalize(mean=MEAN, std=STD)(images).dtype == torch.float32
    assert images.equal(before)


def test_mistakes_are_named():
    with pytest.raises(OptionError, match=r"^task\.online_knn\.crop: "):
        EvaluationCrop(resize=32, crop=40)
    with pytest.raises(OptionError, match=r"^task\.normalize\.std: "):
        Normalize(mean=MEAN, std=[0.2, 0.0, 0.2])
