"""How tasks are found: at once, without running what nobody asked for, and never what was not allowed."""

import json
import os
import signal
from itertools import pairwise

import pytest

from marlin_tools.errors import DataError, RecipeError
from marlin_tools.evaluation import task_index
from marlin_tools.evaluation.evaluate import EvaluateSettings
from marlin_tools.evaluation.harness import _no_way_out
from marlin_tools.evaluation.task_index import OWN, Tasks

PROOF = "import pathlib\npathlib.Path({proof!r}).touch()\n"


@pytest.fixture
def spy(write_task, tmp_path):
    """A folder with the task `fish` and the task `spy`, whose code leaves a file behind."""
    folder = write_task("fish")
    write_task("spy")
    with (folder / "spy.yaml").open("a") as file:
        file.write("process_docs: !function evil.process\n")
    proof = tmp_path / "proof"
    (folder / "evil.py").write_text(PROOF.format(proof=str(proof)) + "def process(docs):\n    return docs\n")
    return folder, proof


def tasks(folder, *names, allow=False):
    return Tasks(names, (folder,), allow_code=allow)


def test_tasks_that_nobody_asked_for_do_not_run(spy, model, run):
    folder, proof = spy
    run(model, "fish", include_path=(folder,))

    assert not proof.exists()


def test_code_runs_only_if_that_is_allowed_and_is_named_in_the_report(spy, model, run):
    folder, proof = spy
    with pytest.raises(RecipeError) as caught:
        run(model, "spy", include_path=(folder,))

    assert f"`{folder / 'spy.yaml'}` runs code: `process_docs: !function evil.process` in `spy.yaml`" == caught.value.message
    assert "--allow-task-code" in caught.value.hint
    assert not proof.exists()
    result = run(model, "spy", include_path=(folder,), allow_task_code=True)
    assert proof.exists()
    assert any("ran code: `process_docs: !function evil.process`" in note for note in result.notes)


@pytest.mark.parametrize(
    ("line", "told"),
    (
        ("class: fish.Task", "a class of its own"),
        ("dataset_path: pandas", "unpickles"),
        ("dataset_kwargs: {trust_remote_code: true}", "has a script"),
        ("metric_list: [{metric: ./mine}]", "metric `./mine` is fetched"),
        ("metric_list: [{metric: acc, hf_evaluate: true}]", "metric `acc` is fetched"),
        ("include: hidden", "!function os.getcwd"),
    ),
)
def test_every_way_to_bring_code_is_known(write_task, line, told):
    folder = write_task("fish")
    (folder / "hidden").write_text("process_docs: !function os.getcwd\n")
    key = line.partition(":")[0]
    lines = [
        each
        for each in (folder / "fish.yaml").read_text().splitlines()
        if not each.startswith((key, "  - ", "  data", "    ag", "    hi"))
    ]
    (folder / "fish.yaml").write_text("\n".join([*lines, line]) + "\n")

    with pytest.raises(RecipeError, match="runs code") as caught:
        tasks(folder, "fish")
    assert told in caught.value.message


def test_a_group_brings_the_code_of_its_members(spy):
    folder, proof = spy
    (folder / "both.yaml").write_text("group: both\ntask: [fish, {task: spy, num_fewshot: 1}]\n")

    with pytest.raises(RecipeError, match=r"spy\.yaml` runs code"):
        tasks(folder, "both")
    assert not proof.exists()


def test_a_comment_is_no_code_and_what_lm_eval_brings_is_its_own(write_task):
    folder = write_task("fish")
    (folder / "fish.yaml").write_text("# not !function here\n" + (folder / "fish.yaml").read_text())
    (folder / "mine.yaml").write_text(f"task: mine\ninclude: {OWN / 'gsm8k' / 'gsm8k.yaml'}\n")

    assert [] == tasks(folder, "fish", "mine").code


def test_templates_reach_values_and_not_the_interpreter(write_task, model, run, tmp_path):
    folder, proof = write_task("fish"), tmp_path / "proof"
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(proof) + "') }}"
    text = (folder / "fish.yaml").read_text().replace('"{{question}} Answer:"', json.dumps(escape))
    (folder / "fish.yaml").write_text(text)
    assert escape in text

    with pytest.raises(DataError):
        run(model, "fish", include_path=(folder,))
    assert not proof.exists()


