"""What must be set before PyTorch, transformers and datasets are imported."""

import logging
import os
import signal
import sys
from typing import TextIO

# Large blocks of memory grow in place, so that gaps between them do not use up the memory. Pinned
# host memory is not rounded up to powers of two: above this size nothing is cached or rounded.
ALLOCATOR_SETTINGS = "expandable_segments:True,pinned_max_cached_size_mb:1"
# A thread that waits for others turns so often before it sleeps (GNU OpenMP: 300,000 times). On
# two cores that were busy otherwise, a step of the stand-in took 375 to 593 ms instead of 1,363 to
# 3,321, and as long as before, within 10 ms, on idle ones.
SPIN_COUNT = "1000"
# These libraries warn of kernels for other machines, and of each try to reach the hub.
TALKATIVE_LIBRARIES = ("torchao", "torch.utils._pytree", "huggingface_hub")


def set_environment() -> None:
    """Set what PyTorch and others read once, when they are imported. The user's values win."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR_SETTINGS)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    for name in TALKATIVE_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def announce_start(file: TextIO = sys.stdout) -> None:
    """Print a line at once: the imports take seconds. Ctrl-C ends them without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("start      importing PyTorch and transformers", file=file, flush=True)
