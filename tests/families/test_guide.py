"""What outputs are worth, found block by block, is what a backward pass through the whole model finds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from marlin_tools.algorithms.coupled import Worth
from marlin_tools.algorithms.hessian import Hessian
from marlin_tools.checkpoint.output import OutputDirectory
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.guide import Guide
from marlin_tools.data.tokens import TokenSet
from marlin_tools.events import silent
from marlin_tools.stream.inventory import take_linears
from marlin_tools.stream.layer_stream import LayerStream

CPU = torch.device("cpu")


def likeliest(probabilities: Tensor, _count: int, *, generator: torch.Generator) -> Tensor:
    """Instead of a word that is drawn."""
    assert generator.initial_seed() == 0
    return probabilities.argmax(dim=-1, keepdim=True)


def by_the_whole(model: nn.Module, tokens: TokenSet) -> dict[int, tuple[Tensor, Tensor]]:
    """Of every linear, by its module's id: its weight, and the mean of g gᵀ at its outputs."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, _inputs: object, output: object) -> None:
        def add(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2)
            sums = rows.T @ rows / tokens.tokens
            weight: Tensor = module.weight  # type: ignore[assignment]
            found[id(module)] = weight, sums + (found[id(module)][1] if id(module) in found else 0)

        if isinstance(output, Tensor) and output.requires_grad:  # a router may say more than that
            output.register_hook(add)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(watch)
    for sequence in tokens.sequences:
        logits = model(input_ids=sequence[None]).logits[0].float()
        nn.functional.cross_entropy(logits, logits.argmax(dim=-1), reduction="sum").backward()
    return found


def test_worth_is_that_of_the_whole_model(
    made: Callable[[str], Path],
    eager: Callable[[str, Path], nn.Module],
    tokens: TokenSet,
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Checkpoint.open(made(model_type))
    inventory = take_linears(checkpoint, ())
    monkeypatch.setattr(torch, "multinomial", likeliest)
    seen: dict[str, Hessian] = {}
    monkeypatch.setattr(Worth, "of", seen.setdefault)
    guide, output = Guide(inventory, silent), OutputDirectory(tmp_path / "out")

    def stream_of(text: TokenSet, *, with_original: bool = False) -> LayerStream:
        return LayerStream(checkpoint, text, inventory.names, CPU, with_original=with_original)

    with output:
        guide.make(tokens, stream_of, output)
        weights: dict[str, Tensor] = {}
        for block in stream_of(tokens, with_original=True):
            guide.look(block)
            weights |= {name: linear.weight.clone() for name, linear in block.linears().items()}
            for group in block.groups():
                if group.names and group.tokens is None:
                    problem = _Anything()
                    guide.couple(problem, group)  # type: ignore[arg-type]
        output.clear()
    whole = by_the_whole(eager(model_type, checkpoint.path), tokens)
    assert seen
    compared = 0
    for name, gram in seen.items():
        for weight, expected in whole.values():
            if weight.shape == weights[name].shape and torch.equal(weight, weights[name]):
                scale = float(expected.abs().max())
                torch.testing.assert_close(
                    gram.matrix, expected, rtol=0.02, atol=0.01 * scale, msg=lambda m, n=name: f"{n}: {m}"
                )
                compared += scale > 0
    assert set(seen) <= {target.name for target in inventory.targets if target.share == 1}
    assert compared >= len(seen) / 2  # others are parts of a tensor there


class _Anything:
    """Looks like a problem."""

    hessian = aim = solve = slab = print
