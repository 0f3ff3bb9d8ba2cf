"""Run the script in several processes, as torchrun starts them, but forked: imports cost once.

    python tests/launch.py '[{"world": 2, "argv": [...], "folder": "...", "compute": "bf16"}, ...]'
    python tests/launch.py --kills 20                    # of runs over shards, which are resumed

Jobs run one after another, each process with a log in the job's folder; prints their exit codes as
JSON. With "compute", a number format, the script takes the CPU for a GPU of that format, and
several processes shard the model; else they train whole copies. "free": the memory that each
process finds, in GiB. Process R writes to seen-R, a JSON object a line, what it alone can tell:
rows encoded, seeds of the rounding, and the number formats in which gradients are exchanged.
"""

import json
import os
import socket
import sys
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
from sft import arguments, memory_plan


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
        kinds = accelerate.state.DistributedType
        if shard:
            accelerate.state.PartialState._shared_state["distributed_type"] = kinds.MULTI_GPU
        create_accelerator(trainer)
        assert not shard or (trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2)
        if compute == "fp16":
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    transformers.Trainer.create_accelerator_and_postprocess = create
    defaults = {"use_cpu": True, "ddp_backend": "gloo"} if shard else {"use_cpu": True}
    defaults |= {"fsdp": True, "fsdp_config": arguments.FSDP_CONFIG} if shard else {}
    arguments.process_defaults = lambda use_cpu: defaults
    if not shard:
        load_model = sft_qwen2.load_model  # the plan's device map is of GPUs
        sft_qwen2.load_model = lambda name_or_path, dtype, _: load_model(name_or_path, dtype)


def watch(path: Path) -> None:
    """Write to the file what a process alone can tell."""

    def watched(module, name, tell):
        function = getattr(module, name)

        def call(*args, **kwargs):
            with open(path, "a") as file:
                file.write(json.dumps(tell(*args, **kwargs)) + "\n")
            return function(*args, **kwargs)

        setattr(module, name, call)

    watched(sft_qwen2, "encode_batch", lambda rows, _: {"rows": len(rows)} if len(rows) > 1 else {})
    watched(torch, "manual_seed", lambda seed: {"seed": seed} if seed > 2**32 else {})
    dtype = lambda output, input, **_: {"exchanged": str(input.dtype)}  # noqa: E731
    watched(torch.distributed, "reduce_scatter_tensor", dtype)


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


def run(job: dict) -> list[int]:
    """Run the job's processes to their end; return their exit codes."""
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    port = free_port()
    pids = [start(job, rank, port) for rank in range(job["world"])]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def load_modules() -> None:
    """Load what every fork needs, once."""
    torch.set_num_threads(1)
    sft_qwen2.callbacks.quiet_libraries()
    for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
        getattr(transformers, name)


def main() -> None:
    load_modules()
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
