"""The plugin that vLLM finds in `vllm.general_plugins`: where we are installed beside it, its INT4 layers run on our kernels.

vLLM calls `register` in each of its processes, perhaps more than once. Nothing that goes wrong here, or later in a layer, may
stop an engine: `Attempt` ends every exception of ours in one line of the log, and vLLM's own kernel takes over. What the
kernel does is in `vllm_kernel.py`, which imports vLLM; this module does not.

The interface of vLLM 0.22.1 and 0.33.0 was read; other versions are tried, and left alone if they do not fit.
"""

import logging
import os
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, entry_points, version
from types import TracebackType

SWITCH = "MARLIN_TOOLS_VLLM"
"""Environment variable; 0 leaves vLLM as it is."""

GROUP, NAME = "vllm.general_plugins", "marlin_tools"

log = logging.getLogger("vllm.marlin_tools")  # below vLLM's logger, so that it is shown as its own lines are


class Attempt(AbstractContextManager["Attempt"]):
    """The only place where exceptions of any kind end: `with Attempt("what happens instead") as attempt: ...`.

    `attempt.failure` is None, or what went wrong in one line, which the log has as well.
    """

    def __init__(self, instead: str) -> None:
        self.failure: str | None = None
        self._instead = instead

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Swallow what a program may handle; an interrupt is not ours to stop."""
        if not isinstance(error, Exception):
            return False
        text = " ".join(str(error).split()) or "no message"
        self.failure = f"{type(error).__name__}: {text[:300]}"
        log.warning("marlin-tools: %s (%s)", self._instead, self.failure)
        return True


def register() -> None:
    """Offer our kernel to vLLM before its own. Never raises."""
    if os.environ.get(SWITCH, "1") == "0":
        log.info("marlin-tools: off, because %s=0", SWITCH)
        return
    with Attempt("vLLM is left as it is"):
        from marlin_tools.serving import vllm_kernel

        vllm_kernel.install()


def seen() -> tuple[str, str | None]:
    """What vLLM would make of the plugin here, and the obstacle if it would not load it. Imports nothing of vLLM."""
    try:
        engine = version("vllm")
    except PackageNotFoundError:
        return "vLLM is not installed", None
    if NAME not in {point.name for point in entry_points(group=GROUP)}:
        return f"vLLM {engine}", "the plugin is not among the installed entry points; install marlin-tools again"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"vLLM {engine}", f"VLLM_PLUGINS does not name `{NAME}`"
    if os.environ.get(SWITCH, "1") == "0":
        return f"vLLM {engine}", f"{SWITCH}=0 turns the plugin off"
    return f"vLLM {engine} loads the plugin", None
