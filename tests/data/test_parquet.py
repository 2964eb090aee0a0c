"""Parquet files as Hugging Face writes them, and plainer ones."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit.data.base import BadImage
from esvit.data.parquet import ParquetData
from esvit.errors import OptionError
from tests.data.pictures import data_options, picture, png


def parquet_data(root, **changed) -> ParquetData:
    return ParquetData(**data_options(root=str(root), image_column="image", label_column="label", row_groups=2) | changed)


def write_parquet(path, images, labels, *, names=None, group=2, image_name="image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image_name: images, "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)


def records(numbers) -> list[dict]:
    return [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]


def test_files_of_hugging_face_are_one_set_with_their_class_names(tmp_path):
    for part, numbers in enumerate([range(5), range(5, 8)]):
        write_parquet(
            tmp_path / "data" / f"train-0000{part}-of-2.parquet",
            records(numbers),
            [number % 3 for number in numbers],
            names=["a", "b", "c"],
        )
    write_parquet(tmp_path / "data" / "validation-0.parquet", records([9]), [2], names=["a", "b", "c"])
    data = parquet_data(tmp_path)
    train, validation = data.train(), data.validation()
    assert train.labels.tolist() == [number % 3 for number in range(8)]
    assert train.class_names == validation.class_names == ["a", "b", "c"]
    assert train.chunk_ends.tolist() == [2, 4, 5, 7, 8]
    for index in np.random.default_rng(0).permutation(8):
        assert train.read(int(index)).tobytes() == picture(int(index)).tobytes()
    assert train.name(6) == "data/train-00001-of-2.parquet row 1"
    assert validation.labels.tolist() == [2]
    assert pickle.loads(pickle.dumps(train)).read(7).tobytes() == picture(7).tobytes()


def test_plain_bytes_and_names_do_as_well(tmp_path):
    write_parquet(tmp_path / "x.parquet", [png(0), png(1)], ["dog", "cat"], image_name="picture")
    write_parquet(tmp_path / "val" / "y.parquet", [png(2)], ["dog"], image_name="picture")
    data = parquet_data(tmp_path, image_column="picture", val_root=str(tmp_path / "val"))
    assert len(data.train()) == 2  # not those of val/
    assert data.validation().class_names == ["cat", "dog"]
    assert data.validation().labels.tolist() == [1]
    assert parquet_data(tmp_path / "val", image_column="picture", label_column=None).train().labels is None


def test_rows_without_an_image_are_bad_ones(tmp_path):
    images = [{"bytes": png(0), "path": ""}, {"bytes": None, "path": "a.png"}, {"bytes": b"text", "path": ""}, None]
    write_parquet(tmp_path / "train.parquet", images, [0, 0, 0, 0])
    train = parquet_data(tmp_path).train()
    train.read(0)
    for index in (1, 2, 3):
        with pytest.raises(BadImage):
            train.read(index)


@pytest.mark.parametrize(
    ("images", "labels", "changed", "found"),
    [
        ([b"x"], [0], {"image_column": "photo"}, r"data\.image_column: [^\n]* has no column 'photo' but image, label"),
        ([b"x"], [0], {"label_column": "class"}, r"data\.label_column: [^\n]* has no column 'class' but image, label; [^\n]*null"),
        (["text"], [0], {}, r"data\.image_column: column 'image' of [^\n]* holds string"),
        ([b"x", b"y"], [0, None], {}, r"data\.root: [^\n]*train\.parquet' row 1 has no label"),
        ([b"x", b"y"], [0, -1], {}, r"data\.root: row 1 has label -1"),
        ([b"x"], [0.5], {}, r"data\.label_column: holds float64"),
    ],
)
def test_wrong_columns_are_named(tmp_path, images, labels, changed, found):
    write_parquet(tmp_path / "train.parquet", images, labels)
    with pytest.raises(OptionError, match=f"^{found}"):
        parquet_data(tmp_path, **changed).train()


def test_no_files_and_damaged_ones_are_told_apart(tmp_path):
    with pytest.raises(OptionError, match=r"^data\.root: folder [^\n]* holds no Parquet files"):
        parquet_data(tmp_path).train()
    (tmp_path / "train.parquet").write_bytes(b"nonsense")
    with pytest.raises(OptionError, match=r"^data\.root: [^\n]*train\.parquet' is no readable Parquet file"):
        parquet_data(tmp_path).train()
