"""Special tokens stand exactly once, and the template speaks only when it is asked."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers.processors import Sequence, TemplateProcessing

from marlin_tools.data.render import Encoder, leave_open
from marlin_tools.errors import DataError

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
Make = Callable[..., Any]


def test_a_text_is_its_tokens_behind_one_bos(tokenizer: Any) -> None:
    ids = Encoder(tokenizer)("aä\n").tolist()

    assert [0, *tokenizer.convert_tokens_to_ids(["a", "Ã", "¤", "Ċ"])] == ids


def test_a_text_goes_on_though_the_tokenizer_would_end_it(make_tokenizer: Make) -> None:
    plain, ending = make_tokenizer(), make_tokenizer(TEMPLATE)
    ending.eos_token = "!"
    end = ending.convert_tokens_to_ids("!")
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A !", special_tokens=[("<s>", 0), ("!", end)])
    assert end == ending("a")["input_ids"][-1]

    assert [Encoder(plain).eos, Encoder(ending).eos] == [False, True]
    for text in ("aä", "so!", ""):
        assert Encoder(plain)(text).tolist() == Encoder(ending)(text).tolist()
    assert Encoder(ending)([{"role": "user", "content": "hi!"}])[-1] == end


def test_others_are_given_a_tokenizer_that_leaves_texts_open(make_tokenizer: Make) -> None:
    plain, unruled = make_tokenizer(), make_tokenizer(bos=False)
    rule = TemplateProcessing(single="<s> $A !", special_tokens=[("<s>", 0), ("!", plain.convert_tokens_to_ids("!"))])
    for processor in (rule, Sequence([rule])):
        ending = make_tokenizer()
        ending.eos_token, ending.backend_tokenizer.post_processor = "!", processor
        leave_open(ending)
        for text in ("aä", "so!", ""):
            assert plain(text)["input_ids"] == ending(text)["input_ids"]
    for other in (plain, unruled):
        before = other.backend_tokenizer.to_str()
        leave_open(other)
        assert before == other.backend_tokenizer.to_str()


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_template_brings_its_own_bos(make_tokenizer: Make, mode: Any) -> None:
    encode = Encoder(make_tokenizer(TEMPLATE), mode)

    assert "<s>[user]hi[assistant]ho" == encode.render(CHAT)
    assert 1 == encode(CHAT).tolist().count(0)
    assert encode(CHAT).tolist() == Encoder(make_tokenizer())("[user]hi[assistant]ho").tolist()


@pytest.mark.parametrize(("template", "mode"), [(None, "auto"), (None, "off"), (TEMPLATE, "off")])
def test_without_a_template_turns_are_paragraphs(make_tokenizer: Make, template: str | None, mode: Any) -> None:
    encode = Encoder(make_tokenizer(template), mode)

    assert "hi\n\nho" == encode.render(CHAT)
    assert encode("hi\n\nho").tolist() == encode(CHAT).tolist()
    assert 0 == encode(CHAT)[0]


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_plain_text_is_left_alone(make_tokenizer: Make, mode: Any) -> None:
    assert " as it is\n" == Encoder(make_tokenizer(TEMPLATE), mode).render(" as it is\n")


def test_on_insists(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match="there are no conversations") as plain:
        Encoder(make_tokenizer(TEMPLATE), "on")("plain")
    with pytest.raises(DataError, match="the tokenizer has none") as bare:
        Encoder(make_tokenizer(None), "on")(CHAT)
    for refusal in (plain, bare):  # a recipe alone can insist: no verb has an option for it
        assert str(refusal.value.hint).startswith("use `chat_template: auto`")


def test_a_conversation_that_the_template_refuses_is_named(make_tokenizer: Make) -> None:
    with pytest.raises(DataError, match=r"refuses a conversation with the roles user, assistant: must alternate"):
        Encoder(make_tokenizer("{{ raise_exception('must alternate') }}"))(CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ tools | length }}", "object of type 'NoneType' has no len"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ({"one": TEMPLATE, "another": TEMPLATE}, "no default specified"),
    ],
)
def test_a_template_that_fails_is_one_line(make_tokenizer: Make, template: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"refuses a conversation with the roles user, assistant: .*{reason}"):
        Encoder(make_tokenizer(template))(CHAT)


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Any) -> None:
    highest = int(Encoder(tokenizer)("az").max())

    assert highest == Encoder(tokenizer, vocab_size=highest + 1)("az").max()
    with pytest.raises(DataError, match=f"token id {highest} is outside the model's vocabulary of {highest}"):
        Encoder(tokenizer, vocab_size=highest)("az")


def test_bos_is_told_apart(make_tokenizer: Make) -> None:
    assert Encoder(make_tokenizer()).bos
    assert not Encoder(make_tokenizer(bos=False)).bos


def test_marks_in_the_place_of_a_bos_are_as_good(make_tokenizer: Make) -> None:
    """As GLM's `[gMASK]<sop>`."""
    marked = make_tokenizer()
    mark = marked.convert_tokens_to_ids("!")
    process = TemplateProcessing(single="! <s> $A", special_tokens=[("<s>", 0), ("!", mark)])
    marked.backend_tokenizer.post_processor = process

    assert [mark, 0] == Encoder(marked)("a")[:2].tolist()
    for bos in ("<s>", None):
        marked.bos_token = bos
        assert Encoder(marked).bos


def test_an_end_is_no_bos(make_tokenizer: Make) -> None:
    ending = make_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <s>", special_tokens=[("<s>", 0)])

    assert not Encoder(ending).bos
