"""The page and the tables: what they say can be checked by hand, and a hundred runs stay readable."""

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from esvit.comparison.comparison import Comparison, compared
from esvit.comparison.groups import Summary
from esvit.comparison.page import measured, write_comparison
from esvit.comparison.runs import Gathered, Run
from esvit.comparison.tables import markdown, write_groups, write_runs
from esvit.errors import OptionError
from tests.comparison.folders import PROTOCOL, run

METRICS = ["knn/*", "loss/total"]


def comparison(runs: Sequence[Run], **changes: Any) -> Comparison:
    chosen: dict[str, Any] = {"title": "a <b> title", "sources": "here", "metrics": METRICS, "best": "auto", "rank_by": None, "cost": None}
    return compared(Gathered(list(runs)), **(chosen | changes))


def two_losses(seeds: int = 3) -> list[Run]:
    """View: 68, 70, 72; both: 71, 73, 75."""
    return [
        run(f"{loss}_seed{seed}", {"knn/teacher": [40.0, start + 2.0 * seed], "loss/total": [6.0, 5.0]}, seed=seed, choices__loss=loss)
        for loss, start in (("view", 68.0), ("both", 71.0))
        for seed in range(seeds)
    ]


def page(found: Comparison, folder: Path) -> str:
    write_comparison(folder / "compare.html", found)
    return (folder / "compare.html").read_text()


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        (None, "–"),
        (Summary(71.234, None, 1, False), "71.23"),
        (Summary(71.234, 0.4567, 3, False), "71.23 ± 0.46"),
        (Summary(0.01234, 0.0005, 2, True), "0.01234 ± 0.00050†"),
        (Summary(math.nan, math.nan, 2, False), "not finite"),
        (Summary(2.5e9, 1.2e7, 2, False), "2.500e+09 ± 1.200e+07"),
    ],
)
def test_a_mean_is_written_with_its_deviation_in_the_same_decimals(summary, told):
    assert measured(summary) == told


def test_fewer_values_than_finished_runs_are_told():
    assert measured(Summary(70.0, 1.0, 2, False), among=3) == "70.00 ± 1.00 (n=2)"


def test_the_page_shows_groups_by_rank_and_the_best_in_bold(tmp_path):
    text = page(comparison(two_losses()), tmp_path)
    assert "a &lt;b&gt; title" in text
    rows = re.findall(r'<tr data-g="(\d)"><th scope="row">.*?</span>(\w+)</th>', text)
    assert rows[:2] == [("0", "both"), ("1", "view")]
    assert "<b>73.00 ± 2.00</b>" in text
    assert "70.00 ± 2.00" in text and "<b>70.00 ± 2.00</b>" not in text


def test_the_page_stands_alone(tmp_path):
    text = page(comparison(two_losses()), tmp_path)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert text.count("<script>") == 1


def test_every_group_lights_up_in_curves_and_coordinates(tmp_path):
    text = page(comparison(two_losses()), tmp_path)
    for place in (0, 1):
        assert text.count(f'<g class="mark" data-g="{place}">') == 3  # two metrics' curves, and the parallel coordinates


def test_results_are_drawn_over_a_cost_where_it_differs(tmp_path):
    runs = [run(f"r{rate}", {"knn/teacher": 70.0 + rate, "hours": float(rate)}, optimizer__learning_rate=rate) for rate in (1, 2, 3)]
    found = comparison(runs, metrics=["knn/teacher"])
    assert found.cost == "hours"
    text = page(found, tmp_path)
    assert "Result and cost" in text
    assert "hours of training (smaller is better)" in text


def test_an_option_may_be_the_cost():
    runs = [run(f"r{count}", {"knn/teacher": 70.0 + count}, head__prototypes=count) for count in (1, 2)]
    found = comparison(runs, cost="head.prototypes")
    assert (found.cost, found.lower_cost) == ("head.prototypes", True)


def test_a_run_alone_has_a_page_too(tmp_path):
    text = page(comparison(two_losses(1)[:1]), tmp_path)
    assert "None but the seed" in text
    assert "Result and cost" not in text


def test_runs_without_any_metric_are_told_so(tmp_path):
    found = comparison([run("a", {}), run("b", {}, epochs=2)])
    assert found.by is None
    assert any("No run has a metric" in note for note in found.notes)
    page(found, tmp_path)


def test_a_reader_is_told_of_unfinished_runs_protocols_and_losses_that_do_not_compare():
    other = {**PROTOCOL, "frozen": {"crop": 128}}
    runs = [
        run("a", {"knn/top1": 50.0}, protocol=PROTOCOL),
        run("b", {"knn/top1": 60.0}, protocol=other, epochs=2),
        run("c", {"loss/total": 5.0}, status="killed", epochs=3, head__prototypes=2),
        run("d", {"loss/total": 4.0}, epochs=3, head__prototypes=3),
    ]
    notes = "\n".join(comparison(runs).notes)
    assert "1 of 4 runs has not finished: c (killed)" in notes
    assert "knn/top1: measured by 2 protocols (frozen.crop=96 / frozen.crop=128)" in notes
    assert "loss/total: the numbers depend on options that differ between these runs (head.prototypes)" in notes


