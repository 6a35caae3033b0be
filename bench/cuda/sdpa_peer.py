"""Decode attention of torch (flash and cuDNN) on contiguous fp16 K and V, for attention_decode_bench.

The query heads of a KV head are the rows of one attention (no mask), so K and V are read once.
Timed as the benchmark times itself: replays of a CUDA graph of many launches, inputs rotated over
more than the L2 cache, median of 31. Prints "sdpa-<backend>-g<G>-b<B>-l<L>k <microseconds>".
"""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [(8, 1, 16), (8, 1, 64), (8, 8, 16), (8, 32, 4), (8, 32, 16), (8, 128, 4)]
KV_HEADS, HEAD_DIM, ROTATED_BYTES, REPLAYS = 8, 128, 256 << 20, 31


def microseconds(group, batch, length, backend):
    size = batch * KV_HEADS * length * HEAD_DIM * 4
    variants = max(2, -(-ROTATED_BYTES // size))

    def random(n):
        return torch.randn(batch, KV_HEADS, n, HEAD_DIM, device="cuda", dtype=torch.float16)

    inputs = [(random(group), random(length), random(length)) for _ in range(variants)]
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(backend), torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for one in inputs:
                attend(*one)
        stream.synchronize()
        launches = variants * max(1, 8 // variants)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                attend(*inputs[i % variants])
        times = []
        for _ in range(REPLAYS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times[2:]) * 1000 / launches


for group, batch, length_k in CASES:
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        us = microseconds(group, batch, 1024 * length_k, backend)
        torch.cuda.empty_cache()
        print(f"sdpa-{name}-g{group}-b{batch}-l{length_k}k {us:.2f}", flush=True)
