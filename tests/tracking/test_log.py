"""log.jsonl: valid JSON whatever the numbers are, whole records whatever kills the process."""

import json
import math
from pathlib import Path

import pytest

from esvit.tracking.log import LogFile, read_records


def filled(path: Path, steps: range) -> LogFile:
    log = LogFile(path)
    for step in steps:
        log.append(step=step, epoch=step // 10, time=1.5 * step, metrics={"loss/total": 1 / step})
    return log


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)[0]]


def test_records_come_back_as_they_were_logged(tmp_path: Path) -> None:
    filled(tmp_path / "log.jsonl", range(1, 4))
    records, offset = read_records(tmp_path / "log.jsonl")
    assert records[2] == {"step": 3, "epoch": 0, "time": 4.5, "loss/total": 1 / 3}
    assert offset == (tmp_path / "log.jsonl").stat().st_size
    assert read_records(tmp_path / "log.jsonl", offset) == ([], offset)


def test_numbers_that_json_lacks_are_written_as_valid_json_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    LogFile(path).append(step=1, epoch=0, time=0.0, metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "d": 2})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert (strict["a"], strict["b"], strict["c"], strict["d"]) == ("NaN", "Infinity", "-Infinity", 2)
    (record,), _ = read_records(path)
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf


def test_a_torn_last_line_is_passed_over_by_readers_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    filled(path, range(1, 6)).close()
    with path.open("a") as file:
        file.write('{"step": 6, "epo')
    assert steps_of(path) == [1, 2, 3, 4, 5]
    log = LogFile(path)
    assert log.last_step == 5
    log.append(step=6, epoch=0, time=0.0, metrics={})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_records_after_the_resumed_step_are_dropped_and_logged_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = filled(path, range(1, 21))
    assert log.keep_up_to(10) == 10
    assert steps_of(path) == list(range(1, 11))
    log.append(step=11, epoch=1, time=0.0, metrics={})
    log.sync_to_disk()
    assert steps_of(path) == list(range(1, 12))


def test_steps_grow_and_reserved_names_are_refused(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl", range(1, 4))
    with pytest.raises(ValueError, match="step 3 was logged after step 3"):
        log.append(step=3, epoch=0, time=0.0, metrics={})
    with pytest.raises(ValueError, match="'epoch'"):
        log.append(step=4, epoch=0, time=0.0, metrics={"epoch": 1.0})
    assert steps_of(tmp_path / "log.jsonl") == [1, 2, 3]


def test_a_large_log_is_read_in_pieces_of_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    filled(path, range(1, 200))
    steps, offset = [], 0
    while True:
        records, end = read_records(path, offset, 500)
        if end == offset:
            break
        assert len(records) < 20
        steps += [record["step"] for record in records]
        offset = end
    assert steps == list(range(1, 200))
