#!/usr/bin/env python3
"""Compares kvarn's tokenizer with Hugging Face's, on strings made here from a fixed seed.

    tokenizer_oracle.py TOOL TOKENIZER_JSON[.xz] [--strings N] [--seed S]

TOOL is the test binary tokenizer_tool. Encoding must give the same ids, decoding the same text (of
the ids that were encoded, and of random ids, whose bytes need not be UTF-8). Any difference fails.
The corpus holds natural scripts, emoji, code, runs of white space, combining marks, added tokens
inside text, random bytes, and every code point there is in a few contexts, since both sides bring
Unicode tables of their own.
"""
import argparse
import json
import lzma
import os
import random
import subprocess
import sys
import tempfile
import unicodedata

try:
    import tokenizers
except ImportError as error:
    print(f"SKIPPED: {error}; pip install -r tests/requirements.txt")
    sys.exit(77)

SCRIPTS = {
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F), (0x1E00, 0x1EFF)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Cyrillic": [(0x400, 0x52F)],
    "Hebrew": [(0x591, 0x5F4)],
    "Arabic": [(0x600, 0x6FF), (0x750, 0x77F)],
    "Devanagari": [(0x900, 0x97F)],
    "Bengali": [(0x980, 0x9FE)],
    "Tamil": [(0xB80, 0xBFF)],
    "Thai": [(0xE00, 0xE5B)],
    "Georgian": [(0x10A0, 0x10FF)],
    "Hangul": [(0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F)],
    "Kana": [(0x3041, 0x30FF), (0xFF61, 0xFF9F)],
    "Han": [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAD9), (0x20000, 0x2A6DF)],
    "Ethiopic": [(0x1200, 0x139F)],
    "Tibetan": [(0xF00, 0xFDA)],
    "Symbols": [(0x2000, 0x2BFF)],
    "Mathematical": [(0x1D400, 0x1D7FF)],
    "Any": [(0x0, 0xD7FF), (0xE000, 0x10FFFF)],
}
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n", "\u00a0", "\u2003", "\u3000", "\u180e",
          "\u200b", "\u2028", "\x0b", "\x0c", "\x1c", "\x85"]
MARKS = [chr(c) for c in range(0x300, 0x370)] + list("\u05b0\u05bc\u064b\u0651\u093c\u3099\u309a\u1ab0"
                                                     "\u0345\u0327\u0328\u20d7\u1dc0\ufe20\U0001d165")
CANONICAL = [chr(c) for c in range(0xA0, 0x30000) if not 0xAC00 <= c < 0xD7A4 and (unicodedata.combining(chr(c))
             or unicodedata.normalize("NFD", chr(c)) != chr(c))] + ["\U00011935", "\U00011930"] * 20
CODE = ["def f(x):\n\treturn x**2  # square\n", "for (int i = 0; i < n; ++i) {\n    a[i] += b[i];\n}\n",
        "SELECT * FROM t WHERE id='x''y';", "<div class=\"a\">&nbsp;</div>", "0x1F + 1e-9 / 3.14159;",
        "{\"name\": \"x\", \"arguments\": {\"k\": [1, 2, null]}}", "\\frac{1}{2}\\pi r^2",
        "https://example.org/a?b=c&d=%20#e", "let s = r#\"raw\"#;", "    \t  if a!=b:\r\n\r\n\r\n"]
WORDS = ("the of and to in a is that it was for on are as with his they I at be this have from or one had "
         "by word but not what all were we when your can said there use an each which she do how their if "
         "don't I'll you're We've it's he'd I'M they'RE O'Neil naïve café Straße coöperate 12345 3.14 1,000 "
         "supercalifragilisticexpialidocious antidisestablishmentarianism").split()
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇸🇪", "🇳🇴🇩🇰", "❤️", "☺", "🤷🏿‍♂️", "1️⃣", "🫠", "🪿", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]


def script_text(rng, ranges, length):
    out = []
    while len(out) < length:
        for _ in range(rng.randint(1, 8)):
            low, high = rng.choice(ranges)
            out.append(chr(rng.randint(low, high)))
        out.append(rng.choice([" ", " ", " ", "", ", ", ". ", "\n", "-", "1"]))
    return "".join(c for c in out if not any(0xD800 <= ord(x) < 0xE000 for x in c))


