"""The demo model's tokenizer: sentencepiece BPE, written twice, as `tokenizer.model` and as `tokenizer.json`.

Both files hold the same pieces and must give the same ids for any text. sentencepiece keeps the pieces in the order in which
they were merged; the `tokenizers` library wants the merges themselves, so they are recovered from the pieces: every split of
a piece into two known pieces is a merge, and earlier pieces merge first. Unknown characters fall back to bytes.
Ids: 0 `<unk>`, 1 `<s>` (put before every text), 2 `</s>` (put between documents), 3-258 the bytes.
"""

import json
from pathlib import Path

VOCABULARY = 1024
CONTEXT = 1024


def train(texts: list[str], directory: Path) -> None:
    """Learn the pieces from texts and write all three tokenizer files."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=VOCABULARY, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, max_sentence_length=16384, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    _write_json(directory / "tokenizer.json", _fast(vocabulary))
    _write_json(directory / "tokenizer_config.json", _config())


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for piece, rank in vocabulary.items():
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(rank, vocabulary[left], vocabulary[right], left, right) for left, right in splits
                 if left in vocabulary and right in vocabulary]  # fmt: skip
        found += known if rank > 258 else []
    return [(left, right) for *_, left, right in sorted(found)]


def _fast(vocabulary: dict[str, int]) -> dict[str, object]:
    """The `tokenizer.json`: spaces become `▁`, one stands before the text; undone when decoding."""
    special = [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i, name in enumerate(("<unk>", "<s>", "</s>"))]  # fmt: skip
    text = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text[0]], "pair": [bos, *text],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": [list(pair) for pair in _merges(vocabulary)]},
    }  # fmt: skip


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
