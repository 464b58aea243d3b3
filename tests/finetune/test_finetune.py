"""Stage `finetune`: the student comes closer to its teacher, its zeros stay, a killed run ends in the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, ModelError, NumericalError, OutputError, RecipeError
from marlin_tools.events import Event, silent
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.training import loop
from marlin_tools.training.sample import sample

Run = Callable[..., Checkpoint]


def zeros(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) == 0 for name in checkpoint.names() if "proj" in name}


def same_files(left: Path, right: Path) -> bool:
    names = sorted(file.name for file in left.glob("*.safetensors"))
    return names == sorted(file.name for file in right.glob("*.safetensors")) and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names
    )


class StopError(Exception):
    """In place of a kill."""


def stop_at(step: int) -> Callable[[Event], None]:
    """An emitter that ends the run when this step is told."""

    def emit(event: Event) -> None:
        if event.kind == "progress" and event.text == "steps" and event.done >= step:
            raise StopError

    return emit


def test_the_student_learns_and_keeps_its_zeros(run: Run, pruned: Path, teacher: Path) -> None:
    events: list[Event] = []
    out = run(how={"emit": events.append}, rate=1e-3, tokens=30 * 4 * 32)
    manifest = json.loads((out.path / "manifest.json").read_text())
    (_, before), *_, (steps, after) = manifest["held_out_kl"]
    assert steps == manifest["steps"] == 30
    assert after < 0.97 * before
    old = Checkpoint.open(pruned)
    assert all(torch.equal(zeros(out)[name], mask) for name, mask in zeros(old).items())
    assert all(out.stored(name).dtype == old.stored(name).dtype for name in old.names())
    for frozen in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(out.read(frozen), Checkpoint.open(teacher).read(frozen))
    for moved in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert not torch.equal(out.read(moved), old.read(moved))
    assert any(event.kind == "note" and event.text.startswith("12 windows are read 10.0 times") for event in events)
    told = [event.data for event in events if event.text == "steps"]
    assert {"kl", "ce", "square_head", "tokens_per_s", "eta_s"} <= set(told[-1])


@pytest.mark.parametrize("stop", [3, 6])
def test_a_killed_run_ends_in_the_same_bytes(run: Run, stop: int) -> None:
    whole = run("whole")
    with pytest.raises(StopError):
        run("killed", how={"emit": stop_at(stop)})
    notes: list[str] = []
    again = run("killed", how={"emit": lambda event: notes.append(event.text)})
    assert any(note.startswith("continuing at step") for note in notes)
    assert same_files(whole.path, again.path)
    assert (
        json.loads((whole.path / "manifest.json").read_text())["held_out_kl"]
        == (json.loads((again.path / "manifest.json").read_text())["held_out_kl"])
    )


def test_a_full_disk_is_seen_before_the_first_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StopError):
        run(how={"emit": stop_at(3)})
    state = (tmp_path / "out.partial" / "state" / "training.safetensors").stat().st_size
    free = SimpleNamespace(free=1.9 * state)  # a state takes the place of another, and the result is small beside both
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    steps: list[int] = []
    count = {"emit": lambda event: steps.append(event.done) if event.text == "steps" else None}
    with pytest.raises(OutputError, match=r"`.*other` needs .* MB, .* MB are free"):
        run("other", how=count)
    assert not steps
    assert not (tmp_path / "other.partial").exists()
    run(how=count)
    assert steps


def test_what_gets_worse_is_not_kept(run: Run, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_WORSE", 1.1)  # a model of random weights has no more to lose
    notes: list[str] = []
    source, out = Checkpoint.open(pruned), run(rate=0.5, how={"emit": lambda event: notes.append(event.text)})
    assert sum("a lower rate than 0.5 may learn more" in note for note in notes) == 1
    assert any("nothing was learned" in note for note in notes)
    facts = json.loads((out.path / "manifest.json").read_text())
    assert facts["best_step"] == 0 < facts["steps"]
    assert all(torch.equal(out.read(name), source.read(name)) for name in source.names())


def test_the_best_state_outlives_a_kill(run: Run, pruned: Path) -> None:
    """Here the first, to which nothing that comes later returns."""
    with pytest.raises(StopError):
        run(rate=0.5, how={"emit": stop_at(6)})
    source, out = Checkpoint.open(pruned), run(rate=0.5)
    assert json.loads((out.path / "manifest.json").read_text())["best_step"] == 0
    assert all(torch.equal(out.read(name), source.read(name)) for name in source.names())


def test_changed_settings_do_not_continue_another_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(how={"emit": stop_at(3)})
    with pytest.raises(OutputError, match="another model, calibration or settings"):
        run(rate=1e-3)
    assert (tmp_path / "out.partial" / "state" / "training.safetensors").is_file()  # nothing is lost
    assert run(rate=1e-3, how={"resume": False}).path.is_dir()


def test_a_finished_run_is_not_repeated(run: Run) -> None:
    run()
    notes: list[str] = []
    run(how={"emit": lambda event: notes.append(event.text)})
    assert any("nothing to do" in note for note in notes)
    with pytest.raises(OutputError, match="not empty"):
        run(rate=1e-4)


@pytest.mark.parametrize("other", ["text", "teacher", "model"])
def test_what_was_learned_from_something_else_is_another_result(run: Run, pruned: Path, tmp_path: Path, other: str) -> None:
    """Not taken for finished, though all settings are the same."""
    run(tokens=4 * 32)
    shifted = Path(shutil.copytree(pruned, tmp_path / "shifted"))  # of the same shape and with the same zeros
    for shard in shifted.glob("*.safetensors"):
        save_file({name: t * 1.5 for name, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    text = TokenSet(tuple(torch.full((15, 32), 9)), "nines", packed=True, documents=1)
    changed: dict[str, Any] = {"text": text} if other == "text" else {other: shifted if other == "model" else str(shifted)}
    with pytest.raises(OutputError, match="not empty"):
        run(tokens=4 * 32, **changed)


def test_accumulated_gradients_are_those_of_the_batch(run: Run) -> None:
    """Two micro-batches or one: the same up to the order of sums."""
    one, two = run("one", micro=4, rate=1e-4), run("two", micro=2, rate=1e-4)
    for name in one.names():
        torch.testing.assert_close(one.read(name).float(), two.read(name).float(), rtol=0, atol=3e-4)


def test_recomputing_changes_nothing(run: Run) -> None:
    assert same_files(run("kept").path, run("recomputed", recompute=True).path)


def test_nothing_drops_out_at_random(run: Run, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """A config.json may ask for it in training; a run that goes on would draw something else."""
    model = tiny_model("llama", attention_dropout=0.5)
    pruned = prune(model, None, PruneSettings(preset="magnitude", device="cpu"), tmp_path / "pruned").path
    runs = [run(str(how), model=pruned, teacher=str(model), recompute=how).path for how in (False, True)]
    assert same_files(*runs)


def test_recomputing_calls_blocks_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x))
    run("kept")
    kept = len(calls)
    run("recomputed", recompute=True)
    assert len(calls) - kept == kept + 8 * 2 * 2  # steps, forwards and blocks


def test_the_teacher_can_write_the_text(run: Run, tmp_path: Path) -> None:
    out = run(text=None, sampled=15, seqlen=32)
    assert json.loads((out.path / "manifest.json").read_text())["calibration"]["source"].startswith("written by")
    assert same_files(out.path, run("again", text=None, sampled=15, seqlen=32).path)
    assert not same_files(out.path, run("other", text=None, sampled=15, seqlen=32, seed=1).path)


def test_what_the_teacher_has_written_is_not_written_again(run: Run) -> None:
    told: list[str] = []

    def stopping(event: Event) -> None:
        told.append(event.text)
        stop_at(3)(event)

    with pytest.raises(StopError):
        run(text=None, sampled=15, seqlen=32, how={"emit": stopping})
    assert "windows written by the teacher" in told
    told.clear()
    run(text=None, sampled=15, seqlen=32, how={"emit": lambda event: told.append(event.text)})
    assert any(text.startswith("continuing at step") for text in told)
    assert "windows written by the teacher" not in told


def test_a_written_text_goes_on_behind_its_end_and_is_drawn_from_all_words(teacher: Path) -> None:
    told: Any = SimpleNamespace(config={"bos_token_id": 5}, text_config={"bos_token_id": 5}, origin="somewhere")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    words = torch.stack(sample(model, told, 70, 2, 0, silent).sequences)  # more than are written at a time
    assert words.shape == (70, 2)
    assert len(set(words[:, 1].tolist())) > 40
    end = torch.nn.Parameter(torch.zeros(512).index_fill_(0, torch.tensor(1), 100.0))
    model.lm_head.bias = end
    assert [window.tolist() for window in sample(model, told, 2, 8, 0, silent).sequences] == [[5, *[1] * 7]] * 2


@pytest.mark.parametrize(
    ("whole", "part", "begin"),
    [
        ({"bos_token_id": 5}, {}, 5),
        ({"bos_token_id": None, "eos_token_id": 7}, {}, 7),
        ({}, {"bos_token_id": 3, "eos_token_id": [7, 8]}, 3),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, {}, None),
    ],
)
def test_what_a_written_text_begins_with(
    teacher: Path, whole: dict[str, object], part: dict[str, object], begin: int | None
) -> None:
    told: Any = SimpleNamespace(config=whole, text_config=part or whole, origin="somewhere")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    if begin is None:
        with pytest.raises(ModelError, match="names no BOS token"):
            sample(model, told, 2, 4, 0, silent)
    else:
        assert [int(window[0]) for window in sample(model, told, 2, 4, 0, silent).sequences] == [begin, begin]


def test_what_the_teacher_asks_for_besides_is_not_written(teacher: Path) -> None:
    told: Any = SimpleNamespace(config={"bos_token_id": 5}, text_config={"bos_token_id": 5}, origin="somewhere")

    def written(**asked: Any) -> str:
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        model.generation_config = GenerationConfig(**asked)
        return sample(model, told, 3, 32, 0, silent).fingerprint

    asked = {"repetition_penalty": 1.5, "num_beams": 2, "min_p": 0.5, "max_time": 0.001, "return_dict_in_generate": True}
    assert written() == written(**asked)


def test_what_is_trained_can_be_quantized_with_its_zeros(run: Run, tokens: TokenSet, tmp_path: Path) -> None:
    tuned = run()
    settings = QuantizeSettings(preset="fast", sparsity="keep", format="marlin-24", device="cpu")
    stored = StoredLinears(quantize(tuned, tokens, settings, tmp_path / "int4"))
    for name in stored.names:
        assert bool((stored.read(name).codes[tuned.read(f"{name}.weight") == 0] == 8).all()), name


def test_another_model_as_the_teacher_is_told(run: Run, teacher: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(preset="rtn", format="gptq", device="cpu")
    student = quantize(teacher, None, settings, tmp_path / "student")
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    heard: list[Event] = []
    run(model=student.path, how={"emit": heard.append}, tokens=4 * 32)
    assert not [event for event in heard if event.kind == "warning"]
    out = run("again", model=student.path, teacher=str(other), how={"emit": heard.append}, tokens=4 * 32)
    (said,) = [event.text for event in heard if event.kind == "warning"]
    assert said == f"`{student.path}` was made from `{teacher}`; its teacher `{other}` is another model"
    assert said in json.loads((out.path / "manifest.json").read_text())["warnings"]


def test_a_dense_model_has_nothing_to_keep(run: Run, teacher: Path) -> None:
    with pytest.raises(ModelError, match="no 2:4 sparse linear"):
        run(model=teacher)


def test_a_teacher_with_another_vocabulary(run: Run, tiny_model: Callable[..., Path], teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vocabulary of 640 tokens"):
        run(teacher=str(tiny_model("llama", vocab_size=640)))
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="number their tokens differently"):
        run(teacher=str(other))


def test_a_teacher_of_another_shape_needs_no_hidden_states(run: Run, tiny_model: Callable[..., Path]) -> None:
    other = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(ModelError, match="num_hidden_layers"):
        run(teacher=str(other))
    assert run(teacher=str(other), square_head=0).path.is_dir()


def test_a_loss_that_is_no_number_names_its_step(
    run: Run, tiny_model: Callable[..., Path], tmp_path: Path, pruned: Path
) -> None:
    """A norm whose weights overflow: 3e38 is a number in bfloat16, its products are none."""
    broken = Path(shutil.copytree(pruned, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text()) | {"dtype": "bfloat16"}
    (broken / "config.json").write_text(json.dumps(config))
    for shard in broken.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(shard).items()}
        if "model.layers.1.post_attention_layernorm.weight" in tensors:
            tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="not finite at step 0 of 8"):
        run(model=broken)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()  # nothing had been saved


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"kl": 0, "ce": 0, "square_head": 0}, RecipeError, "are all 0"),
        ({"micro": 3}, RecipeError, "not a multiple"),
        ({"held_out": 15}, DataError, "of which 15 are held out"),
        ({"sampled": 4, "seqlen": 16}, DataError, "windows of 32 tokens, the teacher would write 16"),
    ],
)
def test_settings_that_cannot_work(run: Run, settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(**settings)


def test_too_few_windows_by_the_teacher_name_the_setting(run: Run) -> None:
    with pytest.raises(DataError) as caught:
        run(text=None, sampled=3, seqlen=16)
    assert caught.value.hint == "use `--sampled 4` or more"


def test_documents_of_different_lengths_are_refused(run: Run) -> None:
    ragged = TokenSet((torch.arange(2, 9), torch.arange(2, 30)), "ragged", packed=False, documents=2)
    with pytest.raises(DataError, match="windows of one length"):
        run(text=ragged)


def test_a_file_that_could_not_be_taken_over_is_told_before_the_training(run: Run, pruned: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(pruned, tmp_path / "model"))
    (model / "n\udcff.txt").touch()
    events: list[Event] = []

    with pytest.raises(ModelError, match="is no text in UTF-8"):
        run(model=model, how={"emit": events.append})
    assert not any(event.kind == "progress" for event in events)
