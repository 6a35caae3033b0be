"""End to end with the real binary and the demo model: e2e_test.py BINARY. Exits with 77 (skipped) where a client package is missing."""

import asyncio
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/clients"), str(ROOT / "bench")]

try:
    import grpc
    import openai  # noqa: F401: smoke.py needs it
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    import grpc_client
except ImportError as error:
    print(f"SKIPPED: {error}; the test environment is tests/requirements.txt")
    sys.exit(77)
from sse_client import HttpError, fetch, metrics, stream

BINARY = ""
MODEL = str(ROOT / "assets/demo-model")
START_SECONDS = 120   # sanitizer builds start slowly
END_SECONDS = 120
SECRET = "Xylophone-Quartz-77"  # in prompts; must not be in logs


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kvarn(*arguments, stdin="", environment=None, timeout=300):
    return subprocess.run([BINARY, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, **(environment or {})})


class Server:
    """`kvarn serve` on free ports; a context manager that leaves nothing running."""

    def __init__(self, *arguments, environment=None, ports_by_flag=True):
        self.http, self.grpc = free_port(), free_port()
        self.log = tempfile.TemporaryFile()
        ports = ["--port", str(self.http), "--grpc-port", str(self.grpc)] if ports_by_flag else []
        environment = {**os.environ, **(environment or {})}
        if not ports_by_flag:
            environment.update(KVARN_PORT=str(self.http), KVARN_GRPC_PORT=str(self.grpc))
        self.process = subprocess.Popen([BINARY, "serve", "--model", MODEL, "--kv-memory", "64MiB", *ports, *arguments],
                                        stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        self.address = ("127.0.0.1", self.http)

    def __enter__(self):
        end = time.monotonic() + START_SECONDS
        while "\nready\n" not in self.output():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server does not get ready:\n{self.output()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()

    def output(self):
        self.log.seek(0)
        return self.log.read().decode()

    def signal(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        return self.process.wait(timeout=END_SECONDS)

    def fetch(self, method, path, payload=None):
        return asyncio.run(fetch(self.address, method, path, payload))

    def chat(self, max_tokens=8, **fields):
        payload = {"messages": [{"role": "user", "content": f"Hello {SECRET}!"}], "temperature": 0,
                   "max_tokens": max_tokens, **fields}
        status, body = self.fetch("POST", "/v1/chat/completions", payload)
        return status, json.loads(body)

    def tokens_for(self, seconds):
        """How many tokens a request may have to run for about so long beside three others."""
        started = time.monotonic()
        self.chat(max_tokens=32, ignore_eos=True)
        rate = 32 / (time.monotonic() - started)
        return max(64, min(3500, int(rate * seconds / 2)))


async def long_streams(server, count, max_tokens, when_all_run):
    """Streams that are cut off or end; calls when_all_run() once each has had an event. [(events, done, error code)]."""
    results = [None] * count
    running = asyncio.Semaphore(0)

    async def one(i):
        payload = {"messages": [{"role": "user", "content": f"Count, {i}. {SECRET}"}], "stream": True, "ignore_eos": True,
                   "max_tokens": max_tokens, "temperature": 0}
        events, done, code = 0, False, None
        try:
            async for event in stream(server.address, "/v1/chat/completions", payload):
                if event == "[DONE]":
                    done = True
                elif "error" in event:
                    code = event["error"]["code"]
                else:
                    events += 1
                    if events == 1:
                        running.release()
        finally:
            results[i] = (events, done, code)

    tasks = [asyncio.ensure_future(one(i)) for i in range(count)]
    for _ in range(count):
        await asyncio.wait_for(running.acquire(), END_SECONDS)
    await when_all_run()
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), END_SECONDS)
    return results


class SmokeTest(unittest.TestCase):
    def test_the_smoke_test_passes_and_logs_hold_no_prompt(self):
        with Server() as server:
            output = server.output()
            for line in (r"memory  weights .* KV pool .* = \d+ pages", rf"http    http://127.0.0.1:{server.http}",
                         rf"grpc    127.0.0.1:{server.grpc}"):
                self.assertRegex(output, line)
            smoke = subprocess.run(
                [str(ROOT / "tests/clients/smoke.sh")], capture_output=True, text=True, timeout=600,
                env={**os.environ, "KVARN_HTTP": f"http://127.0.0.1:{server.http}",
                     "KVARN_GRPC": f"127.0.0.1:{server.grpc}", "KVARN_PYTHON": sys.executable})
            self.assertEqual(smoke.returncode, 0, smoke.stdout + smoke.stderr)
            self.assertEqual(server.chat()[0], 200)
            server.signal()
            self.assertEqual(server.wait(), 0)
            self.assertNotIn(SECRET, server.output())

    def test_ports_come_from_the_environment_and_settings_from_a_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
            json.dump({"served-model-name": "from-file", "max_model_len": 1000}, settings)
            settings.flush()
            with Server(environment={"KVARN_CONFIG": settings.name}, ports_by_flag=False) as server:
                models = json.loads(server.fetch("GET", "/v1/models")[1])
                self.assertEqual([m["id"] for m in models["data"]], ["from-file"])
                self.assertEqual(models["data"][0]["max_model_len"], 1000)

    def test_without_reflection_and_control_neither_is_served(self):
        with Server("--no-grpc-reflection", "--grpc-services", "inference") as server:
            client = grpc_client.Client(f"127.0.0.1:{server.grpc}")
            with self.assertRaises(grpc.RpcError) as raised:
                client.services()
            self.assertEqual(raised.exception.code(), grpc.StatusCode.UNIMPLEMENTED)
            client.close()


class DrainTest(unittest.TestCase):
    def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(self):
        with Server("--drain-seconds", "100") as server:
            channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc}")
            client = grpc_client.Client(f"127.0.0.1:{server.grpc}")
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.SERVING)
            client.call("Control", "GetLoad")  # reflection and connection are warm
            seen = {}

            async def drain():
                server.signal()
                while (await fetch(server.address, "GET", "/health/ready"))[0] != 503:
                    await asyncio.sleep(0.01)
                seen["live"] = (await fetch(server.address, "GET", "/health/live"))[0]
                seen["new"] = await fetch(server.address, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1})
                try:
                    await asyncio.to_thread(client.call, "Inference", "Generate", text="x")
                except grpc.RpcError as error:
                    seen["grpc"] = (error.code().name, dict(error.trailing_metadata()).get("kvarn-error-code"))

            tokens = server.tokens_for(3)
            results = asyncio.run(long_streams(server, 4, tokens, drain))
            self.assertEqual(seen["live"], 200)
            self.assertEqual(seen["new"][0], 503)
            self.assertEqual(json.loads(seen["new"][1])["error"]["code"], "server_draining")
            self.assertEqual(seen["grpc"], ("UNAVAILABLE", "server_draining"))
            for _, done, code in results:
                self.assertTrue(done, results)
                self.assertIsNone(code)
            self.assertEqual(next(watch).status, health_pb2.HealthCheckResponse.NOT_SERVING)
            self.assertEqual(server.wait(), 0, server.output()[-2000:])
            client.close()
            channel.close()

    def test_a_second_sigterm_ends_all_with_an_error(self):
        with Server("--drain-seconds", "100", "--max-model-len", "8192") as server:
            async def twice():
                server.signal()
                while (await fetch(server.address, "GET", "/health/ready"))[0] != 503:
                    await asyncio.sleep(0.01)
                server.signal()

            results = asyncio.run(long_streams(server, 4, 7000, twice))
            for _, done, code in results:
                self.assertFalse(done, results)
                self.assertEqual(code, "server_shutdown")
            self.assertEqual(server.wait(), 1)

    def test_at_the_drain_deadline_the_rest_ends_with_an_error(self):
        with Server("--drain-seconds", "0.3") as server:
            async def once():
                server.signal()

            results = asyncio.run(long_streams(server, 4, 7000, once))
            self.assertEqual({code for _, _, code in results}, {"server_shutdown"}, results)
            self.assertEqual(server.wait(), 1)

    def test_idle_it_ends_at_once(self):
        with Server() as server:
            started = time.monotonic()
            server.signal()
            self.assertEqual(server.wait(), 0)
            self.assertLess(time.monotonic() - started, 10)


