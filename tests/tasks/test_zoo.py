"""task=zoo: the published table as data, and checkpoints that arrive whole over connections that break."""

import hashlib
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

import conf.schema
from esvit import zoo
from esvit.download import fetch
from esvit.errors import OptionError
from esvit.tasks.zoo import Zoo
from tests.command_line.commands import ROOT, environment

CONTENT = hashlib.shake_256(b"a checkpoint").digest(300_000)
EXPERIMENTS = ROOT / "conf" / "experiment"
PLACE = "/ckpts/esvit/swin/swin_tiny/bl_lr0.0005_gpu16_bs32_dense_multicrop_epoch300/checkpoint_best.pth"


class Storage(http.server.ThreadingHTTPServer):
    """One file behind HTTP, on a server that can be told to misbehave.

    cuts     after how many bytes to cut each of the next connections
    ranges   whether Range is understood
    token    the query string without which the answer is `refusal`
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.cuts: list[int] = []
        self.ranges = True
        self.token: str | None = None
        self.refusal = 403
        self.requests: list[str | None] = []  # the Range of each

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Storage

    def do_GET(self) -> None:
        storage = self.server
        wanted = self.headers.get("Range")
        storage.requests.append(wanted)
        place, _, query = self.path.partition("?")
        if storage.token is not None and query != storage.token:
            return self.send_error(storage.refusal)
        if place != PLACE:
            return self.send_error(404)
        valid = self.headers.get("If-Range") in (None, storage.etag)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and storage.ranges and valid else 0
        if start >= len(storage.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(storage.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(storage.content) - 1}/{len(storage.content)}")
        if storage.etag is not None:
            self.send_header("ETag", storage.etag)
        self.send_header("Content-Length", str(len(storage.content) - start))
        self.end_headers()
        stop = start + storage.cuts.pop(0) if storage.cuts else None
        self.wfile.write(storage.content[start:stop])
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def storage() -> Iterator[Storage]:
    server = Storage()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ESVIT_HOME", str(tmp_path))
    monkeypatch.delenv("ESVIT_ZOO_TOKEN", raising=False)
    return tmp_path


def get(storage: Storage, name: str = "swin_tiny_w7_vr", token: str | None = None) -> None:
    Zoo(model=name, token=token, server=storage.address).run()


def download(storage: Storage, path: Path) -> Path:
    return fetch(storage.address + PLACE, path, token=None, option="task.model", token_option="task.token", pause_seconds=0)


def test_the_table_lists_every_published_model_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    Zoo(model=None, token=None, server=None).run()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words for words in lines if words and words[0] in zoo.models()}
    assert len(rows) == 19
    assert rows["swin_tiny_w7_vr"][-3:] == ["512", "78.0", "75.7"]
    assert rows["swin_tiny_w7_v_openimages"][-4:] == ["OpenImages-v4", "1024", "69.6", "60.3"]
    assert rows["cvt_tiny_w7_vr"][-3:] == ["-", "78.5", "76.7"]


def test_every_model_has_the_addresses_of_its_checkpoint_and_logs() -> None:
    for model in zoo.models().values():
        urls = model.urls(zoo.published_server())
        assert set(urls) == {"checkpoint", "train_log", "linear_log", "knn_log"}
        assert urls["checkpoint"].startswith("https://") and urls["checkpoint"].endswith(".pth")


def test_the_command_prints_the_table_without_importing_torch(tmp_path: Path) -> None:
    command = "sys.argv = ['run.py', 'task=zoo']; runpy.run_path('run.py', run_name='__main__')"
    program = f"import runpy, sys; {command}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "swin_base_w14_vr" in done.stdout


def test_a_checkpoint_is_fetched_once_and_its_checksum_recorded(storage: Storage, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(storage)
    get(storage)
    file = home / "checkpoints" / "swin_tiny_w7_vr.pth"
    assert file.read_bytes() == CONTENT
    assert storage.requests == [None]
    assert (home / "checkpoints" / "swin_tiny_w7_vr.pth.sha256").read_text().split() == [hashlib.sha256(CONTENT).hexdigest(), file.name]
    assert sorted(each.name for each in file.parent.iterdir()) == [file.name, file.name + ".sha256"]
    assert f"checkpoint={file}" in capsys.readouterr().out


def test_a_cut_connection_goes_on_where_it_stopped(storage: Storage, tmp_path: Path) -> None:
    storage.cuts = [100_000, 50_000]
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT
    assert storage.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_download_that_was_given_up_goes_on_in_the_next_command(storage: Storage, tmp_path: Path) -> None:
    storage.cuts = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(OptionError, match="task.model: the connection to 127.0.0.1:.* failed 5 times: it was cut; run this again"):
        download(storage, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT
    assert storage.requests[-1] == "bytes=100000-"


def test_a_server_that_knows_no_ranges_sends_everything_again(storage: Storage, tmp_path: Path) -> None:
    storage.ranges = False
    storage.cuts = [100_000]
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ['"one"', 'W/"weak"', None])
def test_a_file_that_came_whole_but_was_not_put_in_place_yet_is_taken(storage: Storage, tmp_path: Path, etag: str | None) -> None:
    storage.etag = etag
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ['W/"weak"', None])
def test_a_server_without_version_marks_can_be_resumed_too(storage: Storage, tmp_path: Path, etag: str | None) -> None:
    storage.etag = etag
    storage.cuts = [100_000]
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT
    assert storage.requests == [None, "bytes=100000-"]


def test_a_file_that_changed_on_the_server_is_fetched_from_its_beginning(storage: Storage, tmp_path: Path) -> None:
    storage.cuts = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(OptionError):
        download(storage, tmp_path / "file")
    storage.etag = '"two"'
    storage.content = CONTENT[::-1]
    assert download(storage, tmp_path / "file").read_bytes() == CONTENT[::-1]


def test_a_file_put_there_by_hand_is_taken(storage: Storage, home: Path) -> None:
    file = home / "checkpoints" / "swin_tiny_w7_vr.pth"
    file.parent.mkdir()
    file.write_bytes(b"mine")
    get(storage)
    assert storage.requests == []
    assert file.read_bytes() == b"mine"


def test_a_file_that_changed_since_its_first_use_is_refused(storage: Storage, home: Path) -> None:
    get(storage)
    file = home / "checkpoints" / "swin_tiny_w7_vr.pth"
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(OptionError, match="has the checksum .* as when it was first used; remove"):
        get(storage)
    file.unlink()
    get(storage)
    assert file.read_bytes() == CONTENT


def test_a_download_with_another_checksum_than_recorded_is_thrown_away(storage: Storage, home: Path) -> None:
    get(storage)
    file = home / "checkpoints" / "swin_tiny_w7_vr.pth"
    file.unlink()
    storage.content = b"tampered with"
    with pytest.raises(OptionError, match="the downloaded file has the checksum"):
        get(storage)
    assert sorted(each.name for each in file.parent.iterdir()) == [file.name + ".sha256"]


@pytest.mark.parametrize("refusal", [401, 403, 404, 409])
def test_a_refusal_names_its_status_and_the_token(storage: Storage, refusal: int) -> None:
    storage.token, storage.refusal = "sv=1&sig=secret", refusal
    with pytest.raises(
        OptionError, match=f"answers {refusal} .* for checkpoint_best.pth; give the storage's access token as .*ESVIT_ZOO_TOKEN"
    ):
        get(storage)
    assert len(storage.requests) == 1


def test_the_token_opens_the_storage_and_is_never_shown(
    storage: Storage, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.token = "sv=1&sig=secret"
    get(storage, token="?sv=1&sig=secret")
    (home / "checkpoints" / "swin_tiny_w7_vr.pth").unlink()
    monkeypatch.setenv("ESVIT_ZOO_TOKEN", "sv=1&sig=secret")
    get(storage)
    storage.token = "sv=2&sig=other"
    (home / "checkpoints" / "swin_tiny_w7_vr.pth").unlink()
    with pytest.raises(OptionError) as refused:
        get(storage)
    shown = capsys.readouterr()
    assert "secret" not in f"{refused.value} {shown.out} {shown.err}"


def test_an_unknown_model_is_told_with_those_of_similar_names(storage: Storage) -> None:
    with pytest.raises(OptionError, match="task.model: there is no published model 'swin_tiny_w7_rv'; did you mean .*swin_tiny_w7_vr"):
        get(storage, "swin_tiny_w7_rv")


def test_a_server_without_a_web_address_is_refused() -> None:
    with pytest.raises(OptionError, match="task.server: 'files' is no web address"):
        Zoo(model="swin_tiny_w7_vr", token=None, server="files").run()


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the connection to 127.0.0.1:9 failed 5 times: .*refused"):
        fetch("http://127.0.0.1:9/file", tmp_path / "file", token=None, option="task.model", token_option="task.token", pause_seconds=0)


def test_a_home_that_cannot_be_written_is_named(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESVIT_HOME", str(tmp_path / "file"))
    with pytest.raises(OptionError, match="ESVIT_HOME: cannot write '.*swin_tiny_w7_vr.pth' .*; name a folder"):
        get(storage)


def test_two_downloads_of_one_file_do_not_mix(storage: Storage, tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "file.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OptionError, match="another process is downloading"):
            download(storage, tmp_path / "file")


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[[str], dict[str, Any]]]:
    """The options of an experiment, and what was chosen of each group under "choices"."""

    def options(experiment: str) -> dict[str, Any]:
        config = compose("config", [f"experiment={experiment}", "data.root=images"], return_hydra_config=True)
        choices = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        plain = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
        assert isinstance(plain, dict)
        return {"choices": choices} | {str(key): value for key, value in plain.items()}

    conf.schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(EXPERIMENTS.parent), version_base="1.3"):
        yield options


@pytest.mark.parametrize("name", zoo.models())
def test_every_model_has_an_experiment_that_does_what_its_path_says(name: str, composed: Callable[[str], dict[str, Any]]) -> None:
    """The authors wrote learning rate, GPUs, batch and epochs, and from where a second phase went on, into their folders' names."""
    model = zoo.models()[name]
    options = composed(f"published/{name}")
    path = model.files["checkpoint"]
    said = re.search(r"lr(?P<lr>[\d.]+)_.*gpu\d+_bs(?P<bs>\d+)_.*multicrop_epoch(?P<epochs>\d+)", path)
    assert said is not None
    first_epoch = re.search(r"(?:continued_from_?(?:epoch)?|resume_from_ckpt)(\d+)", path)
    assert options["name"] == name
    assert options["choices"]["backbone"] == model.backbone
    assert options["choices"]["loss"] == {"V": "view", "V+R": "view_region"}[model.tasks]
    assert options["optimizer"]["learning_rate"] == float(said["lr"])
    assert options["data"]["batch_size"] == int(said["bs"])
    assert options["epochs"] == int(said["epochs"])
    assert (options["start_epoch"], options["fresh_heads"]) == ((int(first_epoch[1]), "region") if first_epoch else (0, "none"))
    assert options["head"]["norm_last_layer"] == path.endswith("norm_true/checkpoint_best.pth")
    assert (options["precision"], options["optimizer"]["clip"], options["optimizer"]["clip_norm"]) == ("fp16", "parameter", 3.0)
    schedule = options["schedule"]
    assert (schedule["teacher_temperature_start"], schedule["teacher_temperature_end"]) == (0.04, 0.07)
    assert (schedule["teacher_temperature_warmup_epochs"], schedule["warmup_epochs"]) == (30, 10)


@pytest.mark.parametrize("name", zoo.models())
def test_every_experiment_states_claim_command_hardware_and_accuracy(name: str) -> None:
    model = zoo.models()[name]
    head = (EXPERIMENTS / "published" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"# Expect: linear {model.linear:.1f} %, k-NN {model.knn:.1f} %. Ours so far: not measured." in head
    assert f"{model.architecture}, {model.parameters} parameters, {model.tasks}, {model.dataset}" in " ".join(head.replace("#", "").split())
    assert f"experiment=published/{name}" in head and "# Hardware: " in head


def test_the_short_name_is_the_same_experiment(composed: Callable[[str], dict[str, Any]]) -> None:
    assert composed("swin_tiny_w7_vr") | {"choices": 0} == composed("published/swin_tiny_w7_vr") | {"choices": 0}
