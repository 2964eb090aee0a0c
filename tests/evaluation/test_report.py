"""The report and its pictures."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from esvit.evaluation.figures import Panel, crops_grid, curves_svg
from esvit.evaluation.report import write_report

RECORDS: list[dict] = [
    {"step": step, "epoch": 0, "loss/total": 7 - step / 9, "loss/view": 6 - step / 9, "schedule/learning_rate": 1e-3, "health/rank_me": 3}
    for step in range(10, 110, 10)
]
METRICS = {"knn/raw_pixels": 38.25, "knn/color_histogram": 66.14, "knn/untrained": 54.5, "knn/teacher": 62.7}


def crops(batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator) for side in (32, 32, 16, 16, 16)]


def write(path: Path, **changes) -> str:
    arguments: dict = dict(
        title="demo <1>",
        facts={"commit": "abc1234"},
        config={"data": {"batch_size": 32, "root": None}, "backbone": {"_target_": "x.Y", "depths": [2, 2]}, "flag": True},
        records=RECORDS,
        metrics=METRICS,
        crops_png=crops_grid(crops()),
    )
    write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


def test_report_shows_numbers_facts_options_and_notes(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", notes=["3 images < 4 were bad"])
    for text in ("demo &lt;1&gt;", "abc1234", "38.2%", "66.1%", "54.5%", "62.7%", "3 images &lt; 4 were bad"):
        assert text in page
    for option in ("data.batch_size=32", "data.root=null", "backbone.depths=[2,2]", "flag=true"):
        assert option in page
    assert "_target_" not in page


def test_report_says_plainly_what_the_teacher_beats_and_what_beats_it(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    assert "it beats raw pixels by 24.5 and the untrained network by 8.2 points" in page
    assert "and stays behind the colour histogram by 3.4 points." in page
    assert "it beats" not in write(tmp_path / "report.html", metrics=METRICS | {"knn/teacher": 10.0})


def test_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", page)
    assert links and all(link.startswith("data:image/") for link in links)
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(" not in page


def test_pictures_of_the_report_are_whole(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    (png,) = re.findall(r"data:image/png;base64,([^\"]+)", page)
    Image.open(io.BytesIO(base64.b64decode(png))).verify()
    figures = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml', page)
    assert figures == ["Loss", "RankMe", "Learning rate"]  # and no empty frames for what was not logged


def test_report_of_a_run_that_logged_nothing_is_still_a_page(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", records=[], metrics={}, crops_png=None)
    assert "<h1>demo &lt;1&gt;</h1>" in page and "<img" not in page and "<h2>Result</h2>" not in page


def test_values_that_were_not_finite_do_not_break_the_report(tmp_path: Path) -> None:
    records = [*RECORDS, {"step": 110, "epoch": 0, "loss/total": None, "health/rank_me": float("nan")}]
    page = write(tmp_path / "report.html", records=records, metrics=METRICS | {"knn/teacher": float("nan"), "knn/untrained": None})
    assert "not finite" in page and "The trained teacher was not measured." in page


def test_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    before = write(path)
    with pytest.raises(UnicodeEncodeError):
        write(path, title="half a character \ud800")
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_report_takes_the_crops_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "crops.png").write_bytes(crops_grid(crops()))
    assert write(tmp_path / "a.html", crops_png=tmp_path / "crops.png") == write(tmp_path / "b.html")


def test_crops_keep_their_relative_sizes_and_their_pixels() -> None:
    batch = crops(batch=5)
    sheet = Image.open(io.BytesIO(crops_grid(batch, images=2)))
    margin, gap, head, side = 12, 8, 30, 128
    assert sheet.size == (2 * margin + 2 * side + 3 * side // 2 + 4 * gap, head + 2 * (side + gap) + margin - gap)
    first = sheet.crop((margin, head, margin + side, head + side)).resize((32, 32), Image.Resampling.NEAREST)
    left = margin + 2 * (side + gap)
    local = sheet.crop((left, head + 32, left + 64, head + 96)).resize((16, 16), Image.Resampling.NEAREST)
    assert torch.equal(torch.frombuffer(bytearray(first.tobytes()), dtype=torch.uint8).view(32, 32, 3), batch[0][0].permute(1, 2, 0))
    assert torch.equal(torch.frombuffer(bytearray(local.tobytes()), dtype=torch.uint8).view(16, 16, 3), batch[2][0].permute(1, 2, 0))


def test_crops_without_local_ones_make_a_sheet() -> None:
    assert Image.open(io.BytesIO(crops_grid(crops()[:2]))).width == 2 * 12 + 2 * 128 + 8


def test_curves_of_the_same_records_are_the_same_file() -> None:
    panel = Panel("Loss", "", "nats", {"total": "loss/total", "view": "loss/view"}, levels={"chance": 7.0})
    assert curves_svg(panel, RECORDS) == curves_svg(panel, RECORDS)


def test_a_metric_of_fewer_than_two_records_has_no_curve() -> None:
    panel = Panel("k-NN", "", "%", {"teacher": "knn/teacher"})
    assert curves_svg(panel, [*RECORDS, {"step": 110, "epoch": 1, "knn/teacher": 50.0}]) is None
