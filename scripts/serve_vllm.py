"""Requests answered by a vLLM server with one kind of weights, by vLLM's `bench serve`: the served table in docs/serving.md.

    python scripts/serve_vllm.py fp16      # needs a GPU, and vLLM beside marlin-tools
    python scripts/serve_vllm.py machete   # vLLM's own kernel: the plugin is off
    python scripts/serve_vllm.py dense --rates 4 16 inf --prompts 80 320 400

A Llama of true shapes with random weights; prompts are random words of the embedded model's tokenizer, answers as long as asked
for. For each rate (requests a second, at random times; inf: all at once) prints one line of JSON.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from bench_vllm import BATCHES, KINDS, SHAPES, STOCK, dtype_of, fill_at_random, write_config

CLI = "vllm.entrypoints.cli.main"
KEPT = ("request_throughput", "output_throughput", "completed", "failed", "max_concurrent_requests", "duration")
TIMES = ("ttft", "tpot", "e2el")
PERCENTILES = ("mean", "p50", "p99")
PATIENCE = 600
"""Seconds that a server may take to start."""

if kind := os.environ.get("SERVED_WEIGHTS"):  # in the server's process, and in that of its engine, which reads this file too
    fill_at_random(sparse=kind == "sparse")


def server(folder: Path, kind: str, port: int) -> subprocess.Popen[bytes]:
    """The server, once it answers."""
    asked = [
        "serve",
        str(folder),
        "--load-format",
        "dummy",
        "--dtype",
        dtype_of(kind),
        "--port",
        str(port),
        "--max-num-seqs",
        "128",
    ]
    asked += ["--max-model-len", "2304", "--served-model-name", "random", "--no-enable-log-requests"]
    asked += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": list(BATCHES)})]
    plugin = {"MARLIN_TOOLS_VLLM": "0"} if kind in STOCK else {}
    started = subprocess.Popen(
        [sys.executable, __file__, "--", *asked],
        env=os.environ | plugin | {"SERVED_WEIGHTS": kind, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
        stdout=sys.stderr,
        start_new_session=True,
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and started.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return started
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    stop(started)
    raise SystemExit("the server did not start; its output says why")


def stop(started: subprocess.Popen[bytes]) -> None:
    """The server and its engine."""
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def measure(folder: Path, port: int, rate: str, prompts: int, lengths: tuple[int, int]) -> dict[str, float]:
    """What `bench serve` finds at one rate."""
    asked = ["bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions", "--port", str(port)]
    asked += ["--model", str(folder), "--served-model-name", "random", "--tokenizer", str(folder), "--temperature", "0"]
    asked += ["--dataset-name", "random", "--random-input-len", str(lengths[0]), "--random-output-len", str(lengths[1])]
    asked += ["--num-prompts", str(prompts), "--request-rate", rate, "--seed", "0", "--num-warmups", "8"]
    asked += ["--percentile-metrics", ",".join(TIMES), "--metric-percentiles", "50,99", "--save-result"]
    asked += ["--result-dir", str(folder), "--result-filename", "measured.json", "--disable-tqdm"]
    subprocess.run([sys.executable, "-m", CLI, *asked], check=True, stdout=sys.stderr)
    found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    if found["failed"] or found["completed"] != prompts:
        raise SystemExit(f"{found['failed']} of {prompts} requests failed")
    kept = [*KEPT, *(f"{what}_{time_}_ms" for time_ in TIMES for what in PERCENTILES)]
    return {name: round(found[name], 3) for name in kept if found.get(name) is not None}


def main() -> int:
    """The kind that is asked for, or the server itself."""
    if sys.argv[1:2] == ["--"]:
        from vllm.entrypoints.cli.main import main as serve

        sys.argv[1:] = sys.argv[2:]
        serve()
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rates", nargs="+", default=["4", "16", "inf"], metavar="RATE")
    parser.add_argument("--prompts", nargs="+", type=int, default=[80, 320, 400], metavar="N", help="one number for each rate")
    parser.add_argument("--lengths", nargs=2, type=int, default=(512, 128), metavar=("IN", "OUT"))
    parser.add_argument("--port", type=int, default=8765)
    asked = parser.parse_args()
    from marlin_tools.resources import demo_dir

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, asked.kind, asked.shape, asked.layers)
        for file in (demo_dir() / "model").glob("tokenizer*"):
            shutil.copy(file, folder)
        begin = time.monotonic()
        started = server(folder, asked.kind, asked.port)
        print(json.dumps({"kind": asked.kind, "seconds until it answered": round(time.monotonic() - begin, 1)}), flush=True)
        try:
            for rate, prompts in zip(asked.rates, asked.prompts, strict=True):
                found = measure(folder, asked.port, rate, prompts, tuple(asked.lengths))
                print(json.dumps({"kind": asked.kind, "rate": rate, "prompts": prompts, **found}), flush=True)
        finally:
            stop(started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
