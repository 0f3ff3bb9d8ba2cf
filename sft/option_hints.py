"""What is meant by an option that does not exist: names of other scripts and older versions."""

import dataclasses
import difflib
from pathlib import Path

import transformers

RENAMED = {
    "lr": "learning_rate",
    "epoch": "num_train_epochs",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "n_epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_train_steps": "max_steps",
    "num_train_steps": "max_steps",
    "bs": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "grad_accum_steps": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "seq_len": "max_len",
    "seq_length": "max_len",
    "max_seq_len": "max_len",
    "max_seq_length": "max_len",
    "max_length": "max_len",
    "model_max_length": "max_len",
    "cutoff_len": "max_len",
    "block_size": "max_len",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "model_id": "model_name_or_path",
    "base_model": "model_name_or_path",
    "tokenizer": "model_name_or_path",
    "tokenizer_name": "model_name_or_path",
    "data": "data_path",
    "data_dir": "data_path",
    "dataset": "data_path",
    "dataset_name": "data_path",
    "dataset_path": "data_path",
    "train_data": "data_path",
    "train_file": "data_path",
    "val_size": "validation_split",
    "val_ratio": "validation_split",
    "val_split": "validation_split",
    "eval_size": "validation_split",
    "eval_split": "validation_split",
    "test_size": "validation_split",
    "validation_size": "validation_split",
    "system": "system_prompt",
    "out": "output_dir",
    "output": "output_dir",
    "out_dir": "output_dir",
    "save_dir": "output_dir",
    "eval_step": "eval_steps",
    "eval_every": "eval_steps",
    "eval_freq": "eval_steps",
    "eval_interval": "eval_steps",
    "evaluation_steps": "eval_steps",
    "save_every": "save_steps",
    "save_interval": "save_steps",
    "log_every": "logging_steps",
    "log_steps": "logging_steps",
    "log_interval": "logging_steps",
    "patience": "early_stopping_patience",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "clip_grad": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "optimizer": "optim",
    "activation_checkpointing": "gradient_checkpointing",
    "grad_checkpointing": "gradient_checkpointing",
    "cpu": "use_cpu",
    "no_cuda": "use_cpu",
    "mask_history": "train_on",
}

ADAPTERS = "leave it out; all weights are trained; for LoRA take TRL or LLaMA-Factory"
COMPILE = "leave it out; micro-batches differ in length, and each length would be compiled anew"
EVALUATION = "leave it out; evaluation makes micro-batches as training does"
NEXT_RUN = "leave it out; --resume goes on with a run, another --output_dir begins a new one"
PADDING = "leave it out; nothing is padded, and examples do not see each other"
PRECISION = "leave it out; the GPU decides between bf16 and fp16, and --fp32 asks for fp32 weights"
PROCESSES = "leave it out; torchrun --nproc_per_node gpu sft_qwen2.py shares the model by FSDP2"
RECORD = "this is a key of a row; rows are given as --data_path, arguments as a JSON object"
STRATEGY = "it is --eval_strategy, for example --eval_strategy steps"
UPLOAD = "leave it out, and upload the model afterwards: hf upload NAME OUTPUT_DIR"
VALIDATION = "leave it out; add the file to --data_path, under a name that begins with validation"
WORKERS = "leave it out; examples lie encoded on disk, and need no workers"

