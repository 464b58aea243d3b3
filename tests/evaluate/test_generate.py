"""Completions are new text only, the same every time."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlin_tools.errors import DataError
from marlin_tools.evaluation.generate import COLDEST, GenerateSettings, generate


def settings(**options):
    return GenerateSettings(device="cpu", **({"max_new_tokens": 12} | options))


def test_greedy_takes_the_likeliest_token_each_time(model):
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer("The boat left")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))

    assert tokenizer.decode(ids, skip_special_tokens=True) == "The boat left" + generate(model, "The boat left", settings())


def test_the_demo_model_answers_with_the_space_that_belongs_there():
    text = generate("demo", "Question: What colour is the duck? Answer:", settings(max_new_tokens=8))

    assert text.startswith(" ")
    assert "Question: What colour" not in text


def test_a_prompt_goes_on_though_the_tokenizer_would_end_it(model, closing):
    assert (
        AutoTokenizer.from_pretrained(closing)("The boat").input_ids[-1]
        == 1 + AutoTokenizer.from_pretrained(model).bos_token_id
    )
    assert generate(model, "The boat left", settings()) == generate(closing, "The boat left", settings())


def test_an_empty_prompt_starts_from_bos(model):
    assert generate(model, "", settings()) == generate(model, "<s>", settings())


def test_sampling_follows_the_seed_and_leaves_the_generator_alone(int4):
    state = torch.random.get_rng_state()
    texts = [generate(int4, "Nine", settings(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]

    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


ASKED = {"repetition_penalty": 5.0, "num_beams": 4, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6, 7], "min_p": 0.5}


def test_what_the_model_asks_for_besides_is_not_done(tiny_llama):
    plain = [generate(tiny_llama, "The boat", settings(temperature=t)) for t in (0.0, 1.0)]
    asked = ASKED | {"max_time": 0.01, "num_return_sequences": 2, "return_dict_in_generate": True}
    (tiny_llama / "generation_config.json").write_text(json.dumps(asked))

    assert plain == [generate(tiny_llama, "The boat", settings(temperature=t)) for t in (0.0, 1.0)]


@pytest.mark.parametrize("asked", ({"temperature": 1e-40}, {"temperature": 1, "seed": 2**64}))
def test_numbers_that_cannot_be_computed_with_are_refused(asked):
    with pytest.raises(ValidationError):
        settings(**asked)
    assert generate("demo", "The boat", settings(temperature=COLDEST, max_new_tokens=2))


def test_generation_ends_where_the_positions_end(tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    events = []
    tokens = len(AutoTokenizer.from_pretrained(tiny_llama)("The boat")["input_ids"])
    generate(tiny_llama, "The boat", settings(), emit=events.append)

    assert f"{8 - tokens} tokens are left to the model, 12 asked for" in [event.text for event in events]
    assert events[-1].data["tokens"] <= 8 - tokens


def test_a_prompt_that_fills_all_positions_is_refused(model):
    with pytest.raises(DataError, match="leaves no room in the model's"):
        generate(model, "The boat. " * 400, settings())


def test_a_prompt_that_is_no_text_is_refused(model):
    with pytest.raises(DataError, match=r"no text in UTF-8"):
        generate(model, b"\xff\xfe".decode("utf-8", "surrogateescape"))


def test_it_tells_how_far_it_is(model):
    events = []
    generate(model, "The boat left", settings(max_new_tokens=20), emit=events.append)

    assert [(event.done, event.total) for event in events if event.text == "tokens"] == [(8, 20), (16, 20), (20, 20)]
