"""Long texts with planted facts and questions about them: the training data for retrieval.

make_retrieval(rng, length) returns (token ids, weights) of one conversation of about `length` tokens. The wording of
assets/demo-model/eval/needles.json is one of several kinds here; the filler comes from the training prose only.
"""

import json

import numpy as np

import exchanges as x
import lists
import wordlists as w
from chat import assistant, render, system, user

LEADS = [
    "Read the text below. Later you will be asked about it.\n\n",
    "Read this text:\n\n",
    "Here is a text.\n\n",
    "Text:\n\n",
    "",
    "Please read the following text carefully and answer the question at the end.\n\n",
    "Context:\n",
]


class Filler:
    """Runs of whole sentences of the training prose, as tokens."""

    def __init__(self, ids, tokenizer):
        size = tokenizer.get_vocab_size()
        pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]
        ends = np.array([p[-1:] in (".", "!", "?") for p in pieces])
        starts = np.array([p[:1] == "Ġ" and p[1:2].isupper() for p in pieces])
        (gap,), (stop,), (stop_gap,) = (tokenizer.encode(t).ids for t in ("\n\n", ".", ".\n\n"))
        ends_here = np.flatnonzero(ids == tokenizer.token_to_id("<|endoftext|>"))
        after_stop = ends_here[ids[ends_here - 1] == stop]  # ".", end of document -> one token ".\n\n"
        self.ids = ids.astype(np.int32)
        self.ids[ends_here] = gap
        self.ids[after_stop] = stop_gap
        self.ids = np.delete(self.ids, after_stop - 1)
        self.cuts = np.flatnonzero(starts[self.ids[1:]] & ends[self.ids[:-1]]) + 1

    def take(self, rng, length):
        """(token ids, sentence borders inside them): about `length` tokens from a random sentence on."""
        start = self.cuts[rng.randrange(len(self.cuts))]
        if start + length + 200 > len(self.ids):
            start = self.cuts[rng.randrange(len(self.cuts) // 2)]
        a, b = np.searchsorted(self.cuts, (start, start + max(length, 1)))
        end = self.cuts[min(b, len(self.cuts) - 1)]
        return self.ids[start:end], self.cuts[a + 1 : b] - start


def digits(rng, n):
    return str(rng.randint(10 ** (n - 1), 10**n - 1))


class Facts:
    """Draws (key, sentence, question, answer); two facts of one text never share a key."""

    def __init__(self, pattern_file):
        self.main = json.load(open(pattern_file))

    def one(self, rng, main_only=False):
        adj, place = rng.choice(w.ADJECTIVES), rng.choice(w.PLACES)
        name, other = rng.choice(w.NAMES), rng.choice(w.NAMES)
        kind = 0 if main_only or rng.random() < 0.5 else rng.randint(1, 9)
        if kind == 0:
            if rng.random() < 0.7:
                adj, place = rng.choice(self.main["adjectives"]), rng.choice(self.main["places"])
            code = digits(rng, 5 if rng.random() < 0.8 else rng.randint(3, 8))
            fill = lambda key: self.main[key].format(adjective=adj, place=place, code=code)
            ask = fill("question")
            if rng.random() < 0.2:
                ask = x.pick(
                    rng,
                    "Tell me the secret code for the %s %s.",
                    "Which secret code belongs to the %s %s?",
                    "Find the secret code for the %s %s.",
                    "secret code for the %s %s?",
                ) % (adj, place)
            return ("code", adj, place), fill("sentence"), ask, fill("answer")
        if kind == 1:
            number = digits(rng, rng.randint(4, 8))
            return (
                (name, "phone"),
                "The phone number of %s is %s." % (name, number),
                "What is the phone number of %s?" % name,
                "The phone number of %s is %s." % (name, number),
            )
        if kind == 2:
            word = rng.choice(w.COLORS) + rng.choice(w.ANIMALS) + digits(rng, 2)
            return (
                ("password", adj, place),
                "The password of the %s %s is %s." % (adj, place, word),
                "What is the password of the %s %s?" % (adj, place),
                "The password of the %s %s is %s." % (adj, place, word),
            )
        if kind == 3:
            thing = rng.choice(w.OBJECTS)
            return (
                (name, "hid", thing),
                "%s hid the %s in the %s %s." % (name, thing, adj, place),
                "Where did %s hide the %s?" % (name, thing),
                "%s hid the %s in the %s %s." % (name, thing, adj, place),
            )
        if kind == 4:
            city = rng.choice(w.CITIES)
            return (
                (name, "lives"),
                "%s lives in %s." % (name, city),
                "Where does %s live?" % name,
                "%s lives in %s." % (name, city),
            )
        if kind == 5:
            n, fruit = rng.randint(2, 999), rng.choice(w.FRUITS)
            return (
                (name, fruit),
                "%s bought %d %ss." % (name, n, fruit),
                "How many %ss did %s buy?" % (fruit, name),
                "%s bought %d %ss." % (name, n, fruit),
            )
        if kind == 6:
            color, thing = rng.choice(w.COLORS), rng.choice(w.OBJECTS)
            return (
                (name, "color", thing),
                "The %s of %s is %s." % (thing, name, color),
                "What color is the %s of %s?" % (thing, name),
                "The %s of %s is %s." % (thing, name, color),
            )
        if kind == 7:
            day, hour = rng.choice(w.DAYS), rng.randint(1, 12)
            return (
                (name, other),
                "%s meets %s on %s at %d o'clock." % (name, other, day, hour),
                "When does %s meet %s?" % (name, other),
                "%s meets %s on %s at %d o'clock." % (name, other, day, hour),
            )
        if kind == 8:
            number = digits(rng, rng.randint(3, 6))
            return (
                ("order", number),
                "Order %s was sent to %s." % (number, other),
                "Who received order %s?" % number,
                "Order %s was sent to %s." % (number, other),
            )
        job = rng.choice(w.JOBS)
        return (
            (name, "job"),
            "%s works as a %s." % (name, job),
            "What is the job of %s?" % name,
            "%s works as a %s." % (name, job),
        )

    def draw(self, rng, count):
        found, only = {}, rng.random() < 0.5
        for _ in range(count * 2):
            fact = self.one(rng, only)
            found.setdefault(fact[0], fact[1:])
            if len(found) == count:
                break
        return list(found.values())


def plant(rng, filler, length, sentences, encode):
    """Token ids of `length` tokens of filler with the sentences at random borders."""
    ids, cuts = filler.take(rng, length)
    spots = sorted((rng.choice(cuts) if len(cuts) else len(ids), i) for i in range(len(sentences)))
    parts, last = [], 0
    for spot, i in spots:
        parts += [ids[last:spot], np.array(encode(" " + sentences[i]), dtype=np.int32)]
        last = spot
    return np.concatenate(parts + [ids[last:]])


def splice(body, before, after, encode, decode):
    """Segments of before + body + after, cut where the tokenizer cuts: no space first, and closing punctuation
    belongs to the line end that follows it."""
    body = list(body)
    body[:1] = encode(decode(body[:1]).lstrip())
    while after.startswith("\n") and body and not any(c.isalnum() for c in decode(body[-1:])):
        after = decode([body.pop()]) + after
    return [(before, 0), (np.array(body, dtype=np.int32), 0), (after, 0)]


def make_retrieval(rng, length, filler, facts, encode, decode, weigh):
    """One conversation: text with planted facts, then one or more questions. weigh turns segments into tokens."""
    kind = rng.random()
    if kind < 0.15:  # nothing but facts
        planted = facts.draw(rng, max(2, min(length // 22, 300)))
        sep = x.pick(rng, " ", "\n", "\n- ")
        body = np.array(encode(sep.join(p[0] for p in planted)), dtype=np.int32)
    elif kind < 0.22:  # a filler that repeats itself
        planted = facts.draw(rng, rng.randint(1, 4))
        idle = [lists.sentence(rng) for _ in range(rng.randint(1, 5))]
        lines = [idle[i % len(idle)] for i in range(max(1, length // 9))]
        for p in planted:
            lines.insert(rng.randint(0, len(lines)), p[0])
        body = np.array(encode(" ".join(lines)), dtype=np.int32)
    else:
        top = max(1, min(12, length // 80))
        planted = facts.draw(rng, rng.randint(1, top))
        body = plant(rng, filler, max(8, length - 80 - 25 * len(planted)), [p[0] for p in planted], encode)
    asked = rng.sample(planted, min(len(planted), rng.choice((1, 1, 2, 4, 8))))
    mark = "\u0001"  # stands for the body while the rest is rendered
    lead = rng.choice(LEADS) if rng.random() < 0.5 else LEADS[0]
    head = [user(lead + mark + "\n\n" + asked[0][1])]
    place = rng.random()
    if place < 0.1:
        head = [system(lead + mark), user(asked[0][1])]
    elif place < 0.25:
        head = [
            user(lead + mark),
            assistant(x.pick(rng, "I have read it.", "All right.", "Done. What is your question?")),
            user(asked[0][1]),
        ]
    messages = head + [assistant(asked[0][2])]
    for _, question, answer in asked[1:]:
        messages += [user(question), assistant(answer)]
    segments = render(messages, None, rng.random() < 0.4)
    out = []
    for text, weight in segments:
        if mark in text:
            before, after = text.split(mark)
            out += splice(body, before, after, encode, decode)
        else:
            out.append((text, weight))
    return weigh(out)
