"""Greedy words inside vLLM beside those of our reference backend in float32: "The same words?" in docs/serving.md.

    python scripts/vllm_words.py DIR TEXT                # needs a GPU, and vLLM beside marlin-tools
    python scripts/vllm_words.py DIR TEXT --dtype bfloat16 --eager
    TORCHINDUCTOR_ENABLE_PDL=1 python scripts/vllm_words.py DIR TEXT

DIR is a quantised model, TEXT a file of running text; prompts of 8 to 300 tokens are cut from it. Prints one line of JSON: how
many answers are alike; where they part, how much likelier, in float32, the word is that vLLM did not take; and how far the
log-probabilities of the prompts are off.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTHS = (300, 300, 200, 200, 150, 40, 20, 8)
"""Tokens of the prompts, over and over."""


def cut(ids: Sequence[int], prompts: int) -> list[list[int]]:
    """Prompts from successive places of a text."""
    step = len(ids) // prompts
    if step < max(LENGTHS):
        raise SystemExit(f"the text has {len(ids)} tokens, {prompts} prompts need {prompts * max(LENGTHS)}")
    return [list(ids[i * step : i * step + LENGTHS[i % len(LENGTHS)]]) for i in range(prompts)]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two answers part; None if one is how the other begins."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


class Reference:
    """The dequantised model in float32."""

    def __init__(self, folder: str) -> None:
        import torch

        import marlin_tools

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = marlin_tools.load(folder, dtype=torch.float32, device=self._device, backend="reference")

    def scores(self, ids: Sequence[int]) -> Any:
        """Log-probabilities of every word behind every token [tokens, words]."""
        with self._torch.no_grad():
            return self._model(self._torch.tensor([list(ids)], device=self._device)).logits[0].float().log_softmax(-1)

    def answer(self, ids: Sequence[int], new: int) -> list[int]:
        """Greedy words; fewer than `new` if one of them ends the text."""
        made = self._model.generate(self._torch.tensor([list(ids)], device=self._device), max_new_tokens=new, do_sample=False)
        return list(made[0, len(ids) :].tolist())


def ask_vllm(
    folder: str, prompts: list[list[int]], new: int, dtype: str, *, eager: bool
) -> list[tuple[list[int], list[float]]]:
    """Greedy words, and the log-probability of each token of the prompt but the first."""
    from vllm import LLM, SamplingParams

    longest = max(LENGTHS) + new
    engine = LLM(folder, dtype=dtype, max_model_len=longest, gpu_memory_utilization=0.3, enforce_eager=eager)
    how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=0)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
    found = []
    for ids, answer in zip(prompts, answers, strict=True):
        told = [told[token].logprob for told, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
        found.append((list(answer.outputs[0].token_ids), told))
    return found


def main() -> int:
    """Both, beside each other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("text", metavar="TEXT", type=Path)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="words of each answer")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(asked.folder)(asked.text.read_text(encoding="utf-8")).input_ids
    prompts = cut(ids, asked.prompts)
    served = ask_vllm(asked.folder, prompts, asked.new, asked.dtype, eager=asked.eager)
    reference = Reference(asked.folder)
    ties, off = [], []
    for prompt, (words, told) in zip(prompts, served, strict=True):
        exact = reference.answer(prompt, asked.new)
        parted = first_difference(exact, words)
        if parted is not None:
            scores = reference.scores([*prompt, *exact[:parted]])[-1]
            ties.append(round(float(scores[exact[parted]] - scores[words[parted]]), 4))
        scores = reference.scores(prompt)
        off += [abs(float(scores[i, token]) - value) for i, (token, value) in enumerate(zip(prompt[1:], told, strict=True))]
    print(
        json.dumps(
            {
                "dtype": asked.dtype,
                "eager": asked.eager,
                "alike": len(prompts) - len(ties),
                "of": len(prompts),
                "ties": ties,
                "log-probabilities off, mean": round(sum(off) / len(off), 5),
                "most": round(max(off), 4),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
