"""Runs with state, or gradients as well, in host memory are the same runs, bit for bit.

On the CPU, device and host are the same memory, so all of it can be tried here but for speed.
"""

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from types import SimpleNamespace

import forks
import pytest
import runs
import torch
import transformers

import sft.plan
from sft.errors import UserError
from sft.host_memory import GradientsOnHost, HostMemoryTrainer, PinnedMemory
from sft.optimizer import AdamW8bitOnHost, optimizer_class_and_options

pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = {"device": (), "state": ("state",), "gradients": ("state", "gradients")}
NUM_STEPS = 12
SAVED_STEP = 5
EXAMPLES_PER_STEP = 8
EXAMPLES_PER_MICRO_BATCH = 3
VOCAB_SIZE = 64
CLIPPED_NORM = 0.3  # below the norm of each step


@pytest.fixture(autouse=True, scope="module")
def eager():
    """Steps that are not compiled: the same formula, without the wait for a compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


# ---- A small trainer that makes its steps as the script does ------------------------------------
class SmallTrainer(HostMemoryTrainer):
    """A Trainer of steps with several micro-batches, made again where memory ran out."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        while True:
            try:
                return self.forward_backward(model, inputs["input_ids"])
            except torch.OutOfMemoryError:
                pass
            model.zero_grad()

    def forward_backward(self, model, input_ids):
        self.begin_gradients()
        step_loss = torch.zeros(())
        for micro_batch in input_ids.split(EXAMPLES_PER_MICRO_BATCH):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss
            loss = loss * len(micro_batch) / len(input_ids)
            self.accelerator.backward(loss)
            step_loss += loss.detach()
        return step_loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(grad_norm):
            raise UserError(f"step {self.state.global_step + 1}: the norm is {float(grad_norm)}")
        return grad_norm


@dataclass
class Run:
    """What a run leaves: losses and norms of its steps, weights, and the optimizer's state."""

    logs: list
    weights: dict
    state: dict


def make_model(tied: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=VOCAB_SIZE,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM._from_config(config, dtype=dtype)


def make_trainer(folder, place, *, tied=False, dtype=torch.bfloat16, trainer=SmallTrainer, **flags):
    settings = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": CLIPPED_NORM,
        "max_steps": NUM_STEPS,
        "save_strategy": "no",
        "per_device_train_batch_size": EXAMPLES_PER_STEP,
        "logging_steps": 1,
        **flags,
    }
    args = transformers.TrainingArguments(
        folder, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB_SIZE, (NUM_STEPS * EXAMPLES_PER_STEP, 12), generator=generator)
    return trainer(
        make_model(tied, dtype),
        args,
        train_dataset=[{"input_ids": row} for row in tokens],
        optimizer_cls_and_kwargs=optimizer_class_and_options(
            args, SimpleNamespace(optim="adamw_torch_8bit"), rank=0, in_host_memory=PLACES[place]
        ),
        in_host_memory=PLACES[place],
    )


def run(folder, place, resume_from=None, **options) -> Run:
    trainer = make_trainer(folder, place, **options)
    trainer.train(resume_from)
    logs = []
    for log in trainer.state.log_history:
        if "grad_norm" in log:
            logs.append((log["step"], log["loss"], log["grad_norm"]))
    return Run(logs, trainer.model.state_dict(), trainer.optimizer.state_dict())


def assert_same(found: Run, wanted: Run) -> None:
    assert found.logs == wanted.logs
    for name, weights in wanted.weights.items():
        assert torch.equal(found.weights[name], weights), name
    assert found.state["state"].keys() == wanted.state["state"].keys()
    for number, wanted_state in wanted.state["state"].items():
        for name, moment in wanted_state.items():
            assert_same_moment(found.state["state"][number][name], moment)


