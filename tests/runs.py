"""What many tests make: arguments, small models, runs of main() and what they leave.

Torch and transformers are imported by the functions: whoever imports this first sets CPU_ONLY.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny-qwen2"
CPU_ONLY = {  # the environment of all runs, before torch, transformers and datasets are imported
    "CUDA_VISIBLE_DEVICES": "",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # small models gain nothing, and a pool would not survive a fork
    "TOKENIZERS_PARALLELISM": "false",
}
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def argv(**flags) -> list[str]:
    """Return flags as they stand on a command line; of a list, each of its words."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def make_model(folder: Path, tied: bool = True, dtype: str = "float32", **sizes) -> Path:
    """Save a Qwen2 with random weights and the stand-in's vocabulary, with its tokenizer."""
    import torch
    import transformers

    config = json.loads((TINY / "config.json").read_text())
    del config["layer_types"]  # of the stand-in's number of layers
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(config | sizes)))
    model.generation_config = transformers.GenerationConfig.from_pretrained(TINY)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def read_logs(output_dir: Path, name: str = "loss") -> list[dict]:
    """Return the entries of metrics.jsonl that have this figure: of training steps, by default."""
    lines = Path(output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [log for log in map(json.loads, lines) if name in log]


def run_main(*words) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of main(), in this process."""
    import sft_qwen2

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sft_qwen2.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def train(model_dir, data_path, output_dir, **flags) -> SimpleNamespace:
    """Return a finished run of main() and what can be known of it.

    output_dir, trainer, the rows of each step in their order, the logged losses, out, err.
    """
    import sft_qwen2

    flags = {"report_to": "none", "output_dir": output_dir, **flags}
    flags |= {"model_name_or_path": model_dir, "data_path": data_path}
    build_trainer = sft_qwen2.build_trainer
    seen = SimpleNamespace(output_dir=Path(output_dir), steps=[])

    def build_and_watch(*args, **kwargs):
        seen.trainer = trainer = build_trainer(*args, **kwargs)
        training_step = trainer.training_step

        def watched_step(model, rows, *args, **kwargs):
            seen.steps.append(rows)
            return training_step(model, rows, *args, **kwargs)

        trainer.training_step = watched_step
        return trainer

    sft_qwen2.build_trainer = build_and_watch
    try:
        code, seen.out, seen.err = run_main(*argv(**flags))
    finally:
        sft_qwen2.build_trainer = build_trainer
    assert code == 0, seen.err
    seen.losses = [log["loss"] for log in seen.trainer.state.log_history if "loss" in log]
    return seen
