#!/usr/bin/env python3
"""Golden vectors of the KVarN codec: tests/data/kvarn, read by tests/kernels/kv_encode_test.cpp.

    python3 tools/oracles/kvarn_golden.py --check [DIR]    recompute every array from its inputs
    python3 tools/oracles/kvarn_golden.py --write DIR      draw new inputs and write all arrays

The committed files were written on x86-64 with NumPy 1.24. --check is a second, independent
implementation of the format (docs/kvarn.md; codec of arXiv 2606.03458): it works in float64, where
the committed arrays are float32 results, and demands

    stored scales       1 unit in the last place of fp16
    codes               at most 0.1 % differ, by one step (rounding ties)
    unabsorbed scales   1e-5 relative
    decoded tiles       1e-6 of the largest value
    attention           1e-5 relative error of each head's output

Needs NumPy only.
"""
import argparse
import json
import pathlib
import sys

import numpy as np

TOKENS = DIM = 128
PASSES, MARGIN = 8, 1e-4
STD_RANGE, LOG_RANGE = (1e-3, 1e3), (-0.3, 10.0)
CASES = {"k4v2_g128": (4, 2), "k4v4_g128": (4, 4)}  # name -> bits of K and V codes
DEFAULT_DIR = pathlib.Path(__file__).resolve().parents[2] / "tests" / "data" / "kvarn"
DTYPES = {"f16": "<f2", "f32": "<f4", "u8": "u1"}


def rotation():
    """The Sylvester Hadamard matrix over sqrt(DIM), by the parity of the common bits."""
    i = np.arange(DIM)
    common = i[:, None] & i[None, :]
    ones = sum((common >> bit) & 1 for bit in range(7))
    return np.where(ones % 2 == 0, 1.0, -1.0) / np.sqrt(DIM)


def deviation(x, axis):
    return np.sqrt(((x - x.mean(axis, keepdims=True)) ** 2).sum(axis) / (x.shape[axis] - 1))


def spread(x):
    return sum(s.max() / max(s.min(), 1e-8) for s in (deviation(x, 0), deviation(x, 1)))


def normalise(x):
    """Column and row scales whose quotient has even deviations. x: float64 [rows, columns]."""
    logs = [np.zeros(x.shape[1]), np.zeros(x.shape[0])]  # columns, rows
    scaled = lambda: x / np.exp(logs[0])[None, :] / np.exp(logs[1])[:, None]
    best, kept = spread(x), [np.zeros_like(v) for v in logs]
    for _ in range(PASSES):
        for axis in (0, 1):
            step = np.log(np.clip(deviation(scaled(), axis), *STD_RANGE))
            logs[axis] = np.clip(logs[axis] + step, *LOG_RANGE)
        now = spread(scaled())
        if now < best * (1 - MARGIN):
            best, kept = now, [v.copy() for v in logs]
    return np.exp(kept[0]), np.exp(kept[1])


def encode(x, bits):
    """Codes [rows, columns], step and zero per row (row scale absorbed), scale per column and row."""
    column, row = normalise(x)
    y = x / column / row[:, None]
    low = y.min(1)
    step = np.maximum((y.max(1) - low) / (2**bits - 1), 1e-10)
    codes = np.clip(np.rint((y - low[:, None]) / step[:, None]), 0, 2**bits - 1)
    return {"codes": codes.astype(np.uint8), "step": row * step, "zero": row * low,
            "column": column, "row": row}


def packed(codes, bits):
    per = 8 // bits
    groups = codes.reshape(len(codes), -1, per).astype(np.uint16)
    return (groups << (np.arange(per, dtype=np.uint16) * bits)).sum(-1).astype(np.uint8)


def unpacked(data, bits):
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    return ((data[..., None] >> shifts) & (2**bits - 1)).reshape(len(data), -1)


def half(x):
    return np.clip(x, -65504, 65504).astype("<f2")