def assert_same_moment(found, wanted) -> None:
    """Compare plain tensors, or codes and scales of 8-bit moments."""
    assert type(found) is type(wanted)
    for name in getattr(wanted, "tensor_attrs", []):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    if not hasattr(wanted, "tensor_attrs"):
        assert torch.equal(found, wanted)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return a function that gives the run on the device alone, made once for each setting."""
    runs = {}

    def get(**options) -> Run:
        key = tuple(sorted(options.items()))
        if key not in runs:
            runs[key] = run(tmp_path_factory.mktemp("reference"), "device", **options)
        return runs[key]

    return get


ON_HOST = pytest.mark.parametrize("place", ["state", "gradients"])
TIED = pytest.param(True, id="tied", marks=pytest.mark.slow)
HEADS = pytest.mark.parametrize("tied", [pytest.param(False, id="untied"), TIED])


# ---- The same run, wherever its values lie ------------------------------------------------------
def test_the_reference_is_a_run_in_which_all_matters(reference):
    """Its steps are clipped, some state has 8 bits and some fp32, and the weights move."""
    found = reference()
    assert [step for step, *_ in found.logs] == list(range(1, NUM_STEPS + 1))
    assert min(grad_norm for *_, grad_norm in found.logs) > CLIPPED_NORM
    num_8bit = sum("tensor_attrs" in dir(each["exp_avg"]) for each in found.state["state"].values())
    assert 0 < num_8bit < len(found.state["state"])
    start = make_model(tied=False, dtype=torch.bfloat16).state_dict()
    for name, weights in found.weights.items():
        assert not torch.equal(weights, start[name]), name


@HEADS
@ON_HOST
def test_no_bit_depends_on_the_place(tmp_path, reference, place, tied):
    assert_same(run(tmp_path, place, tied=tied), reference(tied=tied))


@pytest.mark.slow
def test_no_bit_depends_on_the_place_without_clipping(tmp_path, reference):
    assert_same(run(tmp_path, "gradients", max_grad_norm=0), reference(max_grad_norm=0))


def test_norms_are_summed_in_the_order_of_clip_grad_norm(tmp_path, reference):
    """In fp32 the last bits of the sum show the order. In bf16 they are rounded away."""
    found = run(tmp_path, "gradients", dtype=torch.float32)
    assert_same(found, reference(dtype=torch.float32))


@pytest.mark.slow
def test_no_bit_depends_on_the_place_where_layers_are_recomputed(tmp_path, reference):
    """Recomputing changes no bit either, so this is the same run again."""
    assert_same(run(tmp_path, "gradients", gradient_checkpointing=True), reference())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a function that gives the checkpoint of a run that was killed in a place."""
    checkpoints = {}

    def get(place) -> str:
        if place not in checkpoints:
            folder = tmp_path_factory.mktemp("killed")
            saves = {"save_strategy": "steps", "save_steps": SAVED_STEP}
            make_trainer(folder, place, trainer=KilledTrainer, **saves).train()
            checkpoints[place] = str(folder / f"checkpoint-{SAVED_STEP}")
        return checkpoints[place]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("resumed_place", PLACES)
@pytest.mark.parametrize("killed_place", PLACES)
def test_a_run_resumes_in_any_place(tmp_path, reference, killed, killed_place, resumed_place):
    resumed = run(tmp_path, resumed_place, resume_from=killed(killed_place))
    assert_same(resumed, reference())


class KilledTrainer(SmallTrainer):
    """A Trainer that ends two steps after it has saved, so that those steps are made again."""

    def training_step(self, *args, **options):
        if self.state.global_step == SAVED_STEP + 2:
            self.control.should_training_stop = True
        return super().training_step(*args, **options)


# ---- What goes wrong ----------------------------------------------------------------------------
class OutOfMemoryOnce(GradientsOnHost):
    """Runs out of memory in the hook of one parameter, when others have sent their gradients."""

    num_calls = 0

    def take_gradient(self, p):
        self.num_calls += 1
        if self.num_calls == 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().take_gradient(p)


def test_a_step_that_ran_out_of_memory_in_a_hook_is_made_again(tmp_path, reference, monkeypatch):
    monkeypatch.setattr("sft.host_memory.GradientsOnHost", OutOfMemoryOnce)
    assert_same(run(tmp_path, "gradients"), reference())


