"""lm-eval's tasks: found early, quiet, scored as lm-eval scores them, and compared item by item."""

import json
import math
import random
from statistics import fmean, stdev

import pytest
import torch

from marlin_tools.errors import DataError, DeviceError, RecipeError
from marlin_tools.evaluation import evaluate as stage
from marlin_tools.evaluation.harness import influences
from marlin_tools.evaluation.judge import Judge

SUBJECTS = {
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality professional_psychology "
    "public_relations security_studies sociology us_foreign_policy",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy "
    "prehistory professional_law world_religions",
}


def group(name, members):
    rule = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    return f"group: {name}\ntask: [{', '.join(members)}]\n{rule}\nmetadata: {{version: 2}}\n"


@pytest.fixture
def mmlu(write_task):
    """All 57 subjects of MMLU with two questions each (three in one of them), from local files."""
    for subjects in SUBJECTS.values():
        for subject in subjects.split():
            count = 3 if subject == "virology" else 2
            rows = [{"question": f"{subject} {n}?", "choices": ["A", "B", "C", "D"], "answer": n} for n in range(count)]
            folder = write_task(f"mmlu_{subject}", rows, folder="mmlu")
    for name, subjects in SUBJECTS.items():
        (folder / f"_{name}.yaml").write_text(group(f"mmlu_{name}", [f"mmlu_{subject}" for subject in subjects.split()]))
    (folder / "_mmlu.yaml").write_text(group("mmlu", [f"mmlu_{name}" for name in SUBJECTS]))
    return folder


def test_mmlu_over_all_subjects_from_local_data(int4, model, mmlu, run, capfd):
    result = run(int4, "mmlu", baseline=model, include_path=(mmlu,))
    leaves = [score for score in result.scores if score.part_of not in (None, "mmlu")]
    whole = result.score("mmlu")

    assert (57, 115) == (len(leaves), sum(leaf.details["items"] for leaf in leaves))
    assert pytest.approx(sum(leaf.value * leaf.details["items"] for leaf in leaves) / 115) == whole.value
    assert pytest.approx(sum(leaf.baseline * leaf.details["items"] for leaf in leaves) / 115) == whole.baseline
    assert 0 < whole.stderr < 0.1
    errors = [(leaf.details["items"] / 115 * leaf.difference_stderr) ** 2 for leaf in leaves]
    assert pytest.approx(math.sqrt(sum(errors))) == whole.difference_stderr
    assert [["mmlu"], 62] == [[row[0] for row in result.table()[1]], len(result.table(parts=True)[1])]
    assert ("", "") == tuple(capfd.readouterr())


def test_a_task_of_ones_own_is_found_with_its_data_from_anywhere(model, write_task, run, monkeypatch, tmp_path):
    folder = write_task("fish")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    score = run(model, "fish", include_path=(folder,)).score("fish")

    assert ("acc", True, 10, 3.0, 0) == (
        score.metric,
        score.higher_is_better,
        *(score.details[key] for key in ("items", "task_version", "num_fewshot")),
    )
    assert pytest.approx(math.sqrt(score.value * (1 - score.value) / 9)) == score.stderr


def test_shots_and_limit_reach_lm_eval(model, write_task, run):
    details = run(model, "fish", include_path=(write_task("fish"),), num_fewshot=2, limit=4).score("fish").details

    assert (2, 4) == (details["num_fewshot"], details["items"])


def test_questions_stay_open_though_the_tokenizer_would_end_them(model, closing, write_task, run, monkeypatch):
    asked, folder = {}, write_task("fish")
    through = Judge._loglikelihood_tokens

    def hear(self, requests, *args, **kwargs):
        asked.setdefault(here, []).extend((context, answer) for _, context, answer in requests)
        return through(self, requests, *args, **kwargs)

    monkeypatch.setattr(Judge, "_loglikelihood_tokens", hear)
    notes = []
    for here in (model, closing):
        notes += run(here, "fish", include_path=(folder,)).notes

    assert asked[model]
    assert asked[model] == asked[closing]
    assert not any("EOS" in note for note in notes)


def test_questions_that_the_tokenizer_ends_are_said_aloud(model, closing, write_task, run, text, monkeypatch):
    monkeypatch.setattr("marlin_tools.evaluation.evaluate.leave_open", lambda _: None)  # one that knows no rules
    folder = write_task("fish")
    told = [
        run(each, *tasks, include_path=(folder,), seqlen=32).notes
        for each in (model, closing)
        for tasks in (("fish",), (text,))
    ]

    assert [0, 0, 1, 0] == [sum("puts an EOS behind each text" in note for note in notes) for notes in told]


