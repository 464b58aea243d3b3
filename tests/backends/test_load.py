"""Loading is strict: nothing missing, nothing left over, and every choice is said aloud."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlin_tools import backends
from marlin_tools.backends import BACKENDS, choose_backend, load
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.errors import DeviceError, ModelError, RecipeError
from marlin_tools.formats.stored import StoredLinears

NORM = "model.layers.1.input_layernorm.weight"


def test_a_missing_tensor_is_named(tiny_llama, edit):
    edit(tiny_llama, {NORM: None})

    with pytest.raises(ModelError, match=f"lacks `{NORM}`"):
        load(tiny_llama, device="cpu")


def test_leftovers_are_named_and_counted(tiny_llama, edit):
    edit(tiny_llama, {f"model.vision.{n}": torch.ones(2) for n in range(5)})

    with pytest.raises(ModelError, match=r"holds `model.vision.0`, `model.vision.1`, `model.vision.2` and 2 more, which"):
        load(tiny_llama, device="cpu")


def test_a_wrong_shape_is_named(tiny_llama, edit):
    edit(tiny_llama, {NORM: torch.ones(255)})

    with pytest.raises(ModelError, match=rf"`{NORM}` is \(255,\) in the checkpoint, config.json asks for \(256,\)"):
        load(tiny_llama, device="cpu")


def test_values_that_are_not_finite_are_refused(tiny_llama, edit):
    edit(tiny_llama, {NORM: torch.full((256,), float("nan"))})

    with pytest.raises(ModelError, match="NaN"):
        load(tiny_llama, device="cpu")


def test_a_quantized_linear_of_the_wrong_size_is_named(tiny_llama, write_int4, edit):
    packed, _ = write_int4(tiny_llama, "gptq")
    edit(packed, {}, intermediate_size=1024)

    with pytest.raises(ModelError, match=r"`model.layers.0.mlp.down_proj` is \(256, 512\) in the checkpoint"):
        load(packed, device="cpu")


def test_blocks_that_config_does_not_count_are_named(tiny_llama, write_int4, edit):
    packed, _ = write_int4(tiny_llama, "gptq")
    edit(packed, {}, num_hidden_layers=1)

    with pytest.raises(ModelError, match="num_hidden_layers"):
        load(packed, device="cpu")


def test_frequencies_in_old_checkpoints_are_known(tiny_llama, edit):
    edit(tiny_llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})

    assert load(tiny_llama, device="cpu").config.num_hidden_layers == 2


def test_zero_biases_of_old_gptq_writers_are_known_and_others_are_not(tiny_llama, write_int4, edit):
    packed, _ = write_int4(tiny_llama, "gptq")
    edit(packed, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)})
    assert load(packed, device="cpu").config.num_hidden_layers == 2

    edit(packed, {"model.layers.0.self_attn.q_proj.bias": torch.ones(256)})
    with pytest.raises(ModelError, match=r"q_proj\.bias"):
        load(packed, device="cpu")


def test_a_head_that_is_stored_is_used_even_if_config_ties_it(tiny_qwen2, edit):
    edit(tiny_qwen2, {"lm_head.weight": torch.full((512, 256), 0.5)})
    model = load(tiny_qwen2, device="cpu")

    assert 0.5 == model.lm_head.weight.unique().item()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_an_equal_head_stays_tied(tiny_qwen2, edit):
    embedding = AutoModelForCausalLM.from_pretrained(tiny_qwen2).model.embed_tokens.weight.detach()
    edit(tiny_qwen2, {"lm_head.weight": embedding.clone()})
    model = load(tiny_qwen2, device="cpu")

    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_embedding_can_come_from_its_tied_head(tiny_qwen2, edit):
    embedding = AutoModelForCausalLM.from_pretrained(tiny_qwen2).model.embed_tokens.weight.detach()
    edit(tiny_qwen2, {"model.embed_tokens.weight": None, "lm_head.weight": embedding.clone()})

    assert torch.equal(embedding, load(tiny_qwen2, device="cpu").model.embed_tokens.weight.to(embedding.dtype))


def test_nothing_is_left_without_a_value_and_nothing_is_trained(tiny_llama, write_int4):
    model = load(write_int4(tiny_llama, "marlin")[0], device="cpu")
    tensors = [*model.parameters(), *model.buffers()]

    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    assert not model.training


def test_end_of_text_comes_from_generation_config(tiny_llama):
    (tiny_llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))

    assert [1, 7] == load(tiny_llama, device="cpu").generation_config.eos_token_id


# ---- which backend ---------------------------------------------------------------------------------------------------


def notes(events):
    return [event.text for event in events if event.kind == "note"]


def test_auto_says_what_it_took_and_why(tiny_llama, write_int4):
    events = []
    load(write_int4(tiny_llama, "marlin")[0], device="cpu", emit=events.append)

    assert notes(events)[0].endswith("on cpu in float32: backend `reference` (torch, dequantised once at load; the default)")
    assert ("linears", 14, 14) == (events[-1].text, events[-1].done, events[-1].total)


@pytest.mark.parametrize(
    ("dtype", "group_size", "capability", "expected"),
    (
        (torch.float16, 128, (9, 0), ("native", "our kernels; the default")),
        (torch.bfloat16, -1, (8, 0), ("native", "our kernels; the default")),
        (torch.float32, 128, (9, 0), ("reference", "`native` multiplies float16 or bfloat16 activations, not torch.float32; ")),
        (torch.float16, 32, (8, 6), ("native", "our kernels; the default")),
        (torch.float16, 16, (9, 0), ("reference", "`native` cannot hold `model.layers.0.")),
        (torch.float16, 128, (7, 5), ("reference", "`native` needs compute capability 8.0 (Ampere), Some GPU has 7.5; ")),
    ),
)
def test_a_gpu_runs_our_kernels_if_it_can(tiny_llama, write_int4, monkeypatch, dtype, group_size, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(backends, "free_memory", lambda _: 1 << 30)
    checkpoint = Checkpoint.open(write_int4(tiny_llama, "compressed-tensors", group_size)[0])

    chosen, why = choose_backend("auto", skeleton(checkpoint, dtype), StoredLinears(checkpoint), torch.device("cuda"))

    assert (expected[0], True) == (chosen, expected[1] in why)


@pytest.mark.parametrize(("parts", "expected"), ((4, "native"), (8, "reference")))
def test_each_linear_is_held_against_our_kernels_with_its_own_groups(
    tiny_llama, write_int4, edit, monkeypatch, parts, expected
):
    """All have groups of 128, one of 32 or of 16."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(backends, "free_memory", lambda _: 1 << 30)
    folder, name = write_int4(tiny_llama, "compressed-tensors")[0], "model.layers.1.mlp.up_proj.weight_scale"
    edit(folder, {name: Checkpoint.open(folder).read(name).repeat_interleave(parts, dim=1)})
    checkpoint = Checkpoint.open(folder)

    chosen, why = choose_backend("auto", skeleton(checkpoint, torch.float16), StoredLinears(checkpoint), torch.device("cuda"))

    assert expected == chosen
    assert expected == "native" or "`native` cannot hold `model.layers.1.mlp.up_proj`: group_size 16 is neither" in why


