"""The load test behind bench/load.sh: starts a server, storms it, and says whether anything was lost, mixed up or leaked."""

import argparse
import asyncio
import datetime
import json
import os
import pathlib
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from sse_client import HttpError, fetch, metrics, stream

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTLE_SECONDS = 30          # for gauges to return to zero after the last answer


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "build/release/bin/kvarn"), help="the server to start")
    parser.add_argument("--model", default=str(ROOT / "assets/demo-model"), help="directory of the model to serve")
    parser.add_argument("--kv-cache-dtype", default="auto", help="KV format of the server")
    parser.add_argument("--kv-memory", default="96MiB", help="KV pool: small, so that requests wait for pages and all of it is touched early")
    parser.add_argument("--requests", type=int, default=2000, help="streaming requests")
    parser.add_argument("--concurrency", type=int, default=256, help="at once")
    parser.add_argument("--cancelled", type=float, default=0.2, help="share that is cancelled at a random moment")
    parser.add_argument("--prompts", type=int, default=40, help="different prompts")
    parser.add_argument("--max-tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--memory-slack-mib", type=int, default=8,
                        help="growth after them that is still flat: buffers of the allocator")
    parser.add_argument("--warm-requests", type=int, default=500, help="memory must be flat after so many")
    parser.add_argument("--seed", type=int, default=1, help="of prompts and cancels")
    parser.add_argument("--out", default="", help="write the result as JSON to this file")
    return parser.parse_args()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resident_bytes(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def make_prompts(count, rng):
    """Prompts of 10 to some 600 words, some with a common beginning (so that the prefix cache is hit)."""
    words = "river stone lamp garden winter bridge paper music signal harbour copper window forest letter".split()
    shared = " ".join(rng.choice(words) for _ in range(250))
    prompts = []
    for i in range(count):
        own = " ".join(rng.choice(words) for _ in range(rng.choice((10, 40, 120, 350))))
        prompts.append(f"Number {i}. {shared if i % 3 == 0 else ''} {own}. What comes next?")
    return prompts


class Server:
    def __init__(self, options):
        self.http, self.grpc = free_port(), free_port()
        self.log = tempfile.NamedTemporaryFile(prefix="kvarn-load-", suffix=".log", delete=False)
        self.process = subprocess.Popen(
            [options.binary, "serve", "--model", options.model, "--port", str(self.http), "--grpc-port", str(self.grpc),
             "--kv-memory", options.kv_memory, "--kv-cache-dtype", options.kv_cache_dtype,
             "--max-queued-requests", str(max(options.requests, 512))],
            stdout=self.log, stderr=subprocess.STDOUT)
        self.address = ("127.0.0.1", self.http)

    async def wait_ready(self, seconds=120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                if (await fetch(self.address, "GET", "/health/ready"))[0] == 200:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.1)
        sys.exit(f"load: the server is not ready; its log: {self.log.name}\n"
                 + pathlib.Path(self.log.name).read_text()[-2000:])

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def payload(prompt, max_tokens):
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": max_tokens,
            "stream": True, "stream_options": {"include_usage": True}}


async def read_answer(address, body, stop_after=None):
    """What a stream said; with stop_after, the client leaves after so many events."""
    text, finish, usage, done, events, ids = "", None, None, False, 0, set()
    async for event in stream(address, "/v1/chat/completions", body):
        if event == "[DONE]":
            done = True
            continue
        if "error" in event:
            raise HttpError(200, json.dumps(event).encode())
        ids.add(event["id"])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            text += choice["delta"].get("reasoning_content") or ""
            finish = choice["finish_reason"] or finish
        events += 1
        if stop_after is not None and events >= stop_after:
            return None
    return {"text": text, "finish": finish, "completion_tokens": usage and usage["completion_tokens"], "done": done,
            "one_id": len(ids) == 1}


