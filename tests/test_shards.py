"""Checkpoints of processes that share a model in shards, and of those that each have all of it."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import accelerate
import forks
import numpy as np
import pytest
import runs
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemWriter

from sft import checkpoints, model_files, run_record
from sft.checkpoints import CheckpointTrainer
from sft.errors import UserError

pytestmark = pytest.mark.slow
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}
STEPS = 4
HALF = 2  # the step from which runs are resumed


# ---- In each process ----------------------------------------------------------------------------
class Trainer(CheckpointTrainer):
    """Takes the CPU for GPUs, on which accelerate shards, and scales the losses of fp16."""

    shards = True
    scales = False

    def create_accelerator_and_postprocess(self):
        if self.shards:
            shared = accelerate.state.PartialState._shared_state
            shared["distributed_type"] = accelerate.state.DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.is_fsdp_enabled == self.shards
        if self.scales:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def evaluate(self, *args, **kwargs):
        return {"eval_loss": {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}[self.state.global_step]}


class OnePieceTrainer(Trainer):
    shards = False


class ScalingTrainer(Trainer):
    scales = True


class OnStepEnd(transformers.TrainerCallback):
    def __init__(self, action):
        self.action = action
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.action(self.trainer, state.global_step)


def train(
    folder,
    output_dir,
    resume_from=None,
    action=None,
    trainer_class=Trainer,
    weights_are_sent=False,
    **options,
):
    """Train the model in folder, in output_dir; return the trainer."""
    examples = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(8 * STEPS):
        ids = torch.randint(3, 3000, (12,), generator=generator)
        examples.append({"input_ids": ids, "labels": ids})
    if trainer_class.shards:
        options = {"fsdp": True, "fsdp_config": dict(SHARDED), **options}
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        options = {"ddp_backend": "gloo", **options}
    arguments = transformers.TrainingArguments(
        str(output_dir),
        per_device_train_batch_size=8 // num_processes,
        max_steps=STEPS,
        learning_rate=3e-3,
        save_steps=HALF,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = trainer_class(
        model_files.load_weights(
            transformers.Qwen2ForCausalLM,
            str(folder / "model"),
            torch.float32,
            weights_are_sent=weights_are_sent,
        ),
        arguments,
        train_dataset=examples,
        eval_dataset=examples[:1],
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
    )
    if action is not None:
        callback = OnStepEnd(action)
        callback.trainer = trainer
        trainer.add_callback(callback)
    checkpoint = None
    if resume_from is not None:
        checkpoint = str(output_dir / resume_from)
    trainer.train(checkpoint)
    return trainer


def resume(folder, name, source, **options):
    """Train from the checkpoint of step HALF that is in the folder of another run."""
    output_dir = folder / name
    checkpoint = f"checkpoint-{HALF}"
    if int(os.environ.get("RANK", "0")) == 0:
        shutil.copytree(folder / source / checkpoint, output_dir / checkpoint)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return train(folder, output_dir, resume_from=checkpoint, **options)


def read_losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def is_last_process() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def raise_full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def spoil_last_shard(trainer, step):
    if step == HALF and is_last_process():
        parameter = next(trainer.model.parameters())
        parameter.to_local().data[-1] = torch.nan


class FullDisk:
    """In the last process, fails to write with a function in the save of step HALF."""

    def __init__(self, owner, name):
        self.owner = owner
        self.name = name
        self.function = getattr(owner, name)

    def __call__(self, trainer, step):
        setattr(self.owner, self.name, self.function)
        if step == HALF and is_last_process():
            setattr(self.owner, self.name, raise_full_disk)


class Attack:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_result(folder: Path, name: str, result) -> None:
    path = folder / f"{name}.result-{torch.distributed.get_rank()}"
    path.write_text(json.dumps(result))


def note_refusal(folder, name, function, *args, **options):
    """Call a function that must raise a UserError; keep its sentence."""
    try:
        function(*args, **options)
        sentence = None
    except UserError as error:
        sentence = str(error)
    write_result(folder, name, sentence)


def run_in_shards(folder: Path) -> int:
    whole = train(folder, folder / "whole", save_total_limit=None)
    write_result(folder, "whole", read_losses(whole))
    whole.export(torch.bfloat16)
    resumed = resume(folder, "resumed", "whole")
    write_result(folder, "resumed", read_losses(resumed))
    sent = train(folder, folder / "sent", weights_are_sent=is_last_process())
    write_result(folder, "sent", read_losses(sent))
    train(folder, folder / "no-rng", action=FullDisk(Trainer, "_save_rng_state"))
    train(folder, folder / "no-shard", action=FullDisk(FileSystemWriter, "write_data"))
    note_refusal(folder, "nan", train, folder, folder / "nan", action=spoil_last_shard)
    note_refusal(folder, "one-piece", resume, folder, "one-piece", "one")
    for part in (checkpoints.WEIGHT_SHARDS, checkpoints.OPTIMIZER_SHARDS):
        if not is_last_process():
            shutil.copytree(folder / "whole", folder / f"with-{part}")
            contents = folder / f"with-{part}" / f"checkpoint-{HALF}" / part / ".metadata"
            contents.write_bytes(pickle.dumps(Attack(folder / "ran")))
        note_refusal(folder, f"attack-{part}", resume, folder, f"attack-{part}", f"with-{part}")
    return 0


def run_with_scaler(folder: Path) -> int:
    whole = train(folder, folder / "fp16", trainer_class=ScalingTrainer)
    write_result(folder, "fp16", read_losses(whole))
    resumed = resume(folder, "fp16-resumed", "fp16", trainer_class=ScalingTrainer)
    write_result(folder, "fp16-resumed", read_losses(resumed))
    scale = torch.load(folder / "fp16-resumed" / f"checkpoint-{STEPS}" / "scaler.pt")["scale"]
    write_result(folder, "scale", scale)
    return 0


def run_in_one_piece(folder: Path) -> int:
    """Two processes that have the whole model each; the first one cannot save the best step."""

    def fail_in_first(trainer, step):
        checkpoints.write_weights = write_weights
        if step == HALF and torch.distributed.get_rank() == 0:
            checkpoints.write_weights = raise_full_disk

    write_weights = checkpoints.write_weights
    trainer = train(
        folder,
        folder / "pair",
        action=fail_in_first,
        trainer_class=OnePieceTrainer,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    write_result(folder, "pair", trainer.state.best_model_checkpoint)
    return 0


# ---- All runs, once -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a model, where all of the above has run."""
    folder = tmp_path_factory.mktemp("shards")
    runs.make_model(folder / "model", num_hidden_layers=1)
    train(folder, folder / "one", trainer_class=OnePieceTrainer)
    for function in (run_in_shards, run_with_scaler, run_in_one_piece):
        calls = [(function, folder)] * 2
        ended = forks.run(folder / f"{function.__name__}.log", *calls)
        assert ended.codes == [0, 0], "".join(ended.texts)
    return folder


