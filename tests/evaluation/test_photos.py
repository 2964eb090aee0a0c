"""Where photos come from, and what they are called."""

from pathlib import Path

import pytest
from PIL import Image

from esvit.errors import OptionError
from esvit.evaluation.photos import as_picture, evenly_spaced, open_photos, read_photos


def save(path: Path, color: str = "red") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), color).save(path)
    return str(path)


def test_photos_are_those_of_a_folder_a_file_a_list_or_the_package(tmp_path: Path) -> None:
    files = [save(tmp_path / name) for name in ("a.png", "b.png")]
    assert len(open_photos(str(tmp_path), option="o")) == 2
    assert len(open_photos(files[0], option="o")) == 1
    assert len(open_photos(files, option="o")) == 2
    assert len(open_photos(None, option="o")) == 21


def test_photos_keep_their_names_apart(tmp_path: Path) -> None:
    files = [save(tmp_path / name) for name in ("cat.png", "dog.png", "more/cat.png")]
    assert [photo.name for photo in read_photos(open_photos(files[:2], option="o"), [0, 1], option="o")] == ["cat", "dog"]
    names = [photo.name for photo in read_photos(open_photos(files, option="o"), [0, 1, 2], option="o")]
    assert len(set(names)) == 3 and not any("/" in name for name in names)


def test_mistakes_name_the_option(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no photo")
    for images in ([str(tmp_path / "none.png")], str(tmp_path / "nowhere"), []):
        with pytest.raises(OptionError, match=r"^task\.images: "):
            open_photos(images, option="task.images")
    with pytest.raises(OptionError, match=r"^task\.images: photo '.*bad\.png' cannot be read"):
        read_photos(open_photos(str(tmp_path), option="task.images"), [0], option="task.images")


def test_numbers_are_evenly_spaced_from_the_first_to_the_last() -> None:
    assert evenly_spaced(9, 3).tolist() == [0, 4, 8]
    assert evenly_spaced(2, 5).tolist() == [0, 1]
    assert evenly_spaced(5, 1).tolist() == [0]


def test_the_square_of_a_photo_shows_the_same_at_every_size(tmp_path: Path) -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    (photo,) = read_photos(open_photos(str(tmp_path / "wide.png"), option="o"), [0], option="o")
    for side in (20, 40, 90):
        shown = as_picture(photo.square(resize=50, crop=40, side=side))
        assert shown.size == (side, side) and shown.getcolors() == [(side * side, (0, 0, 255))]
