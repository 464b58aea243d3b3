"""Where calibration text comes from: a name, a file or a dataset of the Hugging Face Hub -> a corpus.

To add a source, write one function that returns a `Corpus` and one line in `SOURCES`.

Hub datasets are plain data files, streamed: no dataset script runs and nothing is fetched beyond what is read. With
`HF_HUB_OFFLINE=1` they are read from the hub cache. The sources named here are pinned to a commit of their repository; a
dataset that the user names is read as it is, and the notes of its corpus say so.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from marlin_tools.checkpoint.offline import give_up_early
from marlin_tools.data.rows import TABLES, Document, Rows, documents, paragraphs, read_rows, read_text, texts
from marlin_tools.errors import DataError, first_line, near
from marlin_tools.resources import demo_dir, expanded, is_file

POOL = 10_000
"""A draw from a streamed dataset is made among its first so many documents, whatever the number drawn."""

Shape = Literal["packed", "documents"]


@dataclass(frozen=True)
class Corpus:
    """Text that has been found and not yet been tokenised.

    name       for people and manifests
    documents  in their own order; reading a streamed corpus fetches it
    text       the whole as one running text, where it is one
    pool       how many of the documents a draw looks at; None for all
    shape      the samples that are made of it when nobody says otherwise
    held_out   documents that belong to evaluation and are never calibrated on
    """

    name: str
    documents: Iterable[Document]
    text: str | None = None
    pool: int | None = None
    shape: Shape = "packed"
    held_out: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face Hub."""

    owner_name: str
    config: str | None = None
    split: str = "train"
    data_file: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """Everything that was chosen, for people."""
        repository = self.owner_name + (f"@{self.revision}" if self.revision else "")
        return " ".join(filter(None, [repository, self.config, self.data_file, f"({self.split})"]))

    def rows(self) -> Rows:
        """Stream the rows; network, permission and naming failures become a `DataError`."""
        import httpx
        from datasets import load_dataset

        chosen: dict[str, Any] = {"data_files": {self.split: self.data_file}} if self.data_file else {}
        try:
            location = self._location()
            if location == self.owner_name and self.revision:
                chosen["revision"] = self.revision
            dataset = load_dataset(location, self.config, split=self.split, streaming=True, **chosen)
            for number, row in enumerate(dataset, start=1):
                yield f"{self.owner_name}, row {number}", row
        # What `datasets` raises: OSError for network, access and absence, RuntimeError for a script, ValueError for a wrong
        # config or split. The rows are not looked at here, so nothing of ours can be meant.
        except (OSError, httpx.HTTPError, RuntimeError, ValueError) as failure:
            hint = "use `--calib FILE` or `--calib demo`; a gated dataset needs `HF_TOKEN`, a script dataset cannot be read"
            raise DataError(f"`{self.name}`: cannot be read from the hub ({first_line(failure)})", hint=hint) from failure

    def corpus(self, *notes: str) -> Corpus:
        """Its rows as documents."""
        if self.revision is None:
            notes = (f"`{self.name}` is read at its newest revision: none is pinned", *notes)
        return Corpus(self.name, documents(self.rows()), pool=POOL, notes=notes)

    def _location(self) -> str:
        # Offline, `datasets` looks only at tables it prepared itself; the files in the hub cache are as good.
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        told = constants.HF_HUB_OFFLINE
        give_up_early()
        if not constants.HF_HUB_OFFLINE:
            return self.owner_name
        try:
            return snapshot_download(self.owner_name, revision=self.revision, repo_type="dataset", local_files_only=True)
        except LocalEntryNotFoundError as failure:
            why = "HF_HUB_OFFLINE is set" if told else "the hub does not answer"
            raise OSError(f"not in the hub cache, and {why}") from failure


def local_file(path: Path) -> Corpus:
    """A file: `.jsonl` and `.parquet` are tables, anything else is UTF-8 text with blank lines between documents."""
    if path.suffix.lower() in TABLES:
        return Corpus(str(path), documents(read_rows(path)))
    text = read_text(path)
    notes = () if path.suffix in (".txt", "") else (f"`{path}` is read as plain UTF-8 text",)
    return Corpus(str(path), paragraphs(text), text=text, notes=notes)


def demo() -> Corpus:
    """The text that ships with the package; needs no network."""
    return replace(local_file(demo_dir() / "calibration.txt"), name="demo")


