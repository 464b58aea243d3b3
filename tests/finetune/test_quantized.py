"""A quantised model learns from the original: same format and size, codes move by one at most, and it never ends worse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from marlin_tools.algorithms.masks import magnitude
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, ModelError, RecipeError
from marlin_tools.events import Event
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import QuantizedLinear
from marlin_tools.training.finetune import FinetuneSettings
from marlin_tools.training.loop import Trainer
from marlin_tools.training.pair import pair
from marlin_tools.training.scaled import ScaledLinear, TunedLinear, _Product, free_codes

Run = Callable[..., Checkpoint]
Make = Callable[..., Path]
MUCH = tuple(torch.randint(2, 512, (203, 32), generator=torch.Generator().manual_seed(3)))
ENOUGH = {"text": TokenSet(MUCH, "random", packed=True, documents=1), "code_rate": 0.02, "rate": 1e-3, "tokens": 60 * 4 * 32}
"""What a quantised model needs to get better on windows that it was not trained on."""


class StopError(Exception):
    """In place of a kill."""


def stop_at(step: int) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if event.kind == "progress" and event.text == "steps" and event.done >= step:
            raise StopError

    return emit


@pytest.fixture(scope="module")
def quantized(teacher: Path, tokens: TokenSet, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`quantized(format="gptq")` is the teacher in INT4, by round-to-nearest; made once for each choice."""
    made: dict[str, Path] = {}

    def make(**choice: Any) -> Path:
        key = json.dumps(choice, sort_keys=True)
        if key not in made:
            settings = QuantizeSettings(**{"preset": "rtn", "device": "cpu", **choice})
            made[key] = quantize(teacher, tokens, settings, tmp_path_factory.mktemp("int4") / "out").path
        return made[key]

    return make


def manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint.path / "manifest.json").read_text())
    return content


