"""What a kernel is compiled for: `sm_90a` and the like (machine code of one GPU), or `compute_80` (PTX for any later one)."""

from functools import cache

import torch

from marlin_tools.errors import DeviceError

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""Targets that are compiled in tests and whose results are trusted; any other GPU is self-tested first."""

OVERLAP_CAPABILITY = 90
"""From Hopper on, a kernel fetches its first weights while the one before it still runs."""


def capability_of(target: str) -> int:
    """`sm_90a` -> 90."""
    digits = "".join(c for c in target.partition("_")[2] if c.isdigit())
    if not digits:
        raise DeviceError(f"`{target}` is not a GPU target", hint=f"known targets: {', '.join(TARGETS)}")
    return int(digits)


@cache
def target_of(device: torch.device) -> str:
    """The target to compile for on a device that is present."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise DeviceError(
            f"`{torch.cuda.get_device_name(device)}` has compute capability {major}.{minor}, the kernels need 8.0 (Ampere)",
            hint="use `--backend reference`",
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
