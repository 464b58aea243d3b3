"""Nothing is put into a finished result: it could not be replaced then. Refused before the work, whatever makes the output."""

from pathlib import Path

import pytest

RULE = "error: `{}` would lie in the result `{}`, which is replaced as a whole\nhint: choose another `-o DIR`\n"
EVALUATING = "name: scores\nmodel: demo\nstages:\n  - {stage: evaluate, tasks: ['ppl:demo'], device: cpu}\n"


@pytest.fixture
def quantize(cli, tiny_llama, tmp_path):
    (tmp_path / "boat.txt").write_text("The boat left the harbour at dawn. " * 80, encoding="utf-8")

    def call(*more):
        return cli("quantize", tiny_llama, "--preset", "rtn", "--calib", "boat.txt", "--seqlen", "32", "--device", "cpu", *more)

    assert 0 == call("-o", "c/ct").code
    return call


def test_every_verb_that_makes_a_model_refuses(cli, quantize, tiny_llama):
    before = sorted(Path("c").rglob("*"))
    for more in ((), ("--dry-run",)):
        assert (2, "", RULE.format("c/ct/sub", "c/ct")) == quantize("-o", "c/ct/sub", *more)
        assert (2, "", RULE.format("c/ct/gptq", "c/ct")) == quantize("-o", "c/ct", "--format", "gptq,marlin", *more)
        learned = quantize("-o", "c/ct", "--learn", "512", "--num-samples", "4", *more)
        assert (2, RULE.format("c/ct/compressed-tensors", "c/ct")) == (learned.code, learned.err)
        pruned = cli("prune", tiny_llama, "--preset", "magnitude", "--device", "cpu", "-o", "c/ct/a/b", *more)
        assert (2, RULE.format("c/ct/a/b", "c/ct")) == (pruned.code, pruned.err)
    exported = cli("export", "c/ct", "--format", "gptq,marlin", "-o", "c/ct")
    assert (2, RULE.format("c/ct/gptq", "c/ct")) == (exported.code, exported.err)
    assert before == sorted(Path("c").rglob("*"))
    assert 0 == quantize("-o", "c/ct", "--overwrite").code


def test_scores_and_reports_of_others_refuse_too(cli, quantize):
    Path("scores.yaml").write_text(EVALUATING, encoding="utf-8")
    before = sorted(Path("c").rglob("*"))
    for out in ("c/ct", "c/ct/scores"):
        told = cli("run", "scores.yaml", "-o", out)
        assert 2 == told.code
        assert told.err.endswith(RULE.format(f"{out}/evaluation.json", "c/ct"))
        for more in ((), ("--dry-run",)):
            told = cli("reproduce", "scores.yaml", "-o", out, *more)
            assert (2, RULE.format(f"{out}/report.html", "c/ct")) == (told.code, told.err)
    assert "MB of weights for each model" in cli("run", "scores.yaml", "--dry-run").out
    assert before == sorted(Path("c").rglob("*"))


def test_pages_and_recipes_refuse_too(cli, quantize, tiny_llama):
    before = sorted(Path("c").rglob("*"))
    told = cli("compare", tiny_llama, "c/ct", "-o", "c/ct/page.html")
    assert (2, "", RULE.format("c/ct/page.html", "c/ct").replace("DIR", "FILE")) == told
    told = cli("recipes", "copy", "demo", "c/ct")
    assert (2, "", RULE.format("c/ct/demo.yaml", "c/ct").replace("choose another `-o DIR`", "name another FILE")) == told
    assert before == sorted(Path("c").rglob("*"))


def test_models_beside_each_other_go_into_one_directory(quantize):
    assert 0 == quantize("-o", "c/several", "--format", "compressed-tensors,gptq").code
    again = quantize("-o", "c/several", "--format", "compressed-tensors,gptq,marlin")
    assert (0, 2) == (again.code, again.err.count("nothing to do"))
    assert 0 == quantize("-o", "c/several/more").code
