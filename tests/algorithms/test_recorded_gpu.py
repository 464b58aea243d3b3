"""What a recording gives is what the usual way gives, bit for bit, and what it cannot solve is solved in the usual way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, recorded
from marlin_tools.algorithms.hessian import Gram, Hessian
from marlin_tools.algorithms.recorded import Recordings
from marlin_tools.algorithms.solution import Solution, solve_all
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import NumericalError

pytestmark = pytest.mark.gpu

Asked = tuple[str, Tensor, Hessian]

DTYPE = torch.float16


def case(seed: int, n: int = 384, k: int = 512) -> Asked:
    """One weight, and the Hessian of inputs, few or many, of which some are silent and some loud."""
    torch.manual_seed(seed)
    x = torch.randn((1024, 200)[seed % 2], k, device="cuda") * torch.rand(k, device="cuda").exp2()
    x[:, seed] = 0
    gram = Gram(k, torch.device("cuda"))
    gram.add(x.to(DTYPE))
    return f"expert {seed}", torch.randn(n, k, device="cuda", dtype=DTYPE) / 50, gram.hessian()


def usual(settings: GPTQ, each: Asked, group: int = 128) -> Solution:
    name, weight, hessian = each
    return solve_all(settings.problem(name, hessian, group, DTYPE), weight)


def assert_same(found: Solution, expected: Solution) -> None:
    assert found.damp == expected.damp
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("preset", ["default", "fast", "marlin"])
@pytest.mark.parametrize("group", [64, 128])
def test_recordings_give_the_same(preset: str, group: int) -> None:
    settings = PRESETS[preset]
    assert isinstance(settings, GPTQ)
    recordings = Recordings(settings, DTYPE)
    for n, k in ((384, 512), (512, 256), (384, 512)):  # the last ones are recorded already
        asked = [case(seed, n, k) for seed in range(11)]
        expected = [usual(settings, each, group) for each in asked]
        for found, each in zip(recordings.solve(asked, group), expected, strict=True):
            assert_same(found, each)


def test_one_that_needs_more_damping_is_solved_in_the_usual_way() -> None:
    settings = GPTQ()
    asked = [case(seed) for seed in range(6)]
    name, weight, hessian = asked[2]
    bent = hessian.matrix - 0.5 * hessian.diagonal.mean() * torch.eye(len(hessian.matrix), device="cuda")
    asked[2] = (name, weight, Hessian(bent, hessian.tokens))
    found, expected = Recordings(settings, DTYPE).solve(asked, 128), [usual(settings, each) for each in asked]
    assert found[2].damp != settings.damp
    for pair in zip(found, expected, strict=True):
        assert_same(*pair)


def test_what_nobody_can_solve_is_named() -> None:
    asked = [case(seed) for seed in range(6)]
    name, weight, hessian = asked[4]
    asked[4] = (name, weight, Hessian(hessian.matrix * torch.nan, hessian.tokens))
    with pytest.raises(NumericalError, match="`expert 4`: the calibration activations are not finite"):
        Recordings(GPTQ(), DTYPE).solve(asked, 128)


def test_memory_that_is_given_back_at_once_holds_nothing_of_the_next() -> None:
    """Weights and Hessians that nobody keeps while recordings still read them."""
    settings = GPTQ()
    recordings = Recordings(settings, DTYPE)
    expected = [usual(settings, case(seed)) for seed in range(9)]
    found = []
    for start in range(0, 9, 3):
        found += recordings.solve([case(seed) for seed in range(start, start + 3)], 128)
        torch.full((1 << 24,), torch.nan, device="cuda")
    for pair in zip(found, expected, strict=True):
        assert_same(*pair)


def test_a_mixture_comes_out_the_same(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixture = tiny_model("qwen3_moe", num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1, **sizes)
    generator = torch.Generator().manual_seed(0)
    text = TokenSet(tuple(torch.randint(2, 512, (8, 64), generator=generator)), "random", packed=True, documents=1)
    played = []
    play = recorded._Recording.play
    monkeypatch.setattr(recorded._Recording, "play", lambda *given: [played.append(1), play(*given)][1])
    for name in ("recorded", "usual"):
        quantize(mixture, text, QuantizeSettings(device="cuda"), tmp_path / name)
        monkeypatch.setattr(recorded, "SMALL", 0)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("recorded", "usual")
    )
    assert one == other
    assert len(played) == 2 * 2 * 6  # blocks, steps and experts
