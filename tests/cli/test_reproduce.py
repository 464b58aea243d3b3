"""`reproduce` from the command line: real runs that pass, a broken one that fails, and what cannot be had."""

import json
from pathlib import Path
from typing import Any

import pytest

from marlin_tools.errors import DeviceError, NumericalError, OutputError
from marlin_tools.evaluation import record
from marlin_tools.events import Event, silent
from marlin_tools.recipe.files import load
from marlin_tools.run import reproduce

MINE = """\
table: mine
source: nobody
shared: [&evaluate {{stage: evaluate, tasks: [{tasks}], limit: 4}}]
rows:
  - name: mine-fp16
    model: demo
    stages: [*evaluate]
    expect: [{{task: "ppl:demo", value: {control}, tolerance: 0.01}}]
  - name: mine-rtn
    model: demo
    control: mine-fp16
    stages: [{{stage: quantize, preset: rtn}}, *evaluate, {{stage: verify}}]
    expect:
      - {{task: "ppl:demo", value: {value}, tolerance: 0.02}}
      - {{task: "ppl:demo", metric: {metric}, value: 9, note: no more}}
"""
FP16, RTN = 1.8096, 1.8240  # of the first four documents


@pytest.fixture
def mine(tmp_path):
    def write(tasks='"ppl:demo"', control=FP16, value=RTN, metric="perplexity"):
        (tmp_path / "mine.yaml").write_text(MINE.format(**locals()), encoding="utf-8")
        return "mine.yaml"

    return write


def verdicts(report):
    return {recipe["name"]: recipe["verdict"] for recipe in json.loads(report)["recipes"]}


def test_what_agrees_passes_and_leaves_a_report_with_its_logs(cli, mine):
    outcome = cli("reproduce", mine())
    home = Path("runs/reproduce/mine")

    assert 0 == outcome.code, outcome.err
    assert outcome.out.endswith("2 PASS\n")
    assert {"report.md", "report.html", "report.json", "mine-fp16.log", "mine-rtn.log"} == {
        path.name for path in home.iterdir()
    }
    assert {"mine-fp16": "PASS", "mine-rtn": "PASS"} == verdicts((home / "report.json").read_text(encoding="utf-8"))
    log = (home / "mine-rtn.log").read_text(encoding="utf-8")
    for word in ("quantize", "blocks 4/4", "evaluate", "verify", "PASS: ppl:demo perplexity"):
        assert word in log
    assert "mine-rtn.log" in (home / "report.html").read_text(encoding="utf-8")
    assert Path("runs/mine-fp16/evaluation.json").is_file()


def test_a_broken_row_fails_by_name_with_exit_code_1(cli, mine):
    outcome = cli("reproduce", mine(value=RTN + 1))

    assert 1 == outcome.code
    assert "1 PASS, 1 FAIL\n" in outcome.out
    (failed,) = [line for line in outcome.out.splitlines() if line.endswith("| FAIL     |")]
    assert failed.startswith("| mine-rtn ")
    assert "mine-rtn: FAIL" in outcome.err


def test_a_control_that_fails_keeps_the_others_from_running(cli, mine):
    outcome = cli("reproduce", mine(control=FP16 + 1))

    assert 1 == outcome.code
    assert "mine-rtn: not run: its control `mine-fp16` does not stand: FAIL\n" in outcome.out
    assert not Path("runs/mine-rtn-int4-g128").exists()


def test_what_is_done_is_not_done_again(cli, mine):
    first = cli("reproduce", mine())
    again = cli("reproduce", mine())

    assert first.out == again.out
    assert 3 == again.err.count("; nothing to do")
    assert 0 == cli("reproduce", mine(), "--overwrite").code


def test_data_that_cannot_be_had_is_not_run_and_never_passes(cli, mine):
    outcome = cli("reproduce", mine(tasks='"ppl:demo", "ppl:wikitext2"'))
    recipes = json.loads(Path("runs/reproduce/mine/report.json").read_text(encoding="utf-8"))["recipes"]

    assert 2 == outcome.code
    assert outcome.out.endswith("\n\n2 not run\n")
    assert "mine-rtn: `ppl:wikitext2` was not run: " in outcome.out
    assert ["PASS", "reported", "not run"] == [finding["verdict"] for finding in recipes[1]["findings"]]
    assert ["ppl:demo"] == recipes[1]["evaluation"]["settings"]["tasks"]


