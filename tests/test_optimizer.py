"""sft/optimizer.py beside torch's own AdamW, through saving and loading, and over shards."""

import concurrent.futures
import copy
import io
import itertools
import os
import sysconfig
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed import multi_threaded_pg

from sft.errors import UserError
from sft.optimizer import (
    BLOCK_SIZE,
    AdamW8bit,
    check_compiler,
    check_optimizer,
    optimizer_class_and_options,
    total_norm,
)

# torch.compile and torch's collectives warn of their own doings.
pytestmark = pytest.mark.filterwarnings("ignore")

UNUSUAL = {
    "learning_rate": 0.01,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-3,
    "weight_decay": 0.3,
    "seed": 7,
}
EIGHT_BIT = SimpleNamespace(optim="adamw_torch_8bit")
SHAPES = {"wide": (64, BLOCK_SIZE), "narrow": (128, 96), "small": (16, BLOCK_SIZE), "norm": (8192,)}


@pytest.fixture
def eager():
    """Steps that are not compiled: the same formula, without the wait for a compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def make_parameters(shapes=SHAPES, dtype=torch.bfloat16) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    parameters = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        parameters[name] = torch.nn.Parameter(values.to(dtype))
    return parameters


def make_optimizer(parameters, **options) -> AdamW8bit:
    defaults = {"lr": 1e-2, "seed": 0, "bf16_stochastic_round": True}
    return AdamW8bit(parameters.values(), **{**defaults, **options})


def give_gradients(parameters, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = size * torch.randn(p.shape, generator=generator).to(p.dtype)


# ---- Beside torch.optim.AdamW, with options as Trainer hands them over --------------------------
class Layers(torch.nn.Module):
    """A module with each kind of state: 8-bit, and fp32 with and without weight decay."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.wide = torch.nn.Linear(BLOCK_SIZE, 64)
        self.narrow = torch.nn.Linear(96, 16)
        self.norm = torch.nn.LayerNorm(96)


def train_with_trainer(tmp_path, optim: str, optimizer_cls_and_kwargs=None) -> dict:
    """Return the fp32 weights after 6 steps of the optimizer and schedule that Trainer makes."""
    settings = {**UNUSUAL, "optim": optim, "lr_scheduler_type": "linear", "warmup_steps": 2}
    args = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], **settings)
    trainer = transformers.Trainer(
        Layers(), args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs
    )
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    parameters = dict(trainer.model.named_parameters())
    for step in range(6):
        give_gradients(parameters, seed=step, size=1e-3)  # about as large as eps
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return {name: p.detach() for name, p in parameters.items()}


def test_each_option_reaches_the_8bit_optimizer_through_trainer(eager, tmp_path):
    """With fp32 state it equals torch's AdamW, with 8-bit state up to the rounding of moments."""
    options = optimizer_class_and_options(SimpleNamespace(**UNUSUAL), EIGHT_BIT, rank=0)
    found = train_with_trainer(tmp_path, "adamw_torch_8bit", options)
    wanted = train_with_trainer(tmp_path, "adamw_torch")
    start = dict(Layers().named_parameters())
    for name, weights in wanted.items():
        distance = (weights - start[name]).norm()
        error = (found[name] - weights).norm() / distance
        limit = 1e-5
        if name == "wide.weight":
            limit = 0.02
        assert error < limit, name


def test_updates_smaller_than_a_bf16_step_count_on_average(eager):
    """Rounded to the nearest bf16 value, not one of these weights would ever change."""
    args = SimpleNamespace(**{**UNUSUAL, "learning_rate": 1e-5, "weight_decay": 0.0})
    optimizer_class, options = optimizer_class_and_options(args, EIGHT_BIT, rank=0)
    p = torch.nn.Parameter(torch.ones(64, BLOCK_SIZE, dtype=torch.bfloat16))
    optimizer = optimizer_class([p], **options)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # Each step of AdamW under a constant gradient of 1 is the learning rate, but for eps.
    moved = 1 - p.float().mean().item()
    assert 0.9e-3 < moved < 1.1e-3


