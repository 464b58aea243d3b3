"""Trains the embedded demo model from nothing: text, tokenizer, a 4 M parameter Llama, its scores and the training record.

All text is made and tokenized up front by worker processes and lies on the device as one int16 tensor; a batch is a gather of
windows that begin at document starts, so that Python does no work per token. A window is `<s>` document `</s>` document `</s>`
and so on: short windows first, where a story has little before it that could be mistaken for it, full length for the last
fifth of the steps. Weights and optimiser are float32, products bfloat16 on a GPU; what is written is float16.

    python scripts/train_demo.py --out marlin_tools/demo                                  one GPU, some minutes
    python scripts/train_demo.py --out /tmp/demo --device cpu --steps 4 --documents 2000 --batch 2 --items 8     a smoke test

Writes `model/` (a complete Hugging Face directory), `SHA256SUMS` of it, and `training.json`. A tokenizer in `model/` is reused.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import time
from itertools import chain
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo_score import damage_table, read_items
from demo_text import SPLITS, document, documents
from demo_tokenizer import CONTEXT, VOCABULARY, train
from torch import Tensor, nn

BOS, EOS = 1, 2
Tokens = npt.NDArray[np.int16]
CHUNK = 5000  # documents per unit of work


def architecture() -> Any:
    """Every linear has 256, 512 or 768 inputs and outputs, so every kernel and format can hold it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None, dtype="float32",
    )  # fmt: skip


def _encode_chunk(job: tuple[range, str]) -> tuple[Tokens, list[int]]:
    """The tokens of some documents in a row, and the length of each."""
    import sentencepiece

    seeds, model_file = job
    pieces = sentencepiece.SentencePieceProcessor(model_file=model_file)
    rows = [[*pieces.encode(document(seed)), EOS] for seed in seeds]
    return np.array(list(chain.from_iterable(rows)), dtype=np.int16), [len(row) for row in rows]


def make_tokens(model_file: Path, count: int, processes: int) -> tuple[Tensor, Tensor]:
    """The first `count` training documents as one row of tokens, and where each document starts."""
    seeds = SPLITS["train"][:count]
    jobs = [(seeds[start : start + CHUNK], str(model_file)) for start in range(0, count, CHUNK)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        chunks = pool.map(_encode_chunk, jobs, chunksize=1)
    lengths = [length for _, lengths in chunks for length in lengths]
    return torch.from_numpy(np.concatenate([row for row, _ in chunks])), torch.tensor([0, *lengths[:-1]]).cumsum(0)


class Windows:
    """Random training windows. One in four begins with two `<s>`: lm-eval's rolling likelihood adds one to the tokenizer's."""

    def __init__(self, tokens: Tensor, starts: Tensor, seed: int, device: str) -> None:
        self.tokens = tokens.to(device)
        self.starts = starts[starts < len(tokens) - CONTEXT].to(device)
        self.random = torch.Generator(device).manual_seed(seed)
        self.offsets = torch.arange(CONTEXT + 1, device=device)

    def draw(self, batch: int, context: int) -> Tensor:
        """A batch of rows of `context` + 1 tokens."""
        device, offsets = self.tokens.device, self.offsets[: context + 1]
        picks = torch.randint(len(self.starts), (batch, 1), generator=self.random, device=device)
        lead = 1 + (torch.rand(batch, 1, generator=self.random, device=device) < 0.25).long()
        rows = self.tokens[(self.starts[picks] + offsets - lead).clamp_(min=0)].long()
        return rows.masked_fill_(offsets < lead, BOS)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first fiftieth, then a cosine down to nothing."""
    warm = max(1, steps // 50)
    return peak * min((step + 1) / warm, 0.5 * (1 + cos(pi * max(0, step - warm) / max(1, steps - warm))))


def fit(model: nn.Module, windows: Windows, options: argparse.Namespace) -> list[tuple[int, float]]:
    """Train in place; returns (step, loss) about fifty times."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    on_gpu = options.device != "cpu"
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=on_gpu)
    losses, began = [], time.perf_counter()

    def loss_of(rows: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    forward = torch.compile(loss_of, dynamic=False) if on_gpu else loss_of
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        context = CONTEXT // 4 if step < 0.8 * options.steps else CONTEXT
        loss = forward(windows.draw(options.batch * CONTEXT // context, context))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, options.steps // 50) == 0 or step == options.steps - 1:
            losses.append((step, round(float(loss.detach()), 4)))
            print(f"step {step:6}  loss {losses[-1][1]:.4f}  {time.perf_counter() - began:.0f} s", flush=True)
    return losses


def write_model(model: Any, directory: Path) -> None:
    """The weights in float16, with both configurations."""
    model.half().config.dtype = torch.float16
    model.save_pretrained(directory)
    model.float()


def main() -> None:
    """Train, write, score, record."""
    options = parse_options()
    from transformers import AutoTokenizer, LlamaForCausalLM, __version__

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model_dir, began = options.out / "model", time.perf_counter()
    if not (model_dir / "tokenizer.model").is_file():
        train([document(seed) for seed in SPLITS["train"][:6000]], model_dir)
    tokens, starts = make_tokens(model_dir / "tokenizer.model", options.documents, options.processes)
    prepared = time.perf_counter()
    print(f"{len(tokens):,} tokens in {len(starts):,} documents, {prepared - began:.0f} s", flush=True)
    model = LlamaForCausalLM(architecture()).to(options.device)
    losses = fit(model, Windows(tokens, starts, options.seed, options.device), options)
    trained = time.perf_counter()
    write_model(model, model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    items, texts = read_items()[: options.items], list(documents("validation"))[: options.items]
    scores = damage_table(model.eval(), tokenizer, items, texts)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()), "seed": options.seed, "steps": options.steps,
        "batch": options.batch, "context": CONTEXT, "tokens_seen": options.steps * options.batch * CONTEXT,
        "tokens_unique": len(tokens), "documents": len(starts), "peak_learning_rate": options.lr,
        "seconds_text": round(prepared - began, 1), "seconds_training": round(trained - prepared, 1),
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": __version__},
        "scores": scores, "losses": losses,
    }  # fmt: skip
    (options.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    files = sorted((options.out / "model").iterdir())
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  model/{file.name}\n" for file in files)
    (options.out / "SHA256SUMS").write_text(sums, encoding="utf-8")  # what `marlin-tools doctor` looks at
    print(json.dumps({key: record[key] for key in ("seconds_text", "seconds_training", "scores")}, indent=1))


def parse_options() -> argparse.Namespace:
    """The command line; the defaults are those of the bundled model."""
    parser = argparse.ArgumentParser(description="train the embedded demo model")
    parser.add_argument("--out", type=Path, required=True, help="where model/ and training.json go")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=64, help=f"tokens per step, in units of {CONTEXT}")
    parser.add_argument("--documents", type=int, default=800_000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=400, help="how many items of demo_qa and validation documents to score")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
