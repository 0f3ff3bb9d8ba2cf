"""Runs of the whole script that take simulated devices for the GPUs of one process."""

import os
import signal
from unittest import mock

import accelerate
import runs
import torch
import transformers

import sft.plan
import sft_qwen2
from sft.devices import GIB, Devices
from sft.throughput import Throughput

CAPABILITIES = {"bf16": (8, 0), "fp16": (7, 0)}


class StopAfterOneStep(transformers.TrainerCallback):
    """Ends a run as someone does who types `kill`."""

    def on_step_end(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def run_script(
    *words,
    precision: str,
    max_window_tokens: int | None = None,
    in_host_memory: tuple[str, ...] = (),
    callbacks=(),
) -> runs.Run:
    """Return a run of main() in this process, over all simulated devices.

    `precision`: of matrix products, "bf16" or "fp16". `max_window_tokens`: in flight, instead of
    what the plan says. `in_host_memory`: "state", "gradients" or both, as in Plan.in_host_memory.
    """
    first_device = torch.device("simulated:0")

    class SimulatedTrainer(sft_qwen2.SFTTrainer):
        def __init__(self, **options):
            super().__init__(**options)
            if max_window_tokens is not None:
                self.window_tokens = max_window_tokens

        def create_accelerator_and_postprocess(self):
            # accelerate knows no simulated devices, and scales no losses on them.
            super().create_accelerator_and_postprocess()
            for state in (accelerate.state.PartialState, accelerate.state.AcceleratorState):
                state._shared_state["device"] = first_device
            if precision == "fp16":
                self.accelerator.native_amp = True
                self.accelerator.scaler = torch.amp.GradScaler("simulated", init_scale=1024)

    def device_of_trainer(training_args) -> torch.device:
        assert training_args._setup_devices is not None  # sets up much else when it is asked for
        return first_device

    def find_devices(args, training_args) -> Devices:
        num_devices = torch.simulated.device_count()
        return Devices(
            kind="cuda",
            names=["A100"] * num_devices,
            free_bytes=[8 * GIB] * num_devices,
            capability=CAPABILITIES[precision],
            num_processes=1,
            is_assumed=False,
            host_free_bytes=8 * GIB,
        )

    with (
        mock.patch.object(transformers.TrainingArguments, "device", property(device_of_trainer)),
        mock.patch.object(sft.plan, "find_devices", find_devices),
        mock.patch.object(sft.plan.Plan, "in_host_memory", in_host_memory),
        mock.patch.object(sft_qwen2, "Throughput", lambda num_gpus: Throughput(0)),
    ):
        return runs.watch(*words, callbacks=callbacks, trainer_class=SimulatedTrainer)
