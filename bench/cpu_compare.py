#!/usr/bin/env python3
"""Runs our CPU benches and llama.cpp in turn, round by round, and writes bench/results/cpu-*.json
(docs/performance.md says how to read them). Called by bench/cpu.sh; standard library only.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_json(command: list[str]) -> dict:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return json.loads(done.stdout)


def cpu_model() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.split(":", 1)[1].split())
    return "unknown CPU"


def commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], stdout=subprocess.PIPE, text=True, check=False
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "kernels", "models", "bench/*.cpp")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def row(name, value, unit, against, against_value, must, stretch):
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "against": against,
        "against_value": round(against_value, 3),
        "ratio": round(value / against_value, 3),
        "must": must,
        "stretch": stretch,
        "lower_is_better": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder of our benches")
    parser.add_argument("--peer-python", required=True, help="Python with bench/requirements.txt")
    parser.add_argument("--cache", required=True, help="folder of the peer's GGUF")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--command", default="bench/cpu.sh", help="as it is to be recorded")
    args = parser.parse_args()

    threads = str(args.threads)
    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"warning: load average {load:.1f} before the run; the figures suffer", file=sys.stderr)
    peer = [args.peer_python, str(ROOT / "bench/peer_llama.py"), "--cache", args.cache]
    subprocess.run([*peer, "--threads", threads, "--write-only"], check=True)

    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    gemv, read = [], []
    backend = peer_name = ""
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}: GEMV and read bandwidth", file=sys.stderr)
        linear = run_json(
            [str(args.bin / "kvarn_linear_bench"), "--threads", threads, "--rows", "1", "--json"]
        )
        figures = {(r["name"], r["unit"]): r["value"] for r in linear["rows"]}
        gemv.append(figures["model rows 1", "GB/s"])
        read.append(figures["read bandwidth", "GB/s"])
        for name in ("prefill-512", "decode-b1", "decode-b8", "decode-4k-fp16", "decode-4k-kvarn"):
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            model_bench = [str(args.bin / "kvarn_model_bench"), "--threads", threads, "--json"]
            result = run_json([*model_bench, "--only", name])
            backend = result["backend"]
            ours.setdefault(name, []).append(result["tokens_per_second"][name])
            if name == "decode-4k-kvarn":  # the peer has no such pages
                continue
            result = run_json([*peer, "--threads", threads, "--only", name])
            peer_name = result["backend"]
            theirs.setdefault(name, []).append(result["tokens_per_second"][name])

    own = {name: statistics.median(values) for name, values in ours.items()}
    other = {name: statistics.median(values) for name, values in theirs.items()}
    unit, bf16 = "tokens/s", f"{peer_name}, BF16"
    rows = [
        row("20-decode-b1", own["decode-b1"], unit, bf16, other["decode-b1"], 1.0, 1.2),
        row("20-prefill-512", own["prefill-512"], unit, bf16, other["prefill-512"], 0.8, 1.1),
        row("20-decode-8-streams", own["decode-b8"], unit, bf16, other["decode-b8"], 1.0, 1.3),
        row("21-decode-4k-kvarn", own["decode-4k-kvarn"], unit, "own fp16 pages",
            own["decode-4k-fp16"], 1.0, 1.2),
        row("20-decode-4k-kvarn", own["decode-4k-kvarn"], unit, f"{bf16}, fp16 cache",
            other["decode-4k-fp16"], None, None),
        row("20-decode-4k-fp16", own["decode-4k-fp16"], unit, f"{bf16}, fp16 cache",
            other["decode-4k-fp16"], None, None),
        row("22-gemv-bf16", statistics.median(gemv), "GB/s", "plain read, same run",
            statistics.median(read), 0.8, 0.9),
    ]
    device = f"{cpu_model()}, {args.threads} threads, {backend}"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {args.threads}t".lower().replace("(r)", ""))
    output = args.output or ROOT / "bench/results" / f"cpu-{slug.strip('-')}.json"
    report = {
        "device": device,
        "driver": None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": args.command,
        "load_average_before": round(load, 2),
        "rounds": {"ours": ours, "peer": theirs, "gemv_gb_s": gemv, "read_gb_s": read},
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{device}, Qwen3-0.6B shape, random bf16 weights")
    for r in rows:
        wanted = "" if r["must"] is None else f"  must {r['must']}, stretch {r['stretch']}"
        print(f"  {r['name']:<22}{r['value']:>9.2f} {r['unit']:<9} {r['ratio']:>6.2f}x "
              f"{r['against']} ({r['against_value']:.2f}){wanted}")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
