"""Training: the budget law, a handwritten loop, evaluation and the export law."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT

import sft_qwen2
from sft.encoded_rows import IGNORE_INDEX
from sft.rows import parse_row
from sft_qwen2 import encode, load_tokenizer

# 230 rows at 64 a step: three full steps and a rest of 38, twice.
FLAGS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 2,
    "learning_rate": 5e-3,
    "max_grad_norm": 0.8,  # low enough to be at work
    "max_len": 512,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def data(write_rows):
    """The repository's rows as train.jsonl and validation.jsonl in a folder."""
    path = write_rows((ROOT / "data" / "train.jsonl").read_bytes())
    validation = (ROOT / "data" / "validation.jsonl").read_bytes()
    (path.parent / "validation.jsonl").write_bytes(validation)
    return path.parent


@pytest.fixture(scope="module")
def runs(train, untied_model_dir, data, tmp_path_factory) -> dict:
    """The same run with three budgets of tokens_per_forward: each row alone, some, many."""

    def run(budget):
        output_dir = tmp_path_factory.mktemp("outputs") / str(budget)
        return train(untied_model_dir, data, output_dir, tokens_per_forward=budget, **FLAGS)

    return {budget: run(budget) for budget in (1, 2048, 16384)}


def read_metrics(run) -> list[dict]:
    lines = Path(run.trainer.args.output_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_budget_changes_nothing(runs):
    """Any tokens_per_forward gives the same losses and the same final weights."""
    alone, *others = runs.values()
    for run in others:
        assert run.losses == pytest.approx(alone.losses, rel=1e-5, abs=1e-5)
        weights = zip(run.trainer.model.parameters(), alone.trainer.model.parameters())
        for mine, theirs in weights:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_every_row_is_trained_once_an_epoch(runs, data):
    """An epoch is all rows, the last and smaller step included, in an order of its own."""
    run = runs[2048]
    num_rows = len((data / "train.jsonl").read_bytes().splitlines())
    assert [len(rows) for rows in run.steps] == [64, 64, 64, num_rows - 192] * 2
    orders = [[row["line"] for rows in run.steps[i : i + 4] for row in rows] for i in (0, 4)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, num_rows + 1))
    assert orders[0] != orders[1] != sorted(orders[1])


def test_the_loss_falls(runs):
    """On the repository's data the training loss and the validation loss fall within few steps."""
    run = runs[2048]
    assert run.losses[-1] < run.losses[0] - 0.5
    evals = [metrics["eval_loss"] for metrics in read_metrics(run) if "eval_loss" in metrics]
    assert evals[-1] < evals[0] - 0.5


def token_losses(model, row: dict, max_len: int) -> torch.Tensor:
    """Cross entropy of each trained token of one row, unpadded and alone."""
    ids, labels = (torch.tensor(row[name][:max_len]).long() for name in ("input_ids", "labels"))
    logits = model(ids[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses[labels[1:] != IGNORE_INDEX]


def test_a_plain_loop_gives_the_same_losses(runs, untied_model_dir):
    """AdamW, cosine and clipping written out over single rows repeat the trainer's every loss."""
    run = runs[2048]
    model = transformers.Qwen2ForCausalLM.from_pretrained(untied_model_dir, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.003}, {"params": others, "weight_decay": 0.0}]
    optimizer, num_steps = torch.optim.AdamW(groups, lr=0.0), len(run.steps)
    warmup = math.ceil(0.03 * num_steps)
    losses, norms = [], []
    for step, rows in enumerate(run.steps, 1):
        at = min(step, num_steps - 0.5)  # the schedule's end, 0, is left out
        share = (at - warmup) / (num_steps - warmup)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = FLAGS["learning_rate"] * rate
        labels = [torch.tensor(row["labels"][: FLAGS["max_len"]]) for row in rows]
        num_trained = sum(int((each != IGNORE_INDEX).sum()) for each in labels)
        losses.append(0.0)
        for row in rows:
            loss = token_losses(model, row, FLAGS["max_len"]).sum() / num_trained
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8).item())
        optimizer.step()
        optimizer.zero_grad()
    logged = [log["grad_norm"] for log in run.trainer.state.log_history if "grad_norm" in log]
    assert norms == pytest.approx(logged, rel=1e-3)
    assert max(norms) > FLAGS["max_grad_norm"] > min(norms)
    assert run.losses == pytest.approx(losses, rel=1e-4)
    for mine, theirs in zip(run.trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_eval_loss_is_the_mean_over_all_answer_tokens(runs, data, untied_model_dir):
    """eval_loss weighs every trained token of the validation file alike, before and after."""
    run = runs[16384]
    system = "你是一个知识渊博的人,请根据问题做出全面且正确的回答。"
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied_model_dir)
    lines = (data / "validation.jsonl").read_bytes().splitlines()
    rows = [encode(parse_row(json.loads(line), system), tokenizer) for line in lines]
    evals = [metrics["eval_loss"] for metrics in read_metrics(run) if "eval_loss" in metrics]
    for folder, expected in (
        (untied_model_dir, evals[0]),
        (run.trainer.args.output_dir, evals[-1]),
    ):
        model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            losses = torch.cat([token_losses(model, row, FLAGS["max_len"]) for row in rows])
        assert expected == pytest.approx(losses.mean().item(), rel=1e-5)
    assert re.findall("'eval_loss': '([^']*)'", run.out) == [f"{x:.4g}" for x in evals]


