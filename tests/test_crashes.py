"""What must cost neither a run nor what lies beside it: kills, signals, disks, files of others."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import crash
import forks
import pytest
import runs
import torch
import transformers
from safetensors.torch import load_file

import sft_qwen2
from sft import callbacks, run_folder
from sft.memory_plan import choose_precision
from sft.rows import UserError

STEPS, ROWS_PER_STEP = 4, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with model/ and data/: rows for four steps, and six for validation."""
    folder = tmp_path_factory.mktemp("crashes")
    runs.make_model(folder / "model")
    (folder / "data").mkdir()
    crash.make_data(folder / "data" / "train.jsonl", STEPS * ROWS_PER_STEP)
    lines = (folder / "data" / "train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "data" / "validation.jsonl").write_bytes(b"".join(lines[::-4]))
    (folder / "other.jsonl").write_bytes(b"".join(lines[::-1]))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A function: run main() in this process, let change(trainer) at the trainer before it trains.

    Returns output_dir, exit code, out and err.
    """

    def run(output_dir, change=lambda trainer: None, **flags) -> SimpleNamespace:
        defaults = {"data_path": folder / "data" / "train.jsonl", "num_train_epochs": 1}
        defaults |= {"per_device_train_batch_size": ROWS_PER_STEP}
        argv = crash.arguments(folder, output_dir, **(defaults | flags))
        build = sft_qwen2.build_trainer

        def build_and_change(*args):
            trainer = build(*args)
            change(trainer)
            return trainer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft_qwen2, "build_trainer", build_and_change)
            code, out, err = runs.run_main(*argv)
        return SimpleNamespace(output_dir=Path(output_dir), code=code, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def finished(run, folder):
    """A run to which nothing happened."""
    result = run(folder / "finished")
    assert result.code == 0, result.err
    assert [step for step, *_ in crash.losses(result.output_dir)] == list(range(1, STEPS + 1))
    return result


@pytest.fixture
def stopped(run, tmp_path):
    """A run stopped after its second step."""
    result = run(tmp_path / "stopped", after(2, send(signal.SIGTERM)))
    assert result.code == 128 + signal.SIGTERM, result.err
    return result


def on(event: str, action, step: int | None = None):
    """Return change(trainer): at that event of callbacks, after that step, call action(trainer)."""

    def change(trainer):
        def act(args, state, control, **kwargs):
            if step in (None, state.global_step):
                action(trainer)

        callback = transformers.TrainerCallback()
        setattr(callback, event, act)
        trainer.callback_handler.callbacks.insert(0, callback)  # before StopOnSignal

    return change


def after(step: int, *actions):
    return on("on_step_end", lambda trainer: [action(trainer) for action in actions], step)


def send(number: int):
    return lambda trainer: os.kill(os.getpid(), number)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(result, *words) -> None:
    """The run ended with exit code 1 and one sentence, which has these words."""
    assert result.code == 1, result.err
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert [word for word in words if str(word) not in result.err] == [], result.err


def check_same(result, reference) -> None:
    assert result.code == 0, result.err
    assert crash.differences(reference.output_dir, result.output_dir) == []


# ---- Kills, signals -----------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_or_stopped_runs_resume_exactly(tmp_path):
    """tests/crash.py says how they are killed, and what is compared."""
    command = [sys.executable, crash.__file__, "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout[done.stdout.index("{") :])
    assert counts["differences"] == [] and counts["kills_one"] and counts["kills_shards"]
    assert counts["killed_in_save"] > 1 and counts["killed_in_export"] > 1


def test_a_signal_while_the_run_is_being_set_up_is_not_lost(run, finished, tmp_path):
    """Loading the checkpoint of a large model takes minutes: a stop in that time must count."""
    stopped = run(tmp_path, on("on_train_begin", send(signal.SIGHUP)), save_steps=100)
    assert stopped.code == 128 + signal.SIGHUP and "checkpoint-1 is saved" in stopped.out
    check_same(run(tmp_path, resume=True), finished)


def test_what_a_second_signal_does_and_what_nohup_asks_for(monkeypatch):
    raised, now = [], [100.0]
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with callbacks.StopOnSignal() as stop:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for _ in range(2):  # torchrun repeats a Ctrl-C
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert stop.number == signal.SIGINT and raised == []
        now[0] += 5
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        assert raised == [signal.SIGTERM]
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", ["export", "evaluate"])
def test_ctrl_c_after_training_says_what_is_saved(run, folder, tmp_path, method):
    def interrupt(*args):
        raise KeyboardInterrupt

    flags = {"data_path": folder / "data"}
    result = run(tmp_path, after(STEPS, lambda t: setattr(t, method, interrupt)), **flags)
    assert result.code == 128 + signal.SIGINT
    assert f"checkpoint-{STEPS} is saved; --resume" in result.err
    assert run(tmp_path, resume=True, **flags).code == 0
    assert (tmp_path / "model.safetensors").exists()


# ---- What a resume compares, and what is not touched --------------------------------------------
def test_every_argument_is_compared_or_free():
    """A change of any changes the terms unless it is in FREE, where none changes the result."""
    script, training = sft_qwen2.ScriptArguments(), transformers.TrainingArguments(report_to="none")
    precision = choose_precision(None, False)

    def terms(precision=precision, **changed):
        args = SimpleNamespace(**{k: changed.get(k, v) for k, v in vars(script).items()})
        settings = {k: changed.get(k, v) for k, v in training.to_dict().items()}
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        arguments = SimpleNamespace(to_dict=lambda: settings, world_size=1, **sizes)
        return run_folder.resume_terms(args, arguments, precision, {})

    names = {*vars(script), *training.to_dict()}
    free = {name for name in names if terms(**{name: "other"}) == terms()}
    assert free == set(filter(run_folder.FREE.fullmatch, names))
    changing = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay seed
    data_seed num_train_epochs max_steps max_grad_norm neftune_noise_alpha ignore_data_skip
    adam_beta1 adam_beta2 adam_epsilon optim_args max_len overflow_strategy system_prompt
    model_name_or_path load_best_model_at_end early_stopping_patience"""
    assert set(changing.split()) <= names - free
    assert terms(precision._replace(weights=torch.float16)) != terms()
    assert terms(precision._replace(optim="other")) != terms()


def test_a_run_is_resumed_on_its_own_terms_only(run, finished, folder):
    flags = {"max_len": 256, "per_device_train_batch_size": 3, "num_train_epochs": 2}
    for name, word in (("data", "validation_sha256"), ("other.jsonl", "train_sha256")):
        result = run(finished.output_dir, resume=True, data_path=folder / name, **flags)
        changes = "max_len was 512, now 256", "rows_per_step was 6, now 3"
        check_refused(result, "cannot be resumed", "num_train_epochs was 1.0", word, *changes)


def test_a_finished_run_is_left_alone_and_written_again(run, tmp_path):
    """Also where its end is within an epoch, its log was torn, and rows come in other portions."""
    assert run(tmp_path, num_train_epochs=0.75).code == 0
    before, losses = contents(tmp_path), crash.losses(tmp_path)
    check_refused(run(tmp_path), tmp_path, "--resume", "--output_dir")
    (tmp_path / "model.safetensors").unlink()  # as if killed before the export
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1, "st')
    flags = {"num_train_epochs": 0.75, "resume": True}
    portions = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert run(tmp_path, **flags, **portions).code == 0
    assert crash.losses(tmp_path) == losses
    changed = {path.name for path, content in contents(tmp_path).items() if content != before[path]}
    assert changed <= {"run.json", "metrics.jsonl", run_folder.LOCK}
    for checkpoint in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    check_refused(run(tmp_path, **flags), "no checkpoint")


def test_what_others_keep_in_output_dir_is_not_touched(run, finished, tmp_path):
    for name in (
        "unfinished/save",
        "checkpoint-2-keep/manifest.json",
        "checkpoint-3x/note",
        "notes.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    mine = contents(tmp_path)
    check_same(run(tmp_path, save_total_limit=1), finished)
    assert mine.items() <= contents(tmp_path).items()


NAMES = ["metrics.jsonl", "run.json", "config.json", "checkpoint-3/x", "model.safetensors"]


@pytest.mark.parametrize("text", ["mine", '{"terms": {'])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_run_would_replace_is_refused(run, tmp_path, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    for resume in (True, False):
        check_refused(run(tmp_path, resume=resume), tmp_path, "run.json", "--output_dir")
    assert (tmp_path / name).read_text() == text


class Attack:
    """What runs code when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_is_not_as_it_was_saved_is_refused(run, stopped, finished):
    last = stopped.output_dir / "checkpoint-2"
    for path, content in contents(last).items():
        for change in (content[:-1] + bytes([content[-1] ^ 1]), content[:-1], None):
            path.write_bytes(change or b"")
            if change is None:
                path.unlink()
            with pytest.raises(UserError, match=str(last)):
                run_folder.check_checkpoint(last)
        path.write_bytes(content)
    (last / "pytorch_model.bin").write_bytes(b"more")
    check_refused(run(stopped.output_dir, resume=True), last, "pytorch_model.bin")
    shutil.rmtree(last)  # as the sentence says
    check_same(run(stopped.output_dir, resume=True), finished)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_runs_nothing_even_with_a_manifest_to_match(run, stopped, tmp_path, name):
    last, ran = stopped.output_dir / "checkpoint-2", tmp_path / "ran"
    torch.save(Attack(ran), last / name)
    (last / run_folder.MANIFEST).write_text(json.dumps(run_folder.describe_files(last)))
    check_refused(run(stopped.output_dir, resume=True), last, "remove it")
    with pytest.raises(pickle.UnpicklingError):  # as torch reads sharded checkpoints
        torch.load(last / name, weights_only=False)
    assert not ran.exists()


def test_an_output_dir_in_use_is_refused_until_it_is_free(run, finished, tmp_path):
    with run_folder.lock_folder(tmp_path):
        check_refused(run(tmp_path), tmp_path, f"process {os.getpid()}")
    check_same(run(tmp_path), finished)


# ---- Weights that are not finite, the best ones, the exported ones ------------------------------
@pytest.mark.parametrize("step", [3, STEPS])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(run, tmp_path, step):
    spoil = after(step, lambda trainer: trainer.model.model.norm.weight.data[5].fill_(torch.nan))
    check_refused(run(tmp_path, spoil), f"step {step}", f"checkpoint-{step - 1} is saved")
    saved = [path.name for path in run_folder.whole_checkpoints(tmp_path)]
    assert saved == [f"checkpoint-{step - 2}", f"checkpoint-{step - 1}"]
    assert not (tmp_path / "model.safetensors").exists()


def test_the_best_checkpoint_survives_rotation_stops_and_a_move(run, folder, tmp_path):
    flags = {"data_path": folder / "data", "load_best_model_at_end": True, "save_total_limit": 1}
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 2}
    flags["early_stopping_patience"] = 2

    def change(trainer):  # the best is that of step 2, and patience ends after step 4
        after(3, lambda t: t.model.model.norm.weight.data.mul_(-3))(trainer)

    reference = run(tmp_path / "reference", change, **flags)
    best = load_file(tmp_path / "reference" / "checkpoint-2" / "model.safetensors")
    exported = load_file(tmp_path / "reference" / "model.safetensors")
    assert all(torch.equal(best[name].to(x.dtype), x) for name, x in exported.items())
    folders = [tmp_path / name for name in "abcd"]
    for step, here, there in zip((1, 3, 4), folders, folders[1:]):
        changes = [change, after(step, send(signal.SIGTERM))]
        run(here, lambda trainer, c=changes: [x(trainer) for x in c], resume=step > 1, **flags)
        here.rename(there)
    result = run(folders[-1], change, resume=True, **flags)
    check_same(result, reference)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_the_exported_files_say_what_was_trained(run, folder, tmp_path, end):
    """In the base's number format, to transformers 4 as well; a base model now stops."""
    base, path, old = tmp_path / "base", tmp_path / "outputs", os.umask(0o027)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = end
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert run(path, model_name_or_path=base).code == 0
    os.umask(old)
    names = ("config", "tokenizer_config", "generation_config")
    config, words, generation = (json.loads((path / f"{x}.json").read_text()) for x in names)
    exported = load_file(path / "model.safetensors")
    trained = load_file(path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert all(torch.equal(x.bfloat16(), exported[name]) for name, x in trained.items())
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert words["additional_special_tokens"] == tokenizer.extra_special_tokens != []
    assert words["eos_token"] == "<|im_end|>" and "extra_special_tokens" not in words
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["eos_token_id"] == im_end == generation["eos_token_id"][0]
    assert tokenizer.eos_token_id in generation["eos_token_id"]
    again = transformers.AutoTokenizer.from_pretrained(path)
    assert set(again.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    files = [x for x in path.iterdir() if x.is_file()]
    assert {x.stat().st_mode & 0o777 for x in files} == {0o640}
    assert not (path / "training_args.bin").exists()


GREEDY = """
import sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).float()
for question in ("What is osmosis?", "葡萄牙的首都是哪里?", "Hi!", "2 + 2?", "Say nothing."):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")
    print(model.generate(**ids, max_new_tokens=30, do_sample=False).tolist())
"""


@pytest.mark.slow
def test_transformers_4_generates_the_same_tokens(finished):
    """TRANSFORMERS_4 names the Python of an environment with transformers 4.57."""
    other = os.environ.get("TRANSFORMERS_4") or pytest.skip("TRANSFORMERS_4 is not set")
    command = ["-c", GREEDY, str(finished.output_dir)]
    outputs = [subprocess.check_output([python, *command]) for python in (sys.executable, other)]
    assert outputs[0] == outputs[1] and outputs[0].count(b"\n") == 5


# ---- A full disk, a console that went away, wandb -----------------------------------------------
@pytest.fixture
def disk():
    """Functions: fill(trainer), after which no file can grow beyond 100 kB, and free(trainer)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        return lambda trainer, **_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield SimpleNamespace(fill=limit(100_000), free=limit(soft))
    limit(soft)(None)


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint(run, finished, disk, tmp_path):
    result = run(tmp_path, lambda t: (after(3, disk.fill)(t), after(4, disk.free)(t)))
    check_same(result, finished)
    assert "checkpoint-3 could not be saved" in result.err
    assert [path.name[-1] for path in run_folder.whole_checkpoints(tmp_path)] == ["2", "4"]


def test_a_run_stopped_on_a_full_disk_says_so_and_resumes(run, finished, disk, tmp_path):
    result = run(tmp_path, after(3, disk.fill, send(signal.SIGINT)))
    disk.free(None)
    assert result.code == 128 + signal.SIGINT
    assert "checkpoint-3 could not" in result.err and "checkpoint-2 is saved" in result.out
    check_same(run(tmp_path, resume=True), finished)


def test_a_model_that_cannot_be_exported_ends_with_a_sentence(run, finished, disk, tmp_path):
    result = run(tmp_path, on("on_train_end", disk.fill))
    disk.free(None)
    check_refused(result, tmp_path, "--resume")
    assert not (tmp_path / "model.safetensors").exists()
    check_same(run(tmp_path, resume=True), finished)


def test_a_log_that_cannot_be_written_is_written_when_it_can_be(run, finished, tmp_path):
    """/dev/full is a disk without room for a single byte."""
    metrics = tmp_path / "metrics.jsonl"
    result = run(tmp_path, after(2, lambda t: (metrics.unlink(), metrics.symlink_to("/dev/full"))))
    assert not metrics.is_symlink() and "No space left on device" in result.err
    check_same(result, finished)


def main_without_a_console(closed: bool, argv: list[str]) -> int:
    read, console = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    sys.stdout = os.fdopen(console if closed else full, "w")  # it is flushed at the exit, too
    return sft_qwen2.main(argv)


@pytest.mark.slow
@pytest.mark.parametrize("closed", [True, False])
def test_a_console_that_cannot_be_written_does_not_end_the_run(folder, tmp_path, closed):
    """As in | head, or with a log on a full disk; the process's exit is quiet, too."""
    argv = crash.arguments(folder, tmp_path / "outputs", data_path=folder / "data", max_steps=1)
    ended = forks.run(tmp_path / "log", (main_without_a_console, closed, argv))
    assert ended.codes == [0] and "Error" not in ended.texts[0], ended
    assert (tmp_path / "outputs" / "model.safetensors").exists()


def fail(*args, **kwargs):
    raise RuntimeError("wandb is down (a test)")


def test_a_wandb_that_fails_does_not_stop_the_run(run, finished, tmp_path, monkeypatch):
    import wandb

    down = after(2, lambda trainer: monkeypatch.setattr(wandb, "log", fail))
    result = run(tmp_path / "log", down, report_to="wandb")
    check_same(result, finished)
    assert "step 3 is not reported: wandb is down" in result.out + result.err
    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = run(tmp_path / "init", report_to="wandb")
    check_same(result, finished)
    assert result.out.count("wandb is down") >= 1


def test_wandb_may_not_wait_and_needs_no_key(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    finish, began = wandb.finish, time.monotonic()
    monkeypatch.setattr(wandb, "finish", lambda exit_code: threading.Event().wait(60))
    options = {"report_to": ["wandb"], "process_index": 0, "run_name": "x"}
    with callbacks.wandb_run(SimpleNamespace(**options, output_dir=str(tmp_path)), wait_s=0.1):
        assert wandb.run.offline
    assert time.monotonic() - began < 30
    finish()
    out = capsys.readouterr().out
    assert "records offline" in out and "no answer" in out
