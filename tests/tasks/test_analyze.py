"""task=analyze: the whole of it once for every architecture, and what its options change."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit.augmentations.evaluation import Normalize
from esvit.backbones.base import Backbone
from esvit.errors import OptionError
from esvit.evaluation.frozen import Frozen
from esvit.tasks.analyze import Analyze
from esvit.tasks.analyze_parts import AttentionMaps, RegionColors, RegionMatches
from tests.backbones.networks import Convolutions, micro_cvt, micro_vil, micro_vit, swin
from tests.tasks.colours import evaluate

SIDE = 64
ATTENTION: dict[str, Any] = {"query": None, "threshold": 0.6}
COLORS: dict[str, Any] = {"sizes": [SIDE], "foreground": False}
MATCHES: dict[str, Any] = {"pairs": 3, "photos": None, "scale": [0.4, 1.0], "photometric": True, "saved": None}


def tiny_swin() -> Backbone:
    return swin(depths=[1, 1], heads=[1, 2], dim=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cats/one", "cats/two", "dogs/three", "dogs/four"):
        (folder / name).parent.mkdir(exist_ok=True)
        squares = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        squares.resize((100, 80), Image.Resampling.NEAREST).save(folder / f"{name}.png")
    return folder


def analyze(photos: Path, folder: Path, backbone: Backbone, **changes: Any) -> dict[str, float]:
    """The numbers of an analysis of one photo."""
    options: dict[str, Any] = {
        "images": str(photos),
        "max_photos": 1,
        "dataset": None,
        "max_images": 4,
        "entropy_images": 2,
        "queries": 2,
        "neighbours": 2,
        "batch_size": 2,
        "workers": 0,
        "attention": AttentionMaps(**ATTENTION | changes.pop("attention", {})),
        "colors": RegionColors(**COLORS | changes.pop("colors", {})),
        "matches": RegionMatches(**MATCHES | changes.pop("matches", {})),
        "name": "micro <1>",
    }
    frozen = Frozen(
        backbone=backbone,
        checkpoint=None,
        network="untrained",
        resize_positions=False,
        normalize=Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        resize=SIDE,
        crop=SIDE,
        cache=None,
    )
    return evaluate(Analyze(frozen=frozen, **(options | changes)), folder)


def pictures(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


COMMON = {"matches/one.png", "views/one_1.png", "views/one_2.png", "region_colors.png", "neighbours.png"}


@pytest.mark.parametrize(("make", "blocks"), [(swin, 6), (micro_cvt, 4), (micro_vil, 4), (micro_vit, 3)], ids=["swin", "cvt", "vil", "vit"])
def test_every_transformer_leaves_pictures_numbers_and_a_page(make, blocks: int, photos: Path, tmp_path: Path) -> None:
    metrics = analyze(photos, tmp_path, make())
    assert pictures(tmp_path) == COMMON | {"attention/one.png", "attention_heads/one.png", "attention_entropy.png"}
    assert {f"analyze/entropy_block_{number}" for number in range(1, blocks + 1)} <= metrics.keys()
    assert f"analyze/entropy_block_{blocks + 1}" not in metrics
    assert all(0 <= metrics[f"analyze/entropy_share_block_{number}"] <= 1 for number in range(1, blocks + 1))
    with open(tmp_path / "attention_entropy.csv") as file:
        first = [float(row["bits"]) for row in csv.DictReader(file) if row["block"] == "1"]
    assert metrics["analyze/entropy_block_1"] == pytest.approx(sum(first) / len(first), abs=1e-5)
    page = (tmp_path / "report.html").read_text()
    for title in ("micro &lt;1&gt;", "Where the network looks", "How widely each head looks", "Which images are alike"):
        assert title in page
    assert ("class token" in page) == (make in (micro_vil, micro_vit))
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'>\s]+)""", page)
    assert len(links) == 1 + 6 and all(link.startswith("data:image/") for link in links)  # icon, and six pictures
    protocol = json.loads((tmp_path / "protocol.json").read_text())
    assert protocol["task"] == "analyze" and protocol["attention"] == ATTENTION


