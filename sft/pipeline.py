"""One process, several GPUs: while one computes on a micro-batch, the next computes on another.

The host tells a GPU what to compute and goes on before the GPU has done so. So one thread can keep
all GPUs at work, if it tells them their work in turns. In each turn, each micro-batch moves on by
one GPU. Three GPUs, and the micro-batches A to D on their way forward (capital letters) and back:

    GPU 0   A B C D . . . . a b c d
    GPU 1   . A B C D . . a b c d .
    GPU 2   . . A B C D a b c d . .    the loss is here, and is computed on the way back

A copy between GPUs makes both wait until the other has done all it was told before (PyTorch's
Copy.cu). So all inputs are on their GPUs before the first turn, and a turn begins with its copies.

The layers of a GPU are told in parts, and the graph of autograd is cut between parts. A part begins
with a leaf, and the gradient of that leaf is what the part before begins with on its way back.
Gradients of a parameter add up in the order of the micro-batches, as they do on one GPU. So they
are the same bits, however many micro-batches are in flight. (A tied embedding gets two gradients
from each micro-batch. Their order is another one, and so is their rounding.)

Shapes: T tokens of a micro-batch, N trained tokens, E examples, C hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge

# A launch queue has room for about 1,024 kernels, and the host waits where one is full. A layer has
# about 110 on its way back, with those that are computed again.
MAX_LAYERS_PER_PART = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a device is told at once: consecutive layers, or the loss."""

    device: torch.device
    layers: list[torch.nn.Module]


class MicroBatchInFlight:
    """A micro-batch on its way through the parts, forward and back."""

    def __init__(self, inputs: dict):
        self.inputs = inputs  # as `place` returns them
        # The hidden states [1, T, C] on the way forward, and their gradient on the way back.
        self.carried = None
        # Each part leaves its input, and the end of its graph. Its output is not kept, because the
        # next part has a copy.
        self.leaves = []
        self.ends = []
        self.loss = None

    def move_to(self, device: torch.device) -> None:
        if self.carried is not None:
            self.carried = self.carried.to(device)


class Pipeline:
    """A Qwen2ForCausalLM whose layers are on several devices, which work at the same time.

    `model` has a method answer_loss(hidden_states [1, T, C], trained_positions [N], targets [N]).
    Its norm must be on the device of its head. Hooks of accelerate may stay on the modules: they
    find each input in its place, and copy nothing.
    """

    def __init__(
        self,
        model,
        autocast_dtype: torch.dtype | None = None,
        max_layers_per_part: int = MAX_LAYERS_PER_PART,
    ):
        self.model = model
        self.decoder = model.model
        self.autocast_dtype = autocast_dtype
        self.parts = make_parts(self.decoder, max_layers_per_part)
        self.loss_part = Part(device=model.lm_head.weight.device, layers=[])
        norm_device = self.decoder.norm.weight.device
        assert norm_device == self.loss_part.device, "norm and head are on two devices"

    def autocast(self) -> torch.autocast:
        """Return the context of all forward passes. A backward pass must be outside."""
        return torch.autocast(
            self.loss_part.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            # A cache would keep a copy of all weights for each micro-batch in flight.
            cache_enabled=False,
        )

    def place(self, micro_batch: dict) -> dict:
        """Return a micro-batch with each of its tensors on the devices that need them.

        micro_batch: input_ids, position_ids [1, T], trained_positions, targets [N], seq_lens (a
        list), cu_seq_lens [E + 1]. This waits for the devices, so all micro-batches of a window are
        placed before the first one runs.
        """
        first_device = self.parts[0].device
        head_device = self.loss_part.device
        position_ids = micro_batch["position_ids"].to(first_device)
        # The rotary embedding returns the number format of the weight.
        cos, sin = self.decoder.rotary_emb(self.decoder.embed_tokens.weight, position_ids)
        layer_inputs = {}
        for device in {part.device for part in self.parts}:
            layer_inputs[device] = {
                "attention_mask": None,
                "use_cache": False,
                "position_embeddings": (cos.to(device), sin.to(device)),
                "seq_lens": micro_batch["seq_lens"],
                "cu_seq_lens": micro_batch["cu_seq_lens"].to(device),
            }
        return {
            "input_ids": micro_batch["input_ids"].to(first_device),
            "trained_positions": micro_batch["trained_positions"].to(head_device),
            "targets": micro_batch["targets"].to(head_device),
            "seq_lens": micro_batch["seq_lens"],
            "layer_inputs": layer_inputs,
        }

    def run(
        self,
        micro_batches: list[dict],
        divisor: float,
        backward: bool,
        scaler: torch.amp.GradScaler | None = None,
    ) -> list[torch.Tensor]:
        """Return the loss / divisor of each placed micro-batch, and with `backward` add gradients.

        All micro-batches are in flight at once. `scaler` scales each loss before it goes back. The
        losses are tensors on the head's device, because the host would wait for numbers.
        """
        batches = [MicroBatchInFlight(inputs) for inputs in micro_batches]
        if backward:
            with self.autocast():
                self.run_forward(batches)
            self.run_back(batches, divisor, scaler)
        else:
            with torch.no_grad(), self.autocast():
                self.run_to_loss(batches, divisor)
        return [batch.loss for batch in batches]

    def run_forward(self, batches: list[MicroBatchInFlight]) -> None:
        """Take micro-batches through all layers, and keep what their way back needs."""
        for part, batch in take_turns(self.parts, batches):
            if batch.carried is not None:
                batch.leaves.append(batch.carried.requires_grad_())
            output = self.run_layers(part, batch)
            batch.ends.append(get_gradient_edge(output))
            batch.carried = output.detach()

    def run_back(self, batches: list[MicroBatchInFlight], divisor: float, scaler) -> None:
        """Take micro-batches from their loss back through all layers, and add up gradients.

        The loss is computed here, and not on the way forward. So what a loss keeps for its way back
        exists for one micro-batch at a time.
        """
        for part, batch in take_turns([self.loss_part, *reversed(self.parts)], batches):
            if part is self.loss_part:
                self.start_back(batch, divisor, scaler)
            else:
                go_back_one_part(batch)

    def run_to_loss(self, batches: list[MicroBatchInFlight], divisor: float) -> None:
        """Take micro-batches through all layers and to their loss, without gradients."""
        for part, batch in take_turns([*self.parts, self.loss_part], batches):
            if part is self.loss_part:
                batch.loss = self.compute_loss(batch, divisor)
                batch.carried = None
            else:
                batch.carried = self.run_layers(part, batch)

    def run_layers(self, part: Part, batch: MicroBatchInFlight) -> torch.Tensor:
        """Return the hidden states [1, T, C] after a part's layers."""
        hidden_states = batch.carried
        if hidden_states is None:
            hidden_states = self.decoder.embed_tokens(batch.inputs["input_ids"])
        layer_inputs = batch.inputs["layer_inputs"][part.device]
        for layer in part.layers:
            hidden_states = layer(hidden_states, **layer_inputs)
        return hidden_states

    def compute_loss(self, batch: MicroBatchInFlight, divisor: float) -> torch.Tensor:
        """Return the summed loss / divisor of the hidden states after the last layer."""
        inputs = batch.inputs
        hidden_states = self.decoder.norm(batch.carried)
        loss_sum = self.model.answer_loss(
            hidden_states,
            inputs["trained_positions"],
            inputs["targets"],
        )
        return loss_sum / divisor

    def start_back(self, batch: MicroBatchInFlight, divisor: float, scaler) -> None:
        """Compute the loss, and its gradient of the hidden states after the last layer."""
        leaf = batch.carried.requires_grad_()
        with self.autocast():
            loss = self.compute_loss(batch, divisor)
        batch.loss = loss.detach()
        if scaler is not None:
            loss = scaler.scale(loss)
        loss.backward()
        batch.carried = leaf.grad


