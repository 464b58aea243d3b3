"""A tiny model, its round-to-nearest twin, a text, and folders of lm-eval tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate

QUESTIONS = [
    {
        "question": f"Who saw {fish} off the point?",
        "choices": ["The skipper", "Nine", "A boat at dawn", "Them"],
        "answer": n % 4,
    }
    for n, fish in enumerate("marlins cod eels hake ling pike rays sole tuna whiting".split())
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 3.0}}
"""


@pytest.fixture(scope="session")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def int4(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` quantised by rounding."""
    out = tmp_path_factory.mktemp("int4") / "model"
    quantize(model, None, QuantizeSettings(preset="rtn", device="cpu"), out)
    return out


@pytest.fixture
def closing(tiny_llama: Path) -> Path:
    """`model`, with a tokenizer that puts an EOS behind each text."""
    file = tiny_llama / "tokenizer.json"
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    rule = {"type": "TemplateProcessing", "single": single, "pair": single}
    content = json.loads(file.read_text())
    number = next(token["id"] for token in content["added_tokens"] if token["content"] == "</s>")
    rule["special_tokens"] = {"</s>": {"id": "</s>", "ids": [number], "tokens": ["</s>"]}}
    file.write_text(json.dumps(content | {"post_processor": rule}))
    return tiny_llama


@pytest.fixture
def text(tmp_path: Path) -> str:
    """`ppl:FILE` of a text that is 11 windows of 32 tokens long, and a bit."""
    path = tmp_path / "held.txt"
    path.write_text("".join(f"Line {n}: the skipper counted {n * n} of them off the point.\n" for n in range(20)))
    return f"ppl:{path}"


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """`write_task("name", rows)`: a folder with a task whose data file is named relative to its YAML file."""

    def write(name: str, rows: list[dict[str, Any]] = QUESTIONS, folder: str = "tasks") -> Path:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / f"{name}.yaml").write_text(TASK.format(name=name, file=f"{name}.jsonl"))
        return path

    return write


@pytest.fixture
def run() -> Callable[..., Any]:
    """`run(model, *tasks, baseline=..., emit=..., any=setting)` on the CPU."""

    def start(model: Path, *tasks: str, baseline: Path | None = None, emit: Any = None, **settings: Any) -> Any:
        chosen = EvaluateSettings(tasks=tasks, device="cpu", **settings)
        return evaluate(model, chosen, baseline=baseline, **({"emit": emit} if emit else {}))

    return start