def test_a_network_without_attention_is_analysed_in_all_else(photos: Path, tmp_path: Path) -> None:
    metrics = analyze(photos, tmp_path, Convolutions(class_token=False))
    assert pictures(tmp_path) == COMMON and not any("entropy" in name for name in metrics)
    page = (tmp_path / "report.html").read_text()
    assert "Convolutions has no attention: maps and entropies of attention are left out." in page
    assert "Where the network looks" not in page and "Which regions are alike" in page


def test_saved_views_give_the_same_matches_again(photos: Path, tmp_path: Path) -> None:
    first = analyze(photos, tmp_path / "first", tiny_swin(), queries=0)
    again = analyze(
        photos, tmp_path / "again", tiny_swin(), queries=0, matches={"saved": str(tmp_path / "first" / "views"), "scale": [0.1, 0.2]}
    )
    for name in ("analyze/match_similarity", "analyze/match_mutual_percent"):
        assert first[name] == again[name]
    for view in ("one_1.png", "one_2.png"):
        assert (tmp_path / "first" / "views" / view).read_bytes() == (tmp_path / "again" / "views" / view).read_bytes()
    assert "neighbours.png" not in pictures(tmp_path / "again")  # for no queries


def test_options_change_what_is_drawn(photos: Path, tmp_path: Path) -> None:
    """A query, two photos matched with each other, more photos at more sizes, a dataset with classes."""
    files = [str(photos / name) for name in ("cats/one.png", "dogs/four.png")]
    metrics = analyze(
        photos, tmp_path, tiny_swin(), images=files, max_photos=2, dataset=str(photos),
        attention={"query": [0.25, 0.5]}, matches={"photos": files}, colors={"sizes": [32, SIDE], "foreground": True},
    )  # fmt: skip
    assert {"matches/one_and_four.png", "attention/one.png", "attention/four.png"} <= pictures(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "25% from the top and 50% from the left" in page and "Dark is the background" in page
    assert f"4 images of {photos}" in page
    assert 0 <= metrics["analyze/neighbours_same_class_percent"] <= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_photos": 0}, "task.max_photos: 0 is too small; use 1 or more"),
        ({"dataset": "/nowhere"}, "task.dataset: folder '/nowhere' does not exist"),
        ({"attention": {"query": [50, 50]}}, r"task.attention.query: \[50, 50\]; give a row and a column as shares"),
        ({"attention": {"threshold": 60}}, "task.attention.threshold: 60; use a share between 0 and 1"),
        ({"colors": {"sizes": [2]}}, "task.colors.sizes: the backbone cannot take images of 2 pixels"),
        ({"colors": {"sizes": []}}, "task.colors.sizes: an empty list"),
        ({"matches": {"photos": ["one.png"]}}, "task.matches.photos: 1 photos; give two"),
        ({"matches": {"scale": [0.5, 2]}}, "task.matches.scale"),
        ({"matches": {"pairs": 0}}, "task.matches.pairs: 0 pairs"),
        ({"matches": {"saved": "/nowhere"}}, "task.matches.saved: folder '/nowhere' does not exist"),
    ],
)
def test_mistakes_end_the_analysis_before_it_writes(changes: dict, message: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        analyze(photos, tmp_path / "run", tiny_swin(), **changes)
    assert not (tmp_path / "run").exists()


def test_saved_views_have_to_be_of_these_photos_and_this_size(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no '.*one_1\.png'; give the folder views/ of an analysis of the same photos"):
        analyze(photos, tmp_path / "run", tiny_swin(), matches={"saved": str(photos)})
    for number in (1, 2):
        Image.new("RGB", (48, 48)).save(tmp_path / f"one_{number}.png")
    with pytest.raises(OptionError, match="has 48 x 48 pixels, and frozen.crop is 64; use frozen.crop=48"):
        analyze(photos, tmp_path / "run", tiny_swin(), matches={"saved": str(tmp_path)})