class DisconnectTest(unittest.TestCase):
    def test_clients_that_leave_free_everything(self):
        with Server() as server:
            async def leave():
                async def one(i):
                    payload = {"messages": [{"role": "user", "content": f"{i} " + "word " * 300}], "stream": True,
                               "ignore_eos": True, "max_tokens": 3000}
                    async def read():
                        async for _ in stream(server.address, "/v1/chat/completions", payload):
                            pass
                    task = asyncio.ensure_future(read())
                    await asyncio.wait({task}, timeout=0.05 * (i % 12))
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                await asyncio.gather(*(one(i) for i in range(24)))

            asyncio.run(leave())
            end = time.monotonic() + 30
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            while any(values := [metrics(server.fetch("GET", "/metrics")[1])[name] for name in names]):
                self.assertLess(time.monotonic(), end, f"{names} stay at {values}")
                time.sleep(0.1)
            self.assertEqual(server.chat()[0], 200)


class LoadTest(unittest.TestCase):
    def test_a_small_storm_loses_nothing(self):
        load = subprocess.run([sys.executable, str(ROOT / "bench/load.py"), "--binary", BINARY, "--requests", "160",
                               "--concurrency", "48", "--prompts", "8", "--max-tokens", "12", "--warm-requests", "60",
                               "--kv-memory", "48MiB",
                               # A sanitizer keeps freed memory for a while on purpose.
                               "--memory-slack-mib", "400" if os.environ.get("KVARN_SANITIZE") else "8"], capture_output=True, text=True, timeout=600)
        self.assertEqual(load.returncode, 0, load.stdout[-1500:] + load.stderr[-3000:])


