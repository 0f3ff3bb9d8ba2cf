"""Run the script in several processes, as torchrun starts them, but forked: imports cost once.

    python tests/launch.py '[{"world": 2, "argv": [...], "folder": "...", "sharded": false}, ...]'

The jobs run one after another, each of its processes with a log in the job's folder. Prints the
exit codes of each job's processes as JSON. A "sharded" job's trainer believes that its devices are
GPUs, where accelerate gives in to --fsdp; on a CPU it falls back to DDP without a word. "compute"
is the number format of its layers. Each process counts the rows it encodes in encoded-RANK.
"free" is the memory that each process finds, in GiB.
A "gradients" job runs no script: it saves loss and gradients of a step, by fully_shard if several.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accelerate
import datasets  # noqa: F401
import numpy as np
import psutil
import torch
import transformers

import sft_qwen2


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def shard_on_cpu(compute: str) -> None:
    create_accelerator = transformers.Trainer.create_accelerator_and_postprocess
    choose_precision = sft_qwen2.choose_precision

    def create(trainer):
        kinds = accelerate.state.DistributedType
        accelerate.state.PartialState._shared_state["distributed_type"] = kinds.MULTI_GPU
        create_accelerator(trainer)
        assert trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2

    transformers.Trainer.create_accelerator_and_postprocess = create
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[compute]
    sft_qwen2.choose_precision = lambda *args: choose_precision(*args)._replace(compute_dtype=dtype)


def count_encoded(path: Path) -> None:
    encode_batch = sft_qwen2.encode_batch

    def counting(conversations, tokenizer):
        if len(conversations) > 1:  # not the probe of the chat template
            with open(path, "a") as file:
                file.write(f"{len(conversations)}\n")
        return encode_batch(conversations, tokenizer)

    sft_qwen2.encode_batch = counting


def save_gradients(job: dict, rank: int) -> int:
    """Save the loss and the whole gradients of one step to the job's folder; return 0."""
    from torch.distributed.fsdp import fully_shard

    world, model_dir = job["world"], job["gradients"]
    torch.distributed.init_process_group("gloo")
    model = sft_qwen2.load_model(model_dir, torch.float32).train()
    model.gradient_checkpointing_enable()
    if world > 1:
        for module in (*model.model.layers, model):
            fully_shard(module)
    data = Path(__file__).resolve().parents[1] / "data" / "train.jsonl"
    tokenizer = sft_qwen2.load_tokenizer(model_dir, "Be brief.")
    turns = [sft_qwen2.parse_row(row, "Be brief.") for _, row in sft_qwen2.read_rows(data)][:16]
    rows = [sft_qwen2.encode(conversation, tokenizer) for conversation in turns]
    rows = [{name: np.array(ids) for name, ids in row.items()} for row in rows]
    batches, trained_tokens = sft_qwen2.collate(rows, 2048, 700, rank, world)
    loss_sum = torch.zeros(())
    for batch in batches:
        loss = model(**batch, num_items_in_batch=trained_tokens / world)["loss"]
        loss.backward()
        loss_sum += loss.detach() / world
    torch.distributed.all_reduce(loss_sum)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    if world > 1:
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    if rank == 0:
        torch.save({"loss": loss_sum, "passes": len(batches), **grads}, f"{job['folder']}/step.pt")
    return 0


def start(job: dict, rank: int, port: int) -> int:
    """Fork one process of the job; return its id."""
    if pid := os.fork():
        return pid
    log = os.open(f"{job['folder']}/log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"])}
    os.environ |= {"LOCAL_WORLD_SIZE": str(job["world"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 70
    try:
        if job.get("sharded"):
            shard_on_cpu(job.get("compute", "fp32"))
        if "free" in job:
            memory = SimpleNamespace(available=job["free"][rank] * 2**30)
            psutil.virtual_memory = lambda: memory
        count_encoded(Path(job["folder"], f"encoded-{rank}"))
        run = (
            save_gradients if "gradients" in job else lambda job, rank: sft_qwen2.main(job["argv"])
        )
        code = run(job, rank)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    for name in ("Trainer", "Qwen2ForCausalLM", "Qwen2Tokenizer", "pipeline"):
        getattr(transformers, name)  # loads its module, for every fork
    codes = []
    for job in json.loads(sys.argv[1]):
        port = free_port()
        pids = [start(job, rank, port) for rank in range(job["world"])]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        codes.append([os.waitstatus_to_exitcode(status) for status in statuses])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
