"""The engine rows of bench/gpu.sh: whole steps through the scheduler, on random weights of public shapes, `kvarn bench`
run by run. Every ratio is against our own fp16 pages in the same binary, or against a limit that the row names."""
import argparse
import datetime
import json
import math
import subprocess
import sys

# Limits computed from an H100's measured read of 3.15 TB/s and its fp16 matrix product of 748 TFLOP/s.
ROOFLINE_TOKENS_PER_S = {"qwen3-0.6b": 2405, "qwen3-8b": 206}  # one sequence, 1K context
PREFILL_FLOPS_MS = {2048: 40, 16384: 410}  # qwen3-8b, every product at that rate
TRANSFORMERS_TOKENS_PER_S = {1: 10, 32: 329}  # generate(), 0.6B, fp16; measured once, a floor to clear
OUTPUT = 256


def rows():
    """(name, measure, shape, prompt, sequences or context to fill the memory with, against, must, stretch)"""
    for shape, short in (("qwen3-0.6b", "0.6b"), ("qwen3-8b", "8b")):
        must, stretch = {"qwen3-0.6b": (0.55, 0.75), "qwen3-8b": (0.80, 0.90)}[shape]
        yield f"11-decode-{short}-b1-l512", "decode", shape, 512, 1, "roofline", must, stretch
        must, stretch = {"qwen3-0.6b": (1.5, 1.75), "qwen3-8b": (1.06, 1.10)}[shape]
        yield f"12-decode-{short}-b1-l16k", "decode", shape, 16384, 1, "fp16", must, stretch
        yield f"14-decode-{short}-b32-512-128", "decode", shape, 512, 32, "fp16", 0.97, 1.0
    yield "13-prefill-8b-2k", "prefill", "qwen3-8b", 2048, 1, "flops", 0.60, 0.75
    yield "13-prefill-8b-16k", "prefill", "qwen3-8b", 16384, 1, "flops", 0.50, 0.65
    yield "18-decode-0.6b-b1", "decode", "qwen3-0.6b", 128, 1, "transformers", 50, 130
    yield "18-decode-0.6b-b32", "decode", "qwen3-0.6b", 128, 32, "transformers", 40, 80
    yield "8-decode-0.6b-full-l16k", "full", "qwen3-0.6b", 16128, None, "fp16", 3.3, 4.1
    yield "8-decode-8b-full-l16k", "full", "qwen3-8b", 16128, None, "fp16", 3.3, 4.1
    yield "9-decode-0.6b-full-l4k", "full", "qwen3-0.6b", 3968, None, "fp16", 2.9, 3.6


class Bench:
    def __init__(self, kvarn, device):
        self.kvarn, self.device = kvarn, device
        self.described = None

    def run(self, shape, dtype, prompt, *flags):
        command = [self.kvarn, "bench", "--device", self.device, "--load-format", "dummy", "--shape", shape,
                   "--kv-cache-dtype", dtype, "--prompt-len", str(prompt), *map(str, flags), "--json"]
        print(" ".join(command[1:]), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"kvarn bench failed: {done.stderr.strip()[-500:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        self.described = answer["device"]
        return answer

    def value(self, measure, shape, dtype, prompt, sequences):
        if measure == "full":
            return self.full(shape, dtype, prompt)
        flags = ["--only", measure, "--repeat", 3, "--max-model-len", prompt + OUTPUT]
        if measure == "decode":
            flags += ["--output-len", OUTPUT if prompt != 512 or sequences == 1 else 128, "--concurrency", sequences]
        return self.run(shape, dtype, prompt, *flags)["rows"][0]["value"], sequences

    def full(self, shape, dtype, prompt):
        """As many sequences as the memory takes, all decoding together. They come one chunk a step, so the first ones
        have to decode until the last one is there."""
        limits = ["--max-num-batched-tokens", 8192, "--max-num-seqs", 1024]
        pages = self.run(shape, dtype, 128, "--only", "prefill", "--repeat", 1, *limits)["kv_pages"]
        length = prompt + 1024
        blocks = math.ceil(length / 128)
        each = 4 * blocks if dtype == "fp16" else 5 + blocks + 5 + 1  # sink, blocks, tail, one in reserve
        sequences = min(pages // each, 1024)
        output = min(1024, math.ceil(sequences * prompt / (8192 - sequences)) + OUTPUT)
        answer = self.run(shape, dtype, prompt, "--only", "decode", "--repeat", 1, "--concurrency", sequences,
                          "--output-len", output, "--max-model-len", length, *limits)
        return answer["rows"][0]["value"], sequences


def against(kind, measure, bench, shape, prompt, sequences):
    """(what, its value, ratio of `value` to it)"""
    if kind == "fp16":
        value, count = bench.value(measure, shape, "fp16", prompt, sequences)
        what = "own fp16 pages" if measure != "full" else f"own fp16 pages, {count} sequences"
        return what, value
    if kind == "roofline":
        return "bytes of a step at 3.15 TB/s", ROOFLINE_TOKENS_PER_S[shape]
    if kind == "flops":
        return "all products at 748 TFLOP/s", prompt / PREFILL_FLOPS_MS[prompt] * 1000
    return "transformers generate, fp16, another run", TRANSFORMERS_TOKENS_PER_S[sequences]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kvarn", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="rows whose names begin with this")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--command", default="bench/gpu_engine.py")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    bench = Bench(options.kvarn, options.device)
    results, failures = [], []
    for name, measure, shape, prompt, sequences, kind, must, stretch in rows():
        if not name.startswith(options.only):
            continue
        try:
            value, count = bench.value(measure, shape, "kvarn_k4v2_g128", prompt, sequences)
            what, reference = against(kind, measure, bench, shape, prompt, sequences)
        except (RuntimeError, json.JSONDecodeError, OSError) as error:
            failures.append(f"{name}: {error}")
            continue
        results.append({"name": name, "value": round(value, 2), "unit": "tokens/s", "sequences": count, "against": what,
                        "against_value": round(reference, 2), "ratio": round(value / reference, 3), "must": must,
                        "stretch": stretch, "lower_is_better": False})
        print(f"{name:28} {value:10.1f} tokens/s  {value / reference:6.3f} of {what} ({reference:.1f}); "
              f"must {must}, stretch {stretch}", flush=True)
        write(options, bench, results)  # a run that is cut off keeps its rows
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures or not results else 0


def write(options, bench, results):
    driver = None
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump({"device": bench.described, "driver": driver,
                   "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                   "commit": options.commit, "command": options.command, "rows": results}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    sys.exit(main())
