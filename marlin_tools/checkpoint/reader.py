"""A model directory, read lazily: headers at once, tensors one at a time, nothing ever unpickled.

`Checkpoint.open` takes what people have: a local directory, a hub id, or an alias such as `llama2-7b` or `demo`.
A revision may be named, `owner/name@commit`. Opening reads config.json and the safetensors headers (`headers.py`) and checks
that every shard is there and as long as its header says, that nothing lies outside of the directory, and that config.json
describes these tensors (`contract.py`).
"""

import hashlib
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.contract import (
    Tensors,
    agree,
    blocks_of,
    check_blocks,
    check_config,
    check_generation,
    text_config,
)
from marlin_tools.checkpoint.headers import INDEX, TensorInfo, check_inside, is_read, read_headers
from marlin_tools.checkpoint.offline import give_up_early
from marlin_tools.checkpoint.ours import BESIDE
from marlin_tools.checkpoint.output import sha256_of
from marlin_tools.checkpoint.strict_json import read_object
from marlin_tools.checkpoint.tokenizer_files import NEEDED, check_tokenizer_files, panics_unprinted
from marlin_tools.errors import ErrorTranslation, ModelError, check_named
from marlin_tools.resources import demo_dir, expanded, is_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIASES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    "phi-4": "microsoft/phi-4",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "llama4-scout": "meta-llama/Llama-4-Scout-17B-16E",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma3-4b": "google/gemma-3-4b-it",
    "gemma3-27b": "google/gemma-3-27b-it",
}

GENERATION = "generation_config.json"
"""End-of-text tokens and the like; a model may do without it."""

_WIDE = {torch.float16, torch.bfloat16, torch.float32}
"""What models are made in: codes are narrower."""

