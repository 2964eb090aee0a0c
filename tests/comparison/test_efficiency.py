"""The efficiency figure: the published rows are the paper's, and accuracies on other images stay out of their panels."""

import io
import json

import pytest
from PIL import Image

from esvit import zoo
from esvit.comparison.efficiency import DATA, KINDS, draw, our_panels, published_panels, together
from esvit.comparison.runs import Run
from tests.comparison.folders import PROTOCOL, run

METRICS = {"linear": ["linear/top1"], "knn": ["knn/top1_k20", "knn/teacher"]}


def measured(**changes: object) -> Run:
    protocol = {"task": "throughput", "machine": "Some GPU", "precision": "bf16"}
    values = {"images_per_second": 500.0, "parameters": 25e6, "flops": 4e9}
    return run("cost", values, protocol=protocol, choices__task="throughput", **changes)  # type: ignore[arg-type]


def ours(*runs: Run, dataset: str | None = None):
    return our_panels([*runs, measured()], METRICS, dataset=dataset)


def test_published_rows_have_all_that_is_drawn():
    rows = json.loads(DATA.read_text())["rows"]
    assert len(rows) == 20
    for row in rows:
        assert row["images_per_second"] > 0 and row["parameters_millions"] > 0
        assert ("zoo" in row) is (row["method"] == "EsViT")


def test_accuracies_of_models_in_the_zoo_are_the_zoos():
    linear, knn = published_panels()
    best = zoo.models()["swin_base_w14_vr"]
    assert (best.linear, best.knn) == (81.3, 79.3)
    assert max(dot.accuracy for dot in linear.dots) == best.linear
    assert max(dot.accuracy for dot in knn.dots) == best.knn
    assert len(linear.dots) == 20
    assert len(knn.dots) == 15, "five rows were published without k-NN"


def test_a_run_is_drawn_at_its_accuracy_and_the_throughput_of_its_backbone():
    runs = [run(f"tiny_seed{seed}", {"knn/teacher": 60.0 + 2 * seed}, seed=seed) for seed in (0, 1)]
    found = ours(*runs)
    (panel,) = found.panels
    (dot,) = panel.dots
    assert (panel.dataset, panel.kind) == ("leaves", "knn")
    assert (dot.accuracy, dot.images_per_second, dot.parameters, dot.label) == (61.0, 500.0, 25e6, "tiny, 25 M")
    assert dot.deviation == pytest.approx(2**0.5)
    assert found.machines == ["Some GPU, bf16"]


def test_a_run_without_a_measured_backbone_is_named_and_not_drawn():
    found = ours(run("tiny", {"knn/teacher": 60.0}), run("wide", {"knn/teacher": 70.0}, backbone__dim=128))
    assert [dot.label for panel in found.panels for dot in panel.dots] == ["tiny, 25 M"]
    assert any(note.endswith("wide") for note in found.notes)


def test_of_several_metrics_the_first_one_that_fits_is_drawn_and_the_rest_is_told():
    known = run("tiny", {"knn/teacher": 60.0, "knn/top1_k20": 65.0})
    found = ours(known)
    assert [dot.accuracy for panel in found.panels for dot in panel.dots] == [65.0]
    assert found.notes == ["leaves, k-NN: shows knn/top1_k20; left out: knn/teacher of 1 group"]


def test_other_images_get_panels_of_their_own_and_imagenet_shares_the_published_ones():
    elsewhere = together(published_panels(), ours(run("tiny", {"knn/teacher": 60.0})).panels)
    assert [(panel.dataset, panel.kind) for panel in elsewhere] == [("ImageNet-1K", "linear"), ("ImageNet-1K", "knn"), ("leaves", "knn")]
    same = ours(run("tiny", {"knn/teacher": 60.0}, data__val_root="/data/ILSVRC2012/val")).panels
    assert [(panel.dataset, len(panel.dots)) for panel in together(published_panels(), same)] == [("ImageNet-1K", 20), ("ImageNet-1K", 16)]


def test_the_data_set_may_be_named():
    assert [panel.dataset for panel in ours(run("tiny", {"knn/teacher": 60.0}), dataset="ImageNet-1K").panels] == ["ImageNet-1K"]


def test_unfinished_runs_are_not_drawn():
    assert ours(run("tiny", {"knn/teacher": 60.0}, status="killed")).panels == []


def test_both_files_are_pictures_and_the_labels_are_text():
    protocol = {**PROTOCOL, "task": "linear"}
    found = ours(run("tiny", {"linear/top1": 60.0}, protocol=protocol), run("other", {"linear/top1": 61.0}, protocol=protocol, epochs=7))
    files = draw(together(published_panels(), found.panels), found.machines)
    with Image.open(io.BytesIO(files["png"])) as picture:
        assert picture.width > 1500
    svg = files["svg"].decode()
    for words in ("tiny, 25 M", "ours, throughput on Some GPU, bf16", "throughput on one NVIDIA V100", *KINDS.values()):
        assert words in svg
