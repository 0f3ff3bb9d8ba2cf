"""What a run prints and writes, and that no reporter ends it."""

import contextlib
import copy
import http.server
import json
import os
import pty
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import forks
import pytest
import torch
import transformers
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import sft_qwen2
from sft import reporting
from sft.errors import UserError

NUM_STEPS = 6


class Line(torch.nn.Module):
    """A model of two parameters."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, x, y):
        return {"loss": (self.linear(x)[:, 0] - y).square().mean()}


def make_trainer(output_dir, **arguments) -> transformers.Trainer:
    """Return a Trainer of NUM_STEPS steps, each logged, with two evaluations and saves."""
    torch.manual_seed(0)
    records = []
    for i in range(NUM_STEPS):
        records.append({"x": torch.tensor([float(i)]), "y": torch.tensor(2.0 * i)})
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_on_start": True,
        "label_names": ["y"],
        "prediction_loss_only": True,
    }
    args = transformers.TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    return transformers.Trainer(Line(), args, train_dataset=records, eval_dataset=records)


def metrics_in(output_dir) -> list[dict]:
    lines = Path(output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Interrupt(transformers.TrainerCallback):
    """Raises an error after a step, as a kill would end the run."""

    def __init__(self, step: int):
        self.step = step

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ---- Lines on the screen ------------------------------------------------------------------------
STEP_LOGS = {
    "loss": 0.4356,
    "grad_norm": 0.99,
    "learning_rate": 3e-4,
    "tokens_per_s": 2330,
    "epoch": 0.65,
}


def test_a_step_is_one_line():
    line = "step 20/186  loss 0.4356  lr 3.0e-04  grad 0.99  2,330 tok/s  epoch 0.65"
    assert reporting.format_step(20, 186, STEP_LOGS, newly_skipped=0) == line


def test_a_step_tells_what_else_fits_into_80_columns():
    gpu = {**STEP_LOGS, "mfu": 0.41, "peak_gib": 71.26}
    assert reporting.format_step(2, 186, gpu, 0).endswith("2,330 tok/s  epoch 0.65  mfu 41%")
    assert reporting.format_step(20, 1860, gpu, 3).endswith("  skipped 3  2,330 tok/s")
    large = {**gpu, "loss": 1234.5678, "grad_norm": 123456.0, "tokens_per_s": 1234567}
    line = reporting.format_step(123456, 1234567, large, 0)
    assert "grad 1.2e+05" in line
    assert len(line) <= 80


def test_the_time_left_is_said_once_and_leaves_out_the_first_step(monkeypatch, capsys):
    now = iter([0, 500, 510, 520])  # begin, then the first three steps, the first of which compiles
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    lines = reporting.RunLines()
    state = transformers.TrainerState(max_steps=62, is_world_process_zero=True)
    for step in (1, 2, 3):
        state.global_step = step
        lines.on_log(None, state, None, STEP_LOGS)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time")]
    assert said == ["time       about 10 min 0 s for 60 more steps"]


def test_evaluations_are_marked_where_they_are_the_best_so_far():
    evaluations = [(0, 3.0), (10, 2.0), (20, 2.5), (30, 1.5)]
    history = []
    lines = []
    for step, loss in evaluations:
        history.append({"eval_loss": loss, "step": step})
        lines.append(reporting.format_evaluation(history))
    assert lines == [
        "eval       step 0  eval_loss 3.0000",
        "eval       step 10  eval_loss 2.0000 (best)",
        "eval       step 20  eval_loss 2.5000",
        "eval       step 30  eval_loss 1.5000 (best)",
    ]


def test_the_curve_of_the_loss_goes_from_the_highest_to_the_lowest_block():
    assert reporting.draw_curve([7, 6, 5, 4, 3, 2, 1]) == "▇▆▅▄▃▂▁"
    assert reporting.draw_curve([1.0, 1.0]) == "▁▁"
    long = reporting.draw_curve(list(range(1000)))
    assert len(long) == 40
    assert long[0] == "▁"
    assert long[-1] == "▇"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.9, "1 min 0 s"), (723, "12 min 3 s"), (7322, "2 h 2 min")],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert reporting.format_seconds(seconds) == text


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_run_says_its_steps_evaluations_and_saves(tmp_path, capsys, disable_tqdm):
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, disable_tqdm=disable_tqdm)
    run_lines = reporting.set_up_reporting(trainer)
    trainer.train()
    run_lines.print_summary(trainer.args, trainer.state, "bfloat16")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    labels = [line.split()[0] for line in lines]
    steps = ["step", "step", "step", "eval", "save"]
    summary = ["trained", "loss", "best", "model", "chat", "logs"]
    assert labels == ["eval", *steps, *steps, *summary]
    assert captured.err == ""
    assert lines[1].startswith("step 1/6  loss ")
    best = min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert f"eval_loss {best:.4f}" in lines[-4]
    assert f"weights of step {trainer.state.best_global_step}, bfloat16" in lines[-3]
    assert "steps 1 to 6 in " in lines[-6]
    assert (tmp_path / "loss.svg").exists()


def test_skipped_steps_are_said_when_they_happen(tmp_path, capsys):
    run_lines = reporting.RunLines()
    state = transformers.TrainerState(max_steps=9, is_world_process_zero=True)
    for total in (0, 2, 2):
        state.global_step += 1
        logs = {"loss": 1.0, "skipped_steps": total}
        run_lines.on_log(None, state, None, logs)
    lines = capsys.readouterr().out.splitlines()
    assert ["skipped 2" in line for line in lines] == [False, True, False]


def test_a_save_that_failed_is_not_said_to_be_there(tmp_path, capsys):
    state = transformers.TrainerState(global_step=3, is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path))
    reporting.RunLines().on_save(args, state, None)
    assert capsys.readouterr().out == ""


def test_a_run_that_stopped_early_says_why(tmp_path, capsys):
    run_lines = reporting.RunLines()
    history = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.0, "step": 4}]
    state = transformers.TrainerState(
        global_step=4, max_steps=9, log_history=history, is_world_process_zero=True
    )
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=False)
    run_lines.print_summary(args, state, "float32")
    assert "not 9: eval_loss no longer fell" in capsys.readouterr().out


@pytest.mark.parametrize(("loads_best", "step"), [(True, 3), (False, 6)])
def test_the_summary_names_the_step_whose_weights_are_exported(tmp_path, capsys, loads_best, step):
    state = transformers.TrainerState(global_step=6, max_steps=6, is_world_process_zero=True)
    state.best_global_step = 3
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=loads_best)
    reporting.RunLines().print_summary(args, state, "float32")
    assert f"the weights of step {step}, float32" in capsys.readouterr().out


def train_in_terminal(path: str, output_dir) -> int:
    terminal = os.open(path, os.O_WRONLY)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    trainer = make_trainer(output_dir)
    run_lines = reporting.set_up_reporting(trainer)
    trainer.train()
    run_lines.print_summary(trainer.args, trainer.state, "bfloat16")
    return 0


def test_a_terminal_of_80_columns_shows_whole_lines(tmp_path, monkeypatch):
    """The last evaluation and the best step are among them."""
    monkeypatch.chdir(tmp_path)
    terminal, side = pty.openpty()
    chunks = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while True:
                chunks.append(os.read(terminal, 65536))

    reader = threading.Thread(target=read)
    reader.start()
    call = (train_in_terminal, os.ttyname(side), "outputs")
    ended = forks.run(tmp_path / "log", call)
    os.close(side)
    reader.join(60)
    os.close(terminal)
    assert ended.codes == [0], ended.texts
    text = b"".join(chunks).decode()
    lines = text.split("\r\n")
    assert max(map(len, lines)) <= 80
    assert "\r" not in "".join(lines)
    assert text.count("\neval       step 6  eval_loss ") == 1
    assert text.count("\nbest       step ") == 1


# ---- metrics.jsonl ------------------------------------------------------------------------------
def test_metrics_are_the_log_history(tmp_path):
    trainer = make_trainer(tmp_path)
    reporting.set_up_reporting(trainer)
    trainer.train()
    assert metrics_in(tmp_path) == trainer.state.log_history
    assert "eval_loss" in metrics_in(tmp_path)[0]
    trainer.evaluate()  # as after the export
    assert metrics_in(tmp_path) == trainer.state.log_history


def test_metrics_are_the_log_history_after_a_kill_and_a_resume(tmp_path):
    trainer = make_trainer(tmp_path)
    reporting.set_up_reporting(trainer)
    trainer.add_callback(Interrupt(step=5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1, "st')  # torn by a kill
    resumed = make_trainer(tmp_path)
    reporting.set_up_reporting(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert metrics_in(tmp_path) == resumed.state.log_history
    steps = [log["step"] for log in metrics_in(tmp_path) if "loss" in log]
    assert steps == list(range(1, NUM_STEPS + 1))


def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, capsys):
    """/dev/full is a disk without room for a single byte."""
    trainer = make_trainer(tmp_path)
    reporting.set_up_reporting(trainer)
    metrics = tmp_path / "metrics.jsonl"

    class FullDisk(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                metrics.unlink()
                metrics.symlink_to("/dev/full")

    trainer.add_callback(FullDisk())
    trainer.train()
    assert not metrics.is_symlink()
    assert metrics_in(tmp_path) == trainer.state.log_history
    assert "metrics.jsonl lacks step 3" in capsys.readouterr().err


def test_what_a_full_disk_kept_back_is_written_at_the_end(tmp_path):
    history = [{"loss": 2.0, "step": 1}]
    state = transformers.TrainerState(log_history=history, is_world_process_zero=True)
    args = SimpleNamespace(output_dir=str(tmp_path / "outputs"))
    metrics = reporting.MetricsFile()
    metrics.on_log(args, state, None)
    (tmp_path / "outputs").mkdir()
    metrics.on_train_end(args, state, None)
    assert metrics_in(tmp_path / "outputs") == history


def test_other_processes_print_and_write_nothing(tmp_path, capsys):
    history = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.0, "step": 1}]
    state = transformers.TrainerState(global_step=1, log_history=history)
    state.is_world_process_zero = False
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=False)
    (tmp_path / "checkpoint-1").mkdir()
    run_lines = reporting.RunLines()
    run_lines.on_log(args, state, None, history[0])
    run_lines.on_save(args, state, None)
    run_lines.print_summary(args, state, "float32")
    reporting.MetricsFile().on_log(args, state, None)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_loss_curve_is_an_svg_of_all_losses(tmp_path):
    history = [{"eval_loss": 4.0, "step": 0}, {"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2}]
    reporting.write_loss_curve(tmp_path / "loss.svg", history)
    root = ElementTree.parse(tmp_path / "loss.svg").getroot()
    curves = [line.get("points").split() for line in root if line.tag.endswith("polyline")]
    assert curves == [["420.0,190.0", "780.0,360.0"], ["60.0,20.0"]]


def test_a_loss_curve_that_cannot_be_written_is_said(tmp_path, capsys):
    history = [{"loss": 3.0, "step": 1}]
    reporting.write_loss_curve(tmp_path / "missing" / "loss.svg", history)
    assert "loss.svg is not written" in capsys.readouterr().err


# ---- Reporters ----------------------------------------------------------------------------------
EVENTS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
]


class Reporter(transformers.TrainerCallback):
    """Stands for an integration; fails at one event and counts its calls."""

    def __init__(self, event: str):
        self.event = event
        self.num_calls = 0
        for name in EVENTS:
            setattr(self, name, self.count)
        setattr(self, event, self.fail)

    def count(self, *args, **kwargs):
        self.num_calls += 1

    def fail(self, *args, **kwargs):
        self.num_calls = 0
        raise ConnectionError("the server is gone")


@pytest.mark.parametrize("event", EVENTS)
def test_a_reporter_that_raises_is_said_once_and_dropped(tmp_path, capsys, monkeypatch, event):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "test", Reporter)
    trainer = make_trainer(tmp_path)
    reporter = Reporter(event)
    trainer.add_callback(reporter)
    reporting.set_up_reporting(trainer)
    trainer.train()
    assert trainer.state.global_step == NUM_STEPS
    assert metrics_in(tmp_path) == trainer.state.log_history
    said = "Reporter failed and is left out from now on: the server is gone"
    assert capsys.readouterr().out.count(said) == 1
    assert reporter.num_calls == 0


def test_callbacks_behind_a_reporter_that_raises_are_called(tmp_path, monkeypatch):
    class Witness(transformers.TrainerCallback):
        num_calls = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.num_calls += 1

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "test", Reporter)
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Reporter("on_train_begin"))
    witness = Witness()
    trainer.add_callback(witness)
    reporting.set_up_reporting(trainer)
    trainer.train()
    assert witness.num_calls == 1


def test_the_errors_of_other_callbacks_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(Reporter("on_step_end"))
    reporting.set_up_reporting(trainer)
    with pytest.raises(ConnectionError):
        trainer.train()


def test_callbacks_still_steer_the_run(tmp_path):
    class StopAtTwo(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, lr_scheduler, model, **kwargs):
            control = copy.copy(control)
            control.should_training_stop = state.global_step == 2
            return control

    trainer = make_trainer(tmp_path)
    trainer.add_callback(StopAtTwo())
    reporting.set_up_reporting(trainer)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- wandb --------------------------------------------------------------------------------------
def wandb_arguments(output_dir, process_index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        report_to=["wandb", "test"],
        process_index=process_index,
        run_name="my run",
        output_dir=str(output_dir),
    )


@pytest.fixture
def fake_wandb(monkeypatch):
    """wandb without its server and its processes; keeps what init and finish are given."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    fake = SimpleNamespace(inits=[], exit_codes=[], fails=[], has_key=True)

    def init(**options):
        fake.inits.append(options)
        if options["mode"] in fake.fails:
            raise wandb.errors.CommError(f"no answer ({options['mode']})")
        return SimpleNamespace(
            id=options["id"] or "new-id",
            dir=f"{options['dir']}/wandb/run-1/files",
            url="https://wandb.test/run",
            offline=options["mode"] == "offline",
            finish=fake.exit_codes.append,
        )

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: fake.has_key)
    return fake


