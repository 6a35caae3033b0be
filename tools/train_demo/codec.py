"""The KVarN codec of keys and values in torch, batched over tiles: what a reader of coded pages sees.

A tile is 128 consecutive tokens of one KV head, in the frame rotated by the Hadamard matrix. Keys are balanced
and rounded per channel (4 bits), values per token (2 bits). `round_trip` returns the decoded tile; no bytes are
packed, because only the numbers matter here. The first tile of a sequence is never coded (see evaluate.py).
"""

import torch

TILE = 128
STD_LO, STD_HI, LOG_LO, LOG_HI, TIE = 1e-3, 1e3, -0.3, 10.0, 1e-4


def hadamard(n=128, device="cpu", dtype=torch.float32):
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / n**0.5).to(device=device, dtype=dtype)


def imbalance(x):
    """max/min of the column deviations plus that of the row deviations; x is [..., rows, columns]."""
    total = 0.0
    for axis in (-2, -1):
        dev = x.std(dim=axis)
        total = total + dev.amax(-1) / dev.amin(-1).clamp_min(1e-8)
    return total


def balance(x, passes):
    """(balanced, column scales [..., 1, C], row scales [..., R, 1]) with balanced = x / column / row."""
    log_c = torch.zeros_like(x[..., :1, :])
    log_r = torch.zeros_like(x[..., :, :1])
    best, keep_c, keep_r = imbalance(x), torch.ones_like(log_c), torch.ones_like(log_r)
    cur = x
    for _ in range(passes):
        log_c = (log_c + cur.std(dim=-2, keepdim=True).clamp(STD_LO, STD_HI).log()).clamp(LOG_LO, LOG_HI)
        cur = x / log_c.exp() / log_r.exp()
        log_r = (log_r + cur.std(dim=-1, keepdim=True).clamp(STD_LO, STD_HI).log()).clamp(LOG_LO, LOG_HI)
        cur = x / log_c.exp() / log_r.exp()
        now = imbalance(cur)
        better = (now < best * (1 - TIE))[..., None, None]
        best = torch.where(better[..., 0, 0], now, best)
        keep_c = torch.where(better, log_c.exp(), keep_c)
        keep_r = torch.where(better, log_r.exp(), keep_r)
    return x / keep_c / keep_r, keep_c, keep_r


def half(x):
    return x.clamp(-65504.0, 65504.0).half().float()


def round_trip_rows(x, bits, passes):
    """Codes the rows of x [..., R, C] with one step and one zero each, and decodes them again."""
    balanced, col, row = balance(x, passes)
    top = 2**bits - 1
    low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
    step = ((high - low) / top).clamp_min(1e-10)
    codes = ((balanced - low) / step).round().clamp(0, top)
    return (codes * half(row * step) + half(row * low)) * half(col)


def round_trip(keys, values, passes=8):
    """Decoded (keys, values) of rotated tiles [..., TILE tokens, head_dim]."""
    coded_k = round_trip_rows(half(keys).transpose(-1, -2), 4, passes).transpose(-1, -2)
    return coded_k, round_trip_rows(half(values), 2, passes)