class CommandTest(unittest.TestCase):
    def test_wrong_flags_and_files_give_one_line_and_exit_code_two(self):
        for arguments in (["serve", "--prot", "1"], ["serve", "--model", "/nowhere"], ["serve"], ["chat", "--url", "ftp://x"],
                          ["chat", "--url", "https://x"], ["eval", "--model", MODEL, "--lengths", "x"],
                          ["eval", "--model", "/nowhere"], ["bench", "--model", MODEL, "--kv-cache-dtype", "int3"]):
            done = kvarn(*arguments)
            self.assertEqual(done.returncode, 2, (arguments, done.stderr))
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            self.assertEqual(done.stdout, "")

    def test_a_variable_that_is_wrong_is_named(self):
        done = kvarn("serve", "--model", MODEL, environment={"KVARN_MAX_NUM_SEQS": "0"})
        self.assertEqual(done.returncode, 2)
        self.assertIn("KVARN_MAX_NUM_SEQS", done.stderr)

    def test_a_port_in_use_is_named_with_its_flag(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            for flags in (["--port", port, "--grpc-port", "0"], ["--port", "0", "--grpc-port", port]):
                done = kvarn("serve", "--model", MODEL, *flags, timeout=60)
                self.assertEqual(done.returncode, 1, done.stderr)
                self.assertIn(flags[0] if flags[0] == "--port" and flags[1] == port else "--grpc-port", done.stderr)

    def test_a_truncated_model_names_the_file_and_ends(self):
        with tempfile.TemporaryDirectory() as directory:
            copy = pathlib.Path(directory) / "model"
            shutil.copytree(MODEL, copy)
            weights = copy / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:100_000])
            done = kvarn("serve", "--model", str(copy), "--port", "0", "--grpc-port", "0", timeout=60)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("model.safetensors", done.stderr)

    def test_chat_answers_each_line_in_process_and_at_a_server(self):
        question = "What is 2 + 2?\nHello!\n"
        local = kvarn("chat", "--model", MODEL, "--temperature", "0", "--max-tokens", "24", "--kv-memory", "64MiB",
                      stdin=question)
        self.assertEqual(local.returncode, 0, local.stderr)
        self.assertGreaterEqual(local.stdout.count("\n"), 2)
        with Server() as server:
            remote = kvarn("chat", "--url", f"http://127.0.0.1:{server.http}", "--temperature", "0", "--max-tokens", "24",
                           stdin=question)
        self.assertEqual(remote.returncode, 0, remote.stderr)
        self.assertEqual(remote.stdout, local.stdout)

    def test_chat_without_its_server_says_so(self):
        done = kvarn("chat", "--url", f"http://127.0.0.1:{free_port()}", stdin="x\n")
        self.assertEqual(done.returncode, 2)
        self.assertIn("kvarn serve", done.stderr)

    def test_bench_measures_and_gives_json(self):
        done = kvarn("bench", "--model", MODEL, "--prompt-len", "40", "--output-len", "8", "--concurrency", "2", "--repeat", "1",
                     "--kv-memory", "64MiB", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = {row["name"]: row["value"] for row in json.loads(done.stdout)["rows"]}
        self.assertGreater(rows["prefill-40"], 0)
        self.assertGreater(rows["decode-b2-l40"], 0)

    def test_eval_of_a_format_against_itself_finds_no_difference(self):
        done = kvarn("eval", "--model", MODEL, "--kv-cache-dtype", "fp16", "--only", "perplexity", "--tokens", "300",
                     "--window", "300", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = json.loads(done.stdout)["perplexity"]["rows"]
        self.assertEqual(len(rows), 2)
        self.assertEqual(rows[1]["mean_kl"], 0)
        self.assertEqual(rows[1]["top1_agreement"], 1)

    def test_eval_measures_a_coded_format_and_finds_needles(self):
        done = kvarn("eval", "--model", MODEL, "--tokens", "600", "--window", "600", "--lengths", "512", "--cases", "2", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        out = json.loads(done.stdout)
        reference, coded, chunk_start = out["perplexity"]["rows"]
        self.assertGreater(coded["mean_kl"], 0)
        self.assertLess(coded["mean_kl"], 0.5)
        self.assertEqual(chunk_start["reading_rule"], "chunk_start")
        self.assertEqual({row["cases"] for row in out["needles"]["rows"]}, {2})

    def test_inspect_agrees_with_the_pages_of_a_running_server(self):
        done = kvarn("inspect", "--model", MODEL, "--kv-memory", "64MiB", "--kv-cache-dtype", "auto", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        shown = json.loads(done.stdout)["kv"]["formats"][0]
        with Server() as server:
            pages = int(re.search(r"= (\d+) pages", server.output())[1])
            values = metrics(server.fetch("GET", "/metrics")[1])
        self.assertEqual(shown["num_pages"], pages)
        self.assertEqual(shown["pool_bytes"], values["kvarn:kv_bytes"])


if __name__ == "__main__":
    BINARY = os.path.abspath(sys.argv.pop(1))
    sys.dont_write_bytecode = True
    unittest.main(verbosity=2)