@pytest.mark.parametrize("code", (0, 1, None))
@pytest.mark.parametrize("where", ("load", "ask"))
def test_a_task_that_exits_is_an_error(spy, model, run, code, where):
    folder, _ = spy
    end = f"    raise SystemExit({code!r})\n"
    if where == "ask":
        with (folder / "spy.yaml").open("a") as file:
            file.write("process_results: !function evil.results\n")
    body = "def process(docs):\n" + (end if where == "load" else "    return docs\n")
    (folder / "evil.py").write_text(body + "def results(*_):\n" + end)

    with pytest.raises(DataError, match="a task ended the program with"):
        run(model, "spy", include_path=(folder,), allow_task_code=True)


@pytest.mark.parametrize("where", ("load", "ask"))
def test_a_task_that_leaves_without_a_word_is_an_error(spy, model, run, where):
    """`os._exit(0)` would end the program with exit code 0 and no result."""
    folder, _ = spy
    end = "    import os\n    os._exit(0)\n"
    if where == "ask":
        with (folder / "spy.yaml").open("a") as file:
            file.write("process_results: !function evil.results\n")
    body = "def process(docs):\n" + (end if where == "load" else "    return docs\n")
    (folder / "evil.py").write_text(body + "def results(*_):\n" + end)
    leave = os._exit

    with pytest.raises(DataError, match="a task ended the program with 0"):
        run(model, "spy", include_path=(folder,), allow_task_code=True)
    assert leave is os._exit


def test_a_child_process_may_end_as_it_should():
    with _no_way_out():
        child = os.fork()
        if not child:
            os._exit(7)
        _, status = os.waitpid(child, 0)
    assert 7 == os.waitstatus_to_exitcode(status)


def with_template(folder, text):
    stored = (folder / "fish.yaml").read_text()
    changed = stored.replace('"{{question}} Answer:"', json.dumps(text))
    assert stored != changed
    (folder / "fish.yaml").write_text(changed)


def test_a_template_without_end_is_an_error(write_task, model, run, monkeypatch):
    monkeypatch.setattr(task_index, "TEMPLATE_SECONDS", 0.2)
    folder, before = write_task("fish"), signal.getsignal(signal.SIGALRM)
    with_template(folder, "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")

    with pytest.raises(DataError, match=r"a template of a task takes longer than 0\.2 s"):
        run(model, "fish", include_path=(folder,))
    assert before == signal.getsignal(signal.SIGALRM)
    assert (0.0, 0.0) == signal.getitimer(signal.ITIMER_REAL)


@pytest.mark.parametrize(
    "text", ("{{ range(999999999) | list }}", "{{ 1 / 0 }}", "{{ question.nothing.more }}", "{{ [][7] + 1 }}")
)
def test_a_template_that_fails_is_an_error(write_task, model, run, text):
    folder = write_task("fish")
    with_template(folder, text)

    with pytest.raises(DataError, match="fish"):
        run(model, "fish", include_path=(folder,))


@pytest.mark.parametrize(
    "code", ("raise NameError('x')", "assert False", "return undefined", "return 1 / 0", "import nothing_there")
)
def test_code_that_fails_is_an_error(spy, model, run, code):
    folder, _ = spy
    (folder / "evil.py").write_text(f"def process(docs):\n    {code}\n")

    with pytest.raises(DataError, match="`spy` cannot be loaded"):
        run(model, "spy", include_path=(folder,), allow_task_code=True)


@pytest.mark.parametrize(
    ("line", "told"),
    (
        ('filter_list: [{name: x, filter: [{function: regex, regex_pattern: "(a+"}]}]', "is no regular expression"),
        ('filter_list: [{name: x, filter: [{function: regex, regex_pattern: "(.*)*(.*)*$x"}]}]', "could take very long"),
        ('metric_list: [{metric: exact_match, regexes_to_ignore: [",", "(a|a)+$"]}]', "could take very long"),
    ),
)
def test_bad_patterns_are_refused_before_the_work(write_task, line, told):
    folder = write_task("fish")
    with (folder / "fish.yaml").open("a") as file:
        file.write(line + "\n")

    with pytest.raises(DataError, match=told) as caught:
        tasks(folder, "fish")
    assert "check the task's YAML file" == caught.value.hint