def make_strings(rng, count, added):
    """`count` texts; each maker in turn."""
    scripts = list(SCRIPTS.values())

    def prose():
        return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "  ", ", ", ".\n", "\n\n", "! "])
                       for _ in range(rng.randint(1, 40)))

    def script():
        return script_text(rng, rng.choice(scripts), rng.randint(1, 60))

    def mixed():
        return "".join(script_text(rng, rng.choice(scripts), rng.randint(1, 12)) for _ in range(4))

    def emoji():
        return "".join(rng.choice([rng.choice(EMOJI), rng.choice(WORDS), " "]) for _ in range(rng.randint(1, 25)))

    def code():
        return "".join(rng.choice(CODE) + rng.choice(["", "\n", "    "]) for _ in range(rng.randint(1, 6)))

    def spaces():
        return "".join(rng.choice([rng.choice(SPACES) * rng.randint(1, 6), rng.choice(WORDS), "é", "7"])
                       for _ in range(rng.randint(1, 25)))

    def marks():
        return "".join(rng.choice(["a", "e", "o", "ᄀ", "ᅡ", "ᆨ", "가", "か", "א", "ا", "ि", "Å", " "])
                       + "".join(rng.choice(MARKS) for _ in range(rng.randint(0, 5)))
                       for _ in range(rng.randint(1, 15)))

    def canonical():  # what normalisation works on: marks, and characters that decompose
        return "".join(rng.choice(["", "", "a", " "]) + rng.choice(CANONICAL) for _ in range(rng.randint(2, 20)))

    def tokens():
        parts = [prose, script, spaces, emoji]
        out = []
        for _ in range(rng.randint(1, 6)):
            token = rng.choice(added)
            out.append(rng.choice([token, token, " " + token + " ", token[:-1], token[1:], token * 2, "\n" + token]))
            out.append(rng.choice(parts)()[:rng.randint(0, 12)])
        return "".join(out)

    def printable():
        return "".join(chr(rng.randint(0, 0x7F)) for _ in range(rng.randint(1, 60)))

    def repeated():
        return rng.choice(["a", "ab", "=", " ", "\n", "é", "字", "-+", "0", "😀", "\u0301"]) * rng.randint(1, 300)

    makers = [prose, script, script, mixed, emoji, code, spaces, marks, canonical, tokens, printable, repeated]
    return [makers[i % len(makers)]() for i in range(count)]


def sweep_strings():
    """Every code point alone, in a word, after an apostrophe, between spaces and among marks.

    Planes 4 to 13 hold nothing and planes 15 and 16 are private use: their ends stand for them."""
    out = []
    starts = [*range(0, 0x40000, 64), 0x4FFC0, 0xDFFC0, *range(0xE0000, 0xE0200, 64), 0xF0000, 0x10FFC0]
    for start in starts:
        chars = [chr(c) for c in range(start, start + 64) if not 0xD800 <= c < 0xE000]
        if chars:
            out.append("".join(f"x{c}y{c}7{c} {c}'{c} {c}\u0323\u0301a\u0301{c}\u0323a{c}\u0301.\n" for c in chars))
    return out


class Tool:
    def __init__(self, binary, tokenizer):
        self.command = [binary, tokenizer]

    def ask(self, requests):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in requests)
        run = subprocess.run(self.command, input=text.encode(), stdout=subprocess.PIPE, timeout=280)
        if run.returncode != 0:
            sys.exit(f"{self.command[0]} exited with {run.returncode}")
        answers = [json.loads(line) for line in run.stdout.split(b"\n") if line]
        if len(answers) != len(requests):
            sys.exit(f"{len(requests)} requests, {len(answers)} answers")
        return answers


def compare(what, inputs, ours, theirs):
    wrong = [i for i in range(len(inputs)) if ours[i] != theirs[i]]
    print(f"{what}: {len(inputs)} compared, {len(wrong)} differences")
    for i in wrong[:5]:
        print(f"  input  {json.dumps(inputs[i])[:600]}\n  kvarn  {json.dumps(ours[i])[:600]}\n"
              f"  oracle {json.dumps(theirs[i])[:600]}")
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool")
    parser.add_argument("tokenizer")
    parser.add_argument("--strings", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-sweep", action="store_true", help="leave out the strings of every code point")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = args.tokenizer
        if path.endswith(".xz"):
            path = os.path.join(folder, "tokenizer.json")
            with lzma.open(args.tokenizer) as packed, open(path, "wb") as out:
                out.write(packed.read())
        reference = tokenizers.Tokenizer.from_file(path)
        tool = Tool(args.tool, path)
        rng = random.Random(args.seed)
        added = [t.content for t in reference.get_added_tokens_decoder().values()]
        vocab_size = reference.get_vocab_size(with_added_tokens=True)
        failures = 0

        def encode(texts):
            return [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]

        strings = make_strings(rng, args.strings, added) + ([] if args.no_sweep else sweep_strings())
        expected = encode(strings)
        failures += compare("encode", strings, tool.ask(strings), expected)
        for skip in (False, True):
            decoded = tool.ask([{"ids": ids, "skip": skip} for ids in expected])
            theirs = reference.decode_batch(expected, skip_special_tokens=skip)
            failures += compare(f"decode skip_special_tokens={skip}", expected, decoded, theirs)

        noise = [bytes(rng.choice([rng.randrange(256), rng.choice(b"a \n\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80")])
                       for _ in range(rng.randint(1, 60))) for _ in range(args.strings // 4)]
        lossy = [b.decode("utf-8", "replace") for b in noise]
        failures += compare("encode random bytes", lossy, tool.ask([{"hex": b.hex()} for b in noise]), encode(lossy))

        random_ids = [[rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))] for _ in range(args.strings // 4)]
        failures += compare("decode random ids", random_ids, tool.ask([{"ids": ids} for ids in random_ids]),
                            reference.decode_batch(random_ids, skip_special_tokens=False))

        prose = " ".join(rng.choice(WORDS[:-3]) for _ in range(200000))
        print(f"speed: {tool.ask([{'bench': prose}])[0]:.1f} MB/s on {len(prose) / 1e6:.1f} MB of English words")
        print(f"tokenizers {tokenizers.__version__}, python's Unicode {unicodedata.unidata_version}")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
