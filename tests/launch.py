"""Run the script in several processes, as torchrun starts them, but forked: imports cost once.

    python tests/launch.py '[{"world": 2, "argv": [...], "folder": "..."}, ...]'

Jobs run one after another; prints their exit codes as JSON. In a job there may also be
    compute   a number format: the CPU is taken for a GPU of it, and several processes shard the
              model; else each has a whole copy, in fp32
    free      the memory that each process finds, in GiB
    overflow  a step in which the last process alone has a gradient that is infinite
    begin     [folder, step]: the checkpoint of another job, to be resumed
    kills     kill the processes so many times, at random moments, and resume each time
Process R writes a log-R, and to seen-R what it alone can tell, a JSON object a line.
"""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(ROOT))

import accelerate
import psutil
import torch
import transformers

import sft_qwen2
from sft import arguments, memory_plan, run_folder


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


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


def overflow(step: int) -> None:
    """Let the last process's part of one gradient be infinite in this step."""
    forward_backward = sft_qwen2.StepTrainer.forward_backward

    def broken(trainer, batches, trained_tokens):
        loss = forward_backward(trainer, batches, trained_tokens)
        if trainer.state.global_step + 1 == step:
            grad = next(trainer.model.parameters()).grad
            if trainer.args.process_index == trainer.args.world_size - 1:
                (grad.to_local() if trainer.is_fsdp_enabled else grad)[-1] = float("inf")
        return loss

    sft_qwen2.StepTrainer.forward_backward = broken


def watch(path: Path) -> None:
    """Write rows encoded, seeds of the rounding, and in what gradients are summed, to the file."""

    def watched(module, name, tell):
        function = getattr(module, name)

        def call(*args, **kwargs):
            with open(path, "a") as file:
                file.write(json.dumps(tell(*args, **kwargs)) + "\n")
            return function(*args, **kwargs)

        setattr(module, name, call)

    watched(sft_qwen2, "encode_batch", lambda rows, _: {"rows": len(rows)} if len(rows) > 1 else {})
    watched(torch, "manual_seed", lambda seed: {"seed": seed} if seed > 2**32 else {})
    dtype = lambda input, **_: {"sum": str(input.dtype)}  # noqa: E731
    watched(torch.distributed, "reduce_scatter_single", dtype)  # FSDP2's


def start(job: dict, rank: int, port: int) -> int:
    """Fork one process of the job; return its id."""
    if pid := os.fork():
        return pid
    log = os.open(f"{job['folder']}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        size, port = str(job["world"]), str(port)
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    code = 70
    try:
        if "compute" in job:
            take_for_gpu(job["compute"], job["world"] > 1)
        if "free" in job:
            memory = SimpleNamespace(available=job["free"][rank] * 2**30)
            psutil.virtual_memory = lambda: memory
        if "overflow" in job:
            overflow(job["overflow"])
        watch(Path(job["folder"], f"seen-{rank}"))
        code = sft_qwen2.main(job["argv"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict, kill=lambda pids: None) -> list[int]:
    """Run the job's processes to their end; return their exit codes, below 0 if killed."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if "begin" in job:
        other, name = Path(job["begin"][0], "outputs"), f"checkpoint-{job['begin'][1]}"
        shutil.copytree(other / name, folder / "outputs" / name)
        shutil.copy(other / "run.json", folder / "outputs")
    port = free_port()
    pids = [start(job, rank, port) for rank in range(job["world"])]
    kill(pids)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run_killed(job: dict) -> dict:
    """Run the job in 0/ as it is; in 1/, 2/, ... kill and resume it, each until it is through."""
    rng, counts, aside, run_s = random.Random(0), {"kills": 0, "in_saves": 0}, Path(), 0.0

    def kill(pids):
        time.sleep(rng.uniform(0.2, 1) * run_s)
        for pid in rng.sample(pids, len(pids)):  # the others outlive the first for a moment
            os.kill(pid, signal.SIGKILL)
            time.sleep(rng.choice([0, 0.05, 0.5]))
        counts["in_saves"] += aside.exists()

    for number in itertools.count():
        folder = f"{job['folder']}/{number}"
        argv = [*job["argv"], "--output_dir", f"{folder}/outputs"]
        aside, began, codes = Path(folder, "outputs", run_folder.ASIDE), time.monotonic(), [-9]
        while -9 in codes:
            more = number > 0 and counts["kills"] < job["kills"]
            each = job | {"folder": folder, "argv": argv}
            codes = run(each, kill if more else lambda _: None)
            counts["kills"] += -9 in codes
            argv = [*argv, "--resume", "True"]
        run_s = time.monotonic() - began if number == 0 else run_s
        assert not any(codes), Path(folder, "log-0").read_text()
        if counts["kills"] >= job["kills"]:
            return counts | {"runs": number}


def load_modules() -> None:
    """Load what every fork needs, once."""
    torch.set_num_threads(1)
    sft_qwen2.callbacks.quiet_libraries()
    for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
        getattr(transformers, name)


def main() -> None:
    load_modules()
    torch.compiler.set_stance("force_eager")  # a minute less; other tests compile the optimizer
    jobs = json.loads(sys.argv[1])
    print(json.dumps([run_killed(job) if "kills" in job else run(job) for job in jobs]))


if __name__ == "__main__":
    main()
