"""Held-out text for perplexity, as the published tables take it.

    wikitext2   the test split, rows joined with two newlines, one stream
    FILE        text as it is; the `text` rows of a `.jsonl` or `.parquet` file joined with two newlines; one stream
    redpajama   the documents that calibration holds out, each a sequence of its own and of equal weight
    demo        the bundled held-out documents of the embedded model's world, likewise

A stream is tokenised once, with one BOS at its start if the tokenizer has it, and cut into windows without overlap; the
remainder is dropped. No chat template. Calibration never sees this text: it reads wikitext2's training split alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from marlin_tools.data.render import Encoder
from marlin_tools.data.rows import TABLES, no_text, read_rows, read_text, texts
from marlin_tools.data.samples import LONGEST_DOCUMENT, divide, kept, pack
from marlin_tools.data.sources import Corpus, redpajama, wikitext
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError
from marlin_tools.resources import demo_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NAMED = frozenset({"wikitext2", "redpajama", "demo"})
"""Texts that are no files of the user's."""


def evaluation_documents(
    ref: str, tokenizer: "PreTrainedTokenizerBase", *, seqlen: int = LONGEST_DOCUMENT, vocab_size: int | None = None
) -> TokenSet:
    """The sequences that `ppl:...` is measured on: every full window of a stream, or the documents of `ppl:redpajama`."""
    name = ref.removeprefix("ppl:")
    encode = Encoder(tokenizer, "off", vocab_size)
    if name == "redpajama":
        return _held_out(encode, seqlen)
    if name == "demo":
        return _demo(encode, seqlen)
    text, notes = _running_text(name)
    return pack(Corpus(name, [text], text=text, notes=notes), encode, seqlen, num_samples=None)


def find_text(name: str) -> None:
    """Refuse what is no name of a text and no file; nothing is read."""
    if name not in NAMED and not Path(name).is_file():
        hint = "use `ppl:wikitext2`, `ppl:redpajama`, `ppl:demo` or `ppl:FILE`"
        raise DataError(f"`ppl:{name}`: no such file or evaluation text", hint=hint)


def _running_text(name: str) -> tuple[str, tuple[str, ...]]:
    """A text and the notes of its corpus."""
    if name == "wikitext2":
        corpus = wikitext("test")
        assert corpus.text is not None, corpus.name
        return corpus.text, corpus.notes
    find_text(name)
    path = Path(name)
    text = "\n\n".join(texts(read_rows(path))) if path.suffix.lower() in TABLES else read_text(path)
    if not text.strip():
        raise no_text(name)
    return text, ()


def _demo(encode: Encoder, seqlen: int) -> TokenSet:
    documents = texts(read_rows(demo_dir() / "tasks" / "demo_text.jsonl"))
    sequences = tuple(kept(documents, encode, seqlen))
    if not sequences:
        message = f"`demo`: none of its {len(documents)} documents fits into {seqlen} tokens"
        raise DataError(message, hint="use a larger `--seqlen`")
    notes = () if encode.bos else ("no BOS: the tokenizer adds none",)
    return TokenSet(sequences, "demo", packed=False, documents=len(documents), notes=notes)


def _held_out(encode: Encoder, seqlen: int) -> TokenSet:
    corpus = redpajama()
    documents = divide(corpus, encode)[0]
    fitting = tuple(ids for ids in documents if len(ids) <= seqlen)
    if not fitting:
        message = f"`{corpus.name}`: none of its {len(documents)} held-out documents fits into {seqlen} tokens"
        raise DataError(message, hint="use a larger `--seqlen`")
    left_out = f"{len(documents) - len(fitting)} of {len(documents)} held-out documents are longer than {seqlen} tokens"
    notes = corpus.notes if len(fitting) == len(documents) else (*corpus.notes, left_out)
    return TokenSet(fitting, corpus.name, packed=False, documents=len(documents), order="shuffled", notes=notes)
