"""Everything that is read from disk, fed with mutations of valid files: a reader returns or raises an error of ours.

`READERS` names them; `mutated` makes one input from a valid one with a source of randomness; `survives` judges one reading.
`tests/fuzz/test_readers.py` does it with a fixed budget, `tests/fuzz/campaign.py` for as long as one likes.
"""

import io
import json
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from hostile_files import CONFIG, MANIFEST, QUANTIZATION, header, safetensors, tensors, write_model
from marlin_tools.checkpoint.headers import INDEX, read_header
from marlin_tools.checkpoint.journal import Journal
from marlin_tools.checkpoint.manifest import holds, read_manifest, record_stage
from marlin_tools.checkpoint.output import OutputDirectory, check_output
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.checkpoint.skeleton import skeleton
from marlin_tools.data.rows import documents, read_rows, read_text
from marlin_tools.data.sources import find_corpus
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import MarlinToolsError, OutputError
from marlin_tools.evaluation.record import read_record
from marlin_tools.evaluation.scores import Evaluation, Score
from marlin_tools.families import known_family
from marlin_tools.formats import find_format
from marlin_tools.formats.contents import Contents, keeps
from marlin_tools.recipe import files as recipes
from marlin_tools.resources import recipes_dir


@dataclass(frozen=True)
class Reader:
    """`read` opens the directory after one of `valid` was changed and written to `file` in it."""

    file: str
    valid: tuple[bytes, ...]
    read: Callable[[Path], object]
    slow: bool = False


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _open(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.names(), checkpoint.dtype, checkpoint.nbytes, checkpoint.companions()
    known_family(checkpoint.config)


def _quantization(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    if checkpoint.quantization is None:
        return
    find_format(checkpoint.quantization)
    keeps(checkpoint.quantization, "model.layers.0.mlp.down_proj")
    contents = Contents(checkpoint)
    _ = contents.grids, contents.plain


def restore(found: dict[str, Any] | None) -> None:
    if found is not None:
        evaluation = Evaluation.restore(found)
        evaluation.describe(), evaluation.table(parts=True)


def _manifest(folder: Path) -> None:
    holds(folder, "f" * 64)
    with suppress(OutputError):
        check_output(folder, overwrite=True)
    if read_manifest(folder) is not None:
        record_stage(folder, "quantize", {"seconds": 1.0})


def _journal(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    with OutputDirectory(folder / "out", resume=True) as output:
        output.work.mkdir(exist_ok=True)
        entry = output.state / "block-00000.json"
        for name in ("run.json", "block-00000.json"):
            (output.state / name).write_bytes((folder / "note.json").read_bytes())
        try:
            journal = Journal(output, "f" * 64)
        except MarlinToolsError:
            output.clear()
            raise
        entry.write_bytes((folder / "note.json").read_bytes())
        journal.finished(0, shard)


def _text(folder: Path) -> None:
    list(find_corpus(str(folder / "text.txt"))().documents)
    read_text(folder / "text.txt")


def _skeleton(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    skeleton(checkpoint, torch.float16)


def _tokenizer(folder: Path) -> None:
    tokenizer = Checkpoint.open(folder).tokenizer()
    tokenizer("abc")


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pa.table({"text": ["one", "two", "three"], "n": [1, 2, 3]}), stream)
    return stream.getvalue()


def _tokens() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        TokenSet((torch.arange(8), torch.arange(5)), "x", packed=False, documents=2).save(Path(folder) / "t")
        return (Path(folder) / "t").read_bytes()


def _tokenizer_files() -> tuple[bytes, ...]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return (made.to_str().encode(),)


ROWS = (
    b'{"text": "one"}\n{"text": "two \\u00e9"}\n',
    b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n',
    b'{"instruction": "a", "input": "b", "output": "c"}\n',
)
SHARD = safetensors(*header(tensors()))
INDEXED = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors(), "model-00001-of-00002.safetensors")}
PLACES = {name: f"model-0000{1 + (place > 2)}-of-00002.safetensors" for place, name in enumerate(tensors())}
ENTRY = {"sha256": "0" * 64, "linears": MANIFEST["linears"], "seconds": 1.0, "fingerprint": "f" * 64}
HOW = {"origin": "x", "fingerprint": "x", "format": None, "backend": None, "device": "cpu", "computed_in": "float32"}
SCORES = [Score("ppl:demo", "perplexity", 2.0, 0.1).describe(), Score("demo_qa", "acc", 0.5).describe()]
EVALUATION = {
    "fingerprint": "x",
    "model": HOW,
    "baseline": HOW,
    "scores": SCORES,
    "settings": {},
    "versions": {},
    "notes": ["a"],
}
TABLES = tuple((recipes_dir() / f"{name}.yaml").read_bytes() for name in ("demo-presets", "other-models"))
FLAT = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "checkpoint_format": "gptq",
    "dynamic": {"-:x.*": {}},
}