EXPLAINED = {
    "warmup_ratio": "it is --warmup_steps, for example --warmup_steps 0.03 for 3 % of all steps",
    "evaluation_strategy": STRATEGY,
    "evaluate_during_training": STRATEGY,
    "resume_from_checkpoint": "it is --resume, from the newest checkpoint of --output_dir",
    "overwrite_output_dir": NEXT_RUN,
    "config": "leave it out; the JSON file of arguments is the first word",
    "val_data": VALIDATION,
    "val_file": VALIDATION,
    "eval_data": VALIDATION,
    "eval_file": VALIDATION,
    "eval_dataset": VALIDATION,
    "validation_file": VALIDATION,
    "bf16": PRECISION,
    "fp16": PRECISION,
    "tf32": PRECISION,
    "dtype": PRECISION,
    "torch_dtype": PRECISION,
    "mixed_precision": PRECISION,
    "deepspeed": PROCESSES,
    "fsdp": PROCESSES,
    "fsdp_config": PROCESSES,
    "num_gpus": PROCESSES,
    "device_map": "leave it out; layers are put on GPUs by memory, as auto does",
    "lora": ADAPTERS,
    "lora_r": ADAPTERS,
    "lora_rank": ADAPTERS,
    "lora_alpha": ADAPTERS,
    "lora_dropout": ADAPTERS,
    "use_lora": ADAPTERS,
    "use_peft": ADAPTERS,
    "finetuning_type": ADAPTERS,
    "load_in_4bit": ADAPTERS,
    "load_in_8bit": ADAPTERS,
    "packing": PADDING,
    "padding_free": PADDING,
    "group_by_length": PADDING,
    "attn_implementation": PADDING,
    "flash_attn": PADDING,
    "use_flash_attn": PADDING,
    "torch_compile": COMPILE,
    "per_device_eval_batch_size": EVALUATION,
    "eval_batch_size": EVALUATION,
    "num_workers": WORKERS,
    "dataloader_num_workers": WORKERS,
    "push_to_hub": UPLOAD,
    "hub_model_id": UPLOAD,
    "hub_token": UPLOAD,
    "logging_dir": "leave it out, and set TENSORBOARD_LOGGING_DIR",
    "wandb_project": "leave it out, and set WANDB_PROJECT",
    "metric_for_best_model": "leave it out; the best has the lowest eval_loss",
    "greater_is_better": "leave it out; the best has the lowest eval_loss",
    "neftune_noise_alpha": "leave it out; its noise would depend on how examples are laid together",
    "label_smoothing_factor": "leave it out; the loss is the cross entropy of the answer tokens",
    "use_liger_kernel": "leave it out; the loss is computed in chunks anyway",
    "auto_find_batch_size": "leave it out; out of memory, a step is done again in smaller parts",
    "trust_remote_code": "leave it out; no code of models is run",
    "local_rank": "leave it out; torchrun tells it by the environment",
    "query": RECORD,
    "answer": RECORD,
    "messages": RECORD,
    "conversations": RECORD,
    "instruction": RECORD,
    "template": "leave it out; it is ChatML, as Qwen2 has it",
}
DATA_FILES = (".jsonl", ".csv", ".parquet", ".txt")


def explain_word(word: str, options: dict) -> str:
    """Return a sentence about a word of the command line that belongs to none of the options."""
    if not word.startswith("-"):
        return explain_bare_word(word)
    flag = word.split("=")[0]
    name = flag.lstrip("-").replace("-", "_")
    return f"unknown option {flag}: {explain_name(name, options)}"


def explain_bare_word(word: str) -> str:
    """Return a sentence about a word that is neither an option nor the value of one."""
    if word.endswith(".json"):
        return f"{word}: the JSON file of arguments is the first word; rows: --data_path {word}"
    if word.endswith(DATA_FILES) or Path(word).exists():
        return f"{word}: rows are given as --data_path {word}"
    return f"{word}: belongs to no option; options begin with --, and --help lists all"


def explain_name(name: str, options: dict) -> str:
    """Return what is meant by the name of an option that is none of these options."""
    if name in RENAMED and RENAMED[name] in options:
        return f"it is --{RENAMED[name]}"
    if name in EXPLAINED:
        return EXPLAINED[name]
    positive = name.removeprefix("no_")
    if positive in options:
        return f"it is --{positive} false"
    trainer_names = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    if name in trainer_names:
        return "leave it out; this option of transformers' Trainer has no use here"
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
    if nearest:
        return f"is it --{nearest[0]}?"
    return "--help lists all"