def test_shots_that_do_not_apply_are_said_aloud(model, write_task, run):
    folder = write_task("fish")
    with (folder / "fish.yaml").open("a") as file:
        file.write("num_fewshot: 0\n")
    result = run(model, "fish", include_path=(folder,), num_fewshot=2)

    assert 0 == result.score("fish").details["num_fewshot"]
    assert "`fish` is defined without examples: 2 shots do not apply to it" in result.notes


@pytest.mark.parametrize(("split", "most"), [("", 10), ("fewshot_split: test\n", 9)])
def test_more_shots_than_there_are_examples_are_refused(model, write_task, run, split, most):
    folder = write_task("fish")
    with (folder / "fish.yaml").open("a") as file:
        file.write(split)
    with pytest.raises(DataError) as caught:
        run(model, "fish", include_path=(folder,), num_fewshot=most + 1)

    assert f"`--num-fewshot {most + 1}`: `fish` has {most} examples to show" == caught.value.message
    assert most == run(model, "fish", include_path=(folder,), num_fewshot=most).score("fish").details["num_fewshot"]


def test_differences_of_accuracy_are_paired(int4, model, write_task, run):
    folder = (write_task("fish"),)
    pair = run(int4, "fish", baseline=model, include_path=folder).score("fish")
    alone = [run(one, "fish", include_path=folder).score("fish") for one in (int4, model)]

    assert [score.value for score in alone] == [pair.value, pair.baseline]
    assert [score.stderr for score in alone] == [pair.stderr, pair.baseline_stderr]
    assert pytest.approx(pair.value - pair.baseline) == pair.difference
    assert pair.difference_stderr is not None


def test_a_model_beside_itself_has_no_error_in_the_difference(model, write_task, run):
    score = run(model, "fish", baseline=model, include_path=(write_task("fish"),)).score("fish")

    assert (0, 0, 100) == (score.difference, score.difference_stderr, score.recovery)
    assert 0 < score.stderr


def test_the_batch_size_does_not_change_the_answers(model, write_task, run):
    folder = (write_task("fish"),)

    assert 1 == len({run(model, "fish", include_path=folder, batch_size=size).score("fish").value for size in (1, 3, "auto")})


def test_bundled_tasks_run_in_silence_and_tell_their_progress(model, run, capfd):
    events = []
    result = run("demo", "demo_qa", "demo_text", limit=8, emit=events.append)
    progress = [event for event in events if event.text == "answers"]

    assert ("", "") == tuple(capfd.readouterr())
    assert progress[-1].done == progress[-1].total > 16
    assert ["demo_qa", *["demo_text"] * 3] == [score.task for score in result.scores]
    assert all(score.stderr is not None for score in result.scores)


@pytest.mark.parametrize("metric", ("word_perplexity", "byte_perplexity", "bits_per_byte"))
def test_errors_of_ratios_are_those_of_resampling(metric):
    draw = random.Random(0)
    items = [(-size * draw.uniform(0.5, 1.5), size) for size in (draw.randint(20, 200) for _ in range(80))]

    def value(chosen):
        rate = -sum(a for a, _ in chosen) / sum(b for _, b in chosen)
        return rate / math.log(2) if metric == "bits_per_byte" else math.exp(rate)

    resampled = stdev(value(draw.choices(items, k=len(items))) for _ in range(2000))
    effects = influences(f"{metric},none", items)

    assert pytest.approx(0, abs=1e-9) == fmean(effects)
    assert pytest.approx(resampled, rel=0.1) == stdev(effects) / math.sqrt(len(items))


def test_a_metric_without_a_formula_has_no_error():
    assert [] == influences("f1,none", [(0, 1), (1, 1)])
    assert [1.0, 0.0] == influences("acc,none", [1, False])


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stage, "load", refuse)


def test_an_unknown_task_is_refused_with_near_names_before_any_model(model, run, no_loading):
    with pytest.raises(RecipeError) as caught:
        run(model, "mmlu_anatomi")

    assert "unknown task `mmlu_anatomi`" == caught.value.message
    assert "`mmlu_anatomy`" in caught.value.hint
    assert "--include-path" in caught.value.hint


def test_a_folder_that_is_not_there_is_refused(model, run, no_loading, tmp_path):
    with pytest.raises(RecipeError, match="no such directory"):
        run(model, "fish", include_path=(tmp_path / "none",))


