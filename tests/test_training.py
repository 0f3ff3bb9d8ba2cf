"""Training: the budget law, a handwritten loop, evaluation, what stops a step, the export law."""

import itertools
import json
import math
import re

import pytest
import torch
import transformers
from runs import ROOT, argv, read_logs, run_main, train

import sft_qwen2
from sft.encoded_rows import IGNORE_INDEX
from sft.rows import parse_row
from sft_qwen2 import ScriptArguments, StepSampler, encode, load_tokenizer

# 61 rows at 16 a step: three full steps and a rest of 13, twice. One row is over max_len.
ROWS, STEPS = 61, 8
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
    """A quarter of the repository's rows as train.jsonl, and validation.jsonl, in a folder."""
    lines = (ROOT / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    path = write_rows(b"".join(lines[3::4]))
    validation = (ROOT / "data" / "validation.jsonl").read_bytes()
    (path.parent / "validation.jsonl").write_bytes(validation)
    return path.parent


@pytest.fixture(scope="module")
def runs(untied_model_dir, data, tmp_path_factory) -> dict:
    """The same run with three budgets of tokens_per_forward: each row alone, some, all."""

    def run(budget):
        output_dir = tmp_path_factory.mktemp("outputs") / str(budget)
        return train(untied_model_dir, data, output_dir, tokens_per_forward=budget, **FLAGS)

    return {budget: run(budget) for budget in (1, 300, 16384)}


def assert_same_training(run, other) -> None:
    assert run.losses == pytest.approx(other.losses, rel=1e-5, abs=1e-5)
    weights = (each.trainer.model.parameters() for each in (run, other))
    for mine, theirs in zip(*weights):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_budget_changes_nothing(runs):
    """Any tokens_per_forward gives the same losses and the same final weights."""
    alone, *others = runs.values()
    for run in others:
        assert_same_training(run, alone)


def test_every_row_is_trained_once_an_epoch(runs):
    """An epoch is all rows, the last and smaller step included, in an order of its own."""
    run = runs[300]
    assert [len(rows) for rows in run.steps] == [16, 16, 16, 13] * 2
    orders = [[row["line"] for rows in run.steps[i : i + 4] for row in rows] for i in (0, 4)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1, ROWS + 1))
    assert orders[0] != orders[1] != sorted(orders[1])
    found = [[row["line"] - 1 for row in rows] for rows in run.steps[:4]]
    assert found == list(StepSampler(ROWS, 16, seed=42)) != list(StepSampler(ROWS, 16, seed=43))


def token_losses(model, row: dict) -> torch.Tensor:
    """Cross entropy of each trained token of one row, unpadded and alone."""
    max_len = FLAGS["max_len"]
    ids, labels = (torch.tensor(row[name][:max_len]).long() for name in ("input_ids", "labels"))
    logits = model(ids[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")
    return losses[labels[1:] != IGNORE_INDEX]


def test_a_plain_loop_gives_the_same_losses(runs, untied_model_dir):
    """AdamW, cosine and clipping written out over single rows repeat the trainer's every loss."""
    run = runs[300]
    model = transformers.Qwen2ForCausalLM.from_pretrained(untied_model_dir, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.003}, {"params": others, "weight_decay": 0.0}]
    optimizer, warmup = torch.optim.AdamW(groups, lr=0.0), math.ceil(0.03 * STEPS)
    losses, norms = [], []
    for step, rows in enumerate(run.steps, 1):
        at = min(step, STEPS - 0.5)  # the schedule's end, 0, is left out
        share = (at - warmup) / (STEPS - warmup)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = FLAGS["learning_rate"] * rate
        trained = [row["labels"][: FLAGS["max_len"]] != IGNORE_INDEX for row in rows]
        losses.append(0.0)
        for row in rows:
            loss = token_losses(model, row).sum() / int(sum(each.sum() for each in trained))
            loss.backward()
            losses[-1] += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8).item())
        optimizer.step()
        optimizer.zero_grad()
    logs = read_logs(run.output_dir)
    assert [log["step"] for log in logs] == list(range(1, STEPS + 1))
    assert [log["loss"] for log in logs] == run.losses == pytest.approx(losses, rel=1e-4)
    assert [log["grad_norm"] for log in logs] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > FLAGS["max_grad_norm"] > min(norms)
    for mine, theirs in zip(run.trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_eval_loss_is_the_mean_over_all_answer_tokens(runs, data, untied_model_dir):
    """eval_loss weighs every trained token of the validation file alike, before and after."""
    run = runs[16384]
    tokenizer = transformers.AutoTokenizer.from_pretrained(untied_model_dir)
    lines = (data / "validation.jsonl").read_bytes().splitlines()
    turns = [parse_row(json.loads(line), ScriptArguments.system_prompt) for line in lines]
    rows = [encode(messages, tokenizer) for messages in turns]
    evals = [log["eval_loss"] for log in read_logs(run.output_dir, "eval_loss")]
    for folder, found in ((untied_model_dir, evals[0]), (run.output_dir, evals[-1])):
        model = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            losses = torch.cat([token_losses(model, row) for row in rows])
        assert found == pytest.approx(losses.mean().item(), rel=1e-5)
    assert re.findall("'eval_loss': '([^']*)'", run.out) == [f"{x:.4g}" for x in evals]
    assert evals[-1] < evals[0] - 0.5


# ---- Learning rates -----------------------------------------------------------------------------
def test_the_warm_up_is_a_share_of_the_steps_of_the_run(runs):
    """Of 93 steps the first three warm up; none has a rate of 0."""
    trainer = runs[1].trainer
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-5)
    trainer.lr_scheduler = None
    scheduler, rates = trainer.create_scheduler(93, optimizer), []
    for _ in range(93):
        rates.append(float(f"{optimizer.param_groups[0]['lr']:.6g}"))
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [3.33333e-06, 6.66667e-06, 1e-05, 9.99695e-06, 9.98782e-06]
    assert 0 < min(rates) == rates[-1]


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau", "cosine"])
def test_an_epoch_of_one_step(kind, untied_model_dir, write_rows, tmp_path):
    """Schedules without a warm-up of their own begin at the learning rate that was asked for.

    Trainer logs an epoch after it evaluated in the same step: there is speed to show, still.
    """
    path = write_rows([{"query": "q", "answer": "a"}])
    (path.parent / "validation.jsonl").write_bytes(path.read_bytes())
    flags = FLAGS | {"num_train_epochs": 1, "lr_scheduler_type": kind, "eval_strategy": "steps"}
    flags["logging_strategy"] = "epoch"
    run = train(untied_model_dir, path.parent, tmp_path / "outputs", **flags)
    (log,) = read_logs(run.output_dir)
    assert kind == "cosine" or log["learning_rate"] == FLAGS["learning_rate"]
    assert log["tokens_per_s"] > 0


