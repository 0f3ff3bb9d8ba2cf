"""Training: the budget law, a loop written out by hand, what stops a step, the export law."""

import dataclasses
import itertools
import json
import math
import re

import accelerate
import pytest
import torch
import transformers
from runs import ROOT, make_model, read_logs, run_main, train, watch
from runs import argv as make_argv

import sft_qwen2
from sft.conversations import parse_record
from sft.examples import IGNORE_INDEX
from sft.run_record import find_changes
from sft.step_time import training_flops
from sft_qwen2 import SFTArguments, StepSampler, encode

# 61 examples at 16 a step: three full steps and a rest of 13, twice. One is longer than max_len.
NUM_EXAMPLES = 61
NUM_STEPS = 8
FLAGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 5e-3,
    "max_grad_norm": 0.8,  # low enough to be at work
    "max_len": 512,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def data(write_rows):
    """A folder with a quarter of the repository's rows as train.jsonl, and validation.jsonl."""
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    path = write_rows(b"".join(lines[3::4]))
    validation = (ROOT / "data" / "validation.jsonl").read_bytes()
    (path.parent / "validation.jsonl").write_bytes(validation)
    return path.parent


@pytest.fixture(scope="module")
def budget_runs(untied_model_dir, data, tmp_path_factory) -> dict:
    """The same run with three tokens_per_forward: each example alone, some, all at once."""
    runs = {}
    for budget in (1, 300, 16384):
        output_dir = tmp_path_factory.mktemp("outputs") / str(budget)
        runs[budget] = train(untied_model_dir, data, output_dir, tokens_per_forward=budget, **FLAGS)
    return runs


@pytest.fixture(autouse=True)
def accelerate_state():
    """Runs that end before they have a trainer reset a state that earlier trainers still read."""
    accelerate.Accelerator(cpu=True)


def assert_same_training(run, other) -> None:
    assert run.read_losses() == pytest.approx(other.read_losses(), rel=1e-5, abs=1e-5)
    for mine, theirs in zip(run.trainer.model.parameters(), other.trainer.model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# ---- What is brought ----------------------------------------------------------------------------
TURNS = [
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "two"},
]


def test_a_plan_says_what_is_trained_and_warns(write_rows, tmp_path):
    model_dir = make_model(tmp_path, max_position_embeddings=8)
    path = write_rows([{"messages": TURNS}])
    write_rows([{"messages": TURNS}], "validation.jsonl").rename(path.with_name("validation.jsonl"))
    words = ["--model_name_or_path", model_dir, "--data_path", path.parent, "--train_on", "last"]
    code, out, err = run_main(*words, "--dry_run", "--use_cpu")
    assert code == 0, err
    assert re.findall("⟦(.*?)⟧", out) == ["two<|im_end|>"]
    assert "1 of 1 validation rows are training rows" in out
    assert "and the model takes 8; --max_len 8" in out


@pytest.mark.slow
def test_a_run_goes_on_with_its_model_under_another_name(write_rows, tmp_path):
    model_dir = make_model(tmp_path / "model")
    path = write_rows([{"messages": TURNS}])
    flags = {"max_steps": 1, "save_steps": 1}
    train(model_dir, path, tmp_path / "run", **flags)
    moved = model_dir.rename(tmp_path / "moved")
    assert "nothing more" in train(moved, path, tmp_path / "run", **flags, resume=True).out


# ---- What a resume compares ---------------------------------------------------------------------
ANOTHER_RUN = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"num_cycles": 0.7},
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-4,
    "seed": 1,
    "data_seed": 1,
    "system_prompt": "Be brief.",
    "num_train_epochs": 1.5,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "eval_strategy": "epoch",
    "eval_steps": 2,
    "logging_steps": 3,  # the default of eval_steps
    "early_stopping_patience": 2,
    "load_best_model_at_end": True,
}
THE_SAME_RUN = {"output_dir": "elsewhere", "tokens_per_forward": 1, "ddp_timeout": 9}


@pytest.fixture(scope="module")
def fingerprint_of(untied_model_dir, data, tmp_path_factory):
    """A function: options, and other validation examples, to what --resume compares of a run."""
    args = SFTArguments(
        model_name_or_path=str(untied_model_dir),
        data_path=[str(data)],
        output_dir=str(tmp_path_factory.mktemp("not-run")),
        eval_strategy="steps",
        report_to=["none"],
        use_cpu=True,
    )
    examples = sft_qwen2.load_examples(args, sft_qwen2.prepare_tokenizer(args))
    config = transformers.AutoConfig.from_pretrained(untied_model_dir)
    training_args = sft_qwen2.make_training_arguments(args)
    plan = sft_qwen2.make_plan(config, args, training_args, examples["train"])

    def make(evaluated: str = "validation", **options) -> dict:
        changed = dataclasses.replace(args, **options)
        training_args = sft_qwen2.make_training_arguments(changed)
        these = {"train": examples["train"], "validation": examples[evaluated]}
        return sft_qwen2.make_fingerprint(changed, training_args, plan, these)

    return make