def test_auto_takes_less_memory_when_there_is_less(tiny_llama, write_int4, monkeypatch):
    monkeypatch.setattr(backends, "free_memory", lambda _: 4_000_000)  # 6.3 MB dequantised, 1.7 MB packed
    events = []
    load(write_int4(tiny_llama, "marlin")[0], device="cpu", emit=events.append)

    assert "`reference-packed`" in notes(events)[0]
    assert "backend `reference` needs 0.0 GB, 0.0 GB are free on cpu; the first that can" in notes(events)[0]


def test_no_room_is_an_error_before_loading(tiny_llama, monkeypatch):
    monkeypatch.setattr(backends, "free_memory", lambda _: 1000)

    with pytest.raises(DeviceError, match=r"the model needs .* GB, 0\.0 GB are free on cpu"):
        load(tiny_llama, device="cpu")


def test_running_out_of_memory_is_a_plain_error(tiny_llama, monkeypatch):
    def burst(*_args):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(backends, "fill", burst)
    with pytest.raises(DeviceError, match="does not fit into the memory of cpu"):
        load(tiny_llama, device="cpu")


def test_an_unknown_backend_is_answered_with_the_nearest(tiny_llama):
    with pytest.raises(RecipeError) as caught:
        load(tiny_llama, device="cpu", backend="referense")

    assert ("unknown backend `referense`", "did you mean `reference`?") == (caught.value.message, caught.value.hint)


@pytest.mark.parametrize("how", [{"backend": "reference-packed"}, {"backend": "torch-int4"}, {"activations": "fp8"}])
def test_what_transformers_could_not_read_back_is_not_saved(tiny_llama, write_int4, tmp_path, how):
    packed, _ = write_int4(tiny_llama, "gptq")
    model, ids = load(packed, device="cpu", **how), torch.tensor([[1, 2, 3]])
    copies = [model, copy.deepcopy(model)]

    assert all(torch.equal(model(ids).logits, each(ids).logits) for each in copies)
    for each in copies:
        with pytest.raises(ModelError, match="`save_pretrained` cannot write"):
            each.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_was_dequantised_is_saved_dense(tiny_llama, write_int4, tmp_path):
    packed, _ = write_int4(tiny_llama, "gptq")
    model, ids = load(packed, device="cpu", backend="reference"), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path / "saved")

    assert torch.equal(model(ids).logits, load(tmp_path / "saved", device="cpu")(ids).logits)


def test_activations_that_there_are_not_are_refused(tiny_llama, write_int4):
    packed, _ = write_int4(tiny_llama, "gptq")

    with pytest.raises(RecipeError, match="unknown activations `int8`"):
        load(packed, device="cpu", activations="int8")


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("bf16", TypeError), ("float32", TypeError), (torch.int8, ValueError), (torch.float8_e4m3fn, ValueError)],
)
def test_types_that_no_model_computes_in_are_refused_as_such(tiny_llama, dtype, error):
    with pytest.raises(error, match=r"torch\.bfloat16"):
        load(tiny_llama, device="cpu", dtype=dtype)


def test_a_backend_that_is_refused_for_its_type_is_not_sent_for_memory(tiny_llama, write_int4):
    packed, _ = write_int4(tiny_llama, "gptq")

    with pytest.raises(DeviceError, match="multiplies bfloat16 activations") as refused:
        load(packed, device="cpu", backend="torch-int4", dtype=torch.float32)
    assert "memory" not in refused.value.hint


def test_threads_make_models_of_different_types_one_after_the_other(tiny_llama, monkeypatch):
    make = AutoModelForCausalLM.from_config

    def slowly(config, dtype, **how):
        model = make(config, dtype=dtype, **how)
        torch.set_default_dtype(dtype)  # as transformers does while it makes one, for longer
        time.sleep(0.05)
        torch.set_default_dtype(torch.float32)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", slowly)
    kinds = [torch.bfloat16, torch.float32] * 4
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda dtype: skeleton(Checkpoint.open(tiny_llama), dtype), kinds))

    assert [{parameter.dtype for parameter in model.parameters()} for model in models] == [{dtype} for dtype in kinds]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_of_the_table_can_be_imported(name):
    assert callable(BACKENDS[name].function("16bit"))