def wikitext(split: str) -> Corpus:
    """WikiText-2, raw: its rows are lines, so they are joined to one text, as every published perplexity does."""
    dataset = HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", split, revision="b08601e04326c79dfdd32d625aee71d232d685c3")
    text = "\n\n".join(texts(dataset.rows()))
    return replace(dataset.corpus(), text=text, documents=paragraphs(text), pool=None)


def c4() -> Corpus:
    """The first of the 1024 training files of English C4."""
    file = "en/c4-train.00000-of-01024.json.gz"
    return HubDataset("allenai/c4", data_file=file, revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2").corpus()


def redpajama() -> Corpus:
    """What the paper calibrates on, as far as it can still be had: one document per sequence, 1024 of them held out."""
    note = "DKYoon/SlimPajama-6B stands in for RedPajama-Data-1T-Sample, which is a script dataset that no longer loads"
    dataset = HubDataset("DKYoon/SlimPajama-6B", revision="b5f90f419b7489cdba26fdbc8c022fcb5562f968")
    return replace(dataset.corpus(note), shape="documents", held_out=1024)


def pile() -> Corpus:
    """Ten thousand documents of The Pile."""
    return HubDataset("NeelNanda/pile-10k", revision="127bfedcd5047750df5ccf3a12979a47bfa0bafa").corpus()


def ultrachat() -> Corpus:
    """Conversations, for chat models."""
    revision = "8049631c405ae6576f93f445c6b8166f76f5505a"
    return HubDataset("HuggingFaceH4/ultrachat_200k", split="train_sft", revision=revision).corpus()


SOURCES: dict[str, Callable[[], Corpus]] = {
    "demo": demo,
    "wikitext2": partial(wikitext, "train"),  # the test split belongs to evaluation
    "c4": c4,
    "redpajama": redpajama,
    "pile": pile,
    "ultrachat": ultrachat,
}
BY_DOCUMENT = frozenset({"redpajama"})
"""Sources whose samples are single documents when nobody says otherwise."""


_KNOWN = f"known sources: {', '.join(SOURCES)}, a file, `hf:owner/name`"


def check_sources(source: str) -> None:
    """Refuse what can name no sources, whatever there is on this machine."""
    for name in each_of(source):
        if not name.strip():
            raise DataError("no source is named", hint=_KNOWN)
        if name.startswith("hf:"):
            _dataset(name)


def each_of(source: str) -> tuple[str, ...]:
    """The sources that are named, with commas between them; a file whose name has a comma is one."""
    names = tuple(part.strip() for part in source.split(","))
    if len(names) == 1 or is_file(source):
        return (source,)
    if not all(names):
        raise DataError(f"`{source}`: a comma with no source beside it", hint="write the names with one comma between two")
    places = [expanded(name).resolve() if name not in SOURCES and is_file(name) else name for name in names]
    if twice := next((name for at, name in enumerate(names) if places[at] in places[:at]), None):
        raise DataError(f"`{source}`: `{twice}` is named twice", hint="name every source once: each gives as many samples")
    return names


def find_corpus(source: str) -> Callable[[], Corpus]:
    """How to open a name in `SOURCES`, `hf:owner/name[:config][@split]`, or a path; a name wins over a file of that name.

    Nothing is read yet, so that a plan can ask whether there is such a thing.
    """
    if source in SOURCES:
        return SOURCES[source]
    if source.startswith("hf:"):
        return _dataset(source).corpus
    path = expanded(source)
    if path.is_file():
        return partial(local_file, path)
    if path.exists():
        hint = "name a text file in it" if path.is_dir() else "texts are read twice: write it to a file first"
        raise DataError(f"`{source}` is no regular file", hint=hint)
    is_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)
    hint = f"did you mean `hf:{source}`? {_KNOWN}" if is_hub else near(source, SOURCES, _KNOWN)
    raise DataError(f"`{source}`: no such file or source", hint=hint)


def _dataset(source: str) -> HubDataset:
    """What `hf:owner/name[:config][@split]` names."""
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?::([^:@]+))?(?:@([^:@]+))?", source)
    if match is None:
        raise DataError(f"`{source}`: not a dataset of the hub", hint="write `hf:owner/name`, `hf:owner/name:config@split`")
    return HubDataset(match[1], match[2], match[3] or "train")
