"""Which layers of an engine run on which kernel: counted while a model loads, said in one line when it is loaded."""

import hashlib
from collections import Counter

from marlin_tools import __version__
from marlin_tools.ops.linear.layout import WORDS, PackedTiles
from marlin_tools.serving.vllm import log


class Tally:
    """What happened to the layers of this process."""

    def __init__(self) -> None:
        self._waiting = 0
        self._taken: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._layers: list[str] = []

    def refuse(self, shape: str, reason: str) -> None:
        """A layer that we do not take; each reason is logged when it is new."""
        if reason not in self._refused:
            log.info("marlin-tools: a layer of %s stays on vLLM's own kernel: %s", shape, reason)
        self._refused[reason] += 1

    def expect(self) -> None:
        """A layer that is ours as soon as its weights are there."""
        self._waiting += 1

    def take(self, packed: PackedTiles, *, fp8: bool = False) -> None:
        """A layer whose weights are packed, perhaps for activations in FP8."""
        kind = "FP8" if fp8 else "dense" if packed.codes.shape[2] == WORDS else "2:4"
        self._taken[kind] += 1
        self._layers.append(f"{kind} {tuple(packed.codes.shape)} {tuple(packed.scales.shape)} {packed.out_features}")
        self._arrived()

    def give_back(self, shape: str, reason: str) -> None:
        """A layer that was ours, but whose weights we cannot hold."""
        self.refuse(shape, reason)
        self._arrived()

    def _arrived(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            log.info("marlin-tools %s: %s", __version__, self.summary())

    def summary(self) -> str:
        """All layers so far, by kernel."""
        ours = [f"{count} layers {kind}" for kind, count in sorted(self._taken.items())] or ["no layers"]
        text = f"{' and '.join(ours)} on our kernels"
        if self._refused:
            text += f", {self._refused.total()} on vLLM's own ({'; '.join(self._refused)})"
        return text

    def fingerprint(self) -> str:
        """Changes with the layers that are ours and how they are packed; empty if there are none."""
        return hashlib.sha256("\n".join(self._layers).encode()).hexdigest() if self._layers else ""


TALLY = Tally()
"""That of this process: an engine has one process for each GPU."""
