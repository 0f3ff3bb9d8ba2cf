"""AdamW's state, and gradients as well, in host memory: for models that do not fit on the GPUs.

State: 2 bytes per parameter. It lies in pinned host memory between steps. A step brings the state
of one parameter to the device of that parameter, updates it, and sends the state back.

Gradients: 2 bytes per bf16 parameter. As soon as autograd has a gradient, a hook adds the sum of
the earlier micro-batches, which comes from host memory, notes the norm, sends the new sum to host
memory, and frees the gradient. A step brings each sum, clips it by the norm of all, and uses it.

Values meet the same kernels in the same order as without this file, so no bit of a run differs.
All copies are queued on the stream that computes. A step ends when all have arrived.
"""

import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torchao.optim.subclass_8bit import OptimState8bit
from transformers import Trainer

from sft.console import say
from sft.errors import describe

GIB = 2**30
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- Tensors on their way -----------------------------------------------------------------------
def list_tensors(moment: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors of an optimizer's moment, which torchao itself would copy slowly."""
    if isinstance(moment, OptimState8bit):
        return [moment.codes, moment.scale, moment.qmap]
    return [moment]


def rebuild(moment: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a moment of the same kind that consists of these tensors."""
    if isinstance(moment, OptimState8bit):
        return OptimState8bit(*tensors, moment.signed, moment.dtype)
    return tensors[0]


def send(values: torch.Tensor, target: torch.Tensor) -> None:
    """Queue a copy of a moment or a gradient into another one of its kind."""
    for tensor, target_tensor in zip(list_tensors(values), list_tensors(target)):
        target_tensor.copy_(tensor, non_blocking=True)


def bring(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a device, which will have arrived before whatever is queued next."""
    tensors = []
    for tensor in list_tensors(values):
        tensors.append(torch.empty_like(tensor, device=device))
    arriving = rebuild(values, tensors)
    send(values, arriving)
    return arriving


def wait_for_devices(parameters: list[torch.Tensor]) -> None:
    """Wait until the devices of these parameters have done all that is queued."""
    devices = {p.device for p in parameters}
    for device in devices:
        module = torch.get_device_module(device)
        module.synchronize(device)


class PinnedMemory:
    """Pins host memory, to and from which GPUs copy at full speed, as far as the system lets it."""

    def __init__(self):
        self.num_bytes = 0
        self.is_exhausted = False

    def pin(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a moment or a gradient of the CPU in memory for copies to and from a device.

        Each tensor gets a memory of its own: torch.save writes the whole of a shared one.
        """
        if device.type != "cuda":
            return values
        pinned = [self.pin_tensor(tensor) for tensor in list_tensors(values)]
        return rebuild(values, pinned)

    def pin_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_exhausted:
            return tensor
        try:
            pinned = tensor.pin_memory()
        except RuntimeError as error:  # CUDA's own, which is no torch.OutOfMemoryError
            self.is_exhausted = True
            say(
                f"host       {self.num_bytes / GIB:.1f} GiB can be pinned, and no more: copies of "
                f"the rest are slower ({describe(error)})"
            )
            return tensor
        self.num_bytes += pinned.nbytes
        return pinned


# ---- The optimizer's state ----------------------------------------------------------------------
class StateOnHost:
    """Mixin of AdamW8bit: a parameter's state is on the device only while the parameter changes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pinned_memory = PinnedMemory()
        self.gradients_on_host = None  # a GradientsOnHost, where gradients are in host memory, too

    def take_host_memory(self) -> None:
        """Make the state of all parameters in host memory. Where it is made, nothing changes.

        accelerate's prepare would move this state to a GPU, and has to come earlier.
        """
        for p in self.list_parameters():
            self.find_host_state(p)
        if self.gradients_on_host is not None:
            self.gradients_on_host.take_host_memory(self.pinned_memory)

    def find_host_state(self, p: torch.Tensor) -> dict:
        """Return the state of a parameter in host memory, and make it where there is none."""
        host_state = self.state[p]
        if not host_state:
            like_p = torch.empty_like(p, device="cpu")
            host_state.update(self.new_state(like_p))
            for name in MOMENTS:
                moment = host_state[name]
                host_state[name] = self.pinned_memory.pin(moment, p.device)
        return host_state

    def load_parameter_state(self, p: torch.Tensor, saved: dict) -> None:
        """Copy the saved state of one parameter into its state in host memory."""
        host_state = self.find_host_state(p)
        host_state["step"] = saved["step"].cpu()
        for name in MOMENTS:
            send(saved[name], host_state[name])

    def step(self, closure=None) -> None:
        """Update each parameter, and wait until all state is in host memory: it may be saved."""
        super().step(closure)
        wait_for_devices(self.list_parameters())

    def step_parameter(self, p: torch.Tensor, group: dict) -> None:
        """Bring gradient and state of a parameter, update it, and send its state back."""
        if self.gradients_on_host is not None:
            self.gradients_on_host.bring_gradient(p)
        if p.grad is None:
            return
        host_state = self.find_host_state(p)
        state = {"step": host_state["step"]}
        for name in MOMENTS:
            state[name] = bring(host_state[name], p.device)
        self.state[p] = state
        super().step_parameter(p, group)
        for name in MOMENTS:
            send(state[name], host_state[name])
        self.state[p] = host_state
        if self.gradients_on_host is not None:
            p.grad = None


# ---- Gradients ----------------------------------------------------------------------------------
class GradientsOnHost:
    """Gradients in host memory, summed over the micro-batches of a step.

    A step is `clear`, backward passes, `clip`, and the step of the optimizer. In between, p.grad is
    None. Whatever reads p.grad has to be replaced: it would find a norm of 0.
    """

    def __init__(self, parameters):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.sums = {}
        self.norms = {}
        self.clipping = None
        for p in self.parameters:
            p.register_post_accumulate_grad_hook(self.take_gradient)

    def take_host_memory(self, pinned_memory: PinnedMemory) -> None:
        """Make room in host memory for the sums. Where it is made, nothing changes."""
        for p in self.parameters:
            if p not in self.sums:
                room = torch.empty_like(p.detach(), device="cpu")
                self.sums[p] = pinned_memory.pin(room, p.device)

    def clear(self) -> None:
        """Begin a step with sums of zero, also after a try that failed half-way."""
        self.norms.clear()
        self.clipping = None
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def take_gradient(self, p: torch.Tensor) -> None:
        """Add a parameter's gradient to its sum, just as autograd would add it to p.grad."""
        if p in self.norms:
            earlier_sum = bring(self.sums[p], p.device)
            p.grad.add_(earlier_sum)
        self.norms[p] = get_total_norm([p.grad])  # the last micro-batch's is that of the whole sum
        send(p.grad, self.sums[p])
        p.grad = None

    def clip(self, max_norm: float) -> torch.Tensor:
        """Return the norm of all sums. The step will scale them down to max_norm.

        Each parameter must have sent a gradient in this step, and none may have one still.
        """
        norms = []
        for p in self.parameters:
            assert p.grad is None, "a gradient is not in host memory"
            assert p in self.norms, "a parameter has sent no gradient in this step"
            norms.append(self.norms[p])
        # The order is that of torch's clip_grad_norm_, in which sums are rounded. The norm of a
        # norm is that norm, to the bit.
        total_norm = get_total_norm(norms)
        self.clipping = (max_norm, total_norm)
        return total_norm

    def bring_gradient(self, p: torch.Tensor) -> None:
        """Set p.grad to this step's sum, clipped. Without a sum, p.grad stays as it is."""
        if p not in self.norms:
            return
        max_norm, total_norm = self.clipping
        p.grad = bring(self.sums[p], p.device)
        clip_grads_with_norm_(p, max_norm, total_norm)


# ---- The trainer --------------------------------------------------------------------------------
class HostMemoryTrainer(Trainer):
    """Trainer whose optimizer keeps its state, and gradients, in host memory where it is asked to.

    `in_host_memory` is (), ("state",) or ("state", "gradients"). The subclass has to call
    `begin_gradients` before the first backward pass of each try to make a step.
    """

    def __init__(self, *args, in_host_memory: tuple[str, ...] = (), **options):
        super().__init__(*args, **options)
        self.in_host_memory = in_host_memory
        self.gradients_on_host = None
        self.has_host_memory = False

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Return the optimizer, after which gradients go to host memory if they are to."""
        optimizer = super().create_optimizer(model)
        if self.in_host_memory:
            assert isinstance(optimizer, StateOnHost), "only AdamW8bitOnHost has state there"
        if "gradients" in self.in_host_memory and self.gradients_on_host is None:
            # A gradient scaler would look for infinities in p.grad.
            assert self.accelerator.scaler is None, "gradients of fp16 stay on the GPUs"
            self.gradients_on_host = GradientsOnHost(self.model.parameters())
            optimizer.gradients_on_host = self.gradients_on_host
        return optimizer

    def take_host_memory(self) -> None:
        """Take host memory once and for all: in a backward pass it would hold up the GPU."""
        if not self.in_host_memory:
            return
        if self.has_host_memory:
            return
        say("host       pinning memory, which takes up to a second per GiB")
        self.optimizer.optimizer.take_host_memory()
        self.has_host_memory = True

    def begin_gradients(self) -> None:
        """Begin a step without gradients. The first one takes host memory for them."""
        self.take_host_memory()
        if self.gradients_on_host is not None:
            self.gradients_on_host.clear()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # To load shards, torch makes state by a step with gradients of zero, unless it is made.
        self.take_host_memory()
        super()._load_optimizer_and_scheduler(checkpoint)

    def _clip_grad_norm(self, model) -> torch.Tensor:
        if self.gradients_on_host is None:
            return super()._clip_grad_norm(model)
        return self.gradients_on_host.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor:
        if self.gradients_on_host is not None and grad_norm is None:  # --max_grad_norm 0
            grad_norm = self.gradients_on_host.clip(math.inf)
        return super()._get_grad_norm(model, grad_norm)
