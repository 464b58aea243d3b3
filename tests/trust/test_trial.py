"""What running the model finds: logits that are not those of when it was quantised, and tokens without sense."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import DeviceError
from marlin_tools.verification import trial
from marlin_tools.verification.verify import verify


def change_reference(directory: Path, change) -> None:
    file = directory / "verify" / "reference.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"logits": change(tensors["logits"])}, file)


def add_noise(share: float):
    def change(logits):
        return logits + share * logits.std() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))

    return change


def test_wrong_reference(damaged, failures):
    change_reference(damaged, add_noise(0.01))

    assert "1.0e-02 of their spread away from the stored ones, 0.001 allowed" in failures(damaged)["logits"]


@pytest.mark.parametrize(("share", "ok"), ((0.03, True), (0.08, False)))
def test_a_reference_from_a_gpu_is_held_to_less(damaged, edit_json, share, ok):
    edit_json(damaged / "manifest.json", device="NVIDIA H100")
    change_reference(damaged, add_noise(share))
    (logits,) = (check for check in verify(damaged).checks if check.name == "logits")

    assert ok == logits.ok
    assert "0.05 allowed (the stored ones are from NVIDIA H100)" in logits.detail


def test_reference_of_another_vocabulary(damaged, failures):
    change_reference(damaged, lambda logits: logits[:, :-1].contiguous())

    assert "[64, 512] computed, [64, 511] stored" == failures(damaged)["logits"]


def test_reference_that_is_not_finite(damaged, failures):
    change_reference(damaged, lambda logits: logits.fill_(float("nan")))

    assert "nan of their spread" in failures(damaged)["logits"]


def test_unreadable_reference(damaged, failures):
    (damaged / "verify" / "reference.safetensors").write_bytes(b"nonsense")

    assert "reference.safetensors` cannot be read" in failures(damaged)["logits"]


def test_a_model_that_says_one_word(damaged, edit, failures):
    with edit(damaged, "model.norm.weight") as tensors:
        tensors["model.norm.weight"].zero_()

    found = failures(damaged)["generation"]
    assert (
        "from the beginning: nothing but token 0; from the reference text: nothing but token 0; the original goes on" == found
    )


def test_one_word_after_nothing_is_no_fault(monkeypatch):
    """Only a model that is stuck after every prompt is broken."""
    monkeypatch.setattr(trial, "_continue", lambda model, prompt: [1] * 16 if len(prompt) == 1 else list(range(16)))
    monkeypatch.setattr(trial, "_original", lambda checkpoint: None)
    checkpoint = SimpleNamespace(config={"bos_token_id": 1})
    alone = trial._generate(None, checkpoint, None)

    assert trial._generate(None, checkpoint, (torch.arange(8), torch.zeros(8, 4))).ok
    assert ("skipped", "from the beginning: nothing but token 1; the original is not here to compare with") == (
        alone.result,
        alone.detail,
    )


def generation(directory):
    return next(check for check in verify(directory).checks if check.name == "generation")


def test_a_model_that_repeats_itself_as_its_original_does_is_right(tmp_path):
    """After the beginning mark alone the embedded model ends at once, and so it does with all but `down_proj` in INT4."""
    settings = QuantizeSettings(preset="rtn", format="gptq", ignore=("down_proj",), device="cpu")
    check = generation(quantize("demo", None, settings, tmp_path / "out").path)

    assert ("ok", "16 greedy tokens from the beginning, repeated as the original repeats itself") == (
        check.result,
        check.detail,
    )


@pytest.mark.parametrize("family", ("gemma", "gemma2", "gemma3_text"))
def test_random_weights_that_say_one_word_are_right(rounded, family):
    """A tied head without training answers every token with itself."""
    check = generation(rounded(family, tie_word_embeddings=True))

    assert "ok" == check.result
    assert "as the original repeats itself" in check.detail


def test_another_model_in_the_place_of_the_original_proves_nothing(rounded, tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model("gemma", tie_word_embeddings=True), tmp_path / "source"))
    made = rounded(source=source)
    shutil.rmtree(source)
    shutil.copytree(tiny_model("llama"), source)

    assert "skipped" == generation(made).result


def test_weights_that_are_not_finite(damaged, edit, failures):
    with edit(damaged, "model.norm.weight") as tensors:
        tensors["model.norm.weight"][3] = float("inf")

    assert "`model.norm.weight` holds NaN or infinite values" == failures(damaged)["logits"]


def test_logits_that_overflow(monkeypatch):
    """A model that runs for five tokens and then gives infinity."""

    class Model:
        device = torch.device("cpu")
        calls = 0

        def __call__(self, input_ids, **_state):
            self.calls += 1
            last = torch.arange(8.0) if self.calls <= 5 else torch.full((8,), torch.inf)
            return SimpleNamespace(logits=last.expand(1, input_ids.shape[1], 8), past_key_values=None)

    checkpoint = SimpleNamespace(config={"bos_token_id": 1})
    check = trial._generate(Model(), checkpoint, None)

    assert (False, "from the beginning: logits are not finite after 5 tokens") == (check.ok, check.detail)


def test_a_model_too_large_to_dequantize_runs_packed(in_format, monkeypatch, failures):
    load, tried = trial.backends.load, []

    def cramped(checkpoint, *, device, backend):
        tried.append(backend)
        if backend == "reference":
            raise DeviceError("no room")
        return load(checkpoint, device=device, backend=backend)

    monkeypatch.setattr(trial.backends, "load", cramped)

    assert {} == failures(in_format("gptq"))
    assert ["reference", "reference-packed"] == tried