async def storm(server, options, prompts, expected, rng):
    """Runs all requests; returns counts and the resident memory after the warm ones and at the end."""
    counts = {"answered": 0, "cancelled": 0, "wrong": 0, "failed": 0}
    problems = []
    jobs = []
    for i in range(options.requests):
        leaves = rng.random() < options.cancelled
        index = i % len(prompts)
        # Well before the end, or an answer in a hurry would be whole before its client leaves.
        events = rng.randint(1, max(1, expected[index]["completion_tokens"] // 2))
        jobs.append((index, leaves, rng.random(), events))
    finished = 0
    memory = {}

    async def one(job):
        nonlocal finished
        index, leaves, moment, events = job
        body = payload(prompts[index], options.max_tokens)
        try:
            if leaves and moment < 0.5:  # while queued, in prefill, or early in decode
                task = asyncio.ensure_future(read_answer(server.address, body))
                done, _ = await asyncio.wait({task}, timeout=moment * 4)  # 0 to 2 s
                if not done:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    counts["cancelled"] += 1
                    return
                answer = task.result()
            else:
                answer = await read_answer(server.address, body, events if leaves else None)
            if answer is None:
                counts["cancelled"] += 1
            elif answer == expected[index]:
                counts["answered"] += 1
            else:
                counts["wrong"] += 1
                problems.append(f"prompt {index}: {answer} instead of {expected[index]}")
        except (OSError, HttpError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
            counts["failed"] += 1
            problems.append(f"prompt {index}: {type(error).__name__}: {error}")
        finally:
            finished += 1
            if finished == min(options.warm_requests, options.requests):
                memory["warm"] = resident_bytes(server.process.pid)
            if finished % 100 == 0:
                print(f"load: {finished}/{options.requests} {counts}", file=sys.stderr, flush=True)

    async def worker(queue):
        while queue:
            await one(queue.pop())

    queue = list(reversed(jobs))
    await asyncio.gather(*(worker(queue) for _ in range(options.concurrency)))
    memory["end"] = resident_bytes(server.process.pid)
    return counts, problems, memory


async def settled_metrics(server):
    """The metrics once nothing runs any more, or as they are when patience ends."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        values = metrics((await fetch(server.address, "GET", "/metrics"))[1])
        idle = all(values[name] == 0 for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"))
        if idle and values["kvarn:http_connections"] <= 1 or time.monotonic() > end:
            return values
        await asyncio.sleep(0.2)


async def main():
    options = parse_arguments()
    rng = random.Random(options.seed)
    prompts = make_prompts(options.prompts, rng)
    server = Server(options)
    failures = []
    try:
        await server.wait_ready()
        pool_bytes = (await settled_metrics(server))["kvarn:kv_bytes"]
        expected = []
        for i, prompt in enumerate(prompts):  # one at a time: what each prompt gives alone
            expected.append(await read_answer(server.address, payload(prompt, options.max_tokens)))
            if not (expected[i]["done"] and expected[i]["one_id"] and expected[i]["finish"]):
                failures.append(f"the reference answer {i} is incomplete: {expected[i]}")
        started = time.monotonic()
        counts, problems, memory = await storm(server, options, prompts, expected, rng)
        seconds = time.monotonic() - started
        values = await settled_metrics(server)
    finally:
        exit_code = server.stop()
    log = pathlib.Path(server.log.name).read_text()

    if counts["wrong"] or counts["failed"]:
        failures.append(f"{counts['wrong']} wrong, {counts['failed']} failed; first: {problems[:3]}")
    if sum(counts.values()) != options.requests:
        failures.append(f"{sum(counts.values())} of {options.requests} requests are accounted for")
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "kvarn:outbox_bytes"):
        if values[gauge] != 0:
            failures.append(f"{gauge} is {values[gauge]} after the storm")
    if values["kvarn:http_connections"] > 1:  # the one that asks
        failures.append(f"{values['kvarn:http_connections']} connections are still open")
    leaked = pool_bytes - values["kvarn:kv_bytes"]  # a page that is neither free, cached nor in use
    if leaked or re.search(r"leaked", log):
        failures.append(f"{leaked} B of leaked pages; reports in the log: {re.findall('.*leaked.*', log)[:3]}")
    growth = memory["end"] - memory["warm"]
    if growth > options.memory_slack_mib << 20:
        failures.append(f"resident memory grew by {growth >> 20} MiB after the first {options.warm_requests}")
    if exit_code != 0:
        failures.append(f"the server ended with exit code {exit_code}")

    row = lambda name, value, unit, lower=False: {
        "name": name, "value": value, "unit": unit, "against": None, "against_value": None, "ratio": None, "must": None,
        "stretch": None, "lower_is_better": lower}
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    result = {
        "device": f"{platform.machine()}, {os.cpu_count()} CPUs", "driver": None,
        "date": datetime.date.today().isoformat(), "commit": commit.stdout.strip() or None,
        "command": " ".join(["bench/load.sh", *sys.argv[1:]]), "passed": not failures, "failures": failures,
        "rows": [row("load-answered", counts["answered"], "requests"), row("load-cancelled", counts["cancelled"], "requests"),
                 row("load-wrong", counts["wrong"], "requests", True), row("load-failed", counts["failed"], "requests", True),
                 row("load-requests-per-second", round(options.requests / seconds, 2), "requests/s"),
                 row("load-leaked-bytes", leaked, "B", True),
                 row("load-preemptions", values.get("vllm:num_preemptions_total", 0), "preemptions"),
                 row("load-resident-after-warm", memory["warm"], "B", True),
                 row("load-resident-growth-after-warm", growth, "B", True)]}
    text = json.dumps(result, indent=1)
    if options.out:
        pathlib.Path(options.out).write_text(text + "\n")
    print(text)
    if failures:
        sys.exit("load: FAILED\n  " + "\n  ".join(failures) + f"\n  server log: {server.log.name}")
    os.unlink(server.log.name)
    print("load: passed", file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(main())
