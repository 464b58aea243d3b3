"""`python tests/kill/campaign.py --count 200`: runs that are killed, continued to the end, and compared byte for byte.

Every verb that writes a model is run once undisturbed, counting what it does to files: syncs, renames, removals. A trial then
takes a verb and dies by SIGKILL before or after one of these, publishing included, or at a moment in between; the same command
is given again and has to end with the same bytes, with nothing left beside them. In the meantime what is under the final name
is absent, or what was there before, or complete. Processes are forked from this one, which never computes, so a trial is fast.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers  # noqa: F401 (forked children have it)

import marlin_tools.run.execute
from conftest import SHAPE, TEXT, write_tokenizer
from marlin_tools.cli import main as command_line

SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXT_FLAGS = ("--calib", "text.txt", "--num-samples", "4", "--seqlen", "32")
SPARSE = """\
stages.0.preset=magnitude
calibrate.source=text.txt
calibrate.num_samples=4
calibrate.seqlen=32
finetune.text={source: text.txt, num_samples: 12, seqlen: 32}
finetune.tokens=256
finetune.batch=2
finetune.micro=2
finetune.held_out=2
evaluate.tasks=[ppl:text.txt]
evaluate.seqlen=32
evaluate.baseline=model
model=model
expect=[]"""
SETS = tuple(part for line in SPARSE.splitlines() for part in ("--set", line))
LEARN = ("--tokens", "256", "--batch", "2", "--micro", "2")
VERBS: dict[str, tuple[str, ...]] = {
    "quantize rtn": ("quantize", "model", "--preset", "rtn", "-o", "out"),
    "quantize fast": ("quantize", "model", "--preset", "fast", *TEXT_FLAGS, "-o", "out"),
    "quantize marlin": ("quantize", "model", "--preset", "marlin", *TEXT_FLAGS, "-o", "out"),
    "quantize default": ("quantize", "model", "--preset", "default", *TEXT_FLAGS, "-o", "out"),
    "quantize tuned": ("quantize", "model", "--tune", "4", *TEXT_FLAGS, "-o", "out"),
    "quantize 2:4": ("quantize", "model", "--preset", "fast", "--sparsity", "2:4", *TEXT_FLAGS, "-o", "out"),
    "quantize keep dense": ("quantize", "model", "--preset", "fast", "--sparsity", "2:4", "--keep-dense", "40%", *TEXT_FLAGS,
                            "-o", "out"),
    "quantize over": ("quantize", "model", "--preset", "rtn", "-o", "made", "--overwrite"),
    "prune": ("prune", "model", "--preset", "sparsegpt", *TEXT_FLAGS, "-o", "out"),
    "finetune": ("finetune", "pruned", "--teacher", "model", "--calib", "text.txt", "--num-samples", "40", "--seqlen", "16",
                 *LEARN, "-o", "out"),
    "finetune INT4": ("finetune", "made", "--teacher", "model", "--calib", "text.txt", "--num-samples", "40", "--seqlen", "16",
                      *LEARN, "-o", "out"),
    "export": ("export", "made", "--format", "compressed-tensors", "-o", "out"),
    "eval": ("eval", "made", "--tasks", "ppl:text.txt", "--seqlen", "32"),
    "run demo-sparse": ("run", "demo-sparse", *SETS, "-o", "out"),
}  # fmt: skip
WATCHED = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Undisturbed:
    """What a verb does to files, how long it takes, and what is there at its end."""

    operations: int
    seconds: float
    files: dict[str, str]


def forked(work: Callable[[], None], log: Path) -> int:
    """Start a process that only does this."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        if code == 70:
            traceback.print_exc()  # the parent is told by the code, people by the log
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Its exit status; negative if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def watched(folder: Path, arguments: tuple[str, ...], fatal: int | None, *, after: bool = False) -> None:
    """The command in this process; dies before or after operation `fatal`, or else tells how many there were."""
    os.chdir(folder)
    count = [0]

    def counting(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def operation(*args: object, **options: object) -> object:
            if name == "fsync" or ".partial" in f"{args}" or "out" in f"{args}" or "made" in f"{args}" or options:
                count[0] += 1
                if count[0] == fatal and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **options)
                if count[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return real(*args, **options)

        return operation

    for name in WATCHED:
        setattr(os, name, counting(name, getattr(os, name)))
    try:
        command_line(list(arguments))
    finally:
        (folder.parent / "operations").write_text(str(count[0]))
        (folder.parent / "modules").write_text("\n".join(sys.modules))


def load_what_it_loaded(root: Path) -> None:
    """Have in this process what the last child imported, most of the time of a small run, so that later children have it."""
    for name in (root / "modules").read_text().splitlines():
        if name not in sys.modules and not name.startswith("__"):
            with suppress(ImportError, AttributeError, ValueError, RuntimeError):
                import_module(name)


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file but the page, which shows times; a manifest without its times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "report.html":
            content = file.read_bytes()
            if file.name == "manifest.json":
                content = json.dumps({k: v for k, v in json.loads(content).items() if k != "times"}).encode()
            found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def make_model(folder: Path) -> None:
    """A Llama of two blocks, each as small as a group of 128 weights allows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **(SHAPE | SMALL)), dtype=torch.float16)
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    (folder / "text.txt").write_text(TEXT * 60)


def prepare(root: Path) -> Path:
    """What the verbs start from: a model, a text, a pruned and a quantised model."""
    base = root / "base"
    base.mkdir()
    made = (
        ("prune", "model", "--preset", "magnitude", "-o", "pruned"),
        ("quantize", "model", "--preset", "fast", *TEXT_FLAGS, "--format", "gptq", "-o", "made"),
    )
    steps = [partial(make_model, base), *(partial(watched, base, arguments, None) for arguments in made)]
    for step in steps:
        if ended(forked(step, root / "log")):
            raise SystemExit((root / "log").read_text())
        if (root / "modules").exists():
            load_what_it_loaded(root)
    return base


def measure(root: Path, base: Path, verb: str) -> Undisturbed:
    """The run that all others have to equal."""
    folder = Path(shutil.copytree(base, root / "whole"))
    begin = time.monotonic()
    if code := ended(forked(lambda: watched(folder, VERBS[verb], None), root / "log")):
        raise SystemExit(f"{verb}: exit {code}\n{(root / 'log').read_text()[-3000:]}")
    seconds = time.monotonic() - begin
    load_what_it_loaded(root)
    whole = Undisturbed(int((root / "operations").read_text()), seconds, digest(folder))
    shutil.rmtree(folder)
    return whole


def trial(root: Path, base: Path, verb: str, whole: Undisturbed, seed: int) -> str:
    """One kill and what follows; how it was killed."""
    draw = Random(seed)
    folder = Path(shutil.copytree(base, root / "trial"))
    by_time = draw.random() < 0.25
    fatal = None if by_time else draw.randint(1, whole.operations)
    if fatal is not None and draw.random() < 0.4:
        fatal = max(1, whole.operations - draw.randint(0, 15))  # publishing, pages and cards
    after = draw.random() < 0.5
    before = digest(folder / "made")
    child = forked(lambda: watched(folder, VERBS[verb], fatal, after=after), root / "log")
    if by_time:
        time.sleep(draw.random() * whole.seconds)
        os.kill(child, signal.SIGKILL)
    code = ended(child)
    now = digest(folder)
    for name, value in before.items():  # what stood there stands there, until something complete stands there
        there = now.get(f"made/{name}", now.get(f"made.partial/replaced/{name}"))
        assert there is not None or "made/config.json" in now, (verb, seed, name)
        assert name != "config.json" or there in (value, whole.files.get("made/config.json")), (verb, seed, name)
    if "out/config.json" in now and "run" not in verb:
        missing = [
            name for name in whole.files if name.startswith("out/") and name.endswith(".safetensors") and name not in now
        ]
        assert not missing, (verb, seed, missing)
    if again := ended(forked(lambda: watched(folder, VERBS[verb], None), root / "log")):
        raise SystemExit(f"{verb}, seed {seed}: continued with exit {again}\n{(root / 'log').read_text()[-3000:]}")
    found = digest(folder)
    different = sorted(name for name in found.keys() | whole.files.keys() if found.get(name) != whole.files.get(name))
    assert not different, (verb, seed, different)
    shutil.rmtree(folder)
    return "too late" if code == 0 else "by time" if by_time else "at a file"


def main() -> int:
    """Trials in turns over all verbs; a line for each verb."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(VERBS))
    asked = parser.parse_args()
    verbs = [asked.only] if asked.only else list(VERBS)
    done: Counter[tuple[str, str]] = Counter()
    begin = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="kill-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        base = prepare(root)
        whole: dict[str, Undisturbed] = {}
        for number in range(asked.count):
            verb = verbs[number % len(verbs)]
            if verb not in whole:
                whole[verb] = measure(root, base, verb)
            how = trial(root, base, verb, whole[verb], asked.seed + number)
            done[verb, how] += 1
            print(f"{sum(done.values())}: {verb}, {how}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: what was tried until here", file=sys.stderr)
    finally:
        shutil.rmtree(root)
    for verb in verbs:
        at, by, late = (done[verb, how] for how in ("at a file", "by time", "too late"))
        print(f"| {verb} | {at} | {by} | {late} | {at + by + late} |")
    print(f"{sum(done.values())} kills in {(time.monotonic() - begin) / 60:.1f} minutes: the same bytes every time")
    return 0


if __name__ == "__main__":
    assert marlin_tools.run.execute.execute  # what the children need is loaded before they are made
    sys.exit(main())
