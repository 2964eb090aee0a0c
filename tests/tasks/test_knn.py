"""task=knn: planted colours whose accuracy can be counted by hand, its baselines, what it leaves, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit.errors import OptionError
from esvit.evaluation.protocol import protocol_differences, read_protocol
from esvit.tasks.knn import Knn
from tests.tasks.colours import evaluate, frozen, images, paint

REDS, GREENS, BLUES = ([tuple(250 - 2 * i if c == channel else 20 for c in range(3)) for i in range(4)] for channel in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes; of six validation images one "red" is green."""
    root = tmp_path_factory.mktemp("colours")
    paint(root / "train", {"blue": BLUES[:3], "green": GREENS[:3], "red": REDS[:3]})
    paint(root / "val", {"blue": BLUES[2:], "green": GREENS[2:], "red": [REDS[3], GREENS[3]]})
    return root


def knn(folder: Path, **changes: Any) -> Knn:
    options: dict[str, Any] = {"neighbours": [1, 3], "temperature": 0.07, "baselines": False, "frozen": frozen(), "data": images(folder)}
    return Knn(**(options | changes))


def test_accuracies_are_those_counted_by_hand(folder, tmp_path):
    """The green "red" image is wrong until all nine images vote, and then its class is among the first five."""
    metrics = evaluate(knn(folder, neighbours=[1, 3, 9]), tmp_path / "run")
    wrong, right = pytest.approx(500 / 6), pytest.approx(100)
    assert metrics == {
        "knn/top1_k1": wrong, "knn/top1_k3": wrong, "knn/top1_k9": wrong,
        "knn/top5_k1": wrong, "knn/top5_k3": wrong, "knn/top5_k9": right,
        "knn/best_k": 1, "knn/best_top1": wrong, "knn/best_top5": wrong,
    }  # fmt: skip


def test_baselines_see_colours_as_well_as_the_backbone_does(folder, tmp_path):
    """Pixels less an image's mean, the histogram's cells, and the network itself all tell three plain colours apart."""
    metrics = evaluate(knn(folder, baselines=True), tmp_path / "run")
    for name in ("raw_pixels_", "color_histogram_"):
        for rest in ("top1_k1", "top5_k1", "top1_k3", "top5_k3"):
            assert metrics[f"knn/{name}{rest}"] == metrics[f"knn/{rest}"] == pytest.approx(500 / 6)
    assert not [name for name in metrics if "untrained" in name], "the network itself is untrained"
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == []


def test_the_untrained_network_is_measured_as_it_was_before_its_weights_were_loaded(folder, tmp_path):
    """Weights of zero make all images alike, so that every class has three equal votes: a third of the validation images is right."""
    torch.save({"scale": torch.zeros(1)}, tmp_path / "weights.pt")
    network = frozen(network="teacher", checkpoint=str(tmp_path / "weights.pt"))
    metrics = evaluate(knn(folder, neighbours=[3, 9], baselines=True, frozen=network), tmp_path / "run")
    assert metrics["knn/top1_k9"] == pytest.approx(100 / 3)
    assert metrics["knn/untrained_top1_k3"] == pytest.approx(500 / 6)


def test_the_table_names_every_row_and_k(folder, tmp_path, capsys):
    evaluate(knn(folder, baselines=True), tmp_path / "run")
    title, head, *rows, best, where = capsys.readouterr().out.splitlines()
    assert "6 validation images among 9 training images" in title
    assert head.split() == ["k=1", "k=3"]
    assert [row.split("  ")[0] for row in rows] == ["untrained", "raw pixels", "colour histogram"]
    assert rows[0].endswith("83.33 / 83.33")
    assert best == "best k: 1"
    assert where == f"results in {tmp_path / 'run'}"


def test_the_protocol_pins_what_changes_the_numbers(folder, tmp_path):
    for name, options in {"one": {}, "other": {"temperature": 0.1, "frozen": frozen(resize=10)}}.items():
        evaluate(knn(folder, **options), tmp_path / name)
    one, other = (read_protocol(tmp_path / name) for name in ("one", "other"))
    assert one is not None and other is not None
    assert one["images"] == {"train": 9, "validation": 6}
    assert set(protocol_differences(one, other)) == {"temperature", "frozen.resize"}


def test_the_results_are_logged_and_kept_as_files(folder, tmp_path):
    metrics = evaluate(knn(folder), tmp_path / "run")
    (record,) = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert {name: record[name] for name in metrics} == metrics
    assert {"protocol.json", "metrics.json"} <= set(json.loads((tmp_path / "run" / "tracking.json").read_text())["artifacts"])


def test_images_that_cannot_be_read_are_left_out(folder, tmp_path):
    root = tmp_path / "images"
    paint(root / "train", {"blue": BLUES[:3], "green": GREENS[:3], "red": REDS[:3]})
    paint(root / "val", {"blue": BLUES[2:], "green": GREENS[2:], "red": REDS[2:]})
    (root / "train" / "blue" / "01.png").write_bytes(b"")
    (root / "val" / "red" / "00.png").write_bytes(b"")
    assert evaluate(knn(root), tmp_path / "run")["knn/top1_k3"] == 100
    protocol = read_protocol(tmp_path / "run")
    assert protocol is not None
    assert protocol["images"] == {"train": 8, "validation": 5}


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("task.neighbours", {"neighbours": [1, 10]}),
        ("task.neighbours", {"neighbours": []}),
        ("task.temperature", {"temperature": 0.0}),
        ("task.frozen.crop", {"frozen": frozen(crop=9)}),
        ("checkpoint", {"frozen": frozen(network="teacher")}),
    ],
)
def test_an_impossible_option_is_named_before_anything_is_written(option, changes, folder, tmp_path):
    with pytest.raises(OptionError, match=f"^{option}: "):
        evaluate(knn(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