@pytest.mark.parametrize("name", ANOTHER_RUN)
def test_an_option_that_decides_what_is_learnt_is_compared(fingerprint_of, name):
    assert find_changes(fingerprint_of(), fingerprint_of(**{name: ANOTHER_RUN[name]}))


def test_examples_to_evaluate_on_are_compared(fingerprint_of):
    assert find_changes(fingerprint_of(), fingerprint_of(evaluated="train"))


def test_what_changes_nothing_is_not_compared(fingerprint_of):
    assert find_changes(fingerprint_of(), fingerprint_of(**THE_SAME_RUN)) == []


# ---- The budget law, and every step by hand -----------------------------------------------------
@pytest.mark.parametrize("budget", [300, 16384])
def test_the_budget_changes_nothing(budget, budget_runs):
    """Any tokens_per_forward gives the same losses and the same final weights."""
    assert_same_training(budget_runs[budget], budget_runs[1])


def line_of(example: dict) -> int:
    return int(example["source"].rpartition(":")[2])


def test_every_example_is_trained_once_an_epoch(budget_runs):
    """An epoch is all examples, the last and smaller step included, in an order of its own."""
    steps = budget_runs[300].steps
    assert [len(step) for step in steps] == [16, 16, 16, 13] * 2
    first = [line_of(example) for step in steps[:4] for example in step]
    second = [line_of(example) for step in steps[4:] for example in step]
    assert sorted(first) == list(range(1, NUM_EXAMPLES + 1))
    assert sorted(second) == sorted(first)
    assert first != second


def test_the_order_is_that_of_the_seed(budget_runs):
    found = []
    for step in budget_runs[300].steps[:4]:
        found.append([line_of(example) - 1 for example in step])
    assert found == list(StepSampler(NUM_EXAMPLES, 16, seed=42))


def test_data_seed_decides_the_order_where_it_is_given(budget_runs, monkeypatch):
    trainer = budget_runs[300].trainer
    monkeypatch.setattr(trainer.args, "data_seed", 7)
    sampler = trainer.get_train_dataloader().batch_sampler
    assert list(sampler) == list(StepSampler(NUM_EXAMPLES, 16, seed=7))