def test_runs_of_different_tasks_are_told():
    runs = [run("a", {"knn/top1": 1.0}), run("b", {"knn/top1": 2.0}, choices__task="knn")]
    assert any("runs of different tasks (knn, pretrain)" in note for note in comparison(runs).notes)


def test_repeated_seeds_and_versions_of_the_code_are_told():
    from dataclasses import replace

    runs = [replace(run(f"r{place}", {"knn/teacher": 70.0}), tags={"git.commit": f"{place}" * 40}) for place in (1, 2)]
    notes = "\n".join(comparison(runs).notes)
    assert "Several runs of one seed" in notes
    assert "2 versions of the code: 1111111111, 2222222222" in notes


def test_the_deciding_metric_can_be_chosen_and_has_to_exist():
    runs = two_losses()
    assert comparison(runs).by.metric == "knn/teacher"  # type: ignore[union-attr]
    assert comparison(runs, rank_by="loss/*").by.metric == "loss/total"  # type: ignore[union-attr]
    with pytest.raises(OptionError, match=r"^task\.rank_by: .* there are: knn/teacher, loss/total$"):
        comparison(runs, rank_by="knn/techer")
    with pytest.raises(OptionError, match=r"^task\.cost: no run has a number called 'price'"):
        comparison(runs, cost="price")


def test_a_metric_that_compares_decides_before_one_that_does_not():
    runs = [run(f"r{count}", {"loss/total": 5.0, "knn/teacher": 50.0 + count}, head__prototypes=count) for count in (1, 2)]
    assert comparison(runs, metrics=["loss/total", "knn/*"]).by.metric == "knn/teacher"  # type: ignore[union-attr]


def test_speed_decides_only_where_it_was_asked_for_or_nothing_else_was_measured():
    runs = [run(f"r{count}", {"loss/total": 5.0, "images_per_second": 5.0 + count}, head__prototypes=count) for count in (1, 2)]
    metrics = ["loss/total", "images_per_second"]
    assert comparison(runs, metrics=metrics).by.metric == "loss/total"  # type: ignore[union-attr]
    assert comparison(runs, metrics=metrics, rank_by="images*").by.metric == "images_per_second"  # type: ignore[union-attr]
    assert comparison(runs, metrics=["images_per_second"]).by.metric == "images_per_second"  # type: ignore[union-attr]


def test_a_hundred_groups_keep_the_page_small(tmp_path):
    values = [float(value) for value in range(1000)]
    runs = [run(f"run {rate}", {"knn/teacher": values}, optimizer__learning_rate=rate, seed=seed) for rate in range(100) for seed in (0, 1)]
    text = page(comparison(runs), tmp_path)
    assert len(text) < 2_000_000
    assert "Colour goes from strong to pale" in text
    assert '<details class="card"><summary>200 runs' in text


def test_markdown_is_a_table_for_a_paper():
    lines = markdown(comparison(two_losses())).splitlines()
    assert lines[2] == "| group | loss | n | knn/teacher ↑ | loss/total ↓ |"
    assert lines[4] == "| both | both | 3 | **73.00 ± 2.00** | 5.000 ± 0.000 |"
    assert lines[5] == "| view | view | 3 | 70.00 ± 2.00 | 5.000 ± 0.000 |"


def test_markdown_has_the_best_values_on_the_way_where_they_are_others():
    runs = [run(f"r{rate}", {"knn/teacher": [80.0, 70.0 + rate]}, optimizer__learning_rate=rate) for rate in (1, 2)]
    text = markdown(comparison(runs))
    assert text.count("| **72.00** |") == 1
    assert text.count("| **80.00** |") == 2


def test_csv_has_every_group_and_every_run(tmp_path):
    found = comparison(two_losses())
    write_groups(tmp_path / "groups.csv", found)
    write_runs(tmp_path / "runs.csv", found)
    with (tmp_path / "groups.csv").open() as file:
        both, view = csv.DictReader(file)
    assert (both["group"], both["choices.loss"], both["finished"]) == ("both", "both", "3")
    assert (float(view["knn/teacher final mean"]), float(view["knn/teacher final std"]), view["knn/teacher best n"]) == (70.0, 2.0, "3")
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert (rows[5]["run"], rows[5]["seed"], rows[5]["knn/teacher final"], rows[5]["knn/teacher step"]) == ("view_seed2", "2", "72.0", "20")