def test_a_task_whose_data_is_missing_is_refused(model, write_task, run, no_loading):
    folder = write_task("fish")
    (folder / "fish.jsonl").unlink()

    with pytest.raises(DataError, match="`fish` cannot be loaded"):
        run(model, "fish", include_path=(folder,))


def test_a_task_on_the_hub_is_refused_offline(model, run, no_loading):
    with pytest.raises(DataError, match="`mmlu_anatomy` cannot be loaded"):
        run(model, "mmlu_anatomy")


def test_memory_that_runs_out_halves_the_batch(model, write_task, run, monkeypatch):
    load, sizes = stage.load, []

    def cramped(*args, **options):
        network = load(*args, **options)
        forward = network.forward

        def limited(input_ids, **inputs):
            sizes.append(len(input_ids))
            if len(input_ids) > 3:
                raise torch.OutOfMemoryError("no")
            return forward(input_ids, **inputs)

        network.forward = limited
        return network

    folder = (write_task("fish"),)
    expected = run(model, "fish", include_path=folder).score("fish")
    monkeypatch.setattr(stage, "load", cramped)
    result = run(model, "fish", include_path=folder, batch_size=8)

    assert expected.value == result.score("fish").value
    assert [8, 4, 2] == sizes[:3]
    assert ["out of memory: starting the tasks again with batch size 2"] == [n for n in result.notes if "size 2" in n]


def test_an_item_that_never_fits_is_a_plain_error(model, write_task, run, monkeypatch):
    load = stage.load

    def full(*args, **options):
        network = load(*args, **options)

        def fail(*_args, **_inputs):
            raise torch.OutOfMemoryError("no")

        network.forward = fail
        return network

    monkeypatch.setattr(stage, "load", full)
    with pytest.raises(DeviceError, match="one item of fish does not fit"):
        run(model, "fish", include_path=(write_task("fish"),), batch_size=2)


def test_results_are_one_json_document(int4, model, write_task, text, run):
    result = run(int4, "fish", text, baseline=model, seqlen=32, include_path=(write_task("fish"),))
    content = json.loads(json.dumps(result.describe(), allow_nan=False))

    assert ["model", "baseline", "scores", "settings", "versions", "notes", "times"] == list(content)
    asked = {"origin", "fingerprint", "format", "dtype", "activations", "backend", "device", "computed_in"}
    assert asked == set(content["model"]) == set(content["baseline"])
    assert ("reference", None) == (content["model"]["backend"], content["baseline"]["backend"])
    assert ("compressed-tensors", None) == (content["model"]["format"], content["baseline"]["format"])
    assert ("16bit", None) == (content["model"]["activations"], content["baseline"]["activations"])
    assert {"lm-eval", "torch", "transformers"} <= set(content["versions"])
    assert [["fish", "acc"], [text, "perplexity"], [text, "kl"], [text, "top1"]] == [
        [score["task"], score["metric"]] for score in content["scores"]
    ]
    assert all(score["stderr"] is not None for score in content["scores"])
    assert {"value", "baseline", "baseline_stderr", "difference", "difference_stderr", "recovery"} <= set(content["scores"][0])


def test_a_model_is_run_with_fp8_activations_and_the_baseline_is_not(int4, text, run):
    plain, fp8 = (run(int4, text, baseline=int4, seqlen=32, activations=each) for each in (None, "fp8"))

    assert ("fp8", "16bit") == (fp8.model["activations"], fp8.baseline["activations"])
    kl = [next(score.value for score in result.scores if score.metric == "kl") for result in (plain, fp8)]
    assert 0 == kl[0] < kl[1]
    assert plain.scores[0].baseline == fp8.scores[0].baseline


def test_the_table_has_the_baseline_only_if_there_is_one(int4, model, write_task, run):
    folder = (write_task("fish"),)
    columns, rows = run(int4, "fish", baseline=model, include_path=folder).table()

    assert ["task", "metric", "on", "model", "baseline", "difference", "recovery"] == columns
    assert ["fish", "acc", "10 items, 0-shot"] == rows[0][:3]
    assert all("±" in cell for cell in rows[0][3:6])
    assert rows[0][6].endswith(" %")
    assert ["task", "metric", "on", "model"] == run(int4, "fish", include_path=folder).table()[0]


def test_the_same_evaluation_gives_the_same_document(int4, model, write_task, text, run):
    def document():
        content = run(int4, "fish", text, baseline=model, seqlen=32, include_path=(folder,), num_fewshot=1).describe()
        del content["times"]
        return content

    folder = write_task("fish")

    assert document() == document()
