"""Generation as a CUDA graph: one new token per sequence and step, with a cache of fixed size.

transformers reads the prompt; from there on a step is replayed without Python. Besides the products of its linears a block is
four small kernels (`ops/model/decode.py`) in the place of some forty, and linears that read one tensor are multiplied as one.
The model stays usable as it is: joined weights are shared with it, not copied.

    decoder = Decoder(model, batch=1, capacity=512)
    logits = decoder.read(tokens)                  # [B, T] -> [B, vocabulary] after the last token
    logits = decoder.step(logits.argmax(-1))       # as often as there is room

`refusal` says which models it is for: Llama and what is built like it, in 16 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from marlin_tools.backends.native import NativeLinear, join
from marlin_tools.families.family import turns_by_length
from marlin_tools.ops.model import decode
from marlin_tools.quantized import rounds_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def refusal(model: "PreTrainedModel", capacity: int) -> str | None:
    """Why this model cannot be decoded here, or None."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"model type `{config.model_type}` is not one of {', '.join(MODEL_TYPES)}"
    attention, on_gpu = model.model.layers[0].self_attn, model.device.type == "cuda"
    rotation: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rotation.get("rope_type", "default")
    share = rotation.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    checks = {
        f"its activations are {model.dtype}": on_gpu and model.dtype not in {torch.float16, torch.bfloat16},
        f"its MLP uses {config.hidden_act}": config.hidden_act not in {"silu", "swish"},
        f"its heads have {attention.head_dim} elements": on_gpu and attention.head_dim not in decode.HEAD_SIZES,
        f"its rotary embedding is {kind}": turns_by_length(config),  # no table can hold its angles
        "only a part of each head is rotated": share != 1,
        f"its attention sees {window} tokens, fewer than {capacity}": 0 < (window or 0) < capacity,
        f"it has {config.max_position_embeddings} positions, fewer than {capacity}": config.max_position_embeddings < capacity,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


@dataclass(frozen=True)
class _FusedLinear:
    """Linears that read the same tensor, multiplied at once where they are of one kind."""

    parts: tuple[nn.Module, ...]
    whole: nn.Module | None

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.parts[0].in_features)  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        if self.whole is not None:
            return self.whole(x)
        return torch.cat([part(x) for part in self.parts], dim=-1)


def _join(body: nn.Module, *names: str) -> _FusedLinear:
    """One module in the place of several; these go on as views of its weights."""
    parts = tuple(body.get_submodule(name) for name in names)
    packed = [part for part in parts if isinstance(part, NativeLinear)]
    dense = [part for part in parts if type(part) is nn.Linear and not rounds_inputs(part)]
    whole = join(packed) if len(packed) == len(parts) else _join_dense(dense) if len(dense) == len(parts) else None
    return _FusedLinear(parts, whole)


def _join_dense(parts: list[nn.Linear]) -> nn.Linear | None:
    if len({part.bias is None for part in parts}) > 1:
        return None
    with torch.device("meta"):
        whole = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), bias=parts[0].bias is not None)
    for name, _ in list(whole.named_parameters()):
        tensors = [getattr(part, name).detach() for part in parts]
        joined = torch.cat(tensors)
        setattr(whole, name, nn.Parameter(joined, requires_grad=False))
        for part, piece in zip(parts, joined.split([len(tensor) for tensor in tensors]), strict=True):
            setattr(part, name, nn.Parameter(piece, requires_grad=False))
    return whole


