"""The blocks of a model that is being made: those that are on disk already, and those that are written behind the loop."""

import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from marlin_tools.checkpoint.journal import Journal
from marlin_tools.checkpoint.writer import ModelWriter
from marlin_tools.stopwatch import apart
from marlin_tools.stream.host_copy import HostCopies
from marlin_tools.stream.inventory import Inventory
from marlin_tools.stream.layer_stream import Block, LayerStream

REFERENCE_TOKENS = 64
"""Tokens whose logits are kept with the model, for `verify`."""


class Shards:
    """A shard for each block, and one for the rest. `entries` is what each finished block has recorded, in their order.

    Only the process that writes has a journal. `joins` is that of the store.
    """

    def __init__(
        self, inventory: Inventory, writer: ModelWriter, journal: Journal | None, device: torch.device, *, joins: bool = False
    ) -> None:
        self.entries: list[dict[str, Any]] = []
        self._inventory, self._writer, self._journal, self._joins = inventory, writer, journal, joins
        self._copies = HostCopies(device)
        self._since = time.perf_counter()

    def start(self) -> None:
        """The next block to be recorded begins now, and none before it is known."""
        self.entries.clear()
        self._since = time.perf_counter()

    def finished(self, index: int) -> bool:
        """Whether a block is on disk already, exactly as it was written."""
        return self._journal is not None and self._journal.finished(index, self._writer.shard_path(index)) is not None

    def restore(self, block: Block, suffixes: tuple[str, ...], weight: Callable[[dict[str, Tensor], Tensor], Tensor]) -> None:
        """Put the weights of a finished block in place and move the activations past it."""
        shard = self._writer.shard_path(block.index)
        written = load_file(shard)
        for group in block.all_groups():
            for name in group.names:
                if self._joins:
                    stored = {"weight": self._inventory.part(name, written)}
                else:
                    stored = {suffix: written[f"{name}.{suffix}"] for suffix in suffixes}
                group.replace(name, weight(stored, group.weight(name)))
        block.skip()
        if self._journal is not None:
            self.entries.append(self._journal.entry(block.index))
        self._since = time.perf_counter()

    def writing(self, index: int, stored: dict[str, Tensor], records: list[dict[str, Any]]) -> Callable[[], None]:
        """What is left to do for a solved block: put it on disk, and only then say that it is finished.

        Holds nothing but what is to be written, so that the new weights can go. A block's seconds are those since the one
        before it.
        """
        assert self._journal is not None, "another process writes"
        journal, ready = self._journal, self._copies.mark()

        def write() -> None:
            with apart("write"):
                fetched = self._copies.fetch(stored, ready)
                stored.clear()
                joined = self._inventory.joined(index, fetched) if self._joins else self._untouched(index) | fetched
                self._writer.write_shard(index, joined)
                before, self._since = self._since, time.perf_counter()
                facts = {"linears": records, "seconds": round(self._since - before, 3)}
                self.entries.append(journal.record(index, self._writer.shard_path(index), facts))

        return write

    def write_rest(self) -> None:
        """Everything that belongs to no block: embeddings, final norm, head."""
        self._writer.write_shard(self._inventory.blocks, self._untouched(None))

    def writing_reference(self, stream: LayerStream) -> Callable[[], None]:
        """Keep what the new model puts out for a few tokens, for later checks."""
        ids, logits = stream.logits(REFERENCE_TOKENS)
        reference = {"tokens": ids, "logits": logits}

        def write() -> None:
            self._writer.output.write_tensors("verify/reference.safetensors", reference)

        return write

    def _untouched(self, index: int | None) -> dict[str, Tensor]:
        """All tensors of a block, or of none, that are as they were."""
        return {
            name: reference.read(self._inventory.checkpoint) for name, reference in self._inventory.untouched(index).items()
        }
