#!/usr/bin/env python3
"""Loads the exported folder with transformers and compares its logits with our model's; prints greedy samples.

check_export.py --model DIR --weights CKPT/last.pt
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from model import Model, Shape


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tok = AutoTokenizer.from_pretrained(args.model)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    ours = Model(Shape(args.model + "/config.json")).to(args.device)
    ours.load_state_dict(torch.load(args.weights, map_location=args.device)["model"])
    for p in ours.parameters():
        p.data = p.data.bfloat16().float()
    scorer = evaluate.Scorer(ours, args.device)
    scorer.dtype = torch.float32
    text = open(args.model + "/eval/heldout.txt", encoding="utf-8").read()[:6000]
    ids = tok(text, return_tensors="pt").input_ids.to(args.device)
    with torch.no_grad():
        a, b = theirs(ids).logits[0], scorer.logits(scorer.hidden(ids, False))[0]
    worst = ((a - b).abs().max() / a.abs().max()).item()
    print(
        "tokens %d, largest logit difference %.2e of the largest logit, same best token %.4f"
        % (ids.shape[1], worst, (a.argmax(-1) == b.argmax(-1)).float().mean().item())
    )
    for question in ("Who are you?", "What is 12 + 7?"):
        for thinking in ({}, {"enable_thinking": False}):
            prompt = tok.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, **thinking
            )
            given = tok(prompt, return_tensors="pt").to(args.device)
            out = theirs.generate(**given, max_new_tokens=80, do_sample=False)
            print(repr(tok.decode(out[0, given.input_ids.shape[1] :])))
    assert worst < 5e-3, "the exported model differs from the trained one"


if __name__ == "__main__":
    main()