def test_decay_is_handed_over_without_groups_too():
    options = optimizer_class_and_options(SimpleNamespace(**UNUSUAL), EIGHT_BIT, rank=0)[1]
    assert options["weight_decay"] == 0.3


def test_each_process_rounds_by_other_bits():
    args = SimpleNamespace(**UNUSUAL)
    seeds = [optimizer_class_and_options(args, EIGHT_BIT, rank)[1]["seed"] for rank in (0, 1)]
    assert seeds == [7, 8]


def test_trainer_makes_the_other_optimizers_itself():
    precision = SimpleNamespace(optim="adamw_torch_fused")
    assert optimizer_class_and_options(SimpleNamespace(**UNUSUAL), precision, rank=0) is None


# ---- State --------------------------------------------------------------------------------------
def state_formats(parameters, optimizer) -> dict:
    formats = {}
    for name, p in parameters.items():
        moment = optimizer.state[p]["exp_avg_sq"]
        formats[name] = getattr(moment, "block_size", moment.dtype)
    return formats


EXPECTED_FORMATS = {
    "wide": BLOCK_SIZE,
    "narrow": torch.float32,
    "small": torch.float32,
    "norm": torch.float32,
}


def test_wide_matrices_have_8bit_state_and_all_else_fp32(eager):
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    give_gradients(parameters, seed=0)
    optimizer.step()
    assert state_formats(parameters, optimizer) == EXPECTED_FORMATS


def test_a_scale_belongs_to_values_of_one_row():
    widths_of_qwen2 = (896, 1536, 2048, 3584, 4864, 5120, 8192, 8960, 11008, 13824, 18944, 27648)
    assert [width % BLOCK_SIZE for width in (*widths_of_qwen2, 29568)] == [0] * 13


def save_and_load(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_loaded_it_steps_on_as_if_never_stopped(eager):
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    for step in range(2):
        give_gradients(parameters, seed=step)
        optimizer.step()
    resumed_parameters = copy.deepcopy(parameters)
    resumed = make_optimizer(resumed_parameters)
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    assert state_formats(resumed_parameters, resumed) == EXPECTED_FORMATS
    torch.rand(3)  # what others draw does not matter
    for these, by in ((parameters, optimizer), (resumed_parameters, resumed)):
        give_gradients(these, seed=2)
        by.step()
    for name, p in parameters.items():
        assert torch.equal(p, resumed_parameters[name]), name


def test_what_was_loaded_is_let_go(eager):
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    give_gradients(parameters, seed=0)
    optimizer.step()
    saved = save_and_load(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert saved["state"] == {}


# ---- Random rounding ----------------------------------------------------------------------------
def step_from_start(parameters, optimizer, start) -> torch.Tensor:
    """Return the weights after a step in which only weight decay moves them, always as far."""
    with torch.no_grad():
        parameters["wide"].copy_(start)
    give_gradients(parameters, seed=0, size=0.0)
    optimizer.step()
    return parameters["wide"].detach().clone()


def rounded_steps(seed: int) -> list[torch.Tensor]:
    parameters = make_parameters({"wide": (64, BLOCK_SIZE)})
    start = parameters["wide"].detach().clone()
    optimizer = make_optimizer(parameters, seed=seed, weight_decay=0.3)
    return [step_from_start(parameters, optimizer, start) for _ in range(2)]


@pytest.mark.slow  # the compiler takes most of the time
def test_rounding_depends_on_seed_and_step_and_on_nothing_else():
    """Compiled, as in a run: there the random bits come from a seed that the device draws."""
    first, second = rounded_steps(seed=0)
    torch.rand(3)
    draws = torch.get_rng_state()
    first_again, second_again = rounded_steps(seed=0)
    assert torch.equal(draws, torch.get_rng_state())
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    for other in (second, *rounded_steps(seed=1)):
        assert 0.1 < (first != other).float().mean() < 0.9


def test_rounding_differs_between_seeds_and_between_steps(eager):
    results = []
    for seed in (0, 1, 2**31, 2**32 - 1):
        results += rounded_steps(seed)
    for one, other in itertools.combinations(results, 2):
        assert 0.1 < (one != other).float().mean() < 0.9


def test_a_step_leaves_the_draws_of_others_alone(eager):
    parameters = make_parameters()
    optimizer = make_optimizer(parameters)
    give_gradients(parameters, seed=0)
    draws = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(draws, torch.get_rng_state())


# ---- Shards -------------------------------------------------------------------------------------
@pytest.fixture
def on_two_ranks():
    """Return a function that calls check(device mesh) in two threads that are ranks to torch."""
    store = torch.distributed.HashStore()

    def run_rank(check, rank):
        torch.distributed.init_process_group("threaded", rank=rank, world_size=2, store=store)
        try:
            check(init_device_mesh("cpu", (2,)))
        except BaseException as error:
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # wake the other thread
            raise
        finally:
            torch.distributed.destroy_process_group()

    def run(check):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            ranks = [pool.submit(run_rank, check, rank) for rank in range(2)]
        for rank in ranks:
            rank.result()

    multi_threaded_pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    yield run
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    multi_threaded_pg._uninstall_threaded_pg()


def test_a_norm_is_that_of_the_whole_tensors_on_each_rank(on_two_ranks):
    tensors = [torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0], [12.0]])]

    def check(mesh):
        shards = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors]
        assert total_norm(shards) == 13.0

    assert total_norm(tensors) == 13.0
    on_two_ranks(check)