class BrokenTrainer(SmallTrainer):
    """A Trainer with an infinite gradient in its third step."""

    def forward_backward(self, model, input_ids):
        loss = super().forward_backward(model, input_ids)
        if self.state.global_step == 2:
            self.accelerator.backward(model(input_ids[:1]).logits.sum() * math.inf)
        return loss


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_not_finite_stops_alike(tmp_path, place):
    trainer = make_trainer(tmp_path, place, trainer=BrokenTrainer)
    with pytest.raises(UserError, match="step 3: the norm is nan"):
        trainer.train()


def make_gradients(*values) -> tuple[GradientsOnHost, list[torch.nn.Parameter]]:
    """Return gradients on the host of parameters that begin with these values."""
    parameters = [torch.nn.Parameter(torch.tensor([value])) for value in values]
    gradients = GradientsOnHost(parameters)
    gradients.take_host_memory(PinnedMemory())
    return gradients, parameters


def test_a_norm_without_any_gradient_is_no_norm():
    gradients, _ = make_gradients(3.0)
    with pytest.raises(AssertionError, match="a parameter has sent no gradient"):
        gradients.clip(1.0)


def test_a_gradient_that_no_hook_has_seen_is_an_error():
    gradients, (p,) = make_gradients(3.0)
    (p * p).sum().backward()
    p.grad = torch.ones(1)
    with pytest.raises(AssertionError, match="a gradient is not in host memory"):
        gradients.clip(1.0)


def test_gradients_of_the_step_before_count_no_more():
    gradients, (p,) = make_gradients(3.0)
    (p * p).sum().backward()
    gradients.clear()
    with pytest.raises(AssertionError, match="a parameter has sent no gradient"):
        gradients.clip(1.0)


def test_a_gradient_of_a_failed_try_is_gone_from_the_device():
    gradients, (p,) = make_gradients(3.0)
    p.grad = torch.ones(1)
    gradients.clear()
    assert p.grad is None


def test_gradients_are_summed_up_clipped_and_taken_by_the_step():
    gradients, (p, q) = make_gradients(3.0, 4.0)
    for _ in range(2):
        ((p * p + q * q) / 4).sum().backward()
    assert p.grad is None
    assert gradients.clip(1.0) == 5.0
    gradients.bring_gradient(p)
    assert p.grad.item() == pytest.approx(3 / 5)


def test_a_scaler_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, "gradients")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match="gradients of fp16 stay on the GPUs"):
        trainer.create_optimizer()


# ---- Host memory --------------------------------------------------------------------------------
def test_where_memory_cannot_be_pinned_a_line_says_so_and_the_run_goes_on(capsys):
    """Without a GPU nothing can be pinned."""
    memory = PinnedMemory()
    values = torch.ones(3)
    for _ in range(2):
        assert torch.equal(memory.pin(values, torch.device("cuda")), values)
    assert capsys.readouterr().out.count("0.0 GiB can be pinned, and no more") == 1


def test_host_memory_is_taken_before_the_first_step():
    p = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = AdamW8bitOnHost([p], seed=0)
    optimizer.take_host_memory()
    taken = optimizer.state[p]["exp_avg"].codes.data_ptr()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].codes.data_ptr() == taken


def make_one_parameter_step() -> tuple[AdamW8bitOnHost, torch.nn.Parameter]:
    """Return an optimizer with gradients on the host that is about to make a step."""
    p = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = AdamW8bitOnHost([p], seed=0)
    optimizer.gradients_on_host = GradientsOnHost([p])
    optimizer.take_host_memory()
    (p * p).sum().backward()
    optimizer.gradients_on_host.clip(1.0)
    return optimizer, p


def test_a_gradient_leaves_the_device_once_its_parameter_is_updated():
    """Otherwise all gradients would be there at the end of a step."""
    optimizer, p = make_one_parameter_step()
    optimizer.step()
    assert p.grad is None


def test_a_step_waits_for_the_device_at_its_end(monkeypatch):
    """What lies in host memory may be saved next, and copies to it do not make the host wait."""
    optimizer, _ = make_one_parameter_step()
    events = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda device: events.append("wait"))
    optimizer.compiled_update = lambda *args: events.append("update")
    optimizer.step()
    assert events == ["update", "wait"]