READERS = {
    "safetensors header": Reader("model.safetensors", (SHARD,), lambda folder: read_header(folder / "model.safetensors")),
    "index": Reader(INDEX, (_json(INDEXED | {"weight_map": PLACES}),), _open),
    "config": Reader(
        "config.json", (_json(CONFIG), _json(CONFIG | {"torch_dtype": "bfloat16", "sliding_window": None})), _open
    ),
    "quantization_config": Reader(
        "config.json", tuple(_json(CONFIG | {"quantization_config": each}) for each in (QUANTIZATION, FLAT)), _quantization
    ),
    "generation_config": Reader("generation_config.json", (_json({"eos_token_id": [1, 2], "pad_token_id": 0}),), _open),
    "evaluation": Reader("evaluation.json", (_json(EVALUATION),), lambda folder: restore(read_record(folder))),
    "manifest": Reader("manifest.json", (_json(MANIFEST),), _manifest),
    "journal": Reader("note.json", (_json(ENTRY),), _journal),
    "rows": Reader("rows.jsonl", ROWS, lambda folder: list(documents(read_rows(folder / "rows.jsonl")))),
    "text": Reader("text.txt", ("one\n\ntwo é\n".encode(), b"\xef\xbb\xbfone"), _text),
    "token set": Reader("tokens", (_tokens(),), lambda folder: TokenSet.load(folder / "tokens")),
    "parquet": Reader(
        "rows.parquet", (_parquet(),), lambda folder: list(documents(read_rows(folder / "rows.parquet"))), slow=True
    ),
    "recipe": Reader(
        "x.yaml",
        tuple((recipes_dir() / f"{name}.yaml").read_bytes() for name in ("demo", "demo-sparse")),
        lambda folder: recipes.load(folder / "x.yaml"),
        slow=True,
    ),
    "table": Reader("x.yaml", TABLES, lambda folder: recipes.check(folder / "x.yaml"), slow=True),
    "config in transformers": Reader("config.json", (_json(CONFIG),), _skeleton, slow=True),
    "tokenizer": Reader("tokenizer.json", _tokenizer_files(), _tokenizer, slow=True),
    "tokenizer settings": Reader(
        "tokenizer_config.json",
        (_json({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "a"}),),
        _tokenizer,
        slow=True,
    ),
}

# ---- mutations --------------------------------------------------------------------------------------------------------

_DEEP: Any = []
for _ in range(100):
    _DEEP = [_DEEP]
NASTY: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**45, -(2**70), 1.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x" * 1000,
        "../x",
        "/etc/passwd",
        "a/b",
        "a\0b",
        "\ud800",
        "\x1b[31m",
        "a\nerror: b",
        "llama",
        "gemma2",
        "F16",
        "I16",
    ),
    *("float32", "(a+)+$", "re:(a*)*b", "*", "&a", "0x10", "1_000", "~", "model.safetensors"),
    *([], {}, [[]], _DEEP, [None] * 50, {"a": None}, {"": 1}),
)
PIECES = (
    *(b"\0", b"\xff\xfe", b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\ud800", b"\\", b"9" * 5000, b"[" * 3000, b"- " * 200),
    *(b"\n", b"\r", b"*a", b"&a ", b"<<: ", b"!!python/object:os.system ", b"1e999", b"NaN", b"\xed\xa0\x80"),
)


def mutated(content: bytes, draw: Random) -> bytes:
    """One to three changes: of its JSON, if it is some, or of its bytes."""
    for _ in range(draw.randint(1, 3)):
        content = (_changed_json if draw.random() < 0.65 else _changed_bytes)(content, draw)
    return content


def _changed_json(content: bytes, draw: Random) -> bytes:
    if len(content) > 8 and struct.unpack("<Q", content[:8])[0] <= len(content) - 8 and content[8:9] == b"{":
        length = struct.unpack("<Q", content[:8])[0]
        text = _changed_json(content[8 : 8 + length], draw)
        said = len(text) if draw.random() < 0.9 else draw.choice((0, 1, length, 2**31, 2**64 - 1))
        return struct.pack("<Q", said) + text + content[8 + length :]
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return _changed_bytes(content, draw)
    places = list(_places(value))
    if not places:
        return _changed_bytes(content, draw)
    _change(*draw.choice(places), places, draw)
    return json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _places(value: Any, depth: int = 0) -> Any:
    if depth < 20:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield value, key
            yield from _places(value[key], depth + 1)


def _change(parent: Any, key: Any, places: list[tuple[Any, Any]], draw: Random) -> None:
    how = draw.random()
    if how < 0.6:
        parent[key] = draw.choice(NASTY)
    elif how < 0.75:
        del parent[key]
    elif how < 0.85:
        other, place = draw.choice(places)
        parent[key] = json.loads(json.dumps(other[place]))
    elif isinstance(parent, dict):
        parent[str(draw.choice(NASTY))[:600]] = parent.pop(key)
    else:
        parent.append(draw.choice(NASTY))


def _changed_bytes(content: bytes, draw: Random) -> bytes:
    first, last = sorted((draw.randint(0, len(content)), draw.randint(0, len(content))))
    how = draw.randint(0, 4)
    if how == 0:
        return content[:first] + bytes([draw.randint(0, 255)]) + content[first + 1 :]
    if how == 1:
        return content[:first] + draw.choice(PIECES) + content[first:]
    if how == 2:
        return content[:first]
    if how == 3:
        return content[:first] + content[last:]
    return content[:last] + content[first:last] + content[last:]


def survives(reader: Reader, folder: Path, content: bytes) -> str:
    """Read one input: "read" or "refused". Whatever else is raised goes through."""
    (folder / reader.file).write_bytes(content)
    try:
        reader.read(folder)
    except MarlinToolsError as error:
        told = error
    else:
        return "read"
    for line in (*told.lines, told.hint or ""):
        assert len(line) <= 500, line
        assert line.isprintable(), ascii(line)
    assert len(told.lines) <= 21
    return "refused"


def place(reader: Reader, folder: Path) -> Path:
    """A directory in which only this reader's file will be damaged."""
    write_model(folder)
    (folder / "tokenizer.json").write_bytes(READERS["tokenizer"].valid[0])
    if reader.file == "model.safetensors":
        for file in folder.glob("model*"):
            file.unlink()
    return folder