def test_a_value_that_is_not_finite_is_seen_by_each_rank(on_two_ranks):
    def check(mesh):
        tensor = torch.tensor([[1.0], [float("inf")]])
        assert total_norm([distribute_tensor(tensor, mesh, [Shard(0)])]) == float("inf")

    on_two_ranks(check)


def test_bf16_shards_step_as_whole_tensors_do(eager, on_two_ranks):
    """Without random rounding, whose bits are other ones in each process."""
    whole = make_parameters()
    optimizer = make_optimizer(whole, bf16_stochastic_round=False)
    for step in range(2):
        give_gradients(whole, seed=step)
        optimizer.step()

    def check(mesh):
        shards = {}
        for name, p in make_parameters().items():
            shards[name] = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        sharded = make_optimizer(shards, bf16_stochastic_round=False)
        for step in range(2):
            gradients = make_parameters()
            give_gradients(gradients, seed=step)
            for name, p in shards.items():
                p.grad = distribute_tensor(gradients[name].grad, mesh, [Shard(0)])
            sharded.step()
        for name, p in shards.items():
            state = sharded.state[p]["exp_avg"]
            assert isinstance(state, DTensor)
            assert torch.equal(p.full_tensor(), whole[name]), name

    on_two_ranks(check)


# ---- What is refused ----------------------------------------------------------------------------
COMPILERS = pytest.mark.parametrize(
    "device_kind, variable, names", [("cuda", "CC", "gcc or clang"), ("cpu", "CXX", r"g\+\+")]
)


@COMPILERS
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, device_kind, variable, names):
    monkeypatch.delenv(variable, raising=False)
    check_optimizer("adamw_torch_8bit", device_kind)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"missing: {names} \({variable} names another\)$"):
        check_optimizer("adamw_torch_8bit", device_kind)


@COMPILERS
def test_a_compiler_may_be_named(monkeypatch, tmp_path, device_kind, variable, names):
    compiler = tmp_path / "my-compiler"
    compiler.write_text("")
    os.chmod(compiler, 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(variable, "my-compiler")
    check_compiler(device_kind)


def test_a_missing_header_of_python_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda *args: str(tmp_path))
    with pytest.raises(UserError, match=r": [^:]+/Python\.h \(in the package python3-dev\)$"):
        check_compiler("cpu")
