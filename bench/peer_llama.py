#!/usr/bin/env python3
"""llama.cpp on the workloads of model_bench.cpp: the CPU peer of docs/performance.md.

Writes a GGUF of Qwen3's public shape with random bf16 weights (once, to --cache), then times
llama_decode() on it: prefill of 512 tokens, decode of one and of eight sequences, decode at a
context of 4096. Prints one JSON object with tokens per second.
"""

import argparse
import ctypes
import json
import pathlib
import statistics
import sys
import time

import numpy as np

SHAPES = {
    # layers, hidden, ffn, q heads, kv heads, tied
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, True),
}
HEAD_DIM, VOCAB = 128, 151936
CHUNK, SHORT_PROMPT, LONG_PROMPT = 512, 128, 4096


def write_model(path: pathlib.Path, shape: str) -> None:
    """Random weights, N(0, 0.02), all matrices bf16, norms one, no tokenizer."""
    import gguf

    layers, hidden, ffn, q_heads, kv_heads, tied = SHAPES[shape]
    rng = np.random.default_rng(1)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3")
    writer.add_name(f"random {shape}")
    writer.add_context_length(40960)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(q_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1000000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        bits = ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
        writer.add_tensor(name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, dtype=np.float32))

    matrix("token_embd.weight", VOCAB, hidden)
    ones("output_norm.weight", hidden)
    if not tied:
        matrix("output.weight", VOCAB, hidden)
    for i in range(layers):
        prefix = f"blk.{i}."
        ones(prefix + "attn_norm.weight", hidden)
        matrix(prefix + "attn_q.weight", q_heads * HEAD_DIM, hidden)
        matrix(prefix + "attn_k.weight", kv_heads * HEAD_DIM, hidden)
        matrix(prefix + "attn_v.weight", kv_heads * HEAD_DIM, hidden)
        matrix(prefix + "attn_output.weight", hidden, q_heads * HEAD_DIM)
        ones(prefix + "attn_q_norm.weight", HEAD_DIM)
        ones(prefix + "attn_k_norm.weight", HEAD_DIM)
        ones(prefix + "ffn_norm.weight", hidden)
        matrix(prefix + "ffn_gate.weight", ffn, hidden)
        matrix(prefix + "ffn_up.weight", ffn, hidden)
        matrix(prefix + "ffn_down.weight", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


class Peer:
    """One context; sequences are driven in lockstep through the low-level batch interface."""

    clock = time.perf_counter

    def __init__(self, lib, model, sequences: int, context: int, threads: int):
        self.lib = lib
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * context
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, params)
        if not self.context:
            sys.exit("llama_init_from_model failed")
        self.batch = lib.llama_batch_init(CHUNK, 0, 1)
        self.rng = np.random.default_rng(7)

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)

    def step(self, rows) -> float:
        """rows: (sequence, position, wants logits); seconds of llama_decode."""
        batch = self.batch
        batch.n_tokens = len(rows)
        tokens = self.rng.integers(0, VOCAB, len(rows))
        for i, (sequence, position, logits) in enumerate(rows):
            batch.token[i] = int(tokens[i])
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits
        start = Peer.clock()
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_synchronize(self.context)
        seconds = Peer.clock() - start
        if status != 0:
            sys.exit(f"llama_decode returned {status}")
        return seconds

    def prefill(self, sequence: int, first: int, count: int) -> float:
        return self.step([(sequence, first + i, i + 1 == count) for i in range(count)])

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)


def prefill_512(lib, model, threads: int) -> float:
    peer = Peer(lib, model, 1, CHUNK, threads)
    seconds = []
    for _ in range(4):
        peer.clear()
        seconds.append(peer.prefill(0, 0, CHUNK))
    peer.close()
    return CHUNK / statistics.median(seconds[1:])


def decode(lib, model, threads: int, sequences: int, prompt: int, steps: int) -> float:
    context = (prompt + steps + 255) // 256 * 256
    peer = Peer(lib, model, sequences, context, threads)
    for first in range(0, prompt, CHUNK):
        for sequence in range(sequences):
            peer.prefill(sequence, first, min(CHUNK, prompt - first))
    seconds = [
        peer.step([(s, prompt + i, True) for s in range(sequences)]) for i in range(steps)
    ]
    peer.close()
    return sequences / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for the GGUF")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--only", help="prefill-512, decode-b1, decode-b8 or decode-4k-fp16")
    parser.add_argument("--write-only", action="store_true", help="write the GGUF and stop")
    parser.add_argument("--cpu-time", action="store_true",
                        help="time of the calling thread, for --threads 1 on a busy machine")
    args = parser.parse_args()
    if args.cpu_time:
        Peer.clock = time.thread_time

    args.cache.mkdir(parents=True, exist_ok=True)
    path = args.cache / f"{args.shape}-random-bf16.gguf"
    if not path.exists():
        write_model(path, args.shape)
    if args.write_only:
        return

    import llama_cpp
    import llama_cpp.llama_cpp as lib

    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit(f"llama.cpp does not load {path}")
    benches = {
        "prefill-512": lambda: prefill_512(lib, model, args.threads),
        "decode-b1": lambda: decode(lib, model, args.threads, 1, SHORT_PROMPT, 32),
        "decode-b8": lambda: decode(lib, model, args.threads, 8, SHORT_PROMPT, 24),
        "decode-4k-fp16": lambda: decode(lib, model, args.threads, 1, LONG_PROMPT, 24),
    }
    figures = {
        name: bench() for name, bench in benches.items() if args.only in (None, name)
    }
    print(
        json.dumps(
            {
                "backend": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
                "system": lib.llama_print_system_info().decode().strip(),
                "shape": args.shape,
                "tokens_per_second": figures,
            }
        )
    )


if __name__ == "__main__":
    main()
