"""One process, several GPUs: while one computes on a micro-batch, the next computes on another.

The host tells a GPU what to compute and goes on before the GPU has done so. So one thread can keep
all GPUs at work, if it tells them their work in turns. The layers are cut into parts. In each turn,
each micro-batch moves on by one part. Three GPUs with a part each, and the micro-batches A to D, on
their way forward (capital letters) and back:

    GPU 0   A B C D . . . . . a b c d
    GPU 1   . A B C D . . . a b c d .
    GPU 2   . . A B C D * a b c d . .    * the loss of A; that of B is in the turn of a, and so on

A copy between GPUs makes both wait until the other has done all it was told before (PyTorch's
Copy.cu). So all inputs are on their GPUs before the first turn, and a turn begins with its copies.

Between two parts the graph of autograd is cut. A part begins with a leaf, and the gradient of that
leaf is what the part before begins with on its way back. Gradients of a parameter add up in the
order of the micro-batches, as they do on one GPU. So they are the same bits, however many
micro-batches are in flight. (A tied embedding gets two gradients from each micro-batch. Their order
is another one, and so is their rounding.)

Shapes: T tokens of a micro-batch, N trained tokens, E examples, C hidden size.
"""

from dataclasses import dataclass

import torch
from torch.autograd.graph import get_gradient_edge

# A launch queue has room for about 1,024 kernels, and the host waits where one is full. A layer has
# about 110 on its way back, with those that are computed again.
MAX_LAYERS_PER_PART = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive layers of one device. The first part begins with the embedding."""

    device: torch.device
    layers: list[torch.nn.Module]


class MicroBatchInFlight:
    """A micro-batch on its way through the parts, forward and back."""

    def __init__(self, inputs: dict):
        self.inputs = inputs  # as `place` returns them
        # On the way forward the hidden states [1, T, C], on the way back their gradient.
        self.carried = None
        # Of each part that has run forward: its input, and the end of its graph. The output itself
        # is not kept, because the next part has a copy.
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
        self.head_device = model.lm_head.weight.device
        assert self.decoder.norm.weight.device == self.head_device, "norm and head are apart"

    def autocast(self) -> torch.autocast:
        """Return the context of all forward passes. A backward pass must be outside."""
        return torch.autocast(
            self.head_device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            # A cache would keep a copy of all weights for each micro-batch in flight.
            cache_enabled=False,
        )

    def place(self, micro_batch: dict) -> dict:
        """Return a micro-batch with each of its tensors on the devices that need them.

        micro_batch: input_ids, position_ids [1, T], trained_positions, targets [N], seq_lens (a
        list), cu_seq_lens [E + 1]. This waits for the devices, so all micro-batches of a step are
        placed before the first one runs.
        """
        first_device = self.parts[0].device
        position_ids = micro_batch["position_ids"].to(first_device)
        # Of the weight, the rotary embedding takes the number format.
        cos, sin = self.decoder.rotary_emb(self.decoder.embed_tokens.weight, position_ids)
        layer_inputs = {}
        for part in self.parts:
            layer_inputs[part.device] = {
                "attention_mask": None,
                "use_cache": False,
                "position_embeddings": (cos.to(part.device), sin.to(part.device)),
                "seq_lens": micro_batch["seq_lens"],
                "cu_seq_lens": micro_batch["cu_seq_lens"].to(part.device),
            }
        return {
            "input_ids": micro_batch["input_ids"].to(first_device),
            "trained_positions": micro_batch["trained_positions"].to(self.head_device),
            "targets": micro_batch["targets"].to(self.head_device),
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
        for turn in make_turns(len(batches), len(self.parts)):
            for stop, number in turn:
                batches[number].move_to(self.parts[stop].device)
            for stop, number in turn:
                batch = batches[number]
                if stop > 0:
                    batch.leaves.append(batch.carried.requires_grad_())
                output = self.run_layers(self.parts[stop], batch)
                batch.ends.append(get_gradient_edge(output))
                batch.carried = output.detach()

    def run_back(self, batches: list[MicroBatchInFlight], divisor: float, scaler) -> None:
        """Take micro-batches from their loss back through all layers, and add up gradients.

        The loss is computed here, and not on the way forward. So what a loss keeps for its way back
        exists for one micro-batch at a time.
        """
        devices = [self.head_device]
        for part in reversed(self.parts):
            devices.append(part.device)
        for turn in make_turns(len(batches), len(devices)):
            for stop, number in turn:
                batches[number].move_to(devices[stop])
            for stop, number in turn:
                if stop == 0:
                    self.start_back(batches[number], divisor, scaler)
                else:
                    go_back_one_part(batches[number])

    def run_to_loss(self, batches: list[MicroBatchInFlight], divisor: float) -> None:
        """Take micro-batches through all layers and to their loss, without gradients."""
        devices = [part.device for part in self.parts]
        devices.append(self.head_device)
        for turn in make_turns(len(batches), len(devices)):
            for stop, number in turn:
                batches[number].move_to(devices[stop])
            for stop, number in turn:
                batch = batches[number]
                if stop < len(self.parts):
                    batch.carried = self.run_layers(self.parts[stop], batch)
                else:
                    batch.loss = self.compute_loss(batch, divisor)
                    batch.carried = None

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
        hidden_states = self.decoder.norm(batch.carried)
        trained_positions = batch.inputs["trained_positions"]
        loss_sum = self.model.answer_loss(hidden_states, trained_positions, batch.inputs["targets"])
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


def make_turns(num_micro_batches: int, num_stops: int) -> list[list[tuple[int, int]]]:
    """Return the (stop, number of a micro-batch) pairs of each turn.

    In turn t, the micro-batch t - s is at stop s. Those that have come furthest are named first.
    """
    turns = []
    for turn in range(num_micro_batches + num_stops - 1):
        pairs = []
        for stop in reversed(range(num_stops)):
            number = turn - stop
            if 0 <= number < num_micro_batches:
                pairs.append((stop, number))
        turns.append(pairs)
    return turns


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
