"""Which GPU of one process holds which modules: whole layers, in their order."""

from dataclasses import dataclass

from sft.memory_model import EMBEDDING, HEAD, Job, list_modules, make_share, peak_bytes
from sft.step_time import device_time

ModulesByDevice = list[list[str]]  # names of modules, for each device


@dataclass(frozen=True, kw_only=True)
class Span:
    """Modules that follow one another, on one device."""

    peak_bytes: float
    time: float  # of a micro-batch, in times of a layer


class Spans:
    """All spans of a model's modules: spans.get(first, end) holds modules first to end - 1."""

    def __init__(self, job: Job, tokens: int, trained_share: float, options: dict):
        """`options`: those of memory_model.step_memory."""
        self.modules = list_modules(job.config)
        self.num_modules = len(self.modules)
        self.found = {}
        by_share = {}  # many spans are alike: so many layers, with embedding and head or without
        for first in range(self.num_modules + 1):
            for end in range(first, self.num_modules + 1):
                modules = self.modules[first:end]
                share = make_share(job.config, modules)
                if share not in by_share:
                    by_share[share] = Span(
                        peak_bytes=peak_bytes(job, modules, tokens, **options),
                        time=device_time(job.config, share, trained_share),
                    )
                self.found[first, end] = by_share[share]

    def get(self, first: int, end: int) -> Span:
        return self.found[first, end]

    def list_distinct(self) -> set[Span]:
        return set(self.found.values())

    def cut(self, ends: list[int]) -> ModulesByDevice:
        """Return the modules of each device, from where they end."""
        modules_by_device = []
        first = 0
        for end in ends:
            modules_by_device.append(self.modules[first:end])
            first = end
        return modules_by_device


# ---- Even memory --------------------------------------------------------------------------------
def place_by_memory(job: Job, capacities: list[float], tokens: int, **options) -> ModulesByDevice:
    """Return the modules of each device, so that the fullest device is as little full as can be.

    A device is as full as what a step needs of it over its capacity (in bytes). `options`: those of
    memory_model.step_memory.
    """
    spans = Spans(job, tokens, trained_share=1, options=options)
    limits = set()
    for span in spans.list_distinct():
        for capacity in capacities:
            limits.add(span.peak_bytes / capacity)
    for limit in sorted(limits):
        ends = fill_devices(spans, capacities, limit)
        if ends[-1] == spans.num_modules:
            return spans.cut(ends)
    raise AssertionError("the highest limit lets one device hold all modules")


def fill_devices(spans: Spans, capacities: list[float], limit: float) -> list[int]:
    """Return where each device's modules end, if each in turn takes as many as the limit lets it.

    `limit`: how full a device may be. A device that takes fewer leaves more to the others. So no
    other way gets further.
    """
    ends = []
    first = 0
    end = 0
    for capacity in capacities:
        while end < spans.num_modules:
            longer = spans.get(first, end + 1)
            if longer.peak_bytes / capacity > limit:
                break
            end += 1
        ends.append(end)
        first = end
    return ends


# ---- Even time ----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Split:
    """Where the modules of some devices end, and how uneven their times are."""

    ends: list[int]
    unevenness: float  # the sum of the squares of the devices' times


def place_by_time(
    job: Job, capacities: list[float], tokens: int, trained_share: float, **options
) -> ModulesByDevice | None:
    """Return the modules of each device, so that the times of all devices are as even as can be.

    Only splits that fit into the capacities (in bytes) count. Returns None where nothing fits. No
    other split has a faster slowest device: if one had, a layer could move from the slowest device
    to a faster one, and the times would be more even. `options`: those of memory_model.step_memory.
    """
    spans = Spans(job, tokens, trained_share, options)
    split = find_most_even_split(spans, capacities)
    if split is None:
        return None
    return spans.cut(split.ends)


def find_most_even_split(spans: Spans, capacities: list[float]) -> Split | None:
    """Return the split with the least unevenness of those that fit."""
    # From the last device to the first: the best split of the modules from `first` to the end.
    best = {spans.num_modules: Split(ends=[], unevenness=0)}
    for capacity in reversed(capacities):
        longer = {}
        for first in range(spans.num_modules + 1):
            for end, rest in best.items():
                if end < first:
                    continue
                span = spans.get(first, end)
                if span.peak_bytes > capacity:
                    continue
                split = Split(
                    ends=[end, *rest.ends],
                    unevenness=span.time**2 + rest.unevenness,
                )
                known = longer.setdefault(first, split)
                if split.unevenness < known.unevenness:
                    longer[first] = split
        best = longer
    return best.get(0)


# ---- As accelerate asks for it ------------------------------------------------------------------
def make_device_map(job: Job, modules_by_device: list[list[str]]) -> dict[str, int]:
    """Return {module: number of its GPU} for all modules of the model.

    The norm is where the head is, since a pipeline computes both in one part. A tied head is where
    the embedding is.
    """
    device_map = {}
    for device, modules in enumerate(modules_by_device):
        for name in modules:
            device_map[name] = device
    device_map.setdefault(HEAD, device_map[EMBEDDING])
    device_map["model.norm"] = device_map[HEAD]
    device_map["model.rotary_emb"] = device_map[EMBEDDING]
    return device_map
