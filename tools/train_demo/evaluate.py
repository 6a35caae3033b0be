#!/usr/bin/env python3
"""Scores a trained model with exact and with KVarN-coded keys and values.

    evaluate.py --model DIR --weights FILE.pt [--cases 64] [--device cuda] [--json FILE]

The reading rule is the engine's: a query reads the first tile and its own tile exactly, all other complete tiles
coded. Rows are rounded to fp16 first in either case, as pages hold them. Replies are scored against the expected
text with the text before each token given; an all-correct score is the same as equal greedy output.
"""

import argparse
import json
import math
import random
import re
import time

import torch
import torch.nn.functional as F

import chat
import codec
import dialogues
import exchanges
import lists
from model import Model, Shape, rms_norm, rotate_positions

CHUNK = 1024


def attend(q, k, v, coded, rotation):
    """Causal attention of q [B, T, Hq, D] over k, v [B, T, Hk, D]; all in fp32, rotated frame inside."""
    b, t, hq, d = q.shape
    hk = k.shape[2]
    q, k, v = ((x.float() @ rotation).half().float().transpose(1, 2) for x in (q, k, v))
    full = t // codec.TILE * codec.TILE
    ck, cv = k, v
    if coded and full > codec.TILE:
        tiles = lambda x: x[:, :, :full].reshape(b, hk, -1, codec.TILE, d)
        ck, cv = k.clone(), v.clone()
        back = codec.round_trip(tiles(k), tiles(v))
        ck[:, :, :full], cv[:, :, :full] = (x.reshape(b, hk, full, d) for x in back)
    q = q.reshape(b, hk, hq // hk, t, d)
    out = torch.empty_like(q)
    at = torch.arange(t, device=q.device)
    for a in range(0, t, CHUNK):
        e = min(t, a + CHUNK)
        scores = lambda keys: torch.einsum("bhrqd,bhkd->bhrqk", q[:, :, :, a:e], keys[:, :, :e]) * d**-0.5
        s = scores(k)
        if coded:
            tile = at[:e] // codec.TILE
            exact = (tile[None] == 0) | (tile[None] == at[a:e, None] // codec.TILE)
            s = torch.where(exact, s, scores(ck))
        s = s.masked_fill(at[None, :e] > at[a:e, None], -math.inf)
        p = s.softmax(-1)
        if coded:
            out[:, :, :, a:e] = torch.einsum("bhrqk,bhkd->bhrqd", p * exact, v[:, :, :e]) + torch.einsum(
                "bhrqk,bhkd->bhrqd", p * ~exact, cv[:, :, :e]
            )
        else:
            out[:, :, :, a:e] = torch.einsum("bhrqk,bhkd->bhrqd", p, v[:, :, :e])
    return (out.reshape(b, hq, t, d) @ rotation).transpose(1, 2)


class Scorer:
    def __init__(self, model, device):
        self.m, self.s, self.device = model, model.shape, device
        self.tables = model.tables(device)
        self.rotation = codec.hadamard(self.s.head_dim, device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    @torch.no_grad()
    def hidden(self, tokens, coded):
        """Last hidden states [B, T, hidden] of tokens [B, T]; rows may be padded at their end."""
        s, m = self.s, self.m
        b, t = tokens.shape
        cos, sin = self.tables[0][:t].repeat(b, 1), self.tables[1][:t].repeat(b, 1)
        x = F.embedding(tokens, m.embedding.float()).view(b * t, -1)
        lin = lambda y, w: F.linear(y.to(self.dtype), w.to(self.dtype)).float()
        for i in range(s.layers):
            y = rms_norm(x, m.norm1[i], s.eps)
            q = rotate_positions(rms_norm(lin(y, m.wq[i]).view(b * t, s.q_heads, -1), m.q_norm[i], s.eps), cos, sin)
            k = rotate_positions(rms_norm(lin(y, m.wk[i]).view(b * t, s.kv_heads, -1), m.k_norm[i], s.eps), cos, sin)
            v = lin(y, m.wv[i])
            shape = lambda z, h: z.reshape(b, t, h, s.head_dim)
            a = attend(shape(q, s.q_heads), shape(k, s.kv_heads), shape(v, s.kv_heads), coded, self.rotation)
            x = x + lin(a.reshape(b * t, -1), m.wo[i])
            y = rms_norm(x, m.norm2[i], s.eps)
            x = x + lin(F.silu(lin(y, m.gate[i])) * lin(y, m.up[i]), m.down[i])
        return rms_norm(x, m.final_norm, s.eps).view(b, t, -1)

    def logits(self, hidden):
        return F.linear(hidden.to(self.dtype), self.m.embedding.to(self.dtype)).float()

    def pad(self, rows):
        longest = max(map(len, rows))
        return torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=self.device)

    def replies_right(self, pairs, coded, batch):
        """For (prompt ids, reply ids) pairs: per pair the list of booleans, is each reply token the greedy one."""
        out = []
        for i in range(0, len(pairs), batch):
            part = pairs[i : i + batch]
            tokens = self.pad([p + r for p, r in part])
            hidden = self.hidden(tokens, coded)
            for row, (p, r) in enumerate(part):
                best = self.logits(hidden[row, len(p) - 1 : len(p) + len(r) - 1]).argmax(-1).tolist()
                out.append([x == y for x, y in zip(best, r)])
        return out

    def greedy(self, prompts, stop, limit=96, coded=False):
        """Greedy continuations, all prompts at once, the whole text anew for every token (short texts only)."""
        rows, done = [list(p) for p in prompts], [False] * len(prompts)
        for _ in range(limit):
            hidden = self.hidden(self.pad(rows), coded)
            last = hidden[torch.arange(len(rows)), torch.tensor([len(r) - 1 for r in rows])]
            for i, token in enumerate(self.logits(last).argmax(-1).tolist()):
                if not done[i]:
                    rows[i].append(token)
                    done[i] = token in stop
            if all(done):
                break
        return [r[len(p) :] for r, p in zip(rows, prompts)]


# ---------------------------------------------------------------- needles, as README.md defines them
class Needles:
    def __init__(self, model_dir, tok):
        self.tok, self.c = tok, json.load(open(model_dir + "/eval/needles.json"))
        text = open(model_dir + "/eval/" + self.c["filler"], encoding="utf-8").read()
        self.sentences = []  # (text, ends its paragraph, tokens)
        for paragraph in text.strip().split("\n\n"):
            parts = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)
            for i, part in enumerate(parts):
                self.sentences.append((part, i + 1 == len(parts), len(tok.encode(" " + part).ids) + 1))

    def case(self, rng, tokens, depth):
        """(prompt ids, reply ids, code positions in the reply)."""
        c = self.c
        codes, pairs = set(), set()
        while len(pairs) < 1 + c["distractors"]:
            pairs.add((rng.choice(c["adjectives"]), rng.choice(c["places"])))
        while len(codes) < len(pairs):
            codes.add(str(rng.randint(10 ** (c["code_digits"] - 1), 10 ** c["code_digits"] - 1)))
        planted = [
            dict(adjective=a, place=p, code=code)
            for (a, p), code in zip(
                sorted(pairs, key=lambda _: rng.random()), sorted(codes, key=lambda _: rng.random())
            )
        ]
        question, reply = c["question"].format(**planted[0]), c["answer"].format(**planted[0])
        room = tokens - 60 - 25 * len(planted)
        at, run = rng.randrange(len(self.sentences)), []
        while room > 0:
            sentence = self.sentences[at % len(self.sentences)]
            room -= sentence[2]
            if room > 0 or not run:
                run.append(sentence)
            at += 1
        lengths = [0]
        for s in run:
            lengths.append(lengths[-1] + s[2])
        spot = min(range(len(lengths)), key=lambda i: abs(lengths[i] - depth * lengths[-1]))
        spots = [spot] + [rng.randrange(len(run) + 1) for _ in planted[1:]]
        text = ""
        for i in range(len(run) + 1):
            here = [c["sentence"].format(**p) for p, s in zip(planted, spots) if s == i]
            if here:
                text += (" " if text and not text.endswith("\n") else "") + " ".join(here)
                if i and run[i - 1][1] and i < len(run):
                    text += "\n\n"
            if i < len(run):
                text += (" " if text and not text.endswith("\n") else "") + run[i][0]
                if run[i][1] and i + 1 < len(run) and i + 1 not in spots:
                    text += "\n\n"
        prompt = chat.prompt_text(
            [chat.user(c["prompt"].format(text=text, question=question))], None, c["enable_thinking"]
        )
        ids, out = self.tok.encode(prompt).ids, self.tok.encode(reply + "<|im_end|>").ids
        first = len(self.tok.encode(reply[: reply.index(planted[0]["code"])].rstrip()).ids) + 1
        return ids, out, range(first, first + c["code_digits"])


def needle_table(scorer, model_dir, tok, lengths, cases, coded, seed=17):
    needles, table = Needles(model_dir, tok), {}
    for length in lengths:
        rng = random.Random(seed + length)
        made = [needles.case(rng, length, (i + 0.5) / cases) for i in range(cases)]
        marks = scorer.replies_right([m[:2] for m in made], coded, max(1, 32768 // length))
        code = sum(all(r[i] for i in m[2]) for m, r in zip(made, marks))
        table[length] = {
            "code": code / cases,
            "whole_reply": sum(map(all, marks)) / cases,
            "tokens": round(sum(len(m[0]) for m in made) / cases),
        }
    return table


# ---------------------------------------------------------------- other tasks
def task_scores(scorer, tok, cases, coded, seed=29, kinds=None):
    """Share of replies that greedy decoding would write exactly as expected, per kind, thoughts on and off."""

    def exchange(func):
        def make(rng, thinking):
            question, reply, think = func(rng)
            return chat.render([chat.user(question), chat.assistant(reply, think)], None, thinking)

        return make

    def sums(rng, thinking):
        a, b = rng.randint(0, 49), rng.randint(0, 49)
        return chat.render(
            [
                chat.user("What is %d + %d?" % (a, b)),
                chat.assistant("%d + %d = %d." % (a, b, a + b), exchanges.addition_thoughts(a, b)),
            ],
            None,
            thinking,
        )

    def other(maker):
        def make(rng, thinking):
            while True:
                segments = maker(rng)
                if any(mark == 1 and "<think>" in text for text, mark in segments) == thinking:
                    return segments

        return make

    makers = {
        "small additions": sums,
        "arithmetic": exchange(exchanges.arithmetic),
        "copy": exchange(lists.copying),
        "lists": exchange(lists.listing),
        "counting": exchange(exchanges.counting),
        "memory": other(dialogues.memory_dialogue),
        "tools": other(dialogues.tool_dialogue),
    }
    scores = {}
    for name in kinds or makers:
        for thinking in (True, False):
            rng, pairs = random.Random(seed), []
            for _ in range(cases):
                segments = makers[name](rng, thinking)
                cut = (
                    max(i for i, (t, m) in enumerate(segments) if m == 0 and t.endswith("<|im_start|>assistant\n")) + 1
                )
                cut += 0 if thinking else 1
                text = ["".join(t for t, _ in part) for part in (segments[:cut], segments[cut:-1])]
                pairs.append(tuple(tok.encode(t).ids for t in text))
            pairs.sort(key=lambda p: len(p[0]))
            marks = scorer.replies_right(pairs, coded, 32)
            scores[name + (" (thinking)" if thinking else "")] = sum(map(all, marks)) / cases
    return scores


def heldout_loss(scorer, ids, window=2048, limit=16, coded=False):
    """Mean loss of the held-out prose in windows, in nats a token."""
    count = min(limit, len(ids) // window)
    rows = torch.tensor(ids[: count * window], device=scorer.device).view(count, window)
    total = 0.0
    for part in rows.split(4):
        logits = scorer.logits(scorer.hidden(part, coded)[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return total / (count * (window - 1))


CHATS = [
    "Hello!",
    "Who are you?",
    "What is 12 + 7?",
    "What is 38 + 45?",
    "Repeat after me: the fox is in the garden",
    "Name 3 animals.",
    "My name is Maya. What is my name?",
    "What is kvarn?",
    "Sort this list: pear, apple, kiwi",
    "Tell me a story about a fox.",
    "What is the capital of France?",
    "Explain quantum mechanics.",
    "Count from 1 to 12.",
    "thanks",
]
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather for a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city"}},
                "required": ["city"],
            },
        },
    }
]


def sample_chats(scorer, tok):
    prompts = [(q, chat.prompt_text([chat.user(q)], None, i % 2 == 0)) for i, q in enumerate(CHATS)]
    ask = chat.user("What is the weather in Paris?")
    prompts.append(("[tools] " + ask["content"], chat.prompt_text([ask], WEATHER)))
    prompts.append(
        (
            "[tool result]",
            chat.prompt_text(
                [
                    ask,
                    chat.tool_call("get_weather", {"city": "Paris"}),
                    chat.tool_result('{"temperature": 18, "condition": "sunny"}'),
                ],
                WEATHER,
                False,
            ),
        )
    )
    stop = {tok.token_to_id("<|im_end|>"), tok.token_to_id("<|endoftext|>")}
    replies = scorer.greedy([tok.encode(p).ids for _, p in prompts], stop)
    return [(q, tok.decode(r, skip_special_tokens=False)) for (q, _), r in zip(prompts, replies)]


def magnitudes(scorer, tok, model_dir):
    """Deviation of keys and values per layer, to judge the codec's floor of 0.74."""
    needles = Needles(model_dir, tok)
    ids = needles.case(random.Random(1), 1024, 0.5)[0]
    seen, original = [], globals()["attend"]

    def spy(q, k, v, coded, rotation):
        seen.append((k.std().item(), v.std().item(), v.std(-1).amin().item()))
        return original(q, k, v, coded, rotation)

    globals()["attend"] = spy
    scorer.hidden(torch.tensor([ids], device=scorer.device), False)
    globals()["attend"] = original
    return seen


def report(scorer, model_dir, tok, heldout, lengths=(1024, 2048, 4096, 8192), cases=64):
    result = {}
    for name, coded in (("fp16", False), ("kvarn_k4v2_g128", True)):
        begin = time.time()
        result[name] = {
            "heldout_loss": heldout_loss(scorer, heldout, coded=coded),
            "needles": needle_table(scorer, model_dir, tok, lengths, cases, coded),
            "tasks": task_scores(scorer, tok, 100, coded),
        }
        row = result[name]
        print("%s: held-out loss %.4f nats (%.0f s)" % (name, row["heldout_loss"], time.time() - begin))
        print(
            "   needles  "
            + "  ".join(
                "%d: %.1f%% (whole %.1f%%)" % (n, 100 * v["code"], 100 * v["whole_reply"])
                for n, v in row["needles"].items()
            )
        )
        print("   tasks    " + "  ".join("%s %.0f%%" % (n, 100 * v) for n, v in row["tasks"].items()), flush=True)
    return result


def main():
    from tokenizers import Tokenizer
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    model = Model(Shape(args.model + "/config.json")).to(args.device)
    model.load_state_dict(torch.load(args.weights, map_location=args.device)["model"])
    for p in model.parameters():
        p.data = p.data.bfloat16().float()  # what the exported file holds
    tok = Tokenizer.from_file(args.model + "/tokenizer.json")
    heldout = np.fromfile(args.data + "/heldout.bin", dtype=np.uint16).astype(np.int64).tolist()
    scorer = Scorer(model, args.device)
    for i, (k, v, low) in enumerate(magnitudes(scorer, tok, args.model)):
        print("layer %d: std of keys %.3f, of values %.3f, least of one token's values %.3f" % (i, k, v, low))
    result = report(scorer, args.model, tok, heldout, [int(n) for n in args.lengths.split(",")], args.cases)
    for question, reply in sample_chats(scorer, tok):
        print("> %s\n%s" % (question, reply))
    if args.json:
        json.dump(result, open(args.json, "w"), indent=1)


if __name__ == "__main__":
    main()