_HUB_ID = re.compile(r"\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_HUB_TWICE = ["original/*", "metal/*", "consolidated*"]
"""The same weights once more, as other programs read them."""


class Checkpoint:
    """A model on disk. `path` is its directory, `config` its config.json, `origin` what the user called it."""

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin
        check_inside(path)
        self.config = read_config(path)
        if (generation := path / GENERATION).exists():
            check_generation(read_object(generation), generation)
        self._tensors = read_headers(path)
        agree(self.config, self._shapes_and_types, path / "config.json")
        _ = self.dtype  # refused here, before anything else stumbles over it

    @classmethod
    def open(cls, ref: "str | Path | Checkpoint", accept: Callable[[dict[str, Any]], object] | None = None) -> "Checkpoint":
        """Find the model that `ref` names. `accept` sees config.json before any weights are fetched and may raise."""
        if isinstance(ref, Checkpoint):
            return ref
        check_named(str(ref))
        path = expanded(ref)
        if str(ref) == "demo":
            path = demo_dir() / "model"
        elif not path.is_dir():
            path = _fetch(str(ref), accept)
        if accept is not None:
            accept(read_config(path))
        return cls(path, str(ref))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of config.json, if the weights are stored quantised."""
        return self.config.get("quantization_config")

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the language model: all of it, or what stands beside other models'.

        Nested ones often leave out what is as usual, so transformers' defaults are filled in, if it knows the type.
        """
        if (inside := text_config(self.config)) is self.config:
            blocks = blocks_of(self.config)
            return self.config if blocks is None else self.config | {"num_hidden_layers": blocks}
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.config.get("model_type") not in CONFIG_MAPPING:  # nothing is usual there; it can still be looked at
            return dict(inside)
        known = {key: value for key, value in self.config.items() if key not in {"model_type", "dtype", "torch_dtype"}}
        what = f"`{self.path / 'config.json'}` is not understood by transformers"
        with ErrorTranslation(ModelError, what, "update transformers, or check config.json"):
            whole = AutoConfig.for_model(self.config["model_type"], **deepcopy(known))  # which changes what it is given
            text = dict(whole.get_text_config().to_dict())
        check_blocks(text, self._shapes_and_types, self.path / "config.json")
        return text

    @property
    def _shapes_and_types(self) -> Tensors:
        """Of all tensors, by name."""
        shapes = {name: stored.shape for name, stored in self._tensors.items()}
        return Tensors(shapes, {name: stored.dtype for name, stored in self._tensors.items()})

    @cached_property
    def _largest(self) -> torch.dtype:
        """The type of the largest tensor that is none of codes."""
        wide = [stored for stored in self._tensors.values() if stored.dtype in _WIDE]
        return max(wide, key=lambda stored: math.prod(stored.shape)).dtype if wide else torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit (or other) type that the model was made in; where config.json does not say, that of its largest tensor."""
        inside = self.config.get("text_config")
        places = (self.config, inside) if isinstance(inside, dict) else (self.config,)
        name = next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), None)
        dtype = self._largest if name is None else getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ModelError(f"`{self.path / 'config.json'}`: unknown dtype `{name}`", hint="use float16, bfloat16 or float32")
        return dtype

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def stored(self, name: str) -> TensorInfo:
        """Shape, type and place of a tensor, without reading it."""
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(
                f"`{self.path}` has no tensor `{name}`", hint="the checkpoint does not fit its config.json; download it again"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.stored(name).shape

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import SafetensorError, safe_open

        file = self.stored(name).file
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"`{file}`: cannot read `{name}`: {error}", hint="download the file again") from error

    def read_pinned(self, name: str) -> Tensor:
        """One tensor in pinned memory, from which a GPU fetches it without help."""
        stored = self.stored(name)
        content = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=True)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                _read_all(file, content.numpy().data)
        except OSError as error:
            raise ModelError(f"`{stored.file}`: cannot read `{name}`: {error}", hint="download the file again") from error
        return content.view(stored.dtype).view(stored.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config.json and the contents of all weight files."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        files = sorted({tensor.file for tensor in self._tensors.values()})
        with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
            for file, content in zip(files, threads.map(_content_hash, files), strict=True):
                digest.update(file.name.encode())
                digest.update(content.encode())
        return digest.hexdigest()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's own tokenizer; never runs code from the checkpoint."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoTokenizer

        check_tokenizer_files(self.path)
        with ErrorTranslation(ModelError, f"`{self.path}`: the tokenizer cannot be loaded", NEEDED), panics_unprinted():
            try:
                return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
            except StrictDataclassError as error:  # it looks at config.json as well
                what = f"`{self.path / 'config.json'}` is not understood by transformers: {' '.join(str(error).split())}"
                raise ModelError(what, hint="correct it, or download the model again") from error

    def companions(self) -> list[Path]:
        """The files that make it a complete model besides weights and config: tokenizer, generation settings, licence."""
        own = {"config.json", INDEX, "quantize_config.json", *BESIDE}  # of these weights in this format
        found = [file for file in sorted(self.path.iterdir()) if file.is_file() and not file.name.startswith(".")]
        return [each for each in found if is_read(each.name) and each.suffix != ".safetensors" and each.name not in own]


def hub_name(ref: str) -> tuple[str, str | None]:
    """The repository behind a hub id or an alias, and the revision that is named after an `@`."""
    name, _, revision = ref.partition("@")
    return ALIASES.get(name, name), revision or None


def hub_repository(ref: str) -> tuple[str, str | None]:
    """The same of a name that may be mistyped, held against the hub's rules before the hub is asked."""
    if is_file(ref):
        raise ModelError(f"`{ref}` is a file, not a model", hint="name the directory that holds it")
    if ref.startswith("runs/"):  # where our own results go by default: nobody means the hub
        raise ModelError(f"there is no directory `{ref}`", hint="is the run that makes it finished?")
    if ref.startswith((".", "/", "~")):
        raise ModelError(f"there is no directory `{ref}`", hint="check the path; a model of the hub is called owner/name")
    repo, revision = hub_name(ref)
    if not _HUB_ID.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        told = ", ".join(["demo", *ALIASES])
        raise ModelError(f"`{ref}` is no directory, no hub id (owner/name) and no alias", hint=f"known aliases: {told}")
    return repo, revision


def _fetch(ref: str, accept: Callable[[dict[str, Any]], object] | None) -> Path:
    """Bring a hub model into the hub's own cache; honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""
    repo, revision = hub_repository(ref)
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    give_up_early()
    try:
        config = hf_hub_download(repo, "config.json", revision=revision)
        if accept is not None:
            accept(read_config(Path(config).parent))
        offline = constants.HF_HUB_OFFLINE  # said, because a commit is looked up on the hub even if it is in the cache
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_TWICE, local_files_only=offline
        )
        return Path(folder)
    except GatedRepoError as error:
        raise ModelError(
            f"`{repo}` is gated",
            hint=f"accept its licence on huggingface.co/{repo} and set HF_TOKEN, or give a local directory",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"`{repo}` is neither a local directory nor a model on the hub", hint="check the spelling") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        wanted = f"`{repo}`" + (f" at revision `{revision}`" if revision else "")
        raise ModelError(
            f"{wanted} is not in the local cache and cannot be downloaded",
            hint="check the network and HF_HUB_OFFLINE, or give a local directory",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, every key that we use of its right kind."""
    file = path / "config.json"
    if not file.exists():
        hint = "a Hugging Face model directory has config.json and *.safetensors"
        if inside := sorted(each.parent for each in path.glob("*/config.json")):  # as a result in several formats has
            hint = f"name a model in it: {', '.join(f'`{each}`' for each in inside[:4])}"
        raise ModelError(f"`{path}` holds no config.json", hint=hint)
    config = read_object(file)
    check_config(config, file)
    return config


def _read_all(file: FileIO, into: memoryview) -> None:
    """Fill the whole buffer; one read may stop short."""
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise OSError(f"ends {len(into) - done} bytes early")
        done += count


def _content_hash(file: Path) -> str:
    """sha256 of a file; the hub's cache already names its blobs by it."""
    blob = file.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else sha256_of(file)