# ---- What stops a step, and what does not -------------------------------------------------------
@pytest.fixture
def limit_memory(monkeypatch):
    """A function: let no loss of more than so many tokens have the memory for it, but the first."""

    def limit(tokens):
        forward, number = sft_qwen2.AnswerLoss.forward, itertools.count()

        def limited(self, input_ids=None, **kwargs):
            if self.training and next(number) and input_ids.shape[1] > tokens:
                raise torch.OutOfMemoryError("no memory")
            return forward(self, input_ids, **kwargs)

        monkeypatch.setattr(sft_qwen2.AnswerLoss, "forward", limited)

    return limit


def test_out_of_memory_is_a_smaller_step(runs, untied_model_dir, data, tmp_path, limit_memory):
    """First layers are recomputed, then micro-batches halved: the losses are those of before.

    What the step's micro-batches before added to the gradients is not counted twice.
    """
    limit_memory(512)
    run = train(untied_model_dir, data, tmp_path / "small", tokens_per_forward=560, **FLAGS)
    assert_same_training(run, runs[1])
    said = re.findall(r"now (--tokens_per_forward|gradient checkpointing)", run.out)
    assert said[0] == "gradient checkpointing" and "--tokens_per_forward" in said


@pytest.mark.parametrize("bad", ["loss", "gradient", "memory"])
def test_what_cannot_be_trained_stops_the_run(
    bad, untied_model_dir, data, tmp_path, monkeypatch, limit_memory
):
    """A step that is not finite names its rows, a row too large the remedy; nothing is exported."""
    exact = sft_qwen2.numerics.cross_entropy_sum

    def broken(hidden, head, targets):
        if bad == "loss":
            return exact(hidden, head, targets) * 0  # as of labels that are all masked
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * math.inf)
        return exact(hidden, head, targets)

    if bad == "memory":
        limit_memory(0)
    else:
        monkeypatch.setattr(sft_qwen2.numerics, "cross_entropy_sum", broken)
    paths = {"data_path": data, "output_dir": tmp_path / "outputs", "report_to": "none"}
    code, _, err = run_main(*argv(model_name_or_path=untied_model_dir, **paths, **FLAGS))
    if bad == "memory":
        assert "out of memory with one row of" in err and "--max_len" in err
    else:
        assert f"step 1: its {bad}" in err and f"{data / 'train.jsonl'}:" in err
    assert code == 1 and not (tmp_path / "outputs" / "model.safetensors").exists()


def test_a_step_that_fp16_skips_is_none_for_fused_adamw_either(runs):
    """It would skip by itself, unseen by accelerate, and the schedule go on."""
    optimizer, stepped = runs[1].trainer.optimizer.optimizer, []
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for parameter in runs[1].trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
    scaler.step(optimizer)
    assert not stepped


# ---- The export law -----------------------------------------------------------------------------
OVERFIT = [
    {"query": "What is the capital of Portugal?", "answer": "The capital of Portugal is Lisbon."},
    {"query": "泰国的首都是哪里?", "answer": "泰国的首都是曼谷。"},
]


def test_the_export_is_served_as_it_was_trained(tiny_model_dir, write_rows, tmp_path):
    """Loaded by transformers alone it gives the trainer's logits, answers, and stops."""
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    flags |= {"num_train_epochs": 40, "learning_rate": 3e-3, "save_strategy": "no", "max_len": 256}
    flags["system_prompt"] = "Be 'brief' {{ and \"right\" }} %}\n\\n。"
    run = train(tiny_model_dir, write_rows(OVERFIT), tmp_path / "outputs", **flags)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.output_dir, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.output_dir)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    for row in OVERFIT:
        turns = [{"role": "user", "content": row["query"]}]
        prompt = tokenizer.apply_chat_template(turns, **options)
        output = model.generate(**prompt, max_new_tokens=100, do_sample=False)[0]
        answer = tokenizer.decode(output[prompt["input_ids"].shape[1] :])
        assert answer == row["answer"] + "<|im_end|>"
    config = json.loads((run.output_dir / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    assert config["use_cache"] and model.config._attn_implementation == "sdpa"
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(model.generation_config.eos_token_id) == sorted(ends)
    trained = load_tokenizer(str(tiny_model_dir), flags["system_prompt"])
    ids = encode(parse_row(OVERFIT[0], flags["system_prompt"]), trained)["input_ids"]
    with torch.no_grad():
        for weight in run.trainer.model.parameters():  # to the format of the base's files
            weight.copy_(weight.bfloat16())
        logits = [
            each.float().eval()(torch.tensor([ids])).logits for each in (run.trainer.model, model)
        ]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
