"""Peer of kvarn_prefill_bench: causal flash attention of torch on dense fp16 K and V.

Graph replays, inputs rotated over more than the L2 cache, median of 31. Needs torch with CUDA.
With a file name, writes the faster of two backends there for kvarn_prefill_bench --peers.
"""

import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DIM, REPLAYS, ROTATED_BYTES = 128, 31, 256 << 20


def time_us(q_heads: int, kv_heads: int, rows: int, backend: SDPBackend) -> float:
    def tensor(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, DIM, device="cuda", dtype=torch.float16)

    bytes_each = 2 * rows * DIM * 2 * (q_heads + kv_heads)
    variants = max(2, -(-ROTATED_BYTES // bytes_each))
    inputs = [(tensor(q_heads), tensor(kv_heads), tensor(kv_heads)) for _ in range(variants)]

    def run() -> None:
        for q, k, v in inputs:
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q_heads != kv_heads
            )

    with sdpa_kernel(backend):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / variants)
    return statistics.median(times)


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    lines = []
    for name, q_heads, kv_heads in (("8b", 32, 8), ("0.6b", 16, 8)):
        for rows in (2048, 16384):
            flops = 4 * DIM * q_heads * rows * (rows + 1) / 2
            best = (0.0, "")
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                try:
                    us = time_us(q_heads, kv_heads, rows, backend)
                except RuntimeError as error:
                    print(f"{name} {rows}: {backend.name}: {str(error).splitlines()[0]}")
                    continue
                tflops = flops / us * 1e-6
                print(f"{name} {rows}: {backend.name} {us:.1f} us, {tflops:.1f} TFLOP/s")
                best = max(best, (tflops, backend.name))
            lines.append(f"{name} {rows} {best[0]:.1f} {best[1]}\n")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="ascii") as file:
            file.writelines(lines)


if __name__ == "__main__":
    main()
