"""The embedded model: small, of shapes that every kernel holds, and right often enough that damage shows."""

import json
from pathlib import Path
from typing import Any

import demo_score
import pytest
import torch
from safetensors import safe_open

EDGE_TEXTS = ["Hello wörld!\n\n x  y 日本", "  lead", "a\tb", " trailing ", "", "ABC 1234 zq", "</ s>", "▁"]


def test_the_folder_is_small(demo: Path) -> None:
    assert (
        sum(file.stat().st_size for file in demo.rglob("*") if file.is_file() and "__pycache__" not in file.parts) <= 9_000_000
    )


def test_weights_are_float16_of_legal_shapes_and_tied(demo: Path) -> None:
    config = json.loads((demo / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"] is True
    with safe_open(demo / "model" / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        tensors = {name: weights.get_tensor(name) for name in names}
    assert "lm_head.weight" not in names
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    linears = {name: tensor.shape for name, tensor in tensors.items() if "proj" in name}
    assert len(linears) == 7 * config["num_hidden_layers"]
    assert all(rows % 256 == 0 and columns % 128 == 0 for rows, columns in linears.values())


def test_both_tokenizer_files_give_the_same_tokens(demo: Path, tokenizer: Any) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(demo / "model" / "tokenizer.model"))
    for text in [*demo_score.documents("text"), *EDGE_TEXTS[:-1]]:
        assert [tokenizer.bos_token_id, *pieces.encode(text)] == tokenizer.encode(text), text


def test_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in [*demo_score.documents("text"), *EDGE_TEXTS[:-1]]:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens(tokenizer: Any) -> None:
    assert (0, 1, 2) == (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == 1024


@pytest.fixture(scope="module")
def sample() -> list[dict[str, Any]]:
    return demo_score.read_items()[:100]


def test_the_model_answers_at_least_85_percent(model: Any, tokenizer: Any, sample: list[dict[str, Any]]) -> None:
    scores = demo_score.accuracy(model, tokenizer, sample)
    assert scores["accuracy"] >= 0.85, scores


def test_dropping_half_of_the_weights_costs_at_least_10_points(
    model: Any, tokenizer: Any, sample: list[dict[str, Any]]
) -> None:
    whole = demo_score.accuracy(model, tokenizer, sample)["accuracy"]
    original = {name: linear.weight.detach().clone() for name, linear in demo_score.linears(model)}
    with torch.inference_mode():
        for name, linear in demo_score.linears(model):
            linear.weight.copy_(demo_score.keep_two_of_four(original[name], original[name].abs()))
        halved = demo_score.accuracy(model, tokenizer, sample)["accuracy"]
        for name, linear in demo_score.linears(model):
            linear.weight.copy_(original[name])
    assert halved <= whole - 0.10, (whole, halved)


def test_the_record_is_of_this_model(demo: Path, model: Any) -> None:
    record = json.loads((demo / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["losses"][-1][0] == record["steps"] - 1
    assert record["losses"][-1][1] < record["losses"][0][1] / 5


def test_two_of_four_keeps_the_two_largest() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 5.0, -6.0, 1.0]])
    assert torch.equal(demo_score.keep_two_of_four(weight, weight.abs()), torch.tensor([[0, -4.0, 3.0, 0, 0, 5.0, -6.0, 0]]))


def test_int4_has_sixteen_levels_per_group() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    rounded = demo_score.round_to_int4(weight)
    assert all(len(row.unique()) <= 16 for row in rounded.view(-1, 128))
    scale = weight.view(-1, 128).abs().amax(1) / 7.5
    assert bool(((rounded - weight).view(-1, 128).abs() <= scale[:, None] / 2 + 1e-6).all())
