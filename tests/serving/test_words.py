"""`scripts/vllm_words.py`: what it makes of an engine's answers, told by a model of four words."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "vllm_words.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("vllm_words", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LENGTHS", (3, 2))
    return module


def scores(ids):
    """Behind word n comes n + 1, a little likelier than n + 2."""
    found = torch.full((len(ids), 4), -9.0)
    for i, word in enumerate(ids):
        found[i, (word + 1) % 4], found[i, (word + 2) % 4] = -0.5, -0.75
    return found


def answer(ids, new):
    return [(ids[-1] + 1 + i) % 4 for i in range(new)]


def engine(of):
    """A stand-in of vLLM that answers `of` prompt number i."""

    class LLM:
        def __init__(self, *_args, **_settings):
            pass

        def generate(self, asked, how, **_settings):
            made = []
            for number, prompt in enumerate(asked):
                ids = prompt["prompt_token_ids"]
                told = [None, *({word: SimpleNamespace(logprob=-0.5 - 0.25 * number)} for word in ids[1:])]
                words = of(number, ids, how.max_tokens)
                made.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=words)], prompt_logprobs=told))
            return made

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace
    return module


def test_answers_are_compared_word_by_word(script, monkeypatch, tmp_path, capsys):
    def of(number, ids, new):
        words = answer(ids, new)
        return words if number else [*words[:2], (words[2] + 1) % 4, 0]

    ids = [0, 1, 2, 3, 0, 1, 2, 3]
    tokenizer = SimpleNamespace(from_pretrained=lambda _folder: lambda _text: SimpleNamespace(input_ids=ids))
    monkeypatch.setitem(sys.modules, "vllm", engine(of))
    monkeypatch.setattr("transformers.AutoTokenizer", tokenizer)
    monkeypatch.setattr(script, "Reference", lambda _folder: SimpleNamespace(scores=scores, answer=answer))
    (tmp_path / "text").write_text("text")
    monkeypatch.setattr(sys, "argv", ["vllm_words.py", "model", str(tmp_path / "text"), "--prompts", "2", "--new", "4"])

    assert 0 == script.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["alike"], found["of"], found["ties"]) == (1, 2, [0.25])
    assert found["log-probabilities off, mean"] == pytest.approx(0.25 / 3, abs=1e-5)  # two tokens right, one of the second off
    assert found["most"] == 0.25


def test_a_short_text_is_refused(script):
    assert script.cut(range(8), 2) == [[0, 1, 2], [4, 5]]
    with pytest.raises(SystemExit, match="the text has 8 tokens, 3 prompts need 9"):
        script.cut(range(8), 3)


def test_an_answer_that_ends_early_parts_nowhere(script):
    assert script.first_difference([1, 2], [1, 2, 3]) is None
    assert script.first_difference([1, 2, 3], [1, 3, 3]) == 1
