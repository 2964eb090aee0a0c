"""Names packed in arrays, and the options that all formats share."""

import pickle

import pytest

from esvit.data.base import PackedStrings, is_image_name
from esvit.data.folder import FolderData
from esvit.errors import OptionError
from tests.data.pictures import data_options


def test_packed_strings_give_back_every_name_even_undecodable_ones():
    names = ["a.jpg", "", "größe/ü.png", b"bad\xff.jpg".decode("utf-8", "surrogateescape")]
    packed = pickle.loads(pickle.dumps(PackedStrings(names)))
    assert list(packed) == names
    assert packed[1:3] == names[1:3]
    with pytest.raises(IndexError):
        packed[4]


@pytest.mark.parametrize(("name", "expected"), [("a.JPG", True), ("a.b.jpeg", True), (".a.jpg", False), ("jpg", False), ("a.txt", False)])
def test_image_names_are_known_by_their_ending(name, expected):
    assert is_image_name(name) is expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("workers", -1),
        ("max_bad_fraction", 1.5),
        ("label_fraction", 0.0),
        ("channels", 0),
        ("depth", 12),
        ("max_pixels", 0),
    ],
)
def test_an_impossible_value_is_one_line_that_names_the_option(option, value):
    with pytest.raises(OptionError, match=rf"^data\.{option}: [^\n]+$"):
        FolderData(**data_options(root="x", **{option: value}))
