"""How long a token takes: a model of true shapes with random weights, decoded at several batch sizes, dense and quantised.

Speed does not depend on the values of the weights, so nothing is downloaded. All schemes run on the same decoder
(`backends/decoder.py`), replayed as a CUDA graph; only the linears differ. The time of a step is that of its products and of
the rest (norms, rotation, cache, attention, the greedy choice), which is measured by replaying the products alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import nn

from marlin_tools.backends.decoder import Decoder, refusal
from marlin_tools.backends.fill import compute_buffers
from marlin_tools.backends.native import NativeLinear, NativeSparseLinear
from marlin_tools.bench import timing
from marlin_tools.bench.kernels import random_weight
from marlin_tools.checkpoint.cards import shapes_of
from marlin_tools.checkpoint.reader import ALIASES
from marlin_tools.distributed.device import DeviceName, describe_device
from marlin_tools.errors import ModelError
from marlin_tools.events import Emit, Event, silent
from marlin_tools.families import find_family
from marlin_tools.ops.linear.sparse_layout import random_sparse
from marlin_tools.settings import Settings, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PUBLISHED = {"llama2-7b": ("MARLIN paper, Table 1, A10", (2.93, 3.19, 3.02, 2.90, 2.74, 2.26, 1.78, 1.20))}
"""INT4 over FP16 in vLLM, 64 tokens in and 64 out, at the batch sizes 1, 2, 4, ... 128."""

SPARSE = "int4-2:4"
SCHEMES = ("fp16", "int4", SPARSE)
"""What the blocks' linears can be."""

_REPETITIONS = 5


class BenchModelSettings(Settings):
    """What to decode: `batches` sequences at once, `tokens_in` each, then `tokens_out` more, one at a time."""

    shape: str = "llama2-7b"
    tokens_in: int = Field(default=64, ge=1)
    tokens_out: int = Field(default=64, ge=2)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    schemes: tuple[Annotated[str, one_of("scheme", SCHEMES)], ...] = Field(default=SCHEMES, min_length=1)
    device: DeviceName = "cuda"


