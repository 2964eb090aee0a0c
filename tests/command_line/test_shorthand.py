"""Options of the task without `task.`."""

import pytest

from conf.shorthand import expand


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["task=zoo", "model=swin_tiny_w7_vr"], ["task=zoo", "task.model=swin_tiny_w7_vr"]),
        (["task=export", "format=timm", "checkpoint=a.pt"], ["task=export", "task.format=timm", "checkpoint=a.pt"]),
        (
            ["log_every=5", "online_knn.every_epochs=1", "task.accumulation=2"],
            ["task.log_every=5", "task.online_knn.every_epochs=1", "task.accumulation=2"],
        ),
        (["epochs=3", "backbone.dim=24", "--cfg", "job", "-m"], ["epochs=3", "backbone.dim=24", "--cfg", "job", "-m"]),
        (["task=nothing", "format=timm"], ["task=nothing", "format=timm"]),
    ],
)
def test_an_option_of_the_task_may_stand_by_itself(typed, meant):
    assert expand(typed) == meant