def test_data_that_cannot_be_had_stops_a_run_before_a_model_is_made_for_it(cli):
    made = cli("run", "demo-rtn", "--set", "evaluate.tasks=['ppl:demo', 'ppl:wikitext2']")

    assert 2 == made.code
    assert "cannot be read from the hub" in made.err
    assert not Path("runs").exists()


def test_a_result_that_is_there_is_not_looked_beyond(cli, mine, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(record, "check_data", lambda *_: seen.append(1))
    assert [0, 0, 0] == [cli("run", "demo-rtn", "--set", "evaluate.limit=2", *more).code for more in ((), (), ("--overwrite",))]
    assert [1, 1] == seen


def test_activations_are_those_of_the_model_that_will_be_there(cli, mine, tmp_path):
    file = tmp_path / mine()
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("rtn}, *evaluate", "rtn}, {<<: *evaluate, activations: 16bit}"), encoding="utf-8")
    outcome = cli("reproduce", file)

    assert 0 == outcome.code, outcome.out


def test_a_metric_that_nobody_measured_is_not_run(cli, mine, tmp_path):
    """Which ones a task of questions has, lm-eval knows."""
    file = tmp_path / mine(tasks='"ppl:demo", demo_qa', metric="brier")
    file.write_text(file.read_text(encoding="utf-8").replace('"ppl:demo", metric', "demo_qa, metric"), encoding="utf-8")
    outcome = cli("reproduce", file, "--json")

    assert 2 == outcome.code
    assert "no metric `brier` was measured" == json.loads(outcome.out)["recipes"][1]["findings"][1]["reason"]


def test_a_metric_that_no_text_has_is_refused_before_any_work(cli, mine):
    outcome = cli("reproduce", mine(metric="acc"))

    assert (2, "") == outcome[:2]
    assert "`expect` names metric `acc`, which no text has" in outcome.err
    assert not Path("runs").exists()


def test_a_metric_that_needs_a_baseline_is_refused_without_one(cli, mine):
    outcome = cli("recipes", "validate", mine(metric="kl"))

    assert 2 == outcome.code
    assert "names metric `kl`, and `evaluate` has no `baseline` to measure it by" in outcome.err


def test_where_results_lie_follows_from_the_name(cli, mine, tmp_path):
    file = mine()
    assert 0 == cli("reproduce", file).code
    (tmp_path / file).write_text((tmp_path / file).read_text().replace("preset: rtn", "preset: rtn, ignore: [.*down_proj]"))
    outcome = cli("reproduce", file, "-o", "elsewhere")

    assert 2 == outcome.code
    assert "exists and is not empty; use `--overwrite`, or give the recipe another `name`" in outcome.out
    assert "-o DIR" not in outcome.out


def test_two_runs_do_not_write_into_the_same_logs(cli, mine):
    heard = []

    def second(event):
        if event.kind == "stage" and not heard:
            with pytest.raises(OutputError, match="another run writes its logs to `here`") as caught:
                reproduce.reproduce([mine()], Path("here"))
            heard.append(caught.value.hint)

    reproduce.reproduce([mine()], Path("here"), emit=second)
    assert heard == ["wait for it, or choose another `-o DIR`"]


def test_a_log_is_on_disk_line_by_line(tmp_path):
    with reproduce._log(tmp_path / "x.log", silent) as heard:
        heard(Event("note", "so far"))
        assert (tmp_path / "x.log").read_text(encoding="utf-8").endswith("so far\n")


def test_a_model_that_cannot_be_had_is_not_run_with_its_reason(cli):
    outcome = cli("reproduce", "llama2-13b-marlin")

    assert 2 == outcome.code
    assert (
        "llama2-13b-fp16: not run: `meta-llama/Llama-2-13b-hf` at revision `5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1` is not in"
        in outcome.out
    )
    assert "llama2-13b-marlin: not run: its control `llama2-13b-fp16` does not stand: not run" in outcome.out
    assert "PASS" not in outcome.out
    assert "2 not run\n" in outcome.out