def test_metrics_are_written(runs):
    """metrics.jsonl has every step's loss, as it was logged."""
    run = runs[2048]
    metrics = [metrics for metrics in read_metrics(run) if "loss" in metrics]
    assert [m["loss"] for m in metrics] == run.losses
    assert [m["step"] for m in metrics] == list(range(1, len(run.losses) + 1))


def test_an_epoch_may_be_logged_as_one(train, untied_model_dir, data, tmp_path):
    """Trainer logs an epoch after it evaluated in the same step: there is speed to show, still."""
    flags = {**FLAGS, "num_train_epochs": 1, "logging_strategy": "epoch", "eval_strategy": "steps"}
    run = train(untied_model_dir, data, tmp_path / "outputs", **flags)
    (log,) = [metrics for metrics in read_metrics(run) if "loss" in metrics]
    assert log["tokens_per_s"] > 0


def test_the_warm_up_is_a_share_of_the_steps_of_the_run(
    train, untied_model_dir, write_rows, tmp_path
):
    """The rates that the walk-through's log shows for 93 steps; none is 0."""
    rows = write_rows([{"query": f"{i} + {i} = ?", "answer": str(2 * i)} for i in range(93)])
    flags = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_len": 128}
    run = train(untied_model_dir, rows, tmp_path / "outputs", save_strategy="no", **flags)
    rates = [log["learning_rate"] for log in run.trainer.state.log_history if "loss" in log]
    shown = [float(f"{rate:.6g}") for rate in rates]
    assert shown[:5] == [3.33333e-06, 6.66667e-06, 1e-05, 9.99695e-06, 9.98782e-06]
    assert len(rates) == 93 and 0 < min(rates) == rates[-1]


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau"])
def test_schedules_without_a_warm_up_of_their_own(kind, train, untied_model_dir, data, tmp_path):
    """They begin at the learning rate that was asked for."""
    flags = {**FLAGS, "max_steps": 1, "lr_scheduler_type": kind, "eval_strategy": "epoch"}
    run = train(untied_model_dir, data, tmp_path / "outputs", **flags)
    (log,) = [metrics for metrics in read_metrics(run) if "loss" in metrics]
    assert log["learning_rate"] == FLAGS["learning_rate"]


# ---- What stops a step, and what does not ----------------------------------------------------
SMALL = {"gradient_accumulation_steps": 2, "save_strategy": "no", "max_len": 256, "max_steps": 2}


@pytest.fixture
def fail_once(monkeypatch):
    """A function: an error that the first loss of more tokens than this raises, `times` times."""

    def arm(error, tokens=0, times=1):
        forward, left = sft_qwen2.AnswerLoss.forward, [times]

        def failing(self, input_ids=None, **kwargs):
            large = kwargs.get("shift_labels") is not None and input_ids.shape[1] > tokens
            if large and self.training and left[0]:
                left[0] -= 1
                raise error
            return forward(self, input_ids, **kwargs)

        monkeypatch.setattr(sft_qwen2.AnswerLoss, "forward", failing)

    return arm


def test_out_of_memory_is_a_smaller_step(train, untied_model_dir, data, tmp_path, fail_once):
    """First layers are recomputed, then micro-batches halved: the losses are those of before."""
    plain = train(untied_model_dir, data, tmp_path / "plain", **SMALL)
    fail_once(torch.OutOfMemoryError("no memory"), tokens=700, times=3)
    run = train(untied_model_dir, data, tmp_path / "small", **SMALL)
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    said = re.findall(r"now (--tokens_per_forward|gradient checkpointing)", run.out)
    assert said[0] == "gradient checkpointing" and said[-1] == "--tokens_per_forward"
    assert run.trainer.tokens_per_forward < plain.trainer.tokens_per_forward


def test_one_row_that_is_too_large(run_main, untied_model_dir, data, tmp_path, fail_once):
    fail_once(torch.OutOfMemoryError("no memory"), times=99)
    flags = {"model_name_or_path": untied_model_dir, "data_path": data, "report_to": "none"}
    flags |= {"output_dir": tmp_path / "outputs", **SMALL}
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    code, _, err = run_main(*argv)
    assert code == 1 and "out of memory with one row of" in err and "--max_len" in err