def go_back_one_part(batch: MicroBatchInFlight) -> None:
    """Add up the gradients of the last part that is not done yet."""
    torch.autograd.backward(batch.ends.pop(), batch.carried)
    batch.carried = None
    if batch.leaves:
        batch.carried = batch.leaves.pop().grad


def make_parts(decoder, max_layers_per_part: int) -> list[Part]:
    """Return the layers of a Qwen2Model in parts of at most max_layers_per_part layers.

    The first part is where the embedding is. Without layers there, it is the embedding alone.
    """
    parts = [Part(device=decoder.embed_tokens.weight.device, layers=[])]
    for layer in decoder.layers:
        device = layer.input_layernorm.weight.device
        last = parts[-1]
        if device != last.device or len(last.layers) == max_layers_per_part:
            last = Part(device=device, layers=[])
            parts.append(last)
        last.layers.append(layer)
    return parts


def take_turns(
    parts: list[Part], batches: list[MicroBatchInFlight]
) -> Iterator[tuple[Part, MicroBatchInFlight]]:
    """Yield what the devices are to be told, in order; copy between devices as a turn begins."""
    devices = [part.device for part in parts]
    for turn in make_turns(devices, len(batches)):
        for number, micro_batch in turn:
            batches[micro_batch].move_to(devices[number])
        for number, micro_batch in turn:
            yield parts[number], batches[micro_batch]


def make_turns(devices: list, num_micro_batches: int) -> list[list[tuple[int, int]]]:
    """Return the (number of a part, number of a micro-batch) pairs of each turn, in order.

    `devices`: the device of each part. In a turn, a micro-batch goes through all parts that follow
    each other on one device. No device is told a second part before each is told a first: where a
    second part finds a full queue the host waits, and the other devices have work meanwhile.
    """
    stages = list_stages(devices)
    most_parts = max(len(parts) for parts in stages)
    turns = []
    for turn in range(num_micro_batches + len(stages) - 1):
        pairs = []
        for place in range(most_parts):
            for stage, parts in enumerate(stages):
                micro_batch = turn - stage
                if place < len(parts) and 0 <= micro_batch < num_micro_batches:
                    pairs.append((parts[place], micro_batch))
        turns.append(pairs)
    return turns


def list_stages(devices: list) -> list[list[int]]:
    """Return the numbers of the parts that follow each other on one device."""
    stages = []
    for number, device in enumerate(devices):
        if number == 0 or device != devices[number - 1]:
            stages.append([])
        stages[-1].append(number)
    return stages


def cut_windows(micro_batches: list[dict], max_tokens: int) -> list[list[dict]]:
    """Return micro-batches in lists of at most max_tokens tokens; a longer one is alone."""
    windows = []
    free_tokens = 0
    for micro_batch in micro_batches:
        num_tokens = sum(micro_batch["seq_lens"])
        if not windows or num_tokens > free_tokens:
            windows.append([])
            free_tokens = max_tokens
        windows[-1].append(micro_batch)
        free_tokens -= num_tokens
    return windows