@pytest.mark.parametrize(
    ("error", "told", "code"),
    (
        (NumericalError("`x`: no finite solution"), "FAIL: `x`: no finite solution", 1),
        (DeviceError("`cuda` has 1 GB free", hint="buy"), "not run: `cuda` has 1 GB free; buy", 2),
    ),
)
def test_errors_of_a_run(cli, mine, monkeypatch, error, told, code):
    def execute(planned: Any, emit: Any, *, overwrite: bool) -> Any:
        raise error

    monkeypatch.setattr(reproduce, "execute", execute)
    outcome = cli("reproduce", mine())

    assert code == outcome.code
    assert f"mine-fp16: {told}\n" in outcome.out


def test_a_check_that_fails_is_a_failure(cli, mine, monkeypatch):
    assert 0 == cli("reproduce", mine()).code
    shard = next(Path("runs/mine-rtn-int4-g128").glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    outcome = cli("reproduce", mine())

    assert 1 == outcome.code
    assert "mine-rtn: FAIL: `runs/mine-rtn-int4-g128` fails `hashes`" in outcome.out


def test_two_recipes_of_one_name_are_refused(cli, mine, tmp_path):
    first = mine()
    (tmp_path / "theirs.yaml").write_text((tmp_path / first).read_text().replace("limit: 4", "limit: 2"), encoding="utf-8")
    outcome = cli("reproduce", first, "theirs.yaml", "--dry-run")
    assert 2 == outcome.code
    assert "error: two different recipes are called `mine-fp16`\n" in outcome.err
    assert 0 == cli("reproduce", first, first, "--dry-run").code


def test_overrides_are_told(cli, mine):
    outcome = cli("reproduce", mine(), "--set", "evaluate.limit=2", "-o", "here")

    assert outcome.code in {0, 1}
    assert "Overridden: `evaluate.limit=2`" in Path("here/report.md").read_text(encoding="utf-8")


def test_dry_run_plans_all_rows_and_writes_nothing(cli):
    outcome = cli("reproduce", "llama2-paper", "--dry-run")

    assert 0 == outcome.code
    assert 6 == outcome.out.count("` is `meta-llama/Llama-2-")
    assert 6 == len(json.loads(cli("reproduce", "llama2-paper", "--dry-run", "--json").out))
    assert not Path("runs").exists()


def test_dry_run_refuses_a_place_that_the_run_refuses(cli, mine):
    Path("runs").mkdir()
    Path("runs/mine-rtn-int4-g128").touch()
    outcome = cli("reproduce", mine(), "--dry-run")

    assert (2, "") == outcome[:2]
    assert outcome.err.startswith("error: `runs/mine-rtn-int4-g128` is a file, not a directory\n")


def test_a_pruned_model_lies_where_run_puts_it(cli, tmp_path):
    text = "name: mine\nmodel: demo\nstages: [{stage: prune, preset: magnitude}]\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    planned = [json.loads(cli(verb, "mine.yaml", "--dry-run", "--json").out) for verb in ("run", "reproduce")]
    assert planned[0]["steps"] == planned[1]["mine"]
    assert 0 == cli("reproduce", "mine.yaml").code
    assert (Path(planned[0]["steps"][0]["outputs"][0]) / "config.json").is_file()


def test_dry_run_refuses_a_baseline_that_the_run_refuses(cli, mine, tmp_path):
    file = tmp_path / mine()
    file.write_text(file.read_text(encoding="utf-8").replace("limit: 4", "limit: 4, baseline: nonsense"), encoding="utf-8")
    outcome = cli("reproduce", file, "--dry-run")

    assert (2, "") == outcome[:2]
    assert outcome.err.startswith("error: `nonsense` is no directory, no hub id (owner/name) and no alias\n")


@pytest.mark.parametrize("place", ("file", "file/below"))
def test_a_place_that_cannot_be_written_is_said_before_any_work(cli, place):
    Path("file").touch()
    outcome = cli("reproduce", "demo-rtn", "-o", place)

    assert 2 == outcome.code
    assert outcome.err.startswith(f"error: cannot write `{place}`: ")


@pytest.mark.slow
def test_rows_of_the_embedded_model_pass(cli):
    """For real, as in the file; the other presets run in CI beside the tests."""
    assert all(expected.tolerance for expected in load("demo-rtn").expect)
    outcome = cli("reproduce", "demo-rtn")

    assert 0 == outcome.code, outcome.out
    assert outcome.out.endswith("2 PASS\n")
