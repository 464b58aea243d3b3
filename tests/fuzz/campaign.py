"""`python tests/fuzz/campaign.py --minutes 20`: as many inputs as fit into the time, and what became of them.

Reader after reader, in turns; every input has a number from which it is made again: `--only NAME --seed N --count 1`. Stops at
the first input that raises what is not ours, or takes longer than 20 s, and prints how to repeat it.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzzing import READERS, mutated, place, survives

SLOW_SHARE, TURN = 100, 2000


class TooLateError(BaseException):
    """Nobody on the way may take it for a failure of a library."""


def main() -> int:
    """Run, and print a table for the docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=0, help="inputs per reader instead of a time")
    parser.add_argument("--only", choices=sorted(READERS))
    asked = parser.parse_args()
    done: Counter[tuple[str, str]] = Counter()
    begin, turn = time.monotonic(), 0
    signal.signal(signal.SIGALRM, _late)
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    for name, reader in READERS.items():  # libraries are imported when they are first used
        survives(reader, place(reader, root / name.replace(" ", "-")), reader.valid[0])
    try:
        while turn == 0 or (not asked.count and time.monotonic() - begin < 60 * asked.minutes):
            for name, reader in READERS.items():
                if asked.only in (None, name):
                    folder = place(reader, root / name.replace(" ", "-"))
                    count = asked.count or (TURN // SLOW_SHARE if reader.slow else TURN)
                    for seed in range(asked.seed + turn * TURN, asked.seed + turn * TURN + count):
                        draw = Random(seed)
                        done[name, _one(name, folder, mutated(draw.choice(reader.valid), draw), seed)] += 1
                    shutil.rmtree(folder)
            turn += 1
            print(
                f"{sum(done.values()):,} inputs in {(time.monotonic() - begin) / 60:.1f} minutes", file=sys.stderr, flush=True
            )
    except KeyboardInterrupt:
        print("interrupted: what was tried until here", file=sys.stderr)
    finally:
        shutil.rmtree(root)
    for name in READERS:
        read, refused = done[name, "read"], done[name, "refused"]
        print(f"| {name} | {read + refused:,} | {read:,} | {refused:,} | 0 |")
    print(f"{sum(done.values()):,} inputs in {(time.monotonic() - begin) / 60:.1f} minutes")
    return 0


def _one(name: str, folder: Path, content: bytes, seed: int) -> str:
    became = ""
    signal.alarm(20)
    try:
        became = survives(READERS[name], folder, content)
    finally:
        signal.alarm(0)
        if not became:
            print(f"repeat it with: --only {name!r} --seed {seed} --count 1\n{content[:2000]!r}", file=sys.stderr)
    return became


def _late(_signal: int, _frame: object) -> None:
    raise TooLateError("an input took longer than 20 s")


if __name__ == "__main__":
    sys.exit(main())
