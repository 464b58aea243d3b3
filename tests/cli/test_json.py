"""`--json`, for every verb: stdout is then one JSON document, also where a check failed; an error leaves it empty."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.main import get_command

from marlin_tools.cli import app
from marlin_tools.resources import demo_dir

GROUP = get_command(app)
VERBS = [
    (name, *part)
    for name, command in GROUP.commands.items()
    for part in ([(inner,) for inner in command.commands] if hasattr(command, "commands") else [()])
]


def _command(verb):
    found = GROUP
    for name in verb:
        found = found.commands[name]
    return found


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_it(verb):
    assert "--json" in {spelling for param in _command(verb).params for spelling in param.opts}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded model, rounded."""
    from marlin_tools import QuantizeSettings, quantize

    place = tmp_path_factory.mktemp("json") / "rounded"
    quantize("demo", None, QuantizeSettings(preset="rtn"), place)
    return place


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The embedded model with two of every four weights zero."""
    from marlin_tools import PruneSettings, prune

    place = tmp_path_factory.mktemp("json") / "sparse"
    prune("demo", None, PruneSettings(preset="magnitude"), place)
    return place


DOCUMENTS = [
    (("recipes", "list"), dict),
    (("recipes", "show", "demo"), list),
    (("recipes", "show", "demo-presets"), list),
    (("recipes", "copy", "demo"), dict),
    (("recipes", "schema"), dict),
    (("recipes", "schema", "--table"), dict),
    (("recipes", "validate", "demo", "demo-presets"), dict),
    (("kernels", "list"), dict),
    (("doctor",), list),
    (("inspect", "demo"), dict),
    (("inspect", "MODEL"), dict),
    (("verify", "MODEL"), dict),
    (("quantize", "demo", "--dry-run"), dict),
    (("quantize", "demo", "--preview", "--num-samples", "2", "--seqlen", "64"), list),
    (("quantize", "demo", "--preset", "rtn", "-o", "made"), dict),
    (("prune", "demo", "--dry-run"), dict),
    (("finetune", "SPARSE", "--teacher", "demo", "--dry-run"), dict),
    (("export", "MODEL", "--format", "gptq", "-o", "exported"), dict),
    (("eval", "MODEL", "-t", "ppl:demo", "-L", "1", "--seqlen", "128"), dict),
    (("generate", "MODEL", "--prompt", "a", "--max-new-tokens", "2"), dict),
    (("compare", "MODEL", "DEMO"), dict),
    (("run", "demo", "--dry-run"), dict),
    (("reproduce", "demo-rtn", "--dry-run"), dict),
]


@pytest.mark.parametrize(("words", "kind"), DOCUMENTS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_stdout_is_one_document(cli, model, sparse, words, kind):
    places = {"MODEL": model, "SPARSE": sparse, "DEMO": demo_dir() / "model"}
    outcome = cli(*(places.get(word, word) for word in words), "--json")

    assert 0 == outcome.code, outcome.err
    assert isinstance(json.loads(outcome.out), kind)


def test_a_failed_check_is_a_document_too(cli, model, tmp_path):
    shutil.copytree(model, tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("*.safetensors"):
        weights = load_file(path)
        for name in (name for name in weights if name.endswith("weight_scale")):
            weights[name].fill_(float("inf"))
        save_file(weights, path, metadata={"format": "pt"})
    outcome = cli("verify", "damaged", "--json")

    assert 1 == outcome.code
    assert not json.loads(outcome.out)["verification"]["damaged"]["ok"]


@pytest.mark.parametrize(
    "words",
    (
        ("inspect", "nonsense"),
        ("quantize", "demo", "--preset", "x"),
        ("bench", "kernels", "--figure", "x"),
        ("compare", "demo", "demo"),
        ("recipes", "show", "x"),
    ),
    ids=" ".join,
)
def test_an_error_leaves_stdout_empty(cli, words):
    """The result is on stdout, everything else on stderr: who reads JSON looks at the exit code first."""
    outcome = cli(*words, "--json")

    assert (2, "") == (outcome.code, outcome.out)
    assert outcome.err.startswith("error: ")
