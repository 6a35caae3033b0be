#!/usr/bin/env python3
"""Makes everything the training needs that is not a weight.

Reads   --corpus DIR   sotu.txt and moby-dick.txt (or the same with .xz)
        --qwen3 DIR    Qwen3's tokenizer.json (or .xz) and tokenizer_config.json: the frame of ours
        Debian packages bible-kjv, bible-kjv-text, sqlite3-doc, postgresql-doc-15
Writes  --model DIR    tokenizer.json, tokenizer_config.json, generation_config.json, config.json, eval/heldout.txt
        --out DIR      prose.bin (uint16 tokens, documents end with <|endoftext|>), heldout.bin
"""

import argparse
import html.parser
import json
import lzma
import random
import re
import subprocess
from pathlib import Path

import jinja2
import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import chat
import dialogues

VOCAB = 6144  # embedding rows: the BPE vocabulary and Qwen3's 26 added tokens
PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " ", "–": "-", "…": "...", "\u00ad": None})


def read_text(folder, name):
    path = Path(folder) / name
    if path.exists():
        return path.read_text(encoding="utf-8")
    return lzma.open(str(path) + ".xz", "rt", encoding="utf-8").read()


def tidy(text):
    text = re.sub(r"\s+", " ", text.translate(PLAIN)).strip()
    return text.replace(" (Applause.)", "").replace("(Applause.) ", "")


def paragraphs(text):
    """Paragraphs of at most about 1500 characters, cut at sentence ends, one line each."""
    out = []
    for block in re.split(r"\n\s*\n", text):
        line = ""
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"'])", tidy(block)):
            if line and len(line) + len(sentence) > 1500:
                out.append(line)
                line = ""
            line = line + " " + sentence if line else sentence
        if line:
            out.append(line)
    return out


class ProseParser(html.parser.HTMLParser):
    """The text of <p> elements; all else of a manual page is markup, code or navigation."""

    def __init__(self):
        super().__init__()
        self.found, self.open, self.mute = [], None, 0

    def handle_starttag(self, tag, attrs):
        if tag in ("pre", "script", "style", "table", "ul", "ol", "h1", "h2", "h3", "div", "blockquote"):
            self.close_paragraph()
        if tag in ("pre", "script", "style"):
            self.mute += 1
        if tag == "p":
            self.close_paragraph()
            self.open = ""

    def handle_endtag(self, tag):
        if tag in ("pre", "script", "style"):
            self.mute = max(0, self.mute - 1)
        if tag == "p":
            self.close_paragraph()

    def handle_data(self, data):
        if self.open is not None and not self.mute:
            self.open += data

    def close_paragraph(self):
        if self.open:
            self.found.append(tidy(self.open))
        self.open = None


def manual(folder):
    """One document per page: its paragraphs of at least 80 characters, each once over the whole manual."""
    seen, pages = set(), []
    for path in sorted(Path(folder).rglob("*.html")):
        parser = ProseParser()
        parser.feed(path.read_text(encoding="utf-8", errors="replace"))
        parser.close_paragraph()
        kept = []
        for p in parser.found:
            letters = sum(c.isalpha() or c == " " for c in p)
            if len(p) >= 80 and letters > 0.85 * len(p) and p not in seen:
                seen.add(p)
                kept.append(p)
        if kept:
            pages.append(kept)
    return pages


def bible():
    text = subprocess.run(["bible", "-f", "Gen1:1-Rev22:21"], capture_output=True, text=True, check=True).stdout
    verses, chapters, last = [], [], None
    for line in text.splitlines():
        m = re.match(r"(\S+?)(\d+):\d+ (.*)", line)
        if not m:
            continue
        if m.group(1, 2) != last and verses:
            chapters.append(paragraphs(" ".join(verses)))
            verses = []
        last = m.group(1, 2)
        verses.append(m.group(3))
    return chapters + [paragraphs(" ".join(verses))]


def hold_out(lines, shares, size):
    """Moves contiguous runs of about `size` characters, starting at the given shares of the text, out of lines."""
    total, held, kept, position = sum(map(len, lines)), [], [], 0
    for line in lines:
        inside = any(s * total <= position < s * total + size for s in shares)
        (held if inside else kept).append(line)
        position += len(line)
    return kept, held


def documents(lines, size):
    """Cuts a long run of paragraphs into documents of about `size` characters."""
    docs, doc = [], []
    for line in lines:
        doc.append(line)
        if sum(map(len, doc)) > size:
            docs.append(doc)
            doc = []
    return docs + ([doc] if doc else [])


