"""Device, keyed randomness, and the stop signal on which ranks agree."""

import multiprocessing
import os
import signal
import socket

import numpy as np
import pytest
import torch

from esvit import distributed
from esvit.errors import Interrupted, OptionError
from esvit.run_folder import RunFolder
from esvit.runtime import Runtime


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """A runtime sets switches of the whole process."""
    threads, mode, generator = torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)
    torch.set_rng_state(generator)


def runtime(**options) -> Runtime:
    defaults: dict = {
        "device": "cpu",
        "precision": "fp32",
        "seed": 3,
        "deterministic": None,
        "threads": 1,
        "timeout_minutes": 1.0,
        "stall_minutes": 0,
    }
    return Runtime(**(defaults | options))


class _Tracker:
    """Records how it was closed; a real one needs a real run."""

    def __init__(self):
        self.status = None

    def open(self, *, run_folder, config, is_main):
        return self

    def close(self, status):
        self.status = status


def test_it_sets_threads_and_determinism_and_gives_the_signals_back():
    before = signal.getsignal(signal.SIGTERM)
    with runtime(threads=2) as entered:
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert (entered.rank, entered.world_size, entered.is_main) == (0, 1, True)
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with runtime(deterministic=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_entering_seeds_the_weights():
    with runtime():
        one = torch.nn.Linear(3, 3).weight
    with runtime():
        same = torch.nn.Linear(3, 3).weight
    with runtime(seed=4):
        other = torch.nn.Linear(3, 3).weight
    assert one.equal(same) and not one.equal(other)


def draws(generator: np.random.Generator) -> list[float]:
    return [*torch.rand(3).tolist(), *generator.random(3).tolist()]


def test_what_a_step_draws_depends_on_seed_and_step_alone():
    with runtime() as one:
        first, second = draws(one.seed_step(5)), draws(one.seed_step(6))
        torch.rand(7)
        assert draws(one.seed_step(5)) == first
    with runtime(seed=4) as two:
        other = draws(two.seed_step(5))
    assert not set(first) & set(second) and not set(first) & set(other)


def test_each_rank_draws_numbers_of_its_own(monkeypatch):
    with runtime() as one:
        first = draws(one.seed_step(5))
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        assert not set(first) & set(draws(one.seed_step(5)))


def test_a_signal_is_kept_until_it_is_asked_for():
    with runtime() as one:
        assert one.stop_signal() == 0
        os.kill(os.getpid(), signal.SIGUSR2)
        assert one.stop_signal() == signal.SIGUSR2


def test_a_second_ctrl_c_does_not_wait():
    with runtime() as one, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert one.stop_signal() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_the_type_of_matrix_products(precision, expected):
    with runtime(precision=precision) as one, one.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (Interrupted(15, 3), "KILLED"), (OptionError("a", "b", "c"), "FAILED"), (KeyboardInterrupt(), "FAILED")],
)
def test_the_tracker_learns_how_the_run_ended(error, status, tmp_path):
    tracker = _Tracker()
    with runtime() as one:
        one.records_to(RunFolder(tmp_path / "run"), tracking=tracker, config={"epochs": 1, "max_steps": None})
        try:
            with one.recording() as opened:
                assert opened is tracker
                assert (tmp_path / "run" / "config.yaml").exists()
                if error is not None:
                    raise error
        except type(error) as raised:
            assert raised is error
    assert tracker.status == status


@pytest.mark.parametrize(("options", "environment", "option"), [
    ({"device": "cuda"}, {}, "device"),
    ({"device": "mps"}, {}, "device"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_a_users_mistake(options, environment, option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(OptionError) as error:
        runtime(**options)
    assert error.value.option == option


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert runtime(threads=None).threads == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert runtime(threads=None).threads == 2


def _vote(rank: int, port: int, answers: "multiprocessing.Queue") -> None:
    """Rank 1 is told to stop in step 3."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with runtime() as one:
        heard: list[int] = []
        while not heard or not heard[-1]:
            if rank == 1 and len(heard) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            heard.append(one.stop_signal())
        drawn = draws(one.seed_step(5))
    answers.put((rank, heard, drawn))


def test_ranks_stop_in_the_same_step_and_draw_different_numbers():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_vote, args=(rank, port, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    (_, first, drawn), (_, second, others) = sorted(answers.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert first == second == [0, 0, 0, 0, signal.SIGTERM]
    assert not set(drawn) & set(others)
