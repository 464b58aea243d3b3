"""Which GPUs' results are believed: those whose code the tests know, and any other once it has passed the self-test.

The self-test runs the operators and the operators ask here, so it is not imported but registers itself.
"""

from collections.abc import Callable
from functools import cache

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops.runtime.target import TARGETS, target_of

_judges: list[Callable[[torch.device], str | None]] = []


def register(judge: Callable[[torch.device], str | None]) -> None:
    """Add a judge, who says what is wrong on a device, or None."""
    _judges.append(judge)


@cache
def require_trust(device_index: int) -> None:
    """On a GPU whose target is not tested in advance, ask the judges once and refuse to go on if a kernel fails."""
    device = torch.device("cuda", device_index)
    if target_of(device) in TARGETS:
        return
    assert _judges, "`marlin_tools.ops` registers the self-test"
    for judge in _judges:
        if reason := judge(device):
            raise DeviceError(
                f"the native kernels are wrong on `{torch.cuda.get_device_name(device)}`: {reason}",
                hint="use `--backend reference`, and report this with the output of `marlin-tools doctor --json`",
            )
