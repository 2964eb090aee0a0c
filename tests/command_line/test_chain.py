"""Evaluations that go with a pre-training: after its end, of each kept teacher, and of a run that is named later."""

import json

from tests.command_line.commands import checkpoint, succeeded

KNN = "knn neighbours=[1] frozen.cache=null"


def evaluated(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_evaluations_follow_a_training_and_see_its_teachers(commands, tiny, images, tmp_path):
    run = tmp_path / "run"
    options = (*tiny, f"data.val_root={images / 'val'}", f"output_dir={run}", "evaluate_every=1", f"evaluate='{KNN}'", f"then=['{KNN}']")
    succeeded(commands.run(*options))
    assert sorted(file.name for file in (run / "teachers").iterdir()) == ["teacher_0000004.pt", "teacher_0000008.pt"]
    assert sorted(folder.name for folder in (run / "evaluations").iterdir()) == ["knn", "knn_step_4", "knn_step_8"]
    assert [(each["task"], each["step"]) for each in evaluated(run)] == [("knn", 4), ("knn", 8), ("knn", 8)]
    assert evaluated(run)[1]["knn/top1_k1"] == evaluated(run)[2]["knn/top1_k1"]
    last = json.loads((run / "evaluations" / "knn_step_8" / "protocol.json").read_text())
    assert last["frozen"]["crop"] == 32  # as the global crops

    again = succeeded(commands.run(*options))  # all is done
    assert len(evaluated(run)) == 3 and "nothing to do" in again.out
    assert checkpoint(run)["step"] == 8


def test_a_mistake_in_an_evaluation_shows_before_the_training(commands, tiny, tmp_path):
    for then, found in (("[nonsense]", "then: 'nonsense' is no evaluation"), ("['knn frozen.crops=3']", "did you mean task.frozen.crop?")):
        outcome = commands.run(*tiny, f"output_dir={tmp_path / 'run'}", f"then={then}")
        assert outcome.code == 1 and found in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
