"""task=preview: the views are those that a run sees, and both files show them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from esvit.data.folder import FolderData
from esvit.data.loading import TrainLoader
from esvit.data.sampling import SHUFFLE
from esvit.errors import OptionError
from esvit.evaluation.preview_page import picture, with_boxes
from esvit.tasks.preview import Preview, _shares
from run import build
from tests.data.pictures import data_options, write_classes
from tests.tasks.composition import composed


@pytest.fixture(scope="module")
def options():
    sizes = ("augmentation.global_crops_size=32", "augmentation.local_crops_size=16", "augmentation.local_crops_number=2")
    return composed("task=preview", "data.root=unused", *sizes)["task"]


@pytest.fixture
def files(tmp_path):
    return write_classes(tmp_path / "images", {"ant": 4, "bee & co": 3})


def preview(tmp_path, options, *, images=2, probability=0.0, **data) -> Preview:
    parts = {"augmentation": build(options["augmentation"]), "mixing": build(options["mixing"] | {"probability": probability})}
    folder = FolderData(**data_options(root=str(tmp_path / "images"), **data))
    return Preview(data=folder, sampler=SHUFFLE, images=images, seed=3, folder=str(tmp_path / "preview"), **parts)


def test_the_views_are_those_that_a_run_with_this_seed_sees_first(tmp_path, options, files):
    task = preview(tmp_path, options, images=3)
    drawn, bad_images = task._draw(task.data.train())
    loader = TrainLoader(images=task.data.train(), transform=task.augmentation, batch_size=3, workers=0, seed=3, rank=0, world_size=1,
                         accumulation=1, max_bad_fraction=0.5)  # fmt: skip
    batch = next(loader.from_step(0))
    assert [each.index for each in drawn] == batch.indices.tolist() and bad_images == []
    for view, crops in enumerate(batch.crops):
        assert torch.stack([each.views[view] for each in drawn]).equal(crops)


def test_both_files_show_every_view_with_what_was_drawn(tmp_path, options, files, capsys):
    task = preview(tmp_path, options)
    task.run()
    assert capsys.readouterr().out.split() == [f"{tmp_path}/preview/preview.png", f"{tmp_path}/preview/preview.html"]
    page = (tmp_path / "preview" / "preview.html").read_text()
    assert page.count("<figure") == 2 * (1 + 4) and page.count("data:image/png") == 2 * 4
    drawn, _ = task._draw(task.data.train())
    text = re.sub(r"</?span[^>]*>", "", page)
    for each in drawn:
        assert all(parameters.describe() in text for parameters in each.parameters)
    assert "2 x 32 pixels" in page and "http" not in re.sub(r"http://www\.w3\.org[^\"']*", "", page)
    with Image.open(tmp_path / "preview" / "preview.png") as sheet:
        assert sheet.width > 4 * 168


def test_bad_images_are_named_and_others_shown(tmp_path, options, files, capsys):
    drawn, _ = preview(tmp_path, options)._draw(preview(tmp_path, options).data.train())
    files[drawn[0].index].write_bytes(b"no image")
    bad = str(files[drawn[0].index].relative_to(tmp_path / "images"))
    preview(tmp_path, options).run()
    assert f"cannot be read: {bad} (" in capsys.readouterr().out
    page = (tmp_path / "preview" / "preview.html").read_text()
    assert page.count("<section>") == 2 and "cannot be read: " in page
    for file in files:
        file.write_bytes(b"")
    with pytest.raises(OptionError, match=r"^data\.root: none of 7 images can be read"):
        preview(tmp_path, options).run()


def test_mixing_is_shown_where_it_is_on(tmp_path, options, files):
    preview(tmp_path, options, probability=1.0).run()
    page = (tmp_path / "preview" / "preview.html").read_text()
    assert page.count("<figure") == 2 * (1 + 4 + 4)
    assert re.search(r"\d+% of its own</span>, <span class=\"part\">\d+% of image 2", page)
    assert _shares(torch.tensor([0.25, 0.0, 0.75]), 0) == "25% of its own, 75% of image 3"


def test_images_of_any_channels_can_be_looked_at():
    assert picture(np.full((2, 3, 5), 9, np.uint8)).size == (3, 2)
    assert picture(np.full((2, 3, 1), 9, np.uint8)).getpixel((0, 0)) == (9, 9, 9)
    assert picture(np.full((2, 3, 2), 0x1234, np.uint16)).getpixel((2, 1)) == (0x12, 0x12, 0x12)


def test_a_frame_lies_where_the_view_came_from(tmp_path, options, files):
    task = preview(tmp_path, options, images=1)
    images = task.data.train()
    drawn, _ = task._draw(images)
    (shown,) = task._mixed(images, drawn)
    framed = np.array(with_boxes(shown, 2, 200))
    left, top, right, bottom = (10 * edge for edge in shown.parameters[0].box)  # the original is 20 pixels wide
    for x, y in ((left, top), (right - 1, bottom - 1)):
        assert tuple(framed[y, x]) in ((0x1F, 0x6F, 0xB2), (0xD9, 0x77, 0x2B))


@pytest.mark.parametrize(("changes", "option"), [({"images": 0}, "task.images"), ({"root": "/no/such/folder"}, "data.root")])
def test_what_cannot_work_is_told(tmp_path, options, files, changes, option):
    with pytest.raises(OptionError, match=rf"^{option}: "):
        if "root" in changes:
            task = preview(tmp_path, options)
            task.data.root = changes["root"]
        else:
            task = preview(tmp_path, options, **changes)
        task.run()
    assert not (tmp_path / "preview").exists()