def test_wandb_gets_the_name_of_the_run_and_may_not_wait_for_ever(fake_wandb, tmp_path):
    with reporting.wandb_run(wandb_arguments(tmp_path), run_id=None) as run_id:
        assert run_id == "new-id"
    (options,) = fake_wandb.inits
    assert options["name"] == "my run"
    assert options["dir"] == str(tmp_path)
    assert options["mode"] == "online"
    assert options["settings"].init_timeout == 30
    assert options["settings"].finish_timeout == 60
    assert fake_wandb.exit_codes == [0]


def test_a_resumed_run_is_the_same_wandb_run(fake_wandb, tmp_path):
    with reporting.wandb_run(wandb_arguments(tmp_path), run_id="abc") as run_id:
        assert run_id == "abc"
    assert fake_wandb.inits[0]["id"] == "abc"
    assert fake_wandb.inits[0]["resume"] == "allow"


def test_the_id_of_a_wandb_run_is_kept_for_a_resume(fake_wandb, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"fingerprint": {}, "versions": [{}]}))
    for resume in (False, True):
        args = SimpleNamespace(resume=resume, output_dir=str(tmp_path))
        with sft_qwen2.recorded_wandb_run(args, wandb_arguments(tmp_path)):
            pass
    assert [options["id"] for options in fake_wandb.inits] == [None, "new-id"]