def test_a_step_that_fp16_skips_is_none_for_fused_adamw_either(runs):
    """It would skip by itself, unseen by accelerate, and the schedule go on."""
    optimizer, stepped = runs[2048].trainer.optimizer.optimizer, []
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for parameter in runs[2048].trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
    scaler.step(optimizer)
    assert not stepped


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_reaches_no_weights(
    bad, run_main, untied_model_dir, data, tmp_path, monkeypatch
):
    """It names its rows; nothing is exported."""
    exact = sft_qwen2.numerics.cross_entropy_sum

    def broken(hidden, head, targets):
        if bad == "loss":
            return exact(hidden, head, targets) * 0  # as of labels that are all masked
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * math.inf)
        return exact(hidden, head, targets)

    monkeypatch.setattr(sft_qwen2.numerics, "cross_entropy_sum", broken)
    flags = {"model_name_or_path": untied_model_dir, "data_path": data, "report_to": "none"}
    flags |= {"output_dir": tmp_path / "outputs", **SMALL}
    code, _, err = run_main(*(word for pair in flags.items() for word in (f"--{pair[0]}", pair[1])))
    assert code == 1 and f"step 1: its {bad}" in err and f"{data / 'train.jsonl'}:" in err
    assert not (tmp_path / "outputs" / "model.safetensors").exists()


# ---- The export law -----------------------------------------------------------------------------
OVERFIT = [
    {"query": "What is the capital of Portugal?", "answer": "The capital of Portugal is Lisbon."},
    {"query": "泰国的首都是哪里?", "answer": "泰国的首都是曼谷。"},
]
SERVE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
dtype = model.dtype
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for query in json.loads(sys.argv[3]):
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": query}], **options)
    output = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
    answers.append(tokenizer.decode(output[prompt["input_ids"].shape[1]:]))
reference = torch.load(sys.argv[2])
with torch.no_grad():
    logits = model.float()(reference["input_ids"]).logits
print(json.dumps({
    "answers": answers,
    "difference": (logits - reference["logits"]).abs().max().item(),
    "architectures": model.config.architectures,
    "model_type": model.config.model_type,
    "use_cache": model.config.use_cache,
    "eos": model.generation_config.eos_token_id,
    "dtype": str(dtype),
    "attention": model.config._attn_implementation,
    "modules": [name for name in sys.modules if "sft_qwen2" in name],
}))
"""


def test_the_export_is_served_as_it_was_trained(train, tiny_model_dir, write_rows, tmp_path):
    """Loaded by transformers alone it gives the trainer's logits, answers, and stops."""
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    flags |= {"num_train_epochs": 40, "learning_rate": 3e-3, "save_strategy": "no", "max_len": 256}
    system_prompt = "Be 'brief' {{ and \"right\" }} %}\n\\n。"
    output_dir = tmp_path / "outputs"
    rows = write_rows(OVERFIT)
    run = train(tiny_model_dir, rows, output_dir, system_prompt=system_prompt, **flags)
    tokenizer = load_tokenizer(str(tiny_model_dir), system_prompt)
    ids = torch.tensor([encode(parse_row(OVERFIT[0], system_prompt), tokenizer)["input_ids"]])
    model = run.trainer.model.eval()
    with torch.no_grad():
        for weight in model.parameters():  # to the format of the base's files, the export's
            weight.copy_(weight.bfloat16())
        logits = model(ids).logits
    torch.save({"input_ids": ids, "logits": logits}, tmp_path / "reference.pt")
    queries = json.dumps([row["query"] for row in OVERFIT])
    argv = [sys.executable, "-c", SERVE, output_dir, tmp_path / "reference.pt", queries]
    served = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert served.returncode == 0, served.stderr
    result = json.loads(served.stdout)
    assert result["answers"] == [row["answer"] + "<|im_end|>" for row in OVERFIT]
    assert result["difference"] < 1e-5
    assert result["architectures"] == ["Qwen2ForCausalLM"] and result["model_type"] == "qwen2"
    assert result["use_cache"] is True
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(result["eos"]) == sorted(ends)
    assert result["attention"] == "sdpa" and result["modules"] == []


def test_the_same_seed_is_the_same_run(train, untied_model_dir, write_rows, tmp_path):
    """Two runs with one seed log equal losses; another seed orders the rows otherwise."""
    rows = [{"query": f"{i} + {i} = ?", "answer": str(2 * i)} for i in range(20)]
    flags = {"gradient_accumulation_steps": 1, "save_strategy": "no", "max_len": 64}
    path = write_rows(rows)
    runs = [
        train(untied_model_dir, path, tmp_path / str(i), seed=i // 2, **flags) for i in range(3)
    ]
    assert runs[0].losses == runs[1].losses
    orders = [[row["line"] for rows in run.steps for row in rows] for run in runs]
    assert orders[0] == orders[1] != orders[2]
