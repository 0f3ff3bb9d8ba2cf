"""What tests and benchmarks make: arguments, small models, runs of main() and what they leave.

Torch and transformers are imported by the functions: whoever imports this first sets CPU_ONLY.
"""

import contextlib
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-qwen2"
CPU_ONLY = {  # the environment of all runs, before torch, transformers and datasets are imported
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # small models gain nothing, and a pool would not survive a fork
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def argv(**flags) -> list[str]:
    """Return flags as they stand on a command line."""
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if isinstance(value, list):
            words += map(str, value)
        else:
            words.append(str(value))
    return words


def make_model(folder: Path, tied: bool = True, dtype: str = "float32", **sizes) -> Path:
    """Save a Qwen2 with random weights, and the stand-in's vocabulary and tokenizer."""
    import torch
    import transformers

    config = json.loads((TINY / "config.json").read_text())
    del config["layer_types"]  # as many as the stand-in has layers
    config.update(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config.update(sizes)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    model.generation_config = transformers.GenerationConfig.from_pretrained(TINY)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def read_logs(output_dir: Path, name: str = "loss") -> list[dict]:
    """Return the entries of metrics.jsonl that have this figure: training steps, by default."""
    logs = []
    with open(Path(output_dir, "metrics.jsonl"), encoding="utf-8") as file:
        for line in file:
            log = json.loads(line)
            if name in log:
                logs.append(log)
    return logs


@dataclass
class Run:
    """A run of main() that has ended, and what can be known of it."""

    output_dir: Path | None = None
    code: int | None = None
    out: str = ""
    err: str = ""
    trainer: object = None  # the last one that was made; None if the run ended before
    steps: list[list[dict]] = field(default_factory=list)  # the examples of each step, in order

    def read_losses(self) -> list[float]:
        """Return the logged loss of each step."""
        return [log["loss"] for log in read_logs(self.output_dir)]


def run_main(*words) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of main(), in this process."""
    import sft_qwen2

    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sft_qwen2.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def watch(*words, callbacks=(), trainer_class=None) -> Run:
    """Return a run of main() in this process, with its trainer and the examples of its steps.

    `callbacks`: transformers.TrainerCallback objects, which hear of events before the script's own.
    `trainer_class`: a subclass of sft_qwen2.SFTTrainer that takes its place.
    """
    import sft_qwen2

    run = Run()

    class WatchedTrainer(trainer_class or sft_qwen2.SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.callback_handler.callbacks[:0] = callbacks
            run.trainer = self

        def training_step(self, model, inputs, *args, **kwargs):
            run.steps.append(inputs["examples"])
            return super().training_step(model, inputs, *args, **kwargs)

    with mock.patch.object(sft_qwen2, "SFTTrainer", WatchedTrainer):
        run.code, run.out, run.err = run_main(*words)
    return run


def train(model_dir, data_path, output_dir, **flags) -> Run:
    """Return a run that trained to its end; AssertionError with its stderr if one did not."""
    places = {
        "model_name_or_path": model_dir,
        "data_path": data_path,
        "output_dir": output_dir,
        "report_to": "none",
    }
    run = watch(*argv(**{**places, **flags}))
    assert run.code == 0, run.err
    run.output_dir = Path(output_dir)
    return run