def linears(checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    stored = StoredLinears(checkpoint)
    return {name: stored.read(name) for name in stored.names}


@pytest.mark.parametrize("stored", ["compressed-tensors", "gptq", "marlin"])
def test_it_comes_closer_and_stays_what_it_is(run: Run, quantized: Make, teacher: Path, stored: str) -> None:
    source = Checkpoint.open(quantized(format=stored))
    out = run(model=source.path, **ENOUGH)
    facts = manifest(out)
    measured = dict(facts["held_out_kl"])
    assert measured[facts["best_step"]] == min(measured.values()) < 0.9 * measured[0]
    assert out.quantization == source.quantization
    assert sorted(out.names()) == sorted(source.names())
    assert all(out.stored(name).dtype == source.stored(name).dtype for name in source.names())
    before, after = linears(source), linears(out)
    moved = {name: after[name].codes.int() - before[name].codes.int() for name in before}
    assert 1 == max(int(step.abs().max()) for step in moved.values())
    assert any(not torch.equal(after[name].scales, before[name].scales) for name in before)
    for frozen in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(out.read(frozen), Checkpoint.open(teacher).read(frozen))
    assert not torch.equal(out.read("model.norm.weight"), source.read("model.norm.weight"))


def test_each_linear_keeps_its_own_groups(run: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_model("llama", intermediate_size=320)
    settings = QuantizeSettings(preset="rtn", group_size="auto", device="cpu")
    source = quantize(original, None, settings, tmp_path / "mixed")
    out = run(model=source.path, teacher=str(original), **ENOUGH)
    before, after = linears(source), linears(out)
    assert manifest(out)["best_step"] > 0
    assert out.quantization == source.quantization
    assert {64, 128} == {linear.group_size for linear in before.values()}
    assert {name: linear.group_size for name, linear in before.items()} == {n: each.group_size for n, each in after.items()}
    assert any(not torch.equal(after[name].scales, before[name].scales) for name in before)


def test_codes_stay_if_that_is_wanted(run: Run, quantized: Make) -> None:
    source = quantized()
    out = run(model=source, **{**ENOUGH, "code_rate": 0})
    before, after = linears(Checkpoint.open(source)), linears(out)
    assert all(torch.equal(after[name].codes, before[name].codes) for name in before)
    assert any(not torch.equal(after[name].scales, before[name].scales) for name in before)
    assert manifest(out)["best_step"] > 0


def test_zeros_of_2_4_codes_stay(run: Run, quantized: Make) -> None:
    source = quantized(sparsity="2:4", format="marlin-24")
    before, after = linears(Checkpoint.open(source)), linears(run(model=source, **ENOUGH))
    assert any(not torch.equal(after[name].codes, before[name].codes) for name in before)
    for name in before:
        assert bool((after[name].codes[before[name].codes == 8] == 8).all()), name


@pytest.mark.parametrize("sparse", [False, True])
def test_codes_of_2_4_linears_begin_where_they_stay(sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, codes = torch.randn(16, 64, generator=generator), torch.randint(0, 16, (16, 64), generator=generator)
    codes = torch.where(magnitude(weight), codes, 8) if sparse else codes
    linear = QuantizedLinear(codes.to(torch.uint8), torch.full((16, 2), 0.25).half(), 32)
    model, original = (
        torch.nn.Sequential(ScaledLinear(linear, None, torch.float16)),
        torch.nn.Sequential(torch.nn.Linear(64, 16)),
    )
    original[0].weight.data.copy_(weight)

    free_codes(model, original)
    far = (weight / 0.25 + 8 - codes).abs() > 0.5
    stay = model[0].place[far] == codes[far]
    assert bool(stay.all()) if sparse else not bool(stay.any())


def test_under_fp8_activations_it_learns_what_it_will_read(run: Run, quantized: Make) -> None:
    plain, rounded = quantized(), quantized(activations="fp8")
    first = [dict(manifest(run(m.parent.name, model=m, tokens=128))["held_out_kl"])[0] for m in (plain, rounded)]
    assert first[1] > 1.005 * first[0]
    assert run("again", model=rounded, tokens=128).quantization == Checkpoint.open(rounded).quantization


@pytest.mark.parametrize("stop", [3, 6])
def test_a_killed_run_ends_in_the_same_bytes(run: Run, quantized: Make, stop: int) -> None:
    whole = run("whole", model=quantized())
    with pytest.raises(StopError):
        run("killed", model=quantized(), how={"emit": stop_at(stop)})
    again = run("killed", model=quantized())
    assert sorted(whole.names()) == sorted(again.names())
    assert all(torch.equal(whole.read(name), again.read(name)) for name in whole.names())
    assert manifest(whole)["held_out_kl"] == manifest(again)["held_out_kl"]


def test_what_gets_worse_is_not_kept(run: Run, quantized: Make) -> None:
    source = Checkpoint.open(quantized())
    out = run(model=source.path, rate=0.3, code_rate=0.9)
    facts = manifest(out)
    assert facts["best_step"] == 0 < facts["steps"]
    assert all(torch.equal(out.read(name), source.read(name)) for name in source.names())


def test_what_is_kept_is_the_mean_of_the_states(run: Run, quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    means: list[dict[str, torch.Tensor]] = []
    trainers = []
    real = Trainer._average

    def average(self: Trainer) -> None:
        state = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        before = means[-1] if means else {name: mean.clone() for name, mean in self._mean.items()}
        past = min(0.8, (self.step + 1) / (self.step + 10))
        means.append({name: past * before[name] + (1 - past) * state[name] for name in state})
        trainers.append(self)
        real(self)

    monkeypatch.setattr(Trainer, "_average", average)
    out = run(model=quantized(), **{**ENOUGH, "average": 0.8, "evaluations": 3})
    best = manifest(out)["best_step"]
    assert best > 1
    kept = trainers[0]._trained
    torch.testing.assert_close({name: parameter.detach() for name, parameter in kept.items()}, means[best - 1])
    assert any(not torch.equal(means[best - 1][name], means[best - 2][name]) for name in kept)


def test_a_fault_falls_back_and_is_told(run: Run, quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is no number, in the middle."""
    count, real = 0, _Product.backward

    def broken(context: Any, *gradients: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        x, bias, factor, *others = real(context, *gradients)
        return x, bias, factor * (float("nan") if count > 14 * 2 * 5 else 1), *others

    monkeypatch.setattr(_Product, "backward", staticmethod(broken))
    out = run(model=quantized())
    facts = manifest(out)
    (warning,) = facts["warnings"]
    assert warning.startswith("training stopped (")
    assert f"the state of step {facts['best_step']} is kept" in warning
    assert all(bool(torch.isfinite(linear.dequantize()).all()) for linear in linears(out).values())


def test_a_model_in_16_bits_has_no_codes(run: Run) -> None:
    with pytest.raises(RecipeError, match="`code_rate` means nothing"):
        run(code_rate=0.01)


@pytest.mark.parametrize("kind", [ScaledLinear, TunedLinear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_untrained_it_is_the_quantised_linear(kind: type, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 64), generator=generator, dtype=torch.uint8)
    linear = QuantizedLinear(codes, (0.01 + torch.rand(24, 2, generator=generator)).bfloat16().half(), 32)
    weight = linear.dequantize() + 0.2 * torch.randn(24, 64, generator=generator)
    layer = kind(linear, weight, None, dtype) if kind is TunedLinear else kind(linear, None, dtype)

    assert torch.equal(layer.solved().codes, linear.codes)
    assert torch.equal(layer.solved().scales, linear.scales)
    assert torch.equal(layer(torch.eye(64)), linear.dequantize().T)


@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_is_that_of_the_products(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 32), generator=generator, dtype=torch.uint8)
    linear = QuantizedLinear(codes, (0.01 + torch.rand(8, 2, generator=generator)).half(), 16)
    bias = torch.nn.Parameter(torch.randn(8, generator=generator)) if biased else None
    layer = TunedLinear(linear, linear.dequantize(), bias, torch.float16)
    x, toward = torch.randn(3, 5, 32, generator=generator, requires_grad=True), torch.randn(3, 5, 8, generator=generator)
    y = layer(x)
    y.backward(toward)
    got = [x.grad, layer.offset.grad, layer.factor.grad, *([bias.grad] if bias is not None else [])]

    plain_x, plain_codes = x.detach().clone().requires_grad_(), codes.float().requires_grad_()
    scales = linear.scales.float().requires_grad_()
    plain_bias = None if bias is None else bias.detach().clone().requires_grad_()
    expected = F.linear(plain_x, ((plain_codes - 8).view(8, 2, 16) * scales[..., None]).flatten(1), plain_bias)
    expected.backward(toward)
    torch.testing.assert_close(y, expected)
    assert scales.grad is not None
    wanted = [
        plain_x.grad,
        plain_codes.grad,
        scales.grad * scales.detach(),
        *([plain_bias.grad] if plain_bias is not None else []),
    ]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model_type": "llama", "intermediate_size": 320}, "`intermediate_size` is .* and 320 in its teacher"),
        ({"model_type": "qwen2"}, "`model_type` is llama .* and qwen2 in its teacher"),
    ],
)
def test_a_teacher_of_another_shape(
    run: Run, quantized: Make, tiny_model: Make, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(model=quantized(), teacher=str(tiny_model(**other)))
    assert not (tmp_path / "out").exists()


def test_what_was_left_as_it_is_is_still_told(quantized: Make, teacher: Path) -> None:
    source = Checkpoint.open(quantized(ignore=("down_proj",)))
    settings = FinetuneSettings(teacher=str(teacher))
    facts = pair(source, str(teacher), settings).facts
    assert facts["kept"] == manifest(source)["kept"]
    assert sorted(facts["kept"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert not any("down_proj" in each["name"] for each in facts["linears"])


def test_a_teacher_cannot_write_more_than_it_has_positions_for(run: Run, quantized: Make) -> None:
    with pytest.raises(DataError, match="windows of 4096 tokens are more than the"):
        run(model=quantized(), text=None, sampled=12, seqlen=4096)


def test_a_mixture_of_experts_is_refused_for_what_it_is(run: Run, tiny_model: Make) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = tiny_model("qwen3_moe", **experts)
    with pytest.raises(ModelError, match="is a mixture of experts"):
        run(model=model, teacher=str(model))


@pytest.mark.parametrize("weight", ["kl", "ce", "square_head", "clip"])
def test_weights_are_finite(weight: str) -> None:
    """An infinite one would be written into a manifest that nobody can read."""
    with pytest.raises(ValueError, match="finite"):
        FinetuneSettings(**{weight: float("inf")})
