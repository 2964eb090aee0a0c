"""A stalled process writes its stacks and ends; one that makes progress, or has ended its watch, goes on."""

import subprocess
import sys
import time
from pathlib import Path

from esvit.watchdog import Watchdog
from tests.command_line.commands import ROOT

STALLED = """
import sys, time
from pathlib import Path
import esvit.watchdog as watchdog
watchdog._SECONDS_FOR_THE_OTHERS = 0.05
dog = watchdog.Watchdog(stall_minutes=0.2 / 60, report=Path(sys.argv[1]) / "errors" / "stall_rank_3.txt")
dog.beat("after step 7")
def waits_for_ever():
    time.sleep(60)
waits_for_ever()
"""


def test_a_stalled_process_says_where_it_stands_and_ends(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", STALLED, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: runtime.stall_minutes: no progress for ") and ended.stderr.count("\n") == 1
    report = (tmp_path / "errors" / "stall_rank_3.txt").read_text()
    assert "(after step 7)" in report and "waits_for_ever" in report


def test_progress_keeps_a_process_alive(tmp_path: Path):
    dog = Watchdog(stall_minutes=0.3 / 60, report=tmp_path / "errors" / "stall_rank_0.txt")
    for step in range(6):
        time.sleep(0.1)
        dog.beat(f"after step {step}")
    dog.end()
    assert not (tmp_path / "errors").exists()
