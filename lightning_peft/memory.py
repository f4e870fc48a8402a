"""How much memory a process has needed at most."""

import re
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak bytes of this process: by CUDA's allocator on a GPU, else what is resident.

    What is resident counts Python and its libraries too, about 0.5 GB before any model. It is
    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file():
        # Not getrusage, which counts from before the exec on: the peak of the parent process too.
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
