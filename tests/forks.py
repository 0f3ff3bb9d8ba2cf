"""Run main() in forks of a process that has imported everything: a start costs no imports.

That process has computed nothing, so that no library's thread is lost in a fork.
"""

import os
import socket
import sys
import time
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import accelerate
import torch
import transformers
from runs import ROOT

import sft_qwen2
from sft import arguments, memory_plan

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["imported"])
# It looks for imported.py in neither sys.path nor, for safety, the working directory.
SERVER = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTHONSAFEPATH": "1"}
SECONDS = 120  # for what hangs


def run(log: Path, *calls: tuple, outlive: float = 0.0, cache: Path | None = None):
    """Call each of calls, (function, *arguments), in a process of its own, as torchrun starts them.

    Where one is killed, the others are, too, after `outlive` seconds. Returns their exit codes,
    below 0 if killed, and texts, what each has printed to log-0, log-1, ...
    """
    with mock.patch.dict(os.environ, SERVER):
        forkserver.ensure_running()  # at the first call
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    logs = [Path(f"{log}-{rank}") for rank in range(len(calls))]
    log.parent.mkdir(parents=True, exist_ok=True)
    processes = {}
    for rank, each in enumerate(calls):
        environment = {"HF_DATASETS_CACHE": str(cache or log.parent / "cache")}
        if len(calls) > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(calls)))
        process = CONTEXT.Process(target=call, args=(logs[rank], environment, *each))
        process.start()
        processes[process.sentinel] = process
    alive = dict(processes)
    while alive and (ended := connection.wait(alive, SECONDS)):
        for process in map(alive.pop, ended):
            process.join()
        if any((process.exitcode or 0) < 0 for process in processes.values()):
            time.sleep(outlive)
            break
    for process in alive.values():
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes.values()]
    return SimpleNamespace(codes=codes, texts=[path.read_text() for path in logs])


def call(log: Path, environment: dict, function, *args) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    sys.exit(function(*args))


def main_after(actions, argv: list[str]) -> int:
    """Call the actions, which patch what they like, and main()."""
    for action in actions:
        action()
    return sft_qwen2.main(argv)


def take_for_gpu(compute: str, shard: bool) -> None:
    """Let the script take this CPU for a GPU of this number format, and shard over several."""
    choose_precision = memory_plan.choose_precision
    capability = {"bf16": (8, 0), "fp16": (7, 0), "fp32": None}[compute]
    memory_plan.choose_precision = lambda _, fp32: choose_precision(capability, fp32)
    create_accelerator = transformers.Trainer.create_accelerator_and_postprocess

    def create(trainer):  # accelerate neither shards nor scales on a CPU, and does not say so
        if shard:
            state = accelerate.state.PartialState._shared_state
            state["distributed_type"] = accelerate.state.DistributedType.MULTI_GPU
        create_accelerator(trainer)
        assert trainer.is_fsdp_enabled == trainer.accelerator.is_fsdp2 == shard
        if compute == "fp16":
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    transformers.Trainer.create_accelerator_and_postprocess = create
    shards = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": arguments.FSDP_CONFIG}
    arguments.process_defaults = lambda _: {"use_cpu": True, **(shards if shard else {})}
    load_model = sft_qwen2.load_model  # the plan's device map is of GPUs
    sft_qwen2.load_model = lambda name_or_path, dtype, _: load_model(name_or_path, dtype)
    torch.compiler.set_stance("force_eager")  # a minute less; other tests compile the optimizer