@pytest.mark.parametrize(
    "text", ("task: [", "task: broken\n\tx: 1\n", "task: broken\ninclude: broken.yaml\n", "task: broken\ninclude: 7\n")
)
def test_a_broken_file_is_named(write_task, text):
    folder = write_task("fish")
    (folder / "broken.yaml").write_text(text)

    assert ["fish"] == tasks(folder, "fish").names
    with pytest.raises((DataError, RecipeError), match="broken"):
        tasks(folder, "broken")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghij")
)
MERGES = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 99)}], {new}: 1}}\n" for old, new in pairwise("abcdefghij")
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "rule"),
    (
        (BOMB + "dataset_kwargs: *j\n", "more than 20000 values"),
        (MERGES, "more than 20000 values"),
        ("x: &a [*a]\n", "nested deeper than 32"),
        ("x: &a {<<: *a}\n", "nested deeper than 32"),
        ("x: " + "[" * 100 + "]" * 100, "nested deeper than 32"),
        ("x: " + "[" * 50_000, "nested deeper than 32"),
        ("x:\n " + "- " * 5000, "cannot be read"),
        ("description: " + "x" * 2_000_000, "has 2000024 bytes, at most"),
        ("include: pipe\n", "not an ordinary file"),
    ),
    ids=lambda text: text[:12],
)
def test_a_hostile_file_of_a_task_is_refused_and_harms_no_other(write_task, text, rule):
    folder = write_task("fish")
    (folder / "bomb.yaml").write_text(f"task: bomb\n{text}")
    os.mkfifo(folder / "pipe")

    assert ["fish"] == tasks(folder, "fish").names
    with pytest.raises(DataError, match=rule):
        tasks(folder, "bomb")


@pytest.mark.parametrize("names", (("",), (" ", "mmlu"), ("ppl:",)))
def test_a_task_without_a_name_is_refused_at_once(names):
    with pytest.raises(ValueError, match="a task without a name"):
        EvaluateSettings(tasks=names)


def test_names_of_lm_eval_are_read_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counted = []
    read = task_index._declarations
    monkeypatch.setattr(task_index, "_declarations", lambda root: counted.append(root) or read(root))
    first, again = (Tasks(["arc_easy", "mmlu_anatomy"], (), allow_code=False) for _ in range(2))

    assert 1 == counted.count(OWN)
    assert set(first.manager.task_index) == set(again.manager.task_index)
    (tmp_path / "marlin-tools").joinpath(next((tmp_path / "marlin-tools").iterdir()).name).write_text("{")
    with pytest.raises(RecipeError, match="unknown task `arc_easi`") as caught:
        Tasks(["arc_easi"], (), allow_code=False)
    assert 2 == counted.count(OWN)
    assert "`arc_easy`" in caught.value.hint


@pytest.mark.parametrize("name", ("demo", "wikitext2", "{file}"))
def test_a_text_without_its_prefix_is_told(tmp_path, name):
    (tmp_path / "mine.txt").write_text("some text")
    name = name.format(file=tmp_path / "mine.txt")
    with pytest.raises(RecipeError, match="unknown task") as caught:
        Tasks([name], (), allow_code=False)
    assert caught.value.hint.startswith(f"did you mean `ppl:{name}`")
    with pytest.raises(RecipeError, match="unknown task"):
        Tasks(["name" * 100], (), allow_code=False)


def test_tags_and_groups_bring_all_their_tasks():
    found = Tasks(["mmlu"], (), allow_code=False).manager.task_index

    assert 57 == sum(entry.kind.name == "TASK" for entry in found.values())
    tag = Tasks(["ai2_arc"], (), allow_code=False).manager.task_index["ai2_arc"]
    assert {"arc_easy", "arc_challenge"} == tag.tags


def test_a_part_beside_its_group_is_refused(write_task):
    folder = write_task("fish")
    write_task("bird")
    (folder / "both.yaml").write_text("group: both\ntask: [fish, bird]\n")
    (folder / "all.yaml").write_text("group: all\ntask: [both]\n")

    assert ["both"] == tasks(folder, "both").names
    for name in ("both", "all"):
        with pytest.raises(RecipeError, match=f"task `bird` is a part of `{name}`") as caught:
            tasks(folder, "bird", name)
        assert "name one of the two" == caught.value.hint


def test_a_member_that_is_nowhere_is_named(write_task):
    folder = write_task("fish")
    (folder / "both.yaml").write_text("group: both\ntask: [fish, {task: inline, dataset_path: json}, nobody]\n")

    with pytest.raises(RecipeError, match="unknown task `nobody`"):
        tasks(folder, "both")


def test_data_that_lies_elsewhere_is_known(write_task, tmp_path):
    folder = write_task("fish")
    (folder / "fish.jsonl").rename(tmp_path / "elsewhere.jsonl")
    file = folder / "fish.yaml"
    file.write_text(file.read_text().replace("fish.jsonl", "../elsewhere.jsonl"))

    assert [tmp_path / "elsewhere.jsonl"] == tasks(folder, "fish").data
