"""Does training over bf16 weights keep up with fp32? Held-out loss at the default learning rate.

    python benchmarks/precision.py --data TRAIN.jsonl --validation VAL.jsonl [--steps 60]

At a learning rate of 1e-5 most updates are less than half a step between bf16 numbers: rounded to
the nearest, they are lost. A small Qwen2 (vocabulary of data/tiny-qwen2, random weights) is trained
for a while in fp32 and rounded to bf16: the base. From it each contender takes the same rows in the
same order, through the trainer's own build_trainer:

    fp32              fp32 weights, AdamW: what there is to gain
    bf16, plain       bf16 weights, PyTorch's AdamW: the usual way
    bf16, default     the trainer's on compute capability 8.0 and above: 8-bit state, and rounding
                      up or down by chance, in proportion to the distance

"progress" is the fall of the held-out loss as a share of fp32's; all losses are measured in fp32.
The law: the default's progress is at least 99 %. Exit code 1: it is not.
"""

import argparse
import hashlib
import importlib.metadata
import logging
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import sft_qwen2

LAW = 0.99
PACKAGES = ("torch", "transformers", "torchao")
LEARNING_RATE = 1e-5
TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-qwen2"
LAYERS = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
MAX_LEN, EVAL_ROWS = 256, 256  # longer rows are left out: more steps in the same time
BASE = {"learning_rate": 1e-3, "steps": 90, "rows_per_step": 8}

FP32 = sft_qwen2.choose_precision(None, 1, False)
DEFAULT = sft_qwen2.choose_precision((8, 0), 1, False)
PLAIN = DEFAULT._replace(optim="adamw_torch", bytes_per_parameter=8)
CONTENDERS = {"fp32": FP32, "bf16, plain": PLAIN, "bf16, default": DEFAULT}


def parse_arguments() -> argparse.Namespace:
    description, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=description, epilog=rest)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="rows to train on")
    parser.add_argument("--validation", type=Path, required=True, help="rows to measure on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows_per_step", type=int, default=32)
    return parser.parse_args()


def read_data(args, tokenizer) -> dict:
    """Return the rows of both splits that are no longer than MAX_LEN, EVAL_ROWS to measure on."""
    rows = {}
    for split, path in (("train", args.data), ("validation", args.validation)):
        how = (tokenizer, "", sft_qwen2.encode_batch, sft_qwen2.__file__)
        table = sft_qwen2.encode_files([path], *how)
        rows[split], _ = sft_qwen2.fit_rows(table, MAX_LEN, "drop", skip_bad_rows=True)
    rows["validation"] = rows["validation"].select(slice(EVAL_ROWS))
    return rows


def make_trainer(model, tokenizer, rows, precision, **flags):
    """Return the trainer's own trainer, at a constant learning rate, without logs and saving."""
    flags |= {"output_dir": tempfile.mkdtemp(), "lr_scheduler_type": "constant", "warmup_steps": 0}
    flags |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
    flags |= {"gradient_checkpointing": False, "gradient_accumulation_steps": 1}
    flags |= {"max_len": MAX_LEN, "tokens_per_forward": 2048}
    argv = [str(text) for name, value in flags.items() for text in (f"--{name}", value)]
    args, training_args = sft_qwen2.parse_arguments(argv)
    plan = sft_qwen2.Plan(None, args.tokens_per_forward, 0)
    return sft_qwen2.build_trainer(model, tokenizer, args, training_args, rows, precision, plan)


def train(model, tokenizer, rows, precision, learning_rate, steps, rows_per_step) -> float:
    """Train the model in place; return the seconds it took."""
    sizes = {"per_device_train_batch_size": rows_per_step, "max_steps": steps}
    sizes |= {"learning_rate": learning_rate}
    trainer, start = make_trainer(model, tokenizer, rows, precision, **sizes), time.time()
    trainer.train()
    return time.time() - start


def held_out_loss(model, tokenizer, rows) -> float:
    """Return the mean loss over the answer tokens of the held-out rows, computed in fp32."""
    return make_trainer(model.float(), tokenizer, rows, FP32).evaluate()["eval_loss"]


def make_base(tokenizer, rows, data: Path) -> Path:
    """Return the folder of the base model, in bf16; trained once, and found again."""
    causes = repr((LAYERS, HEADS, BASE, MAX_LEN)) + rows["train"].sha256
    name = hashlib.sha256(causes.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"sft-qwen2-precision-{name}")
    if not folder.exists():
        torch.manual_seed(0)
        config = transformers.Qwen2Config(vocab_size=len(tokenizer), **LAYERS, **HEADS)
        start = Path(tempfile.mkdtemp())
        transformers.Qwen2ForCausalLM(config).save_pretrained(start)
        model = sft_qwen2.load_model(str(start), torch.float32)
        train(model, tokenizer, rows, FP32, *BASE.values())
        aside = tempfile.mkdtemp()
        model.to(torch.bfloat16).save_pretrained(aside)
        Path(aside).rename(folder)
    return folder


def main() -> int:
    args = parse_arguments()
    sft_qwen2.quiet_libraries()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    rows = read_data(args, tokenizer)
    base = make_base(tokenizer, rows, args.data)
    print(f"$ python {shlex.join(sys.argv)}")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    print(f"{', '.join(versions)}, {torch.get_num_threads()} CPU threads\n")
    before = held_out_loss(sft_qwen2.load_model(base, torch.float32), tokenizer, rows)
    print("| | held-out loss | progress | weights changed | s |\n|---|---|---|---|---|")
    print(f"| base | {before:.4f} | | | |", flush=True)
    gains, start = {}, sft_qwen2.load_model(base, torch.float32).state_dict()
    for name, precision in CONTENDERS.items():
        model = sft_qwen2.load_model(base, precision.weights)
        steps = (LEARNING_RATE, args.steps, args.rows_per_step)
        seconds = train(model, tokenizer, rows, precision, *steps)
        loss = held_out_loss(model, tokenizer, rows)
        gains[name] = before - loss
        weights = [(w != start[k]).float().flatten() for k, w in model.state_dict().items()]
        changed, progress = torch.cat(weights).mean(), gains[name] / gains["fp32"]
        shown = f"{loss:.4f} | {progress:.1%} | {changed:.0%} | {seconds:.0f}"
        print(f"| {name} | {shown} |", flush=True)
    holds = gains["bf16, default"] >= LAW * gains["fp32"]
    print(f"\nat least {LAW:.0%} of fp32's progress: {'yes' if holds else 'NO'}")
    return 0 if holds else 1


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    sys.exit(main())