def token_losses(model, example: dict) -> torch.Tensor:
    """Return the cross entropy of each trained token of one example, unpadded and alone."""
    input_ids = torch.tensor(example["input_ids"][: FLAGS["max_len"]]).long()
    labels = torch.tensor(example["labels"][: FLAGS["max_len"]]).long()
    logits = model(input_ids[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
    return losses[labels[1:] != IGNORE_INDEX]


def rate_of_step(step: int) -> float:
    """Return the learning rate by the formula: linear warm-up, then a cosine.

    The schedule is one step longer than the run. Its first step, of rate 0, is left out.
    """
    num_warmup_steps = math.ceil(0.03 * NUM_STEPS)
    if step < num_warmup_steps:
        return FLAGS["learning_rate"] * step / num_warmup_steps
    done = (step - num_warmup_steps) / (NUM_STEPS + 1 - num_warmup_steps)
    return FLAGS["learning_rate"] * 0.5 * (1 + math.cos(math.pi * done))


def train_by_hand(model, steps) -> tuple[list, list]:
    """Train single examples by AdamW, cosine and clipping written out; return losses and norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.003},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,
    )
    losses = []
    norms = []
    for step, examples in enumerate(steps, 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_of_step(step)
        num_trained = sum(int((x["labels"] != IGNORE_INDEX).sum()) for x in examples)
        step_loss = 0.0
        for example in examples:
            loss = token_losses(model, example).sum() / num_trained
            loss.backward()
            step_loss += loss.item()
        losses.append(step_loss)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def test_a_plain_loop_gives_the_same_losses(budget_runs, untied_model_dir):
    """AdamW, cosine and clipping written out over single examples repeat the trainer's run."""
    run = budget_runs[300]
    model = transformers.Qwen2ForCausalLM.from_pretrained(untied_model_dir, dtype=torch.float32)
    losses, norms = train_by_hand(model, run.steps)
    logs = read_logs(run.output_dir)
    assert [log["step"] for log in logs] == list(range(1, NUM_STEPS + 1))
    assert [log["loss"] for log in logs] == pytest.approx(losses, rel=1e-4)
    assert [log["grad_norm"] for log in logs] == pytest.approx(norms, rel=1e-3)
    assert min(norms) < FLAGS["max_grad_norm"] < max(norms)  # clipping was at work, not always
    rates = [rate_of_step(step) for step in range(1, NUM_STEPS + 1)]
    assert [log["learning_rate"] for log in logs] == pytest.approx(rates)
    for mine, theirs in zip(run.trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_eval_loss_is_the_mean_over_all_answer_tokens(budget_runs, data, untied_model_dir):
    """eval_loss weighs every trained token of the validation file alike, before and after."""
    run = budget_runs[16384]
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied_model_dir)
    examples = []
    for line in (data / "validation.jsonl").read_bytes().splitlines():
        messages = parse_record(json.loads(line), SFTArguments.system_prompt)
        examples.append(encode(messages, tokenizer))
    evaluations = [log["eval_loss"] for log in read_logs(run.output_dir, "eval_loss")]
    for folder, found in ((untied_model_dir, evaluations[0]), (run.output_dir, evaluations[-1])):
        model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            losses = torch.cat([token_losses(model, example) for example in examples])
        assert found == pytest.approx(losses.mean().item(), rel=1e-5)
    assert evaluations[-1] < evaluations[0] - 0.5


def test_a_given_dataset_is_evaluated(budget_runs):
    trainer = budget_runs[300].trainer
    of_one = trainer.evaluate([trainer.train_dataset[0]])
    of_all = trainer.evaluate()
    assert of_one["eval_loss"] != of_all["eval_loss"]


def test_tokens_per_second_are_tokens_of_examples(budget_runs, monkeypatch):
    """All tokens of a step by the seconds it took."""
    run = budget_runs[300]
    seconds = iter([0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    run.trainer.throughput.forget()
    run.trainer.throughput.start()
    run.trainer.count_work(run.steps[0])
    num_tokens = sum(len(example["input_ids"]) for example in run.steps[0])
    assert run.trainer.throughput.metrics()["tokens_per_s"] == round(num_tokens / 2)


def test_the_head_counts_as_flops_at_trained_tokens_only(budget_runs):
    run = budget_runs[300]
    lengths = [len(example["input_ids"]) for example in run.steps[0]]
    num_trained = sum(int((x["labels"][1:] != IGNORE_INDEX).sum()) for x in run.steps[0])
    run.trainer.throughput.forget()
    run.trainer.count_work(run.steps[0])
    flops = training_flops(run.trainer.model.config, lengths, num_trained)
    assert run.trainer.throughput.flops == flops


# ---- Learning rates -----------------------------------------------------------------------------
def list_rates(trainer, num_steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)
    trainer.lr_scheduler = None
    schedule = trainer.create_scheduler(num_steps, optimizer)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_the_warm_up_is_a_share_of_the_steps_of_the_run(budget_runs):
    """Three of 93 steps warm up, the first with a third of the peak. No step has a rate of 0."""
    rates = list_rates(budget_runs[1].trainer, 93)
    assert rates[:3] == pytest.approx([1e-5 / 3, 2e-5 / 3, 1e-5])
    assert rates[3] < 1e-5
    assert 0 < min(rates) == rates[-1]


def test_without_a_warm_up_the_first_step_has_the_peak(budget_runs, monkeypatch):
    trainer = budget_runs[1].trainer
    monkeypatch.setattr(trainer.args, "warmup_steps", 0)
    rates = list_rates(trainer, 10)
    assert rates[0] == 1e-5
    assert 0 < min(rates) == rates[-1]


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_an_epoch_of_one_step(kind, untied_model_dir, write_rows, tmp_path):
    """A constant rate is the one that was asked for, and Trainer evaluates in the same step."""
    path = write_rows([{"query": "q", "answer": "a"}])
    (path.parent / "validation.jsonl").write_bytes(path.read_bytes())
    flags = {**FLAGS, "num_train_epochs": 1, "lr_scheduler_type": kind, "eval_strategy": "steps"}
    run = train(untied_model_dir, path.parent, tmp_path / "outputs", **flags)
    (log,) = read_logs(run.output_dir)
    assert kind == "cosine" or log["learning_rate"] == FLAGS["learning_rate"]
    assert log["tokens_per_s"] > 0


# ---- What stops a step, and what does not -------------------------------------------------------
@pytest.fixture
def limit_memory(monkeypatch):
    """A function: no micro-batch of more than so many tokens finds memory, but for the first."""

    def limit(max_tokens):
        forward = sft_qwen2.Qwen2ForCausalLM.forward
        number = itertools.count()

        def limited(self, input_ids=None, **kwargs):
            if self.training and next(number) and input_ids.shape[1] > max_tokens:
                raise torch.OutOfMemoryError("no memory")
            return forward(self, input_ids, **kwargs)

        monkeypatch.setattr(sft_qwen2.Qwen2ForCausalLM, "forward", limited)

    return limit


def test_out_of_memory_is_a_smaller_step(
    budget_runs, untied_model_dir, data, tmp_path, limit_memory
):
    """The losses are those of before."""
    limit_memory(512)
    run = train(untied_model_dir, data, tmp_path / "small", tokens_per_forward=2000, **FLAGS)
    assert_same_training(run, budget_runs[1])
    retries = re.findall(r"out of memory at [\d,]+ tokens .* --tokens_per_forward (\d+)", run.out)
    assert [int(tokens) for tokens in retries] == sorted(map(int, retries), reverse=True)
    assert retries


def test_gradients_of_a_try_that_failed_are_not_counted(budget_runs, monkeypatch):
    run = budget_runs[300]
    trainer = run.trainer
    monkeypatch.setattr(trainer, "tokens_per_forward", 600)
    fails = iter([])
    forward = sft_qwen2.Qwen2ForCausalLM.forward

    def forward_or_fail(self, *args, **kwargs):
        if next(fails, False):
            raise torch.OutOfMemoryError("no memory")
        return forward(self, *args, **kwargs)

    def make_gradients() -> list[torch.Tensor]:
        trainer.model.zero_grad()
        trainer.run_until_it_fits(trainer.forward_backward, run.steps[0])
        return [p.grad.clone() for p in trainer.model.parameters()]

    monkeypatch.setattr(sft_qwen2.Qwen2ForCausalLM, "forward", forward_or_fail)
    expected = make_gradients()
    fails = iter([False, True])  # the second micro-batch
    torch.testing.assert_close(make_gradients(), expected, rtol=1e-4, atol=1e-5)
    assert next(fails, None) is None


def test_out_of_memory_of_one_example_recomputes_layers(
    untied_model_dir, data, tmp_path, monkeypatch
):
    """An example cannot be cut into smaller micro-batches."""
    forward = sft_qwen2.Qwen2ForCausalLM.forward

    def fails_unless_recomputed(self, *args, **kwargs):
        if self.training and not self.model.layers[0].gradient_checkpointing:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(sft_qwen2.Qwen2ForCausalLM, "forward", fails_unless_recomputed)
    flags = {**FLAGS, "num_train_epochs": 1, "tokens_per_forward": 1}
    run = train(untied_model_dir, data, tmp_path / "one", **flags)
    assert "retrying with all layers recomputed" in run.out


def test_memory_that_runs_out_before_the_first_micro_batch_ends_the_run(
    untied_model_dir, data, tmp_path, monkeypatch
):
    """A batch that cannot even be moved is retried smaller, and not for ever."""

    def fails(self, micro_batch):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(sft_qwen2.SFTTrainer, "_prepare_inputs", fails)
    (tmp_path / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes())
    run = watch(*argv_of(untied_model_dir, tmp_path / "train.jsonl", tmp_path / "outputs"))
    assert run.code == 1
    assert "begin anew with a lower --max_len" in run.err


def argv_of(model_dir, data_path, output_dir) -> list[str]:
    return make_argv(
        model_name_or_path=model_dir,
        data_path=data_path,
        output_dir=output_dir,
        report_to="none",
        **FLAGS,
    )


def break_loss(exact):
    """Return a loss of 0, as labels that are all masked would give."""
    return lambda hidden, head, targets: exact(hidden, head, targets) * 0


def break_gradient(exact):
    """Return the loss; its gradients are infinite."""

    def broken(hidden, head, targets):
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * math.inf)
        return exact(hidden, head, targets)

    return broken


@pytest.mark.parametrize(
    ("fault", "named"), [(break_loss, "the loss is 0"), (break_gradient, "the gradient norm is")]
)
def test_a_step_that_is_not_finite_stops_the_run(
    fault, named, untied_model_dir, data, tmp_path, monkeypatch
):
    """The step and its examples are named, and nothing is exported."""
    broken = fault(sft_qwen2.cross_entropy_sum)
    monkeypatch.setattr(sft_qwen2, "cross_entropy_sum", broken)
    run = watch(*argv_of(untied_model_dir, data, tmp_path / "outputs"))
    assert run.code == 1
    assert f"step 1: {named}" in run.err
    assert f"{data / 'train.jsonl'}:" in run.err
    assert not (tmp_path / "outputs" / "model.safetensors").exists()


def test_weights_do_not_change_in_a_step_that_is_not_finite(
    untied_model_dir, data, tmp_path, monkeypatch
):
    broken = break_gradient(sft_qwen2.cross_entropy_sum)
    monkeypatch.setattr(sft_qwen2, "cross_entropy_sum", broken)
    run = watch(*argv_of(untied_model_dir, data, tmp_path / "outputs"))
    before = transformers.Qwen2ForCausalLM.from_pretrained(untied_model_dir, dtype=torch.float32)
    for mine, theirs in zip(run.trainer.model.parameters(), before.parameters()):
        assert torch.equal(mine, theirs)


def test_one_example_that_does_not_fit_names_the_remedy(
    untied_model_dir, data, tmp_path, limit_memory
):
    limit_memory(0)
    run = watch(*argv_of(untied_model_dir, data, tmp_path / "outputs"))
    assert run.code == 1
    assert "begin anew with a lower --max_len" in run.err


def test_only_skips_in_a_row_are_too_many(budget_runs, monkeypatch):
    trainer = budget_runs[300].trainer
    some = [True] * sft_qwen2.MAX_CONSECUTIVE_SKIPS
    was_skipped = iter([*some, False, *some])
    each_step = property(lambda accelerator: next(was_skipped))
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", each_step)
    monkeypatch.setattr(trainer, "num_consecutive_skips", 0)
    for _ in range(2 * len(some) + 1):
        trainer.count_skipped_step()


def test_a_step_that_fp16_skips_is_none_for_fused_adamw_either(budget_runs):
    """Fused AdamW would skip it by itself, unseen by accelerate, and the schedule would go on."""
    optimizer = budget_runs[1].trainer.optimizer.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    stepped = []
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for parameter in budget_runs[1].trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    hook = optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
    scaler.step(optimizer)
    hook.remove()
    optimizer.zero_grad()
    assert not stepped


def test_autocast_keeps_no_cache_of_weights(budget_runs):
    """It would take 2 bytes a parameter that the plan does not count."""
    assert budget_runs[1].trainer.accelerator.autocast_handler.cache_enabled is False


# ---- The export law -----------------------------------------------------------------------------
OVERFIT = [
    {"query": "What is the capital of Portugal?", "answer": "The capital of Portugal is Lisbon."},
    {"query": "泰国的首都是哪里?", "answer": "泰国的首都是曼谷。"},
]
SYSTEM_PROMPT = "Be 'brief' {{ and \"right\" }} %}\n\\n。"


@pytest.fixture(scope="module")
def overfit(tiny_model_dir, write_rows, tmp_path_factory):
    """A run of the stand-in that has learnt two answers by heart."""
    return train(
        tiny_model_dir,
        write_rows(OVERFIT),
        tmp_path_factory.mktemp("overfit") / "outputs",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        num_train_epochs=40,
        learning_rate=3e-3,
        save_strategy="no",
        max_len=256,
        system_prompt=SYSTEM_PROMPT,
    )


def test_the_export_answers_as_it_was_trained_and_stops(overfit):
    """Loaded by transformers alone, without a system turn: the template has the trained one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(overfit.output_dir, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(overfit.output_dir)
    for row in OVERFIT:
        messages = [{"role": "user", "content": row["query"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
        answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
        assert answer == row["answer"] + "<|im_end|>"


def test_the_export_is_an_ordinary_qwen2(overfit):
    config = json.loads((overfit.output_dir / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["model_type"] == "qwen2"
    assert config["use_cache"] is True
    model = transformers.AutoModelForCausalLM.from_pretrained(overfit.output_dir)
    assert model.config._attn_implementation == "sdpa"


def test_the_export_gives_the_trainers_own_logits(overfit):
    model = transformers.AutoModelForCausalLM.from_pretrained(overfit.output_dir, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(overfit.output_dir)
    input_ids = encode(parse_record(OVERFIT[0], SYSTEM_PROMPT), tokenizer)["input_ids"]
    trained = overfit.trainer.model.eval()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.copy_(weight.bfloat16())  # the format of the base's files
        mine = trained.float()(torch.tensor([input_ids])).logits
        theirs = model.float().eval()(torch.tensor([input_ids])).logits
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
