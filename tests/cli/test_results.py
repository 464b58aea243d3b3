"""The verbs on a tiny model, end to end: what they print, what they leave behind, what they do again and what not."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from marlin_tools.cli import main, ui
from marlin_tools.evaluation.scores import COLUMNS
from marlin_tools.formats import FORMATS

TEXT = "The boat left the harbour at dawn, and nine marlins were seen off the point. "
FEW = ("--num-samples", "4", "--seqlen", "64")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "boat.txt"
    file.write_text(TEXT * 80, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def made(model, text, tmp_path_factory):
    """A quantised model, made once."""
    out = tmp_path_factory.mktemp("made") / "int4"
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", str(model), "--preset", "fast", "--calib", str(text), *FEW, "-o", str(out)])
    assert 0 == exit_.value.code
    return out


@pytest.fixture
def int4(cli, made):
    """The test's own copy, in `int4/`."""
    return Path(shutil.copytree(made, "int4"))


def _content(folder):
    """Every file of a result; of manifest.json all but the times, of report.html all but the section that shows them."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    before, _, rest = files["report.html"].partition(b"<!-- times -->")
    files["report.html"] = before + rest.partition(b"<!-- /times -->")[2]
    assert files["report.html"].endswith(b"</html>\n")
    return files, {key: value for key, value in manifest.items() if key != "times"}


@pytest.mark.slow
def test_chain(cli, model, text, int4):
    """Quantize -> eval -> export -> verify -> inspect -> generate."""
    evaluated = cli("eval", int4, "--tasks", f"ppl:{text}", "--seqlen", "64", "--baseline", model)
    assert 0 == evaluated.code, evaluated.err
    header, _, perplexity, kl, top1 = (line.strip("| ").split("|") for line in evaluated.out.splitlines())
    assert list(COLUMNS) == [cell.strip() for cell in header]
    assert ["perplexity", "kl", "top1"] == [row[1].strip() for row in (perplexity, kl, top1)]

    exported = cli("export", int4, "--format", "gptq,marlin", "-o", "others")
    assert (0, "others/gptq\nothers/marlin\n") == exported[:2], exported.err
    for directory in ("int4", "others/gptq", "others/marlin"):
        verified = cli("verify", directory)
        assert 0 == verified.code, verified.out
        assert f"{directory}\n| check " in verified.out
        assert (Path(directory) / "recipe.yaml").is_file()

    inspected = cli("inspect", "others/gptq")
    assert (0, "") == (inspected.code, inspected.err)
    assert "14 quantised, 0 kept" in inspected.out

    written = cli("generate", "others/marlin", "--prompt", "The boat")
    assert 0 == written.code
    assert len(written.out) > 1


def test_recipe_in_the_result_makes_it_again(cli, int4):
    outcome = cli("run", "int4/recipe.yaml", "-o", "again")

    assert (0, "again\n") == outcome[:2], outcome.err
    assert _content(Path("int4")) == _content(Path("again"))


def test_finished_result_is_kept(cli, model, text, int4):
    before = (int4 / "config.json").stat().st_mtime_ns
    arguments = ("quantize", model, "--preset", "fast", "--calib", text, *FEW, "-o", "int4")
    outcome = cli(*arguments)

    assert (0, "int4\n") == outcome[:2]
    assert "`int4` already holds this result; nothing to do" in outcome.err
    assert before == (int4 / "config.json").stat().st_mtime_ns
    assert 0 == cli(*arguments, "--overwrite").code
    assert before != (int4 / "config.json").stat().st_mtime_ns


def test_other_settings_do_not_replace_a_result(cli, model, text, int4):
    outcome = cli("quantize", model, "--preset", "rtn", "-o", "int4")

    assert 2 == outcome.code
    assert "error: `int4` exists and is not empty\nhint: use `--overwrite`, or another `-o DIR`\n" in outcome.err


@contextmanager
def interrupted(monkeypatch):
    """Within, a run is interrupted when it has finished its first block."""
    show = ui.Display.__call__

    def interrupt(display, event):
        show(display, event)
        if event.kind == "progress" and event.text == "blocks" and event.done == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ui.Display, "__call__", interrupt)
        yield


@pytest.mark.parametrize("other", (("--damp", "0.5"), ("--seed", "1"), ("--num-samples", "3"), ("--seqlen", "32")))
def test_other_settings_are_refused_before_the_text_is_read(cli, model, text, int4, other):
    outcome = cli("quantize", model, "--preset", "fast", "--calib", text, *FEW, "-o", "int4", *other)

    assert 2 == outcome.code
    assert "error: `int4` exists and is not empty\n" in outcome.err
    assert "calibrate\n" not in outcome.err


def test_interrupted_run_goes_on_and_ends_in_the_same_bytes(cli, model, text, int4, monkeypatch):
    arguments = ("quantize", model, "--preset", "fast", "--calib", text, *FEW, "-o", "late")
    with interrupted(monkeypatch):
        stopped = cli(*arguments)
    assert 130 == stopped.code
    assert stopped.err.endswith("error: interrupted\nhint: run the same command again: what is finished is kept\n")
    assert not Path("late").exists()

    went_on = cli(*arguments)
    assert (0, "late\n") == went_on[:2]
    assert not Path("late.partial").exists()
    (files, manifest), (expected_files, expected) = _content(Path("late")), _content(int4)
    assert expected_files == files
    assert expected == manifest


@pytest.mark.parametrize("other", (("--damp", "0.5"), ("--seed", "1"), ("--num-samples", "3"), ("--preset", "marlin")))
def test_an_unfinished_run_of_other_settings_is_refused_before_the_text_is_read(cli, model, text, monkeypatch, other):
    arguments = ("quantize", model, "--preset", "fast", "--calib", text, *FEW, "-o", "late")
    with interrupted(monkeypatch):
        assert 130 == cli(*arguments).code
    outcome = cli(*arguments, *other)

    assert 2 == outcome.code
    assert "error: `late.partial` holds an unfinished run with another model, calibration or settings\n" in outcome.err
    assert "calibrate\n" not in outcome.err
    assert 0 == cli(*arguments).code
    assert 0 == cli(*arguments[:-1], "again", *other).code


def test_finetuning_with_other_settings_is_refused_before_the_text_is_read(cli, model, text, int4):
    learning = ("--tokens", "256", "--batch", "2", "--micro", "2")
    few = ("--num-samples", "12", "--seqlen", "16")
    arguments = ("finetune", int4, "--teacher", model, "--calib", text, *few, *learning, "-o", "tuned")
    assert 0 == cli(*arguments).code
    assert "`tuned` already holds this result" in cli(*arguments, "--code-rate", "0.01").err
    for other in (("--rate", "0.5", "--batch", "4"), ("--seed", "1"), ("--num-samples", "11")):
        outcome = cli(*arguments, *other)
        assert 2 == outcome.code
        assert "error: `tuned` exists and is not empty\n" in outcome.err
        assert "calibrate\n" not in outcome.err


RECIPE = """\
name: small
model: {model}
stages:
  - {{stage: quantize, preset: rtn}}
  - {{stage: export, formats: [gptq]}}
  - {{stage: evaluate, tasks: ["ppl:{text}"], seqlen: 64, limit: 2, baseline: {model}}}
  - {{stage: verify}}
