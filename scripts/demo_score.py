"""How well the demo model knows its world: accuracy on `demo_qa`, perplexity on held-out documents, and what compression costs.

The scores need no evaluation library: a choice is scored by the log-likelihood of its tokens after the prompt, as `acc` of
lm-eval does. The damage functions are the plainest forms of three compressions; they say how much there is to lose, and hence
how much a good method can save.

    python scripts/demo_score.py       prints one line per compression of marlin_tools/demo/model
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from demo_text import DEMO, documents
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 1024
BATCH = 64


def _log_likelihoods(model: nn.Module, rows: list[list[int]]) -> Iterator[Tensor]:
    """For each row of tokens, the log-probability of every token but the first."""
    device = next(model.parameters()).device
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long, device=device)
        for n, row in enumerate(batch):
            ids[n, : len(row)] = torch.tensor(row)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        scores = F.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        yield from (scores[n, : len(row) - 1] for n, row in enumerate(batch))


@torch.inference_mode()
def accuracy(model: nn.Module, tokenizer: Any, items: list[dict[str, Any]]) -> dict[str, float]:
    """Share of items whose right answer is the likeliest of the four: of all, of memory (`recall`) and of reading (`read`)."""
    rows = [tokenizer.encode(f"{item['prompt']} {choice}") for item in items for choice in item["choices"]]
    tails = [len(tokenizer.encode(item["prompt"])) - 1 for item in items for _ in item["choices"]]
    scores = [float(score[tail:].sum()) for score, tail in zip(_log_likelihoods(model, rows), tails, strict=True)]
    chosen = torch.tensor(scores).view(-1, 4).argmax(1).tolist()
    right = [(item["kind"].split()[0], pick == item["answer"]) for item, pick in zip(items, chosen, strict=True)]
    hits = {"accuracy": [hit for _, hit in right]}
    hits |= {want: [hit for kind, hit in right if kind == want] for want in ("recall", "read")}
    return {name: sum(each) / len(each) for name, each in hits.items()}


@torch.inference_mode()
def perplexity(model: nn.Module, tokenizer: Any, texts: list[str]) -> float:
    """Perplexity per token; every document starts afresh."""
    rows = [tokenizer.encode(text)[:WINDOW] for text in texts]
    scores = torch.cat(list(_log_likelihoods(model, rows)))
    return float(scores.double().mean().neg().exp())


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the decoder blocks, which is what gets compressed."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head")


def round_to_int4(weight: Tensor) -> Tensor:
    """Nearest of 16 levels, one absmax scale per row and group of 128."""
    groups = weight.view(weight.shape[0], -1, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def keep_two_of_four(weight: Tensor, importance: Tensor) -> Tensor:
    """Zero the two least important of every four consecutive weights of a row."""
    best = importance.view(-1, 4).topk(2, dim=1).indices
    return weight * torch.zeros_like(weight).view(-1, 4).scatter_(1, best, 1.0).view_as(weight)


@torch.inference_mode()
def input_norms(model: nn.Module, tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Per linear, the root of the summed squares of each input over a text: what a weight's importance is scaled with."""
    norms: dict[str, Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: norms.__setitem__(name, args[0].flatten(0, 1).norm(dim=0)))
        for name, linear in linears(model)
    ]
    tokens = [token for text in texts for token in tokenizer.encode(text)]
    windows = torch.tensor(tokens[: len(tokens) // WINDOW * WINDOW], device=next(model.parameters()).device).view(-1, WINDOW)
    model(input_ids=windows[:16], use_cache=False)
    for hook in hooks:
        hook.remove()
    return norms


Scores = dict[str, dict[str, float]]


@torch.inference_mode()
def damage_table(model: nn.Module, tokenizer: Any, items: list[dict[str, Any]], texts: list[str]) -> Scores:
    """Accuracy on items and perplexity on texts, of the model as it is and after each plain compression; changes nothing."""
    norms = input_norms(model, tokenizer, list(documents("calibration")))
    original = {name: linear.weight.clone() for name, linear in linears(model)}
    compressions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fp16": lambda w, _: w,
        "int4 round to nearest": lambda w, _: round_to_int4(w),
        "2:4 by magnitude": lambda w, _: keep_two_of_four(w, w.abs()),
        "2:4 by magnitude and input": lambda w, norm: keep_two_of_four(w, w.abs() * norm),
    }
    table = {}
    for label, compress in compressions.items():
        for name, linear in linears(model):
            linear.weight.copy_(compress(original[name], norms[name]))
        scores = {**accuracy(model, tokenizer, items), "perplexity": perplexity(model, tokenizer, texts)}
        table[label] = {name: round(value, 4) for name, value in scores.items()}
    for name, linear in linears(model):
        linear.weight.copy_(original[name])
    return table


def read_items() -> list[dict[str, Any]]:
    """The rows of `demo_qa`."""
    rows = DEMO / "tasks" / "demo_qa.jsonl"
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Score the bundled model in float32 arithmetic on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    for label, scores in damage_table(model, tokenizer, read_items(), list(documents("validation"))).items():
        print(f"{label:28}", *(f"{name} {value:.4f}" for name, value in scores.items()), sep="  ")


if __name__ == "__main__":
    main()
