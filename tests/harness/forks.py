"""Run functions in processes forked from one that has imported everything: a start is quick.

That process has computed nothing, so that no library's thread is lost in a fork.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from unittest import mock

import accelerate
import torch
from runs import ROOT

import sft.plan
import sft_qwen2
from sft.precision import choose_precision

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported"])
# The server looks for modules in neither sys.path nor, for safety, the working directory.
SERVER_ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'harness'}",
    "PYTHONSAFEPATH": "1",
}
HANGS_S = 300  # a process that takes longer is killed; long, for a busy machine
CAPABILITIES = {"bf16": (8, 0), "fp16": (7, 0), "fp32": None}  # of the GPU that a CPU stands for


@dataclass
class Ended:
    """Processes that have ended: exit codes, below 0 if killed by a signal, and what they wrote."""

    codes: list[int]
    texts: list[str]


def run(log: Path, *calls: tuple, outlive_s: float = 0.0, cache: Path | None = None) -> Ended:
    """Call each of calls, (function, *arguments), in a process of its own, as torchrun would.

    What each process writes goes to log-0, log-1, ... Where one is killed by a signal, the others
    are killed, too, after outlive_s seconds.
    """
    with mock.patch.dict(os.environ, SERVER_ENVIRONMENT):
        forkserver.ensure_running()  # the first call starts the server
    port = find_free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    logs = []
    processes = []
    for rank, call in enumerate(calls):
        environment = {"HF_DATASETS_CACHE": str(cache or log.parent / "cache")}
        if len(calls) > 1:
            environment.update(environment_of_rank(rank, len(calls), port))
        logs.append(Path(f"{log}-{rank}"))
        process = CONTEXT.Process(target=call_function, args=(logs[rank], environment, *call))
        process.start()
        processes.append(process)
    wait_for(processes, outlive_s)
    codes = [process.exitcode for process in processes]
    return Ended(codes, [path.read_text(encoding="utf-8") for path in logs])


def find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment_of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun sets on a single machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def wait_for(processes: list, outlive_s: float) -> None:
    """Wait until all have ended; kill those that hang, or outlive one that was killed."""
    remaining_s = HANGS_S
    alive = list(processes)
    while alive and remaining_s > 0:
        began_s = time.monotonic()
        connection.wait([process.sentinel for process in alive], timeout=remaining_s)
        remaining_s -= time.monotonic() - began_s
        for process in alive:
            process.join(0)
            if process.exitcode is not None and process.exitcode < 0:
                remaining_s = min(remaining_s, outlive_s)
        alive = [process for process in alive if process.exitcode is None]
    for process in alive:
        process.kill()
        process.join()


def call_function(log: Path, environment: dict, function: Callable, *args) -> None:
    """Call function(*args) with its output in the log; the result is the exit code."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    # Under nohup and in the background of a shell, pytest and its children ignore these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.exit(function(*args))


def main_after(actions: list[tuple], argv: list[str]) -> int:
    """Call each action, (function, *arguments), then main().

    An action may replace sft_qwen2.SFTTrainer by a subclass.
    """
    for action, *args in actions:
        action(*args)
    return sft_qwen2.main(argv)


# ---- Actions ------------------------------------------------------------------------------------
def take_for_gpu(compute: str, shard: bool) -> None:
    """Let the script take this CPU for a GPU that multiplies in bf16, fp16 or fp32.

    `shard`: the processes share one model by FSDP2, as on GPUs.
    """
    capability = CAPABILITIES[compute]
    sft.plan.choose_precision = lambda _, fp32, optim: choose_precision(capability, fp32, optim)
    torch.compiler.set_stance("force_eager")  # a minute less; other tests compile the optimizer

    class GPUTrainer(sft_qwen2.SFTTrainer):
        # accelerate neither shards nor scales on a CPU, and does not say so.
        def create_accelerator_and_postprocess(self):
            if shard:
                state = accelerate.state.PartialState._shared_state
                state["distributed_type"] = accelerate.state.DistributedType.MULTI_GPU
            super().create_accelerator_and_postprocess()
            assert self.is_fsdp_enabled == self.accelerator.is_fsdp2 == shard
            if compute == "fp16":
                self.accelerator.native_amp = True
                self.accelerator.scaler = torch.amp.GradScaler("cpu")

    sft_qwen2.SFTTrainer = GPUTrainer
    if shard:
        share_on_cpu()


def share_on_cpu() -> None:
    """Let processes on the CPU share the model in shards, with the settings that GPUs have."""
    settings_of_processes = sft_qwen2.settings_of_processes

    def settings_of_shards(args):
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            settings = settings_of_processes(args)
        return {"use_cpu": True, "ddp_backend": "gloo", **settings}

    sft_qwen2.settings_of_processes = settings_of_shards


def at_step(step: int, action: Callable, *args) -> None:
    """Let this process call action(*args) before it trains that step."""

    class InterruptedTrainer(sft_qwen2.SFTTrainer):
        def training_step(self, *rest, **options):
            if self.state.global_step + 1 == step:
                action(*args)
            return super().training_step(*rest, **options)

    sft_qwen2.SFTTrainer = InterruptedTrainer
