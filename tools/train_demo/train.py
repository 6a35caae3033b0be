#!/usr/bin/env python3
"""Trains the demo model, or goes on from a checkpoint.

    train.py --model ../../assets/demo-model --data DATA --out CKPT --steps 4000

The learning rate rises over 100 steps, stays, and falls to zero over the last part (--decay-from, a share of the
steps). With --codec-from, some steps from that share on see keys and values through the KVarN codec. A run stops
early, with its checkpoint written, after --minutes.
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from tokenizers import Tokenizer

import batches
import codec
import evaluate
from model import Model, Shape, must_expand, packed_attention
from optim import Muon


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="folder with config.json, tokenizer.json and eval/")
    p.add_argument("--data", required=True, help="folder with prose.bin and heldout.bin")
    p.add_argument("--out", required=True, help="folder of the checkpoint")
    p.add_argument("--resume", help="checkpoint to go on from")
    p.add_argument("--steps", type=int, required=True, help="steps of the whole run, all parts together")
    p.add_argument("--stop", type=int, help="stop after this step (default: the last)")
    p.add_argument("--first", type=int, help="count steps from here when resuming (default: the checkpoint's)")
    p.add_argument("--size", type=int, default=131072, help="positions a row")
    p.add_argument("--rows", type=int, default=2, help="rows a step")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=0.003)
    p.add_argument("--decay-from", type=float, default=0.6)
    p.add_argument("--codec-from", type=float, default=2.0)
    p.add_argument("--codec-every", type=int, default=2, help="of the late steps, every n-th sees the codec")
    p.add_argument("--minutes", type=float, default=1e9)
    p.add_argument("--workers", type=int, default=14)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--device", default="cuda")
    p.add_argument("--check-every", type=int, default=500)
    p.add_argument("--no-compile", action="store_true")
    return p.parse_args()


def rate(step, args):
    warm = min(1.0, (step + 1 - (args.first or 0)) / 100)
    fall = args.decay_from * args.steps
    return warm * (1.0 if step < fall else max(0.0, (args.steps - step) / (args.steps - fall)))


def to_device(row, device):
    tokens, targets, weights, positions, bounds = row
    move = lambda a: torch.from_numpy(a.astype(np.int64 if a.dtype != np.uint8 else np.float32)).to(
        device, non_blocking=True
    )
    longest = int(np.diff(bounds).max())
    return move(tokens), move(targets), move(weights), move(positions), torch.from_numpy(bounds).to(device), longest


def save(path, model, muon, adam, step):
    torch.save(
        {"model": model.state_dict(), "muon": muon.buffers, "adam": adam.state_dict(), "step": step}, path + ".new"
    )
    os.replace(path + ".new", path)


def quick_check(model, args, tok, heldout):
    scorer = evaluate.Scorer(model, args.device)
    loss = evaluate.heldout_loss(scorer, heldout, limit=8)
    parts = []
    for coded in (False, True):
        table = evaluate.needle_table(scorer, args.model, tok, (1024, 4096), 24, coded)
        parts.append("/".join("%.0f" % (100 * v["code"]) for v in table.values()))
    tasks = evaluate.task_scores(scorer, tok, 32, False, kinds=("small additions", "lists", "tools"))
    print(
        "  check: held-out %.3f, needles at 1K/4K exact %s coded %s, %s"
        % (loss, *parts, ", ".join("%s %.0f" % (k, 100 * v) for k, v in tasks.items())),
        flush=True,
    )


def main():
    args = parse()
    began = time.time()
    os.makedirs(args.out, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tok = Tokenizer.from_file(args.model + "/tokenizer.json")
    heldout = np.fromfile(args.data + "/heldout.bin", dtype=np.uint16).astype(np.int64).tolist()
    model = Model(Shape(args.model + "/config.json")).to(args.device)
    muon = Muon(model.matrices())
    big = {id(p) for p in model.matrices()}
    adam = torch.optim.Adam(
        [p for p in model.parameters() if id(p) not in big], lr=args.adam_lr, betas=(0.9, 0.95), eps=1e-10
    )
    step = 0
    if args.resume:
        state = torch.load(args.resume, map_location=args.device)
        model.load_state_dict(state["model"])
        step = state["step"]
        if "muon" in state:
            for b, saved in zip(muon.buffers, state["muon"]):
                b.copy_(saved)
            adam.load_state_dict(state["adam"])
    if args.first is not None:
        step = args.first
    stop = args.stop or args.steps
    loader = batches.Loader(args.model, args.data, args.seed * 100 + step, args.size, args.workers, step / args.steps)
    if not args.no_compile:
        model.compile()
    tables = model.tables(args.device)
    expand = must_expand(args.device)
    rotation = codec.hadamard(model.shape.head_dim, args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    print(
        "parameters %.3f M, steps %d to %d of %d"
        % (sum(p.numel() for p in model.parameters()) / 1e6, step, stop, args.steps),
        flush=True,
    )
    seen, mark, sums = 0, time.time(), torch.zeros(3, 2, device=args.device)
    while step < stop and time.time() - began < args.minutes * 60:
        loader.progress.value = step / args.steps
        coded = rotation if step >= args.codec_from * args.steps and step % args.codec_every == 0 else None
        rows = [to_device(loader.next(), args.device) for _ in range(args.rows)]
        total = sum(r[2].sum() for r in rows)
        for tokens, targets, weights, positions, bounds, longest in rows:
            losses = model(tokens, targets, positions, tables, packed_attention(bounds, longest, expand), dtype, coded)
            ((losses * weights).sum() / total).backward()
            with torch.no_grad():
                for i, kind in enumerate((batches.PROSE, batches.TALK, batches.FIND)):
                    chosen = weights == kind
                    sums[i, 0] += (losses * chosen).sum()
                    sums[i, 1] += chosen.sum()
        lr = rate(step, args)
        muon.step(args.lr * lr)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * lr
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        seen += args.rows * args.size
        if step % 50 == 0 or step == stop or step in (1, 10):
            prose, talk, find = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()  # waits for the device
            sums.zero_()
            print(
                "step %d  prose %.3f  talk %.4f  find %.4f  lr %.3f  %.2f M tokens/s  queue %d  %.0f s"
                % (
                    step,
                    prose,
                    talk,
                    find,
                    lr,
                    seen / 1e6 / (time.time() - mark),
                    loader.queue.qsize(),
                    time.time() - began,
                ),
                flush=True,
            )
            seen, mark = 0, time.time()
            if not prose < 20:
                raise SystemExit("the loss is not finite: lower --lr")
        if step % args.check_every == 0 and step < stop:
            quick_check(model, args, tok, heldout)
            save(args.out + "/last.pt", model, muon, adam, step)
            mark = time.time()
    save(args.out + "/last.pt", model, muon, adam, step)
    loader.close()
    if args.device == "cuda":
        print("peak memory %.1f GB" % (torch.cuda.max_memory_allocated() / 1e9))
    print("stopped at step %d after %.0f s" % (step, time.time() - began), flush=True)


if __name__ == "__main__":
    main()