class _Block:
    """One decoder block for one new token per sequence, with its part of the cache."""

    def __init__(self, block: Any, cache: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.keys, self.values = cache
        self._norms = [(norm.weight, _epsilon(norm)) for norm in (block.input_layernorm, block.post_attention_layernorm)]
        self._joint, self._exit = _join(attention, "q_proj", "k_proj", "v_proj"), attention.o_proj
        self._both, self._down = _join(mlp, "gate_proj", "up_proj"), mlp.down_proj
        self._rotation = decode.Rotation(*rotation)
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm, attention.k_norm
            self._rotation = decode.Rotation(*rotation, norms[0].weight, norms[1].weight, _epsilon(norms[0]))
        self._head, self._scale = attention.head_dim, attention.scaling

    @property
    def products(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What multiplies, in order, each with its own number of inputs."""
        return self._joint, self._exit, self._both, self._down

    def step(self, residual: Tensor, branch: Tensor | None, position: Tensor) -> Tensor:
        """The residual stream without the last branch goes in and is changed in place; the last branch comes out."""
        x = decode.add_norm(residual, branch, *self._norms[0])
        joint = self._joint(x).view(len(x), -1, self._head)
        attended = decode.attend(joint, self.keys, self.values, position, self._rotation, self._scale)
        x = decode.add_norm(residual, self._exit(attended.view(len(x), -1)), *self._norms[1])
        out: Tensor = self._down(decode.gate(self._both(x)))
        return out


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon)


class Decoder:
    """A model with room for `batch` sequences of `capacity` tokens, all of the same length at any time."""

    def __init__(self, model: "PreTrainedModel", batch: int, capacity: int) -> None:
        if (reason := refusal(model, capacity)) is not None:
            raise ValueError(f"this model cannot be decoded: {reason}")
        self._model, self.device, self.capacity, self.length = model, model.device, capacity, 0
        device, dtype, inner = model.device, model.dtype, model.model
        attention = inner.layers[0].self_attn
        key_heads = attention.k_proj.out_features // attention.head_dim
        places = torch.arange(capacity, device=device)[None]
        rotation = inner.rotary_emb(torch.empty(0, dtype=dtype, device=device), position_ids=places)
        cosines, sines = (table[0].to(dtype).contiguous() for table in rotation)
        shape = (len(inner.layers), 2, batch, key_heads, capacity, attention.head_dim)
        self._cache = torch.zeros(shape, dtype=dtype, device=device)
        self._blocks = [_Block(block, cache, (cosines, sines)) for block, cache in zip(inner.layers, self._cache, strict=True)]
        self._position = torch.zeros(1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = self._capture() if device.type == "cuda" else torch.empty(0)

    @property
    def products(self) -> list[Callable[[Tensor], Tensor]]:
        """All products of a step in order, the head last: what is left of its time is everything else."""
        return [product for block in self._blocks for product in block.products] + [self._model.lm_head]

    def read(self, tokens: Tensor) -> Tensor:
        """Start over with these tokens [B, T]; the logits [B, vocabulary] after the last of them."""
        with torch.inference_mode():
            out = self._model(tokens, use_cache=True, logits_to_keep=1)
        for block, layer in zip(self._blocks, out.past_key_values.layers, strict=True):
            block.keys[:, :, : tokens.shape[1]] = layer.keys
            block.values[:, :, : tokens.shape[1]] = layer.values
        self.restart(tokens.shape[1])
        logits: Tensor = out.logits[:, -1]
        return logits

    def restart(self, length: int) -> None:
        """Go on after so many tokens of the cache, whatever it holds."""
        assert 0 <= length <= self.capacity, (length, self.capacity)
        self.length = length
        self._position.fill_(length)

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per sequence [B]; the logits after it, which the next step overwrites."""
        assert self.length < self.capacity, (self.length, self.capacity)
        self.length += 1
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        return self._logits

    @torch.inference_mode()
    def _compute(self) -> Tensor:
        inner = self._model.model
        residual: Tensor = inner.embed_tokens(self._tokens)
        branch: Tensor | None = None
        for block in self._blocks:
            branch = block.step(residual, branch, self._position)
        x = decode.add_norm(residual, branch, inner.norm.weight, _epsilon(inner.norm))
        self._position += 1
        logits: Tensor = self._model.lm_head(x)
        return logits

    def _capture(self) -> Tensor:
        """Once without a graph, so that everything is loaded and every shape has its plan; then into the graph."""
        with torch.cuda.device(self._model.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._compute()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                logits = self._compute()
        self.restart(0)
        return logits
