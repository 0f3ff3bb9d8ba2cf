"""A signal saves and stops, a second one ends at once, and nobody's handlers are left changed."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
import transformers

from sft import signals
from sft.errors import UserError

FORK = get_context("fork")
ONE_PROCESS = SimpleNamespace(world_size=1, device=torch.device("cpu"))
SECONDS = 60


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(signals, "REPEATS_S", 0.2)


@pytest.fixture(autouse=True)
def terminal_signals():
    """Under nohup and in the background of a shell, pytest itself ignores some."""
    before = {}
    for number in signals.HANDLED_SIGNALS:
        before[number] = signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def end_of_step(stop: signals.StopOnSignal, args=ONE_PROCESS) -> transformers.TrainerControl:
    control = transformers.TrainerControl()
    stop.on_step_end(args, None, control)
    return control


def in_a_fork(function, *arguments) -> int:
    """Return how a process that calls the function ends: its exit code, or minus a signal."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        pytest.fail("the process hangs")
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_after_the_step(number, capsys):
    with signals.StopOnSignal() as stop:
        assert not end_of_step(stop).should_training_stop
        send(number)
        control = end_of_step(stop)
    assert control.should_save
    assert control.should_training_stop
    assert stop.signal_number == number
    assert signal.Signals(number).name in capsys.readouterr().out


def test_a_long_evaluation_can_ask():
    with signals.StopOnSignal() as stop:
        assert not stop.is_requested(ONE_PROCESS)
        send(signal.SIGTERM)
        assert stop.is_requested(ONE_PROCESS)


def send_two(first: int, second: int, seconds_between: float) -> None:
    with signals.StopOnSignal():
        send(first)
        time.sleep(seconds_between)
        send(second)
        time.sleep(0.1)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(second):
    assert in_a_fork(send_two, signal.SIGINT, second, 0) == -second


def receive_repeats() -> None:
    """As from torchrun or timeout, which pass on what the terminal has sent already."""
    signals.REPEATS_S = 1.5
    said = []
    signals.say = said.append
    with signals.StopOnSignal() as stop:
        shell = "for i in 1 2 3; do kill -INT $0; sleep 0.02; done"
        with subprocess.Popen(["sh", "-c", shell, str(os.getpid())]):
            pass
        assert stop.signal_number == signal.SIGINT
        assert end_of_step(stop).should_save
        assert len(said) == 1


def test_a_repeated_signal_is_no_second_one():
    assert in_a_fork(receive_repeats) == 0


def test_a_signal_within_a_print_is_not_lost(monkeypatch):
    """Python refuses to print within a print."""

    def refuse(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(signals, "say", refuse)
    with signals.StopOnSignal() as stop:
        send(signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM


def test_handlers_are_what_they_were():
    before = [signal.getsignal(number) for number in signals.HANDLED_SIGNALS]
    with signals.StopOnSignal():
        send(signal.SIGTERM)
    with contextlib.suppress(ValueError), signals.StopOnSignal():
        raise ValueError
    after = [signal.getsignal(number) for number in signals.HANDLED_SIGNALS]
    assert after == before


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.StopOnSignal() as stop:
        send(signal.SIGHUP)
        assert not end_of_step(stop).should_training_stop
        send(signal.SIGINT)
        send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ---- Several processes --------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def join_group(rank: int, port: int) -> SimpleNamespace:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    return SimpleNamespace(world_size=2, device=torch.device("cpu"))


def stop_the_second(rank: int, port: int) -> None:
    args = join_group(rank, port)
    with signals.StopOnSignal() as stop:
        assert not end_of_step(stop, args).should_training_stop
        if rank == 1:
            send(signal.SIGTERM)
        assert end_of_step(stop, args).should_save
        assert stop.signal_number == signal.SIGTERM


def lose_the_second(rank: int, port: int) -> None:
    join_group(rank, port)
    torch.distributed.barrier()
    if rank == 1:
        os._exit(0)
    with pytest.raises(UserError, match="another process of this run has ended"):
        lose_a_process()


def lose_a_process() -> None:
    with signals.explain_failures():
        for _ in range(100):
            torch.distributed.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("function", [stop_the_second, lose_the_second])
def test_processes_stop_together_and_notice_a_lost_one(function):
    port = free_port()
    other = FORK.Process(target=function, args=(1, port))
    other.start()
    try:
        assert in_a_fork(function, 0, port) == 0
        other.join(SECONDS)
        assert other.exitcode == 0
    finally:
        other.kill()


# ---- Memory -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
    ],
)
def test_a_machine_without_memory_is_a_sentence(error):
    with pytest.raises(UserError, match="memory of this machine"), signals.explain_failures():
        raise error


def test_other_errors_are_shown_as_they_are():
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"), signals.explain_failures():
        raise error