def read_results(folder, name) -> list:
    """Return what each process has noted."""
    return [json.loads(Path(f"{folder}/{name}.result-{rank}").read_text()) for rank in range(2)]


def saved_steps(output_dir) -> list[int]:
    return [run_record.step_of(path) for path in run_record.find_checkpoints(output_dir)]


def read_shards(output_dir) -> dict[str, bytes]:
    """Return the shards of a run's last checkpoint."""
    checkpoint = output_dir / f"checkpoint-{STEPS}"
    found = {}
    for path in checkpoint.rglob("*.distcp"):
        found[str(path.relative_to(checkpoint))] = path.read_bytes()
    assert len(found) == 4  # weights and state, of two processes
    return found


@pytest.mark.parametrize("name", ["resumed", "fp16-resumed"])
def test_as_many_processes_resume_to_the_bit(folder, name):
    whole = {"resumed": "whole", "fp16-resumed": "fp16"}[name]
    assert read_results(folder, name) == read_results(folder, whole)
    assert read_shards(folder / name) == read_shards(folder / whole)


def test_a_process_that_is_sent_its_weights_trains_the_same(folder):
    """The head is tied, and of both processes only the first reads the model's files."""
    assert read_results(folder, "sent") == read_results(folder, "whole")
    assert read_shards(folder / "sent") == read_shards(folder / "whole")


