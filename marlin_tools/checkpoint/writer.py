"""Write a complete Hugging Face model directory, shard by shard, without ever holding it whole."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from marlin_tools.checkpoint.headers import read_header
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.strict_json import READABLE
from marlin_tools.errors import ModelError


def check_companions(source: Checkpoint) -> None:
    """Refuse files that `finish` takes over and that this user may not read, or no manifest could name, before the work."""
    for companion in source.companions():
        try:
            companion.name.encode("utf-8")
            os.close(os.open(companion, os.O_RDONLY))
        except OSError as error:
            raise ModelError(f"`{companion}` cannot be read: {error.strerror}", hint=READABLE) from error
        except UnicodeEncodeError as error:
            raise ModelError(f"the name of `{companion}` is no text in UTF-8", hint="rename the file") from error


class ModelWriter:
    """Shards, index, companions, and config.json last: without it nothing loads the directory by accident."""

    def __init__(self, output: OutputDirectory, shards: int) -> None:
        self.output = output
        self._shards = shards

    def shard_name(self, index: int) -> str:
        """The file name of shard `index`, counted from 0."""
        return f"model-{index + 1:05d}-of-{self._shards:05d}.safetensors"

    def shard_path(self, index: int) -> Path:
        """Where shard `index` lies while the directory is being made."""
        return self.output.work / self.shard_name(index)

    def write_shard(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write shard `index` whole."""
        self.output.write_tensors(self.shard_name(index), tensors)

    def finish(self, source: Checkpoint, quantization_config: dict[str, Any] | None) -> None:
        """Write the index, take over the companions of `source`, and write config.json."""
        weight_map: dict[str, str] = {}
        total = 0
        for index in range(self._shards):
            weight_map |= dict.fromkeys(read_header(self.shard_path(index)), self.shard_name(index))
            total += self.shard_path(index).stat().st_size
        index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.output.write_text("model.safetensors.index.json", json.dumps(index_json, indent=1) + "\n")
        for companion in source.companions():
            self.output.write_bytes(companion.name, companion.read_bytes())
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        if quantization_config is not None:
            config["quantization_config"] = quantization_config
        self.output.write_text("config.json", json.dumps(config, indent=2) + "\n")