def test_loading_fills_the_memory_that_was_taken():
    p = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = AdamW8bitOnHost([p], seed=0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    other = AdamW8bitOnHost([p], seed=0)
    other.take_host_memory()
    taken = other.state[p]["exp_avg"].codes
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert other.state[p]["exp_avg"].codes is taken
    assert taken.any()
    assert other.state[p]["step"] == 1
    assert saved["state"] == {}


# ---- Through the script -------------------------------------------------------------------------
SCRIPT_STEPS = 6
KILLED_STEP = 5  # after the checkpoint of step 4
FLAGS = {
    "max_steps": SCRIPT_STEPS,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "tokens_per_forward": 160,
    "max_len": 128,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "max_grad_norm": CLIPPED_NORM,
    "save_steps": 2,
    "report_to": "none",
}


def keep_in_host_memory(*contents: str) -> None:
    """Let the script plan for host memory, as it does where the GPUs are too small."""
    sft.plan.Plan.in_host_memory = contents


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return a function that runs the script on a CPU taken for a bf16 GPU: its output folder."""
    folder = tmp_path_factory.mktemp("script")
    sizes = {"hidden_size": 128, "num_hidden_layers": 1}
    runs.make_model(folder / "model", tied=False, **sizes)
    rows = []
    for number in range(24):
        rows.append(json.dumps({"query": f"{number} + {number}?", "answer": f"{2 * number}."}))
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")

    def run_script(name, place, killed=False, num_processes=1, copied_from=None, **flags):
        output_dir = folder / name
        if copied_from is not None:
            shutil.copytree(folder / copied_from, output_dir)
            flags["resume"] = True
        actions = [
            (forks.take_for_gpu, "bf16", num_processes > 1),
            (keep_in_host_memory, *PLACES[place]),
        ]
        if killed:
            actions.append((forks.at_step, KILLED_STEP, kill_this_process))
        places = {
            "model_name_or_path": folder / "model",
            "data_path": folder / "train.jsonl",
            "output_dir": output_dir,
        }
        words = runs.argv(**{**places, **FLAGS, **flags})
        call = (forks.main_after, actions, words)
        ended = forks.run(folder / f"{name}-log", *[call] * num_processes, cache=folder / "cache")
        if not killed:
            assert ended.codes[0] == 0, ended.texts[0]
        return output_dir

    return run_script


@pytest.fixture(scope="module")
def whole_run(script):
    """The output folder of a run that keeps all on the device, and that was never stopped."""
    return script("whole", "device")


def read_steps(output_dir) -> list[tuple]:
    return [(log["step"], log["loss"], log["grad_norm"]) for log in runs.read_logs(output_dir)]


def read_files(output_dir) -> dict[str, bytes]:
    """Return the files of the last checkpoint that hold weights and the optimizer's state."""
    checkpoint = output_dir / f"checkpoint-{SCRIPT_STEPS}"
    files = {}
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        files[name] = (checkpoint / name).read_bytes()
    return files


def assert_same_output(found, wanted) -> None:
    assert read_steps(found) == read_steps(wanted)
    for name, content in read_files(wanted).items():
        assert read_files(found)[name] == content, name


@pytest.mark.slow
@ON_HOST
def test_the_script_writes_the_same_files_wherever_values_lie(script, whole_run, place):
    assert len(read_steps(whole_run)) == SCRIPT_STEPS
    assert_same_output(script(place, place), whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed_place, resumed_place",
    [("device", "gradients"), ("gradients", "state"), ("state", "device")],
)
def test_a_killed_script_resumes_in_another_place(script, whole_run, killed_place, resumed_place):
    killed = f"killed-{killed_place}"
    script(killed, killed_place, killed=True)
    found = script(f"resumed-{killed_place}", resumed_place, copied_from=killed)
    assert_same_output(found, whole_run)


@pytest.mark.slow
def test_shards_resume_in_host_memory(script):
    """A run of two processes, killed, goes on in one, without gradients of zeros on the GPU."""
    half = {"per_device_train_batch_size": 4}
    script("shards", "device", killed=True, num_processes=2, **half)
    wanted = script("shards-device", "device", copied_from="shards")
    for place in ("state", "gradients"):
        found = script(f"shards-{place}", place, copied_from="shards")
        assert_same_output(found, wanted)