@dataclass(frozen=True)
class ModelMeasurement:
    """One scheme at one batch size, in milliseconds; `rest` is what a block does besides its products, in microseconds."""

    scheme: str
    batch: int
    step: float
    products: float
    rest: float
    first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class ModelBench:
    """All measurements, with what they were made on."""

    shape: str
    device: str
    settings: BenchModelSettings
    measurements: tuple[ModelMeasurement, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"bench-{self.shape}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        about = {"shape": self.shape, "gpu": self.device, "torch": torch.__version__, "cuda": torch.version.cuda}
        return {**about, "settings": self.settings.model_dump(), "results": [asdict(each) for each in self.measurements]}

    def find(self, scheme: str, batch: int) -> ModelMeasurement:
        """One of them."""
        return next(m for m in self.measurements if (m.scheme, m.batch) == (scheme, batch))

    def speedup(self, scheme: str, batch: int) -> float:
        """Over FP16, in tokens per second."""
        return self.find("fp16", batch).step / self.find(scheme, batch).step

    def published(self, batch: int) -> float | None:
        """What the paper reports for INT4, on another GPU and another engine."""
        _, values = PUBLISHED.get(self.shape, ("", ()))
        return dict(zip((1, 2, 4, 8, 16, 32, 64, 128), values, strict=False)).get(batch)


def bench_model(settings: BenchModelSettings, emit: Emit = silent) -> ModelBench:
    """Decode every scheme at every batch size."""
    card = card_for(settings)
    _decodable(card)
    device = timing.gpu(settings.device, "decoding is")
    results: list[ModelMeasurement] = []
    with torch.cuda.device(device), torch.inference_mode():
        for scheme in settings.schemes:
            emit(Event("stage", f"{settings.shape} in {scheme}"))
            model = random_model(card, scheme, device)
            for done, batch in enumerate(settings.batches, start=1):
                results.append(_measure(model, scheme, batch, settings))
                emit(Event("progress", scheme, done, len(settings.batches), {"batch": batch}))
            del model
            torch.cuda.empty_cache()
    return ModelBench(settings.shape, describe_device(device), settings, tuple(results))


def random_model(card: dict[str, Any], scheme: str, device: torch.device) -> "PreTrainedModel":
    """A model of these shapes with random weights of a usual size; its blocks' linears are of the scheme."""
    model = _decodable(card)
    family = find_family(card)
    if scheme in {"int4", SPARSE}:
        for block in model.get_submodule(f"{family.decoder}.{family.blocks}").children():
            for name in family.linears:
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                block.set_submodule(name, _random_linear(linear, device, sparse=scheme == SPARSE))
    fill_randomly(model, device)
    return model


def _decodable(card: dict[str, Any]) -> "PreTrainedModel":
    """A model of these shapes without weights, if our decoder has all that it needs."""
    model = empty_model(card, torch.float16, attn_implementation="sdpa")
    if (reason := refusal(model, 1)) is not None:
        raise ModelError(f"this shape cannot be decoded: {reason}", hint=f"models with a built-in shape: {', '.join(ALIASES)}")
    return model


def empty_model(card: dict[str, Any], dtype: torch.dtype, **how: Any) -> "PreTrainedModel":
    """A model of these shapes without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{key: value for key, value in card.items() if key != "dtype"})
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
    return model.eval()


def fill_randomly(model: "PreTrainedModel", device: torch.device) -> None:
    """Give a meta model random weights of a usual size; what has weights already keeps them."""
    compute_buffers(model, device)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if id(parameter) not in made:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.fill_(1) if values.ndim == 1 else values.normal_(std=0.02)
            made[id(parameter)] = nn.Parameter(values, requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[id(parameter)])


def card_for(settings: BenchModelSettings) -> dict[str, Any]:
    """The shapes that are asked for, if they are known and have room for that many tokens."""
    card, asked = shapes_of(settings.shape), settings.tokens_in + settings.tokens_out
    if asked > card["max_position_embeddings"]:
        raise ModelError(
            f"`{settings.shape}` has {card['max_position_embeddings']} positions, fewer than the {asked} tokens asked for",
            hint="use smaller `--in` and `--out`",
        )
    return card


def _random_linear(linear: nn.Linear, device: torch.device, *, sparse: bool) -> NativeLinear:
    n, k = linear.out_features, linear.in_features
    biased = "bias" in dict(linear.named_parameters())
    bias = torch.zeros(n, dtype=torch.float16, device=device) if biased else None
    if sparse:
        return NativeSparseLinear(random_sparse(n, k, device), bias)
    return NativeLinear(random_weight(n, k, device), bias)


def _measure(model: "PreTrainedModel", scheme: str, batch: int, settings: BenchModelSettings) -> ModelMeasurement:
    decoder = Decoder(model, batch, settings.tokens_in + settings.tokens_out)
    tokens = torch.randint(0, model.config.vocab_size, (batch, settings.tokens_in), device=model.device)
    steps = settings.tokens_out - 1  # the first of the new tokens comes from reading the prompt

    def write() -> None:
        decoder.restart(settings.tokens_in)
        logits = decoder.step(tokens[:, -1])
        for _ in range(steps - 1):
            logits = decoder.step(logits.argmax(-1))

    first = min(_milliseconds(lambda: decoder.read(tokens)) for _ in range(_REPETITIONS))
    write()
    step = min(_milliseconds(write) for _ in range(_REPETITIONS)) / steps
    products = _products(decoder, batch)
    rest = (step - products) * 1e3 / model.config.num_hidden_layers
    return ModelMeasurement(scheme, batch, step, products, rest, first, batch / step * 1e3)


def _products(decoder: Decoder, batch: int) -> float:
    """The products of one step alone, replayed from a graph."""
    inputs = {
        product: torch.randn((batch, product.in_features), dtype=torch.float16, device=decoder.device)  # type: ignore[attr-defined]
        for product in decoder.products
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [product(x) for product, x in inputs.items()]
    graph.replay()

    def ten_times() -> None:
        for _ in range(10):
            graph.replay()

    best = min(_milliseconds(ten_times) / 10 for _ in range(_REPETITIONS))
    del held
    return best


def _milliseconds(action: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
