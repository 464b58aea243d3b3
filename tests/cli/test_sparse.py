"""`prune`, `finetune` and `quantize --sparsity` as a user meets them: plans, a chain run twice, and one-line refusals."""

from pathlib import Path

import pytest
import torch

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import is_2_4

TEXT = "The boat left the harbour at dawn, and nine marlins were seen off the point. "
FEW = ("--num-samples", "4", "--seqlen", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "boat.txt"
    file.write_text(TEXT * 80, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def pruned(cli, model):
    """A pruned model; the cheapest mask will do."""
    outcome = cli("prune", model, "--preset", "magnitude", "--device", "cpu", "-o", "pruned")
    assert 0 == outcome.code, outcome.err
    return Path("pruned")


def test_dry_runs_say_what_would_happen_and_do_nothing(cli, model, text, pruned, tmp_path):
    said = cli("prune", model, "--calib", text, *FEW, "--reconstruct", "2", "--dry-run")
    assert 0 == said.code
    for words in ("preset", "14 pruned, 0 kept as they are", "host memory", "disk"):
        assert words in said.out
    said = cli("finetune", pruned, "--teacher", model, "--calib", text, *FEW, "--sampled", "8", "--dry-run")
    assert 0 == said.code
    for words in ("teacher", "4 samples of", "8 windows of 64 tokens", "20,000,000 tokens, 32 sequences a step"):
        assert words in said.out
    assert [tmp_path / "pruned"] == list(tmp_path.iterdir())


def test_prune_then_finetune_then_quantize(cli, model, text, pruned):
    training = ("--tokens", "512", "--batch", "2", "--micro", "2", "--seqlen", "32", "--device", "cpu")
    tuned = ("finetune", pruned, "--teacher", model, "--calib", text, "--num-samples", "14", *training, "-o", "tuned")
    done = cli(*tuned)
    assert 0 == done.code, done.err
    assert "tuned\n" == done.out
    assert "held-out KL" in done.err
    assert "nothing to do" in cli(*tuned).err
    made = cli(
        "quantize",
        "tuned",
        "--sparsity",
        "keep",
        "--preset",
        "fast",
        "--calib",
        text,
        *FEW,
        "--format",
        "marlin-24",
        "-o",
        "int4",
    )
    assert 0 == made.code, made.err
    stored, before = StoredLinears(Checkpoint.open("int4")), Checkpoint.open(pruned)
    for name in stored.names:
        assert bool((stored.read(name).codes[before.read(f"{name}.weight") == 0] == 8).all())


def test_the_teacher_writes_the_text(cli, model, pruned):
    training = ("--tokens", "256", "--batch", "2", "--micro", "2", "--seqlen", "32", "--device", "cpu")
    done = cli("finetune", pruned, "--teacher", model, "--sampled", "12", *training, "-o", "tuned")
    assert 0 == done.code, done.err
    assert is_2_4(Checkpoint.open("tuned").read("model.layers.0.mlp.down_proj.weight"))


def test_a_chain_keeps_what_is_done_and_goes_on_from_any_stage(cli, model, text):
    Path("chain.yaml").write_text(
        f"""name: chain
model: {model}
calibrate: {{source: {text}, num_samples: 4, seqlen: 64}}
stages:
  - {{stage: prune, preset: sparsegpt, device: cpu}}
  - stage: finetune
    text: {{source: {text}, num_samples: 14, seqlen: 32}}
    tokens: 512
    batch: 2
    micro: 2
    device: cpu
  - {{stage: quantize, preset: fast, sparsity: keep, format: marlin-24, device: cpu}}
  - {{stage: export, formats: [gptq, compressed-tensors]}}
  - {{stage: verify}}
"""
    )
    first = cli("run", "chain.yaml", "-o", "out")
    assert 0 == first.code, first.err
    assert {"pruned", "finetuned", "marlin-24", "gptq", "compressed-tensors"} == {path.name for path in Path("out").iterdir()}
    assert 3 == first.out.count(" passed")  # what is quantised is verified
    sparse, *dense = (StoredLinears(Checkpoint.open(f"out/{name}")) for name in ("marlin-24", "gptq", "compressed-tensors"))
    for name in sparse.names:
        assert sparse.read(name).is_2_4()
        for other in dense:
            assert torch.equal(other.read(name).codes, sparse.read(name).codes)
            assert torch.equal(other.read(name).scales, sparse.read(name).scales)
    card = Path("out/gptq/README.md").read_text()
    assert "pruned to 2:4 (preset sparsegpt), then finetuned on 512 tokens with the original as the teacher, then GPTQ" in card
    assert "Embeddings and the head are as in the original." in card
    again = cli("run", "chain.yaml", "-o", "out")
    assert 5 == again.err.count("nothing to do")
    assert first.out == again.out
    changed = ("--set", "quantize.preset=default")
    assert 0 == cli("run", "chain.yaml", "-o", "out", "--from", "quantize", *changed).code
    refused = cli("run", "chain.yaml", "-o", "out", "--from", "quantize", "--set", "finetune.rate=0.1")
    assert (2, "error: `out/finetuned` was made with other settings") == (refused.code, refused.err.splitlines()[-2])


@pytest.mark.parametrize(
    ("stages", "complaint"),
    (
        ("[{stage: quantize}, {stage: prune}]", "`stages` has quantize, then prune: the order is prune, finetune, quantize"),
        ("[{stage: prune}, {stage: quantize}]", "`quantize` after `prune` would lose the zeros: give it `sparsity: keep`"),
        ("[{stage: prune}, {stage: prune}]", "a recipe prunes once: `prune` may stand in `stages` once"),
        ("[{stage: prune, preset: wandas}]", "unknown preset `wandas`"),
        ("[{stage: finetune, rate: -1}]", "`rate: -1`"),
    ),
)
def test_chains_that_make_no_sense(cli, stages, complaint):
    Path("chain.yaml").write_text(f"name: chain\nmodel: demo\nstages: {stages}\n")
    outcome = cli("run", "chain.yaml", "--dry-run")
    assert 2 == outcome.code
    assert complaint in outcome.err


def test_pruning_runs_in_one_process(cli, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    outcome = cli("prune", "demo", "--preset", "magnitude", "--device", "cpu")
    assert 2 == outcome.code
    assert "stage `prune` runs in one process, `torchrun` has started 4" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    (
        (("prune", "demo", "--preset", "wandas"), "unknown preset `wandas`"),
        (("prune", "demo", "--preset", "magnitude", "--reconstruct", "2"), "looks at no data, `reconstruct` needs some"),
        (("finetune", "demo", "--teacher", "nowhere"), "`nowhere` is no directory"),
        (("finetune", "demo", "--teacher", "demo", "--kl", "0", "--square-head", "0"), "are all 0"),
        (("finetune", "demo", "--teacher", "demo", "--rate", "0"), "`--rate 0`: must be greater than 0"),
        (
            ("finetune", "demo", "--teacher", "demo", "--batch", "4"),
            "`batch` 4 is not a multiple of `micro` 8 times 1 processes",
        ),
        (("quantize", "demo", "--sparsity", "1:4"), "must be '2:4' or 'keep'"),
    ),
)
def test_mistakes_are_one_line(cli, arguments, complaint):
    outcome = cli(*arguments, "--device", "cpu")
    assert 2 == outcome.code
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert 1 == len(lines)
    assert complaint in lines[0]
    assert "Traceback" not in outcome.err


def test_a_mask_that_is_not_there_is_named_before_any_work(cli, model, text, tmp_path):
    outcome = cli("quantize", model, "--sparsity", "keep", "--calib", text, *FEW)
    assert 2 == outcome.code
    assert "is not 2:4 sparse: `model.layers.0.self_attn.q_proj` and 13 more" in outcome.err
    outcome = cli("finetune", model, "--teacher", model, "--calib", text, *FEW)
    assert 2 == outcome.code
    assert "has no 2:4 sparse linear" in outcome.err
    assert "calibration text" not in outcome.err
    assert not list(tmp_path.rglob("*.safetensors"))