def to_record(k, v):
    """Field order of a page: codes of K, its step, zero and token scale; codes of V, its channel
    scale, step and zero."""
    return np.concatenate([np.ascontiguousarray(f).reshape(-1).view(np.uint8) for f in (
        packed(k["codes"], k["bits"]), half(k["step"]), half(k["zero"]), half(k["column"]),
        packed(v["codes"], v["bits"]), half(v["column"]), half(v["step"]), half(v["zero"]))])


def from_record(record, k_bits, v_bits):
    at = 0

    def take(count):
        nonlocal at
        at += count
        return record[at - count:at]

    scale = lambda: take(2 * TOKENS).view("<f2").astype(np.float64)
    k = {"codes": unpacked(take(DIM * TOKENS * k_bits // 8).reshape(DIM, -1), k_bits),
         "step": scale(), "zero": scale(), "column": scale()}
    v = {"codes": unpacked(take(DIM * TOKENS * v_bits // 8).reshape(TOKENS, -1), v_bits),
         "column": scale(), "step": scale(), "zero": scale()}
    assert at == len(record), (at, len(record))
    return k, v


def decode(side):
    rows = side["codes"] * side["step"][:, None] + side["zero"][:, None]
    return rows * side["column"][None, :]


def encode_tile(k_rows, v_rows, bits):
    k, v = encode(k_rows.astype(np.float64).T, bits[0]), encode(v_rows.astype(np.float64), bits[1])
    k["bits"], v["bits"] = bits
    return k, v


def attend(q, k, v, scale):
    score = q @ k.T * scale
    p = np.exp(score - score.max(1, keepdims=True))
    return (p / p.sum(1, keepdims=True)) @ v @ rotation()


def attention_case(a, scale):
    """First tile exact, then records, then the exact tail; q is not rotated yet."""
    tiles = [from_record(r, 4, 2) for r in a["attn_records"]]
    k = [a["attn_first_k_rot"]] + [decode(t[0]).T for t in tiles] + [a["attn_tail_k_rot"]]
    v = [a["attn_first_v_rot"]] + [decode(t[1]) for t in tiles] + [a["attn_tail_v_rot"]]
    join = lambda parts: np.concatenate([p.astype(np.float64) for p in parts])
    return attend(a["attn_q"].astype(np.float64) @ rotation(), join(k), join(v), scale)


# ---- --check ----
def load(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = {name: np.fromfile(folder / e["file"], DTYPES[e["dtype"]]).reshape(e["shape"])
              for name, e in manifest["arrays"].items()}
    return manifest, arrays


def ulps(a, b):
    order = lambda x: np.where(x < 0, -(x.astype(int) & 0x7FFF), x)
    return np.abs(order(half(a).view("<i2")) - order(half(b).view("<i2"))).max()


def check(folder):
    manifest, a = load(folder)
    failures = 0

    def need(what, value, limit):
        nonlocal failures
        failures += not value <= limit
        print("%-4s %-34s %.3g (limit %.3g)" % ("ok" if value <= limit else "FAIL", what, value, limit))

    rel = lambda x, y: np.abs(x - y).max() / np.abs(y).max()
    need("rotation", rel(a["rotate_in"].astype(np.float64) @ rotation(), a["rotate_out"]), 1e-6)
    for name, bits in CASES.items():
        ours = encode_tile(a[name + "_k_rot"], a[name + "_v_rot"], bits)
        theirs = from_record(a[name + "_record"], *bits)
        for side, mine, other in zip("kv", ours, theirs):
            gap = np.abs(mine["codes"].astype(int) - other["codes"])
            need(f"{name} {side} codes, largest gap", gap.max(), 1)
            need(f"{name} {side} codes, share", (gap > 0).mean(), 1e-3)
            for field in ("step", "zero", "column"):
                need(f"{name} {side} {field}, ulps", ulps(mine[field], other[field]), 1)
        for field, value in (("k_tok", ours[0]["column"]), ("k_chan", ours[0]["row"]),
                             ("v_tok", ours[1]["row"]), ("v_chan", ours[1]["column"])):
            stored = a[f"{name}_{field}"]
            need(f"{name} {field}", (np.abs(value - stored) / stored).max(), 1e-5)
    k, v = from_record(a["k4v2_g128_record"], 4, 2)
    need("decoded K", rel(decode(k).T, a["k4v2_g128_k_dec"]), 1e-6)
    need("decoded V", rel(decode(v), a["k4v2_g128_v_dec"]), 1e-6)
    scale = next(c["scale"] for c in manifest["cases"] if c["name"] == "attn")
    out = attention_case(a, scale)
    error = np.linalg.norm(out - a["attn_out"], axis=1) / np.linalg.norm(out, axis=1)
    need("attention, relative error", error.max(), 1e-5)
    return failures == 0


# ---- --write ----
def draw(rng, count):
    """Rotated K and V: a few loud channels with an offset, uneven V channels, a few loud tokens."""
    k, v = rng.standard_normal((2, count, DIM))
    loud = rng.choice(DIM, 4, replace=False)
    k[:, loud] = 3 * k[:, loud] + 12 * rng.choice([-1, 1], 4)
    v = (v + 0.5 * rng.standard_normal(DIM)) * np.exp(0.5 * rng.standard_normal(DIM))
    for x in (k, v):
        x[rng.random(count) < 0.02] *= 4
    return [(x.astype("<f2").astype(np.float64) @ rotation()).astype("<f2") for x in (k, v)]


def write(folder):
    rng = np.random.default_rng(1)
    a = {"rotate_in": rng.standard_normal((4, DIM)).astype("<f2")}
    a["rotate_out"] = (a["rotate_in"].astype(np.float64) @ rotation()).astype("<f4")
    for name, bits in CASES.items():
        k_rows, v_rows = draw(rng, TOKENS)
        k, v = encode_tile(k_rows, v_rows, bits)
        a.update({f"{name}_k_rot": k_rows, f"{name}_v_rot": v_rows,
                  f"{name}_record": to_record(k, v),
                  f"{name}_k_tok": k["column"].astype("<f4"), f"{name}_k_chan": k["row"].astype("<f4"),
                  f"{name}_v_tok": v["row"].astype("<f4"), f"{name}_v_chan": v["column"].astype("<f4")})
    k, v = from_record(a["k4v2_g128_record"], 4, 2)
    a["k4v2_g128_k_dec"], a["k4v2_g128_v_dec"] = decode(k).T.astype("<f4"), decode(v).astype("<f4")
    tail, scale = 45, 1 / np.sqrt(DIM)
    k_rows, v_rows = draw(rng, 3 * TOKENS + tail)
    a["attn_q"] = rng.standard_normal((4, DIM)).astype("<f2")
    a["attn_first_k_rot"], a["attn_first_v_rot"] = k_rows[:TOKENS], v_rows[:TOKENS]
    a["attn_tail_k_rot"], a["attn_tail_v_rot"] = k_rows[-tail:], v_rows[-tail:]
    a["attn_records"] = np.stack([
        to_record(*encode_tile(k_rows[i:i + TOKENS], v_rows[i:i + TOKENS], (4, 2)))
        for i in (TOKENS, 2 * TOKENS)])
    a["attn_out"] = attention_case(a, scale).astype("<f4")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"byte_order": "little", "iters": PASSES, "arrays": {},
                "cases": [{"name": n} for n in CASES] + [{"name": "attn", "scale": scale}]}
    for name, array in a.items():
        np.ascontiguousarray(array).tofile(folder / f"{name}.bin")
        kind = next(k for k, t in DTYPES.items() if np.dtype(t) == array.dtype)
        manifest["arrays"][name] = {"file": f"{name}.bin", "shape": list(array.shape), "dtype": kind}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", nargs="?", const=DEFAULT_DIR, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--write", type=pathlib.Path, metavar="DIR")
    args = parser.parse_args()
    if args.write:
        write(args.write)
    if args.check:
        return 0 if check(args.check) else 1
    if not args.write:
        parser.error("say --check or --write DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
