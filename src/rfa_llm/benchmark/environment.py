"""What a result file says of where it was made."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from rfa_llm.receipt import versions


def environment(*more: str) -> dict:
    """Versions (of `more` packages too) and machine; no name or path that tells which machine it is."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
    return {
        "versions": versions(*more),
        "machine": {
            "cpu": names[0] if names else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
        },
    }