def train_bpe(texts, size):
    """Byte-level BPE with Qwen3's normaliser and splitting."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    from tokenizers import Regex

    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return json.loads(tok.to_str())["model"]


def write_tokenizer(args, texts):
    frame = json.loads(read_text(args.qwen3, "tokenizer.json"))
    config = json.loads(read_text(args.qwen3, "tokenizer_config.json"))
    added = frame["added_tokens"]
    bpe = train_bpe(texts, VOCAB - len(added))
    frame["model"]["vocab"], frame["model"]["merges"] = bpe["vocab"], bpe["merges"]
    first, base = added[0]["id"], len(bpe["vocab"])
    for token in added:
        token["id"] += base - first
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {str(int(k) - first + base): v for k, v in decoder.items()}
    config["model_max_length"] = 16384
    ids = {t["content"]: t["id"] for t in added}
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    write = lambda name, value, indent=2: (args.model / name).write_text(
        json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8"
    )
    write("tokenizer.json", frame, 0)
    write("tokenizer_config.json", config)
    write(
        "generation_config.json",
        {
            "bos_token_id": pad,
            "pad_token_id": pad,
            "eos_token_id": [eos, pad],
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    write(
        "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": base + len(added),
            "hidden_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "intermediate_size": 768,
            "hidden_act": "silu",
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 8,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": pad,
            "eos_token_id": eos,
        },
    )
    return config["chat_template"]


def check_rendering(template, count=2000):
    """chat.render must equal the Jinja template, character by character."""
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda v: json.dumps(v, ensure_ascii=False)
    compiled = env.from_string(template)
    seen = []
    original = chat.render

    def spy(messages, tools=None, thinking=True):
        seen.append((messages, tools, thinking))
        return original(messages, tools, thinking)

    dialogues.render = spy
    rng = random.Random(5)
    for _ in range(count):
        ours = "".join(t for t, _ in dialogues.make_dialogue(rng))
        messages, tools, thinking = seen.pop()
        shown = [dict(m) for m in messages]
        if not thinking and "reasoning_content" in shown[-1]:
            shown[-1]["reasoning_content"] = ""
        theirs = compiled.render(messages=shown, tools=tools)
        assert ours == theirs, (ours, theirs)
        prompt = chat.prompt_text(messages[:-1], tools, thinking)
        extra = {} if thinking else {"enable_thinking": False}
        assert prompt == compiled.render(messages=messages[:-1], tools=tools, add_generation_prompt=True, **extra)
    dialogues.render = original


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--qwen3", required=True)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    (args.model / "eval").mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    sotu, held_sotu = hold_out(paragraphs(read_text(args.corpus, "sotu.txt")), (0.15, 0.45, 0.75), 52000)
    moby, held_moby = hold_out(paragraphs(read_text(args.corpus, "moby-dick.txt")), (0.6,), 90000)
    held = held_sotu + held_moby
    docs = {
        "sotu": documents(sotu, 40000),
        "moby-dick": documents(moby, 20000),
        "bible": bible(),
        "sqlite": manual("/usr/share/doc/sqlite3"),
        "postgresql": manual("/usr/share/doc/postgresql-doc-15/html"),
    }
    (args.model / "eval" / "heldout.txt").write_text("\n\n".join(held) + "\n", encoding="utf-8")

    rng = random.Random(11)
    talk = ["".join(t for t, _ in dialogues.make_dialogue(rng)) for _ in range(12000)]
    markers = re.compile(r"<\|[a-z_]+\|>|</?(?:think|tool_call|tool_response)>")
    texts = [p for pages in docs.values() for page in pages for p in page]
    texts += [part for t in talk for part in markers.split(t) if part]
    template = write_tokenizer(args, texts)
    check_rendering(template)

    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    end = tok.token_to_id("<|endoftext|>")
    order = [page for pages in docs.values() for page in pages]
    random.Random(3).shuffle(order)
    ids = []
    for enc in tok.encode_batch(["\n\n".join(page) for page in order]):
        ids.append(np.array(enc.ids + [end], dtype=np.uint16))
    np.concatenate(ids).tofile(args.out / "prose.bin")
    np.array(tok.encode("\n\n".join(held)).ids, dtype=np.uint16).tofile(args.out / "heldout.bin")
    for name, pages in docs.items():
        print("%-12s %6d documents %6.2f MB" % (name, len(pages), sum(len(p) for page in pages for p in page) / 1e6))
    print("held out     %.0f KB; training tokens %.2f M" % (sum(map(len, held)) / 1e3, sum(map(len, ids)) / 1e6))


if __name__ == "__main__":
    main()
