"""The two tasks, loaded and scored by lm-eval itself, without a network."""

from pathlib import Path
from typing import Any

import demo_score
import pytest


@pytest.fixture(scope="module")
def tasks(demo: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(demo / "tasks"), include_defaults=False)
    return manager.load(["demo_qa", "demo_text"])["tasks"]


def test_all_items_are_there(tasks: dict[str, Any]) -> None:
    assert len(list(tasks["demo_qa"].test_docs())) == 400
    assert len(list(tasks["demo_text"].test_docs())) == 64


def test_a_request_is_the_prompt_and_one_choice(tasks: dict[str, Any]) -> None:
    task, item = tasks["demo_qa"], demo_score.read_items()[0]
    task.build_all_requests(limit=1)
    assert [(item["prompt"], f" {choice}") for choice in item["choices"]] == [request.args for request in task.instances]


def test_the_folder_can_lie_anywhere(demo: Path, tmp_path: Path) -> None:
    import shutil

    from lm_eval.tasks import TaskManager

    shutil.copytree(demo / "tasks", tmp_path / "elsewhere")
    moved = TaskManager(include_path=str(tmp_path / "elsewhere"), include_defaults=False).load(["demo_qa"])["tasks"]["demo_qa"]
    assert len(list(moved.test_docs())) == 400


def test_lm_eval_and_the_plain_scorer_agree(demo: Path, model: Any, tokenizer: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(demo / "tasks"), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32)
    results = simple_evaluate(lm, tasks=["demo_qa"], task_manager=manager, limit=40, bootstrap_iters=0)["results"]
    assert results["demo_qa"]["acc,none"] == pytest.approx(
        demo_score.accuracy(model, tokenizer, demo_score.read_items()[:40])["accuracy"]
    )