def test_the_loss_scale_is_resumed(folder):
    """The scaler is there again after the optimizer's state was loaded without it."""
    assert read_results(folder, "scale") == [8.0, 8.0]


def test_one_process_resumes_what_several_saved(folder):
    trainer = resume(folder, "fewer", "whole", trainer_class=OnePieceTrainer)
    whole = read_results(folder, "whole")[0]
    assert read_losses(trainer)[:HALF] == whole[:HALF]
    np.testing.assert_allclose(read_losses(trainer), whole, rtol=0, atol=1e-4)
    weights = checkpoints.read_weights(folder / "whole" / f"checkpoint-{STEPS}")
    for name, weight in weights.items():
        torch.testing.assert_close(trainer.model.state_dict()[name], weight, rtol=0, atol=1e-3)


def test_the_optimizer_state_of_several_is_that_of_one(folder):
    """The same state is saved again, unchanged, by a run that has nothing to do."""
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    shutil.copytree(checkpoint, folder / "again" / checkpoint.name)
    trainer = train(folder, folder / "again", checkpoint.name, trainer_class=OnePieceTrainer)
    one = torch.load(folder / "one" / checkpoint.name / "optimizer.pt")["state"]
    several = trainer.optimizer.state_dict()["state"]
    assert several.keys() == one.keys()
    for number in one:
        assert several[number]["step"] == one[number]["step"]
        torch.testing.assert_close(
            several[number]["exp_avg"], one[number]["exp_avg"], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", ["no-rng", "no-shard"])
def test_a_process_that_cannot_save_costs_all_one_checkpoint(folder, name):
    assert saved_steps(folder / name) == [STEPS]
    assert read_shards(folder / name) == read_shards(folder / "whole")


def test_nan_in_one_shard_is_known_to_all(folder):
    first, last = read_results(folder, "nan")
    assert first == last
    assert "weights are infinite or NaN" in first
    assert saved_steps(folder / "nan") == []


def test_one_piece_is_not_resumed_in_shards(folder):
    for sentence in read_results(folder, "one-piece"):
        assert "was saved in one piece" in sentence
        assert "without torchrun" in sentence


@pytest.mark.parametrize("part", [checkpoints.WEIGHT_SHARDS, checkpoints.OPTIMIZER_SHARDS])
def test_no_shard_runs_code(folder, part):
    for sentence in read_results(folder, f"attack-{part}"):
        assert "would run pathlib.Path.touch" in sentence
    assert not (folder / "ran").exists()


def test_shards_become_an_ordinary_model(folder):
    """By the run itself, and of any checkpoint later, in one process."""
    checkpoint = folder / "whole" / f"checkpoint-{STEPS}"
    record = {"fingerprint": {}, "versions": [{}], "export_dtype": "bfloat16"}
    (folder / "whole" / "run.json").write_text(json.dumps(record))
    later = checkpoints.export_checkpoint(checkpoint)
    base = load_file(folder / "model" / "model.safetensors")
    by_run = load_file(folder / "whole" / "model.safetensors")
    by_hand = load_file(later / "model.safetensors")
    assert by_run.keys() == by_hand.keys() == base.keys()
    for name, weight in by_run.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, by_hand[name])
    for output in (folder / "whole", later):
        config = json.loads((output / "config.json").read_text())
        assert config["architectures"] == ["Qwen2ForCausalLM"]
        _, report = transformers.AutoModelForCausalLM.from_pretrained(
            output, output_loading_info=True
        )
        assert not any(report.values())


def test_a_pair_goes_on_where_one_cannot_save_the_best(folder):
    """And the best that both know of is one that was saved."""
    assert read_results(folder, "pair") == [f"{folder}/pair/checkpoint-{STEPS}"] * 2
    assert saved_steps(folder / "pair") == [STEPS]