"""


@pytest.fixture
def recipe(model, text, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.format(model=model, text=text), encoding="utf-8")
    return file


@pytest.mark.slow
def test_run_keeps_what_is_done_and_redoes_what_is_asked_for(cli, recipe):
    home = Path("runs/small-int4-g128")
    first = cli("run", recipe)
    assert 0 == first.code, first.err
    assert f"| {home}/compressed-tensors | 8 passed, 1 skipped " in first.out
    assert first.err.endswith(f"hint: serve it with vLLM: vllm serve {home}/gptq\n")
    evaluation = home / "compressed-tensors" / "evaluation.json"
    measured = evaluation.read_bytes()
    made = _content(home / "gptq")

    again = cli("run", recipe)
    assert (0, first.out) == again[:2]
    assert 3 == again.err.count("; nothing to do")

    evaluation.unlink()
    weights = (home / "gptq" / "config.json").stat().st_mtime_ns
    last = cli("run", recipe, "--from", "evaluate")
    assert (0, first.out) == last[:2]
    assert "quantize\n" not in last.err
    assert measured == evaluation.read_bytes()
    assert weights == (home / "gptq" / "config.json").stat().st_mtime_ns
    assert 0 == cli("run", recipe, "--from", "export").code
    assert weights != (home / "gptq" / "config.json").stat().st_mtime_ns
    assert made == _content(home / "gptq")

    other = cli("run", recipe, "--set", "quantize.ignore=[down]", "--from", "evaluate")
    assert 2 == other.code
    assert f"error: `{home}/compressed-tensors` was made with other settings\n" in other.err


@pytest.mark.parametrize(
    ("setting", "told"),
    (
        ("evaluate.tasks=['ppl:nothing.txt']", "`ppl:nothing.txt`: no such file or evaluation text"),
        ("evaluate.tasks=[nothing]", "unknown task `nothing`"),
        ("evaluate.baseline=./nothing", "there is no directory `./nothing`"),
        ("evaluate.device=cuda:77", "device `cuda:77` does not exist"),
        ("evaluate.seqlen=1000000", "window length 1000000 is more than"),
        (
            "evaluate={stage: evaluate, tasks: [demo_qa], backend: vllm, device: cpu}",
            "backend `vllm` computes on the first GPU",
        ),
    ),
)
def test_what_could_not_be_measured_is_told_before_a_model_is_made(cli, recipe, setting, told):
    outcome = cli("run", recipe, "--set", setting)

    assert 2 == outcome.code
    assert f"error: {told}" in outcome.err
    assert not Path("runs").exists()


def test_each_verified_directory_is_charged_for_its_own_check(cli, model, monkeypatch):
    charged = []
    monkeypatch.setattr("marlin_tools.stage.record_stage", lambda path, stage, _cost: charged.append((path.name, stage)))
    stages = "[{stage: quantize, preset: rtn, format: gptq}, {stage: export, formats: [marlin]}, {stage: verify}]"
    Path("two.yaml").write_text(f"name: two\nmodel: {model}\nstages: {stages}\n", encoding="utf-8")

    assert 0 == cli("run", "two.yaml").code
    assert [("gptq", "verify"), ("marlin", "verify")] == [each for each in charged if each[1] == "verify"]


def test_verify_fails_on_a_damaged_file(cli, int4):
    shard = next(int4.glob("model-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    outcome = cli("verify", int4)

    assert 1 == outcome.code
    assert "| hashes" in outcome.out
    assert "FAILED" in outcome.out


def test_verify_is_strict_about_what_was_skipped_if_asked(cli, model):
    assert 0 == cli("quantize", model, "--preset", "rtn", "-o", "rounded").code
    plain, strict = cli("verify", "rounded"), cli("verify", "rounded", "--strict", "--json")

    assert (0, 1) == (plain.code, strict.code)
    assert "checks: 8 passed, 1 skipped\n" in plain.err
    assert 1 == json.loads(strict.out)["verification"]["rounded"]["skipped"]


def test_eval_takes_the_newest_run(cli, model, text):
    for preset in ("rtn", "fast"):
        assert 0 == cli("quantize", model, "--preset", preset, "--calib", text, *FEW).code
    outcome = cli("eval", "--tasks", f"ppl:{text}", "--seqlen", "64", "--limit", "1")

    assert 0 == outcome.code
    assert f"evaluating `runs/{model.name}-fast-int4-g128`, the newest model under runs/\n" in outcome.err
    assert Path(f"runs/{model.name}-fast-int4-g128/evaluation.json").is_file()
    assert not Path(f"runs/{model.name}-rtn-int4-g128/evaluation.json").exists()


def test_dry_run_says_much_and_does_nothing(cli, model, text):
    before = set(Path().rglob("*"))
    arguments = (
        "quantize",
        model,
        "--calib",
        text,
        *FEW,
        "--ignore",
        r"layers\.1\..*down_proj",
        "--format",
        "gptq,marlin",
        "--dry-run",
    )
    outcome = cli(*arguments)

    assert 0 == outcome.code, outcome.err
    assert before == set(Path().rglob("*"))
    home = f"runs/{model.name}-default-gptq-marlin-int4-g128"
    assert f"quantize {model} -> {home}/gptq\n" in outcome.out
    assert f"export {home}/gptq -> {home}/marlin\n" in outcome.out
    facts = json.loads(cli(*arguments, "--json").out)["steps"][0]["facts"]
    assert "13 quantised, 1 kept as they are" == facts["linears"]
    assert r"matches --ignore layers\.1\..*down_proj" == facts["kept `model.layers.1.mlp.down_proj`"]
    assert {"blocks", "host memory", "disk", "time", "calibration", "preset", "device"} <= set(facts)
    for name in ("gptq", "marlin"):
        assert any(what.startswith(f"{name} in vLLM ") for what in facts)


def test_plan_refuses_what_a_later_export_could_not_hold(cli, model, text):
    outcome = cli("quantize", model, "--calib", text, "--group-size", "64", "--format", "gptq,marlin", "--dry-run")

    assert 2 == outcome.code
    assert "error: format `marlin` cannot hold `model.layers.0." in outcome.err


def test_preview_shows_what_the_model_reads(cli, model, text):
    outcome = cli("quantize", model, "--calib", text, *FEW, "--preview")

    assert 0 == outcome.code
    assert 3 == len(outcome.out.strip().split("\n\n"))
    assert "harbour at dawn" in outcome.out
    assert 3 == len(json.loads(cli("quantize", model, "--calib", text, *FEW, "--preview", "--json").out))


def test_json_is_one_document(cli, model, text):
    """Of every verb that has it."""
    made = json.loads(cli("quantize", model, "--preset", "rtn", "-o", "int4", "--json").out)
    assert {"outputs": ["int4"], "ok": True, "warnings": []} == made
    scores = json.loads(cli("eval", "int4", "--tasks", f"ppl:{text}", "--seqlen", "64", "--limit", "1", "--json").out)
    assert ["perplexity"] == [score["metric"] for score in scores["evaluation"]["scores"]]
    checks = json.loads(cli("verify", "int4", "--json").out)
    assert checks["ok"] == all(check["ok"] for check in checks["verification"]["int4"]["checks"])
    assert json.loads(cli("export", "int4", "--format", "gptq", "-o", "x", "--json").out)["outputs"] == ["x"]
    assert json.loads(cli("generate", "int4", "--prompt", "The", "--json").out)["text"]
    assert json.loads(cli("inspect", "int4", "--json").out)["format"] == "compressed-tensors"
    assert "torch" in {fact["name"] for fact in json.loads(cli("doctor", "--json").out)}
    assert "steps" in json.loads(cli("run", "demo", "--dry-run", "--json").out)
    assert {"demo", "llama2-paper"} <= set(json.loads(cli("recipes", "list", "--json").out))
    assert {"ok": ["demo"]} == json.loads(cli("recipes", "validate", "demo", "--json").out)


def test_doctor_names_everything_with_its_state(cli):
    outcome = cli("doctor")

    assert (0, "") == (outcome.code, outcome.err)
    assert any(line.startswith(("  torch ", "! torch ")) for line in outcome.out.splitlines())


def test_alias_says_what_it_is(cli):
    assert "`demo` is the embedded model\n" in cli("quantize", "demo", "--dry-run").out


def test_recipes(cli, tmp_path):
    listed = cli("recipes", "list").out
    names = {line.split()[0] for line in listed.splitlines()}
    assert {"demo", "demo-presets", "demo-rtn", "llama2-paper", "llama2-7b-marlin", "llama2-7b-default"} <= names
    assert max(map(len, listed.splitlines())) <= 132
    assert cli("recipes", "show", "demo").out.startswith("# The whole chain on the embedded model")
    assert "preset: rtn\n" in cli("recipes", "show", "demo-rtn").out
    assert (0, "mine.yaml\n", "") == cli("recipes", "copy", "demo", "mine.yaml")
    assert (0, "demo-rtn.yaml\n", "") == cli("recipes", "copy", "demo-rtn", "./")
    assert 0 == cli("run", "demo-rtn.yaml", "--dry-run").code
    valid = cli("recipes", "validate", "mine.yaml", "demo-presets")
    assert (0, "mine.yaml: ok\ndemo-presets: ok, 4 recipes\n", "") == valid
    assert cli("recipes", "show", "demo").out == (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert 2 == cli("recipes", "copy", "demo", "mine.yaml").code
    (tmp_path / "a.yaml").write_text("nam: x\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("a: [\n", encoding="utf-8")
    bad = cli("recipes", "validate", "demo", "a.yaml", "b.yaml")
    assert (2, "") == bad[:2]
    assert "error: a.yaml:1:1: unknown key `nam`; did you mean `name`?" in bad.err
    assert "error: b.yaml:2:1: " in bad.err
    assert "stages" in json.loads(cli("recipes", "schema").out)["properties"]
    assert "rows" in json.loads(cli("recipes", "schema", "--table").out)["properties"]


def test_dry_run_of_a_hub_model_downloads_nothing(cli):
    outcome = cli("quantize", "llama2-7b", "--dry-run")

    assert 0 == outcome.code, outcome.err
    assert "224 quantised, 0 kept as they are" in outcome.out
    assert "planned from its shapes; a run downloads 13.5 GB" in outcome.out


def test_formats_in_a_recipe_are_those_that_exist(cli, model):
    """marlin-24 wants 2:4 weights: known, and refused by name where it cannot hold them."""
    outcome = cli("quantize", model, "--preset", "rtn", "--format", "marlin-24", "-o", "x")

    assert "marlin-24" in FORMATS
    assert 2 == outcome.code
    assert "marlin-24" in outcome.err
    assert not Path("x").exists()
