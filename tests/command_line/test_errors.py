"""A user's mistake is told in one line that names the option and the remedy, with exit code 1, before any work and any run folder."""

import re
import subprocess
import sys

import pytest

from tests.command_line.commands import ROOT, Outcome, environment


def told(outcome: Outcome) -> str:
    """The one line, without its "error: "."""
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    return outcome.err.removeprefix("error: ").strip()


# arguments after those of a tiny run (the last of an option counts) -> the option named, what was found, and the remedy
MISTAKES = {
    "misspelt key": (["head.hiden_dim=3"], "head.hiden_dim", "no such option", "did you mean head.hidden_dim?"),
    "key without likeness": (["head.zzz=3"], "head.zzz", "no such option", "hidden_dim"),
    "misspelt top-level key": (["epoch=3"], "epoch", "no such option", "did you mean epochs?"),
    "experiment of another task": (["experiment=demo", "task=preview"], "experiment=demo", "sets task.log_every", "choose its task"),
    "misspelt option of the task": (["log_evry=5"], "task.log_evry", "no such option", "did you mean task.log_every?"),
    "new key": (["+new.key=1"], "new", "no such option", "there are"),
    "new key in a group": (["+data.rot=1"], "data.rot", "no such option", "did you mean data.root?"),
    "wrong type": (["epochs=many"], "epochs", "many", "give it a value of the right type"),
    "wrong type in a group": (["data.batch_size=4.5"], "data.batch_size", "4.5", "give it a value of the right type"),
    "unknown choice": (["backbone=resnet51"], "backbone", "there is no 'resnet51'", "swin_tiny"),
    "unknown group": (["bakcbone=swin_tiny"], "bakcbone", "no such option", "did you mean backbone?"),
    "unknown experiment": (["experiment=dmeo"], "experiment", "there is no 'dmeo'", "demo"),
    "unreadable override": (["data.root=[a"], "data.root=[a", "cannot be read", "option=value"),
    "word without value": (["backbone"], "backbone", "cannot be read", "option=value"),
    "precision": (["precision=bf61"], "precision", "bf61", "fp32, bf16"),
    "local launcher has one process": (["launcher.processes=2"], "launcher.processes", "no such option", "launcher=gpus"),
    "option of another loss": (["loss=view", "loss.view_weight=1"], "loss.view_weight", "no such option", "an option of loss=view_region"),
    "folder that does not exist": (["data.root=/no/such/folder"], "data.root", "'/no/such/folder' does not exist", "existing folder"),
    "folder without images": (["data.root={empty}"], "data.root", "holds no images", "one folder of images per class"),
    "file for a folder": (["data.root={file}"], "data.root", "is a file", "give the folder"),
    "batch larger than the set": (["data.batch_size=17"], "data.batch_size", "17 images", "at most data.batch_size=16"),
    "crops too small": (["augmentation.local_crops_size=2"], "augmentation.local_crops_size", "2 pixels", "larger"),
    "warm-up longer than training": (["schedule.warmup_epochs=3"], "schedule.warmup_epochs", "3", "2"),
    "no CUDA": (["device=cuda"], "device", "no CUDA device", "device=cpu"),
    "k-NN without validation": (["task.online_knn.every_epochs=1"], "data.val_root", "is not set", "give the validation folder"),
    "more neighbours than images": (
        ["task.online_knn.every_epochs=1", "data.val_root={val}"], "task.online_knn.neighbours", "20 neighbours among 16", "at most 16"
    ),
    "no such checkpoint": (["checkpoint=/no/such/file.pt"], "checkpoint", "no file '/no/such/file.pt'", "give a checkpoint file"),
    "checkpoint that is none": (["checkpoint={file}"], "checkpoint", "cannot be read", "give a checkpoint that this program wrote"),
    "tracking in files": (["tracking=mlflow", "tracking.uri=file:/tmp/mlruns"], "tracking.uri", "file:/tmp/mlruns", "sqlite:///"),
    "no steps": (["max_steps=0"], "max_steps", "0 is too small", "1 or more"),
    "no layers": (["head.layers=0"], "head.layers", "0 layers", "1 or more"),
    "unknown class": (["data.classes=[ant]"], "data.classes", "'ant' is none of the", "use their names"),
    "list without a list": (["data=list"], "data.train_list", "has no value", "give one"),
    "depth": (["data.depth=12"], "data.depth", "12 bits per value", "use 8 or 16"),
    "negative seed": (["seed=-1"], "seed", "-1", "0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(mistake, commands, tiny, images, tmp_path):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    places = {"{empty}": tmp_path / "empty", "{file}": tmp_path / "file", "{val}": images / "val"}
    arguments, option, found, remedy = MISTAKES[mistake]
    for name, place in places.items():
        arguments = [each.replace(name, str(place)) for each in arguments]
    work = tmp_path / "work"
    work.mkdir()
    line = told(commands.run(*tiny, *arguments, folder=work))
    assert option in line.split(" ")[0].strip("':") or line.startswith(f"'{option}'")
    assert found in line
    assert remedy in line
    assert list(work.iterdir()) == []


def test_a_missing_data_root_names_the_option(commands, tiny, tmp_path):
    line = told(commands.run(*(each for each in tiny if not each.startswith("data.root")), folder=tmp_path))
    assert line.startswith("data.root: ")
    assert "data.root=" in line.partition("; ")[2]
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_the_task_does_not_use_is_told(commands, tmp_path):
    outcome = commands.run("task=finetune", "schedule.warmup_epochs=3", "data.root=/no/such/folder", f"output_dir={tmp_path / 'run'}")
    assert outcome.err.splitlines()[0] == "warning: schedule.warmup_epochs has no effect: task=finetune uses no schedule"


def test_a_file_as_output_folder_is_refused(commands, tiny, tmp_path):
    (tmp_path / "file").write_text("text")
    assert told(commands.run(*tiny, f"output_dir={tmp_path / 'file'}")).startswith("output_dir: ")
    assert told(commands.run(*tiny, f"output_dir={tmp_path / 'file' / 'run'}")).startswith("output_dir: ")
    assert (tmp_path / "file").read_text() == "text"


def test_changed_options_are_refused_with_the_list_of_keys(commands, tiny, reference):
    before = (reference / "config.yaml").read_bytes()
    line = told(commands.run(*tiny, f"output_dir={reference}", "seed=1", "head.prototypes=32", "loss=view", "epochs=1"))
    assert line.startswith("output_dir: ")
    for described in ("seed (0 -> 1)", "head.prototypes (64 -> 32)", "loss.region_weight (0.5 -> None)", "epochs (2 -> 1)"):
        assert described in line
    assert (reference / "config.yaml").read_bytes() == before


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(300)
"""


def test_a_folder_that_another_process_writes_to_is_refused(commands, tiny, tmp_path):
    """Locks belong to processes, so that the holder has to be another one."""
    run = tmp_path / "run"
    run.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run / "tracking.lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        line = told(commands.run(*tiny, f"output_dir={run}"))
        assert line.startswith("output_dir: ") and "is writing to" in line and "another folder" in line
    finally:
        holder.kill()
        holder.wait()


LIGHT = """
import sys
sys.path.insert(0, {root!r})
import run
for arguments in (["--help"], ["head.hiden_dim=3"], ["backbone=resnet51"]):
    sys.argv = ["run.py", *arguments]
    try:
        run.main()
    except SystemExit as end:
        print(end.code)
print(sorted({{"torch", "mlflow", "numpy", "matplotlib", "hydra"}} & {{name.partition(".")[0] for name in sys.modules}}))
"""


def test_help_and_mistyped_keys_import_no_torch(tmp_path):
    """The one test of this file that has to be a fresh interpreter."""
    (tmp_path / "light.py").write_text(LIGHT.format(root=str(ROOT)))
    ended = subprocess.run([sys.executable, "light.py"], cwd=tmp_path, capture_output=True, text=True, env=environment())
    *printed, wrong_key, wrong_choice, imported = ended.stdout.splitlines()
    assert ended.stderr == ""
    assert wrong_key.startswith("error: head.hiden_dim: no such option")
    assert wrong_choice.startswith("error: backbone: there is no 'resnet51'")
    assert imported == "['hydra']"
    shown = "\n".join(printed)
    groups = shown.partition("\ngroups:\n")[2].partition("\n\n")[0]
    for folder in sorted(path for path in (ROOT / "conf").iterdir() if list(path.glob("*.yaml"))):
        listed = re.search(rf"^  {folder.name} (.*(?:\n    .*)*)", groups, re.MULTILINE)
        assert listed is not None
        choices = [str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml")]
        assert sorted(each.strip() for each in listed[1].split(",")) == sorted(choices)
    for option in ("device", "precision", "seed", "epochs", "max_steps", "checkpoint_every", "checkpoint", "output_dir"):
        assert f"\n  {option} " in shown