def test_a_failed_run_is_marked_failed(fake_wandb, tmp_path):
    with pytest.raises(UserError), reporting.wandb_run(wandb_arguments(tmp_path), None):
        raise UserError("the loss is nan")
    assert fake_wandb.exit_codes == [1]


def test_the_first_process_alone_has_a_wandb_run(fake_wandb, tmp_path):
    arguments = wandb_arguments(tmp_path, process_index=1)
    with reporting.wandb_run(arguments, None) as run_id:
        assert run_id is None
    assert fake_wandb.inits == []
    assert arguments.report_to == ["test"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1"), ("WANDB_MODE", "disabled")],
)
def test_wandb_can_be_disabled_by_its_variables(fake_wandb, tmp_path, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    arguments = wandb_arguments(tmp_path)
    with reporting.wandb_run(arguments, None) as run_id:
        assert run_id is None
    assert fake_wandb.inits == []
    assert arguments.report_to == ["test"]


def test_a_run_without_wandb_does_not_start_it(fake_wandb, tmp_path):
    arguments = wandb_arguments(tmp_path)
    arguments.report_to = ["test"]
    with reporting.wandb_run(arguments, None) as run_id:
        assert run_id is None
    assert fake_wandb.inits == []


@pytest.mark.parametrize("mode", ["", "online"])
def test_without_a_key_wandb_records_offline(fake_wandb, tmp_path, monkeypatch, capsys, mode):
    """It would ask for a key, and wait."""
    monkeypatch.setenv("WANDB_MODE", mode)
    fake_wandb.has_key = False
    with reporting.wandb_run(wandb_arguments(tmp_path), None):
        pass
    assert [options["mode"] for options in fake_wandb.inits] == ["offline"]
    assert f"to upload:\n           wandb sync {tmp_path}/wandb/run-1" in capsys.readouterr().out


def test_without_an_answer_wandb_records_offline(fake_wandb, tmp_path, capsys):
    fake_wandb.fails = ["online"]
    with reporting.wandb_run(wandb_arguments(tmp_path), None) as run_id:
        assert run_id == "new-id"
    out = capsys.readouterr().out
    assert "no answer (online)" in out
    assert "records offline" in out


def test_a_wandb_that_cannot_start_at_all_is_left_out(fake_wandb, tmp_path, capsys):
    fake_wandb.fails = ["online", "offline"]
    arguments = wandb_arguments(tmp_path)
    with reporting.wandb_run(arguments, None) as run_id:
        assert run_id is None
    assert arguments.report_to == ["test"]
    assert "left out: no answer (offline)" in capsys.readouterr().out


def test_a_wandb_that_cannot_finish_does_not_end_the_run(fake_wandb, tmp_path, capsys):
    class Broken(list):
        def append(self, exit_code):
            raise ConnectionResetError("Connection lost")

    fake_wandb.exit_codes = Broken()
    with reporting.wandb_run(wandb_arguments(tmp_path), None):
        pass
    assert "Connection lost; to upload: wandb sync" in capsys.readouterr().out


def record_with_wandb(folder: Path, environment: dict[str, str], visit: str | None) -> int:
    """Log once to wandb itself, without what this machine has set for it; open a page, end."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            del os.environ[name]
    os.environ.update(environment)
    os.environ["HOME"] = str(folder)
    reporting.WANDB_START_S = 10
    reporting.WANDB_FINISH_S = 3
    with reporting.wandb_run(wandb_arguments(folder), None):
        import wandb

        wandb.log({"loss": 1.0})
        print("offline:", wandb.run.offline, flush=True)
        if visit is not None:
            urllib.request.urlopen(visit)
    print("finished", flush=True)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WANDB_API_KEY": "too-short"},
        {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
    ],
)
def test_wandb_itself_records_offline(tmp_path, environment):
    """Without a key, with what is no key, and with a server that does not answer."""
    ended = forks.run(tmp_path / "log", (record_with_wandb, tmp_path, environment, None))
    assert ended.codes == [0], ended.texts
    assert "offline: True\nfinished\n" in ended.texts[0]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


ANSWERS = {  # the first word that a query has decides
    "upsertBucket": {"upsertBucket": {"bucket": None, "inserted": True}},
    "createRunFiles": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}},
    "serverInfo": {"serverInfo": {"features": []}},
    "organization": {"entity": {"organization": {"coreWeaveOrganizationId": None}}},
    "bucket": {"model": {"bucket": None}},
}
PROJECT = {"id": "1", "name": "p", "entity": {"id": "1", "name": "e"}}
BUCKET = {"id": "x", "name": "x", "displayName": "x", "historyLineCount": 0, "project": PROJECT}


class WandbServer(http.server.BaseHTTPRequestHandler):
    """Answers as wandb's server does, until a page is opened; then never."""

    is_gone = threading.Event()

    def do_GET(self):
        self.is_gone.set()
        self.answer({})

    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.is_gone.is_set():
            time.sleep(600)
        data = {}
        for word, answer in ANSWERS.items():
            if word in query:
                data = answer
                break
        if "upsertBucket" in data:
            data["upsertBucket"]["bucket"] = BUCKET
        self.answer(data)

    def answer(self, data: dict) -> None:
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_a_finished_run_does_not_wait_for_a_wandb_server_that_is_gone(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": url}
    ended = forks.run(tmp_path / "log", (record_with_wandb, tmp_path, environment, url))
    server.shutdown()
    assert ended.codes == [0], ended.texts
    assert "offline: False\n" in ended.texts[0]
    assert ended.texts[0].endswith("finished\n")
    assert WandbServer.is_gone.is_set()
