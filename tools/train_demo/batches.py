"""Packed training rows, made by worker processes while the GPU trains.

A row holds `size` positions of whole documents. Per position: token, target, weight of the target's loss, and the
place in its document. What a row contains depends on the progress of the run (0 to 1): retrieval starts with
short texts and grows to the full context.
"""

import math
import multiprocessing as mp
import os
import random
import time

import numpy as np

PROSE, TALK, FIND = 1, 4, 12  # loss weights of prose, dialogue replies and retrieval replies


class Maker:
    def __init__(self, model_dir, data_dir, seed):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        from tokenizers import Tokenizer
        import needles

        self.needles = needles
        self.tok = Tokenizer.from_file(model_dir + "/tokenizer.json")
        self.rng = random.Random(seed)
        self.prose = np.fromfile(data_dir + "/prose.bin", dtype=np.uint16).astype(np.int32)
        self.filler = needles.Filler(self.prose, self.tok)
        self.facts = needles.Facts(model_dir + "/eval/needles.json")
        self.cache = {}
        self.talk = []

    def encode(self, text):
        if len(text) > 80:
            return self.tok.encode(text).ids
        ids = self.cache.get(text)
        if ids is None:
            if len(self.cache) > 200000:
                self.cache.clear()
            ids = self.cache[text] = self.tok.encode(text).ids
        return ids

    def weigh(self, segments, weight=FIND):
        """(ids, weights) of rendered segments; a segment may be token ids already."""
        ids, weights = [], []
        for text, mark in segments:
            part = self.encode(text) if isinstance(text, str) else text
            ids.append(np.asarray(part, dtype=np.int32))
            w = np.full(len(part), weight if mark else 0, dtype=np.uint8)
            if mark == 2:
                w[:1] = 0
            weights.append(w)
        return np.concatenate(ids), np.concatenate(weights)

    def dialogue(self):
        import dialogues

        return self.weigh(dialogues.make_dialogue(self.rng), TALK)

    def prose_piece(self, length):
        start = self.rng.randrange(len(self.prose) - length)
        return self.prose[start : start + length], np.full(length, PROSE, dtype=np.uint8)

    def copy_piece(self, length):
        """Something twice: the loss is on the second time. Random tokens or prose."""
        half = max(8, length // 2)
        if self.rng.random() < 0.5:
            ids = np.array([self.rng.randrange(6000) for _ in range(half)], dtype=np.int32)
        else:
            ids = self.prose_piece(half)[0]
        weights = np.full(2 * half, TALK, dtype=np.uint8)
        weights[: half + 4] = 0
        return np.concatenate([ids, ids]), weights

    def copy_task(self, length):
        text = self.tok.decode(self.filler.take(self.rng, length)[0].tolist()).strip()
        from chat import assistant, render, user

        ask = self.rng.choice(
            ("Repeat the following text:\n", "Copy this text:\n", "Repeat: ", "Write this again:\n\n")
        )
        return self.weigh(render([user(ask + text), assistant(text)], None, self.rng.random() < 0.5), TALK)

    def continuation(self, length):
        """A piece of prose as the message, what follows it as the reply."""
        ids, cuts = self.filler.take(self.rng, length)
        if len(cuts) == 0:
            return self.prose_piece(length)
        cut = self.rng.choice(list(cuts))
        text = [self.tok.decode(part.tolist()).strip() for part in (ids[:cut], ids[cut:])]
        from chat import assistant, render, user

        ask = self.rng.choice(
            ("Continue this text: ", "Continue: ", "Go on with this text:\n\n", "What comes next?\n\n")
        )
        return self.weigh(render([user(ask + text[0]), assistant(text[1])], None, self.rng.random() < 0.5), PROSE)

    def log_uniform(self, low, high):
        return int(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def document(self, progress):
        """One document. The odds below are of documents; by tokens, retrieval is about half of a late row."""
        r = self.rng.random
        kind = r()
        early = progress < 0.12
        if kind < (0.10 if early else 0.015):
            return self.copy_piece(self.log_uniform(32, 1024 if early else 2048))
        kind = r()
        if kind < 0.79:
            return self.dialogue()
        if kind < 0.81:
            return self.copy_task(self.log_uniform(10, 150))
        if kind < 0.82:
            return self.continuation(self.log_uniform(60, 400))
        if kind < 0.862:
            return self.prose_piece(self.log_uniform(256, 2048) if r() < 0.95 else self.log_uniform(2048, 12000))
        low, high = (
            (48, 400)
            if progress < 0.05
            else (64, 1200) if progress < 0.12 else (64, 2500) if progress < 0.25 else (96, 4300)
        )
        if progress > 0.4 and r() < 0.12:
            low, high = 4000, (8600 if r() < 0.85 else 15500)
        elif progress > 0.25 and r() < 0.2:
            low = 1000
        return self.needles.make_retrieval(
            self.rng, self.log_uniform(low, high), self.filler, self.facts, self.encode, self.tok.decode, self.weigh
        )

    def row(self, size, progress):
        """(tokens, targets, weights, positions, bounds): all documents whole but for the last prose piece."""
        parts, used, waiting, misses = [], 0, [], 0
        while used < size:
            ids, weights = self.document(progress)
            n = len(ids) - 1
            if used + n > size or n > 16000:
                misses += 1
                if misses < 12:
                    continue
                ids, weights = self.prose_piece(size - used + 1)
                n = len(ids) - 1
            parts.append((ids, weights))
            used += n
        tokens = np.concatenate([i[:-1] for i, _ in parts]).astype(np.uint16)
        targets = np.concatenate([i[1:] for i, _ in parts]).astype(np.uint16)
        weights = np.concatenate([w[1:] for _, w in parts])
        positions = np.concatenate([np.arange(len(i) - 1) for i, _ in parts]).astype(np.uint16)
        bounds = np.cumsum([0] + [len(i) - 1 for i, _ in parts]).astype(np.int32)
        return tokens, targets, weights, positions, bounds


def work(model_dir, data_dir, seed, size, progress, queue):
    maker = Maker(model_dir, data_dir, seed)
    while progress.value < 2:
        queue.put(maker.row(size, progress.value))


class Loader:
    """Rows from worker processes. A finished loader must be closed."""

    def __init__(self, model_dir, data_dir, seed, size, workers, progress=0.0):
        self.progress = mp.Value("d", progress)
        self.queue = mp.Queue(maxsize=4 * workers)
        self.procs = [
            mp.Process(
                target=work, args=(model_dir, data_dir, seed * 1000 + i, size, self.progress, self.queue), daemon=True
            )
            for i in range(workers)
        ]
        for p in self.procs:
            p.start()

    def next(self, timeout=120):
        return self.queue.get(timeout=timeout)

    def close(self):
        self.progress.value = 2
        for p in self.procs:
            p.terminate()


if __name__ == "__main__":
    import sys

    maker = Maker(sys.argv[1], sys.argv[2], 1)
    for progress in (0.0, 0.1, 0.3, 0.6):
        begin = time.time()
        rows = [maker.row(131072, progress) for _ in range(3)]
        took = (time.time() - begin) / 3
        w = np.concatenate([r[2] for r in rows])
        share = {k: float((w == v).mean()) for k, v in (("prose", PROSE), ("talk", TALK), ("find", FIND), ("none", 0))}
        lens = np.concatenate([np.diff(r[4]) for r in rows])
        print(
            "progress %.2f: %.2f s a row, %d documents, longest %d, mean square %.0f"
            % (progress, took, len(lens), lens.max(), (lens.astype(float) ** 2).sum() / lens.sum()),
            share,
        )
