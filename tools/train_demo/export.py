#!/usr/bin/env python3
"""Writes a checkpoint's weights as model.safetensors (bf16) with the names of Qwen3ForCausalLM.

export.py --weights CKPT/last.pt --out DIR/model.safetensors
"""

import argparse

import torch
from safetensors.torch import save_file

NAMES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def named(state):
    out = {"model.embed_tokens.weight": state["embedding"], "model.norm.weight": state["final_norm"]}
    for ours, theirs in NAMES.items():
        for i, w in enumerate(state[ours]):
            out["model.layers.%d.%s.weight" % (i, theirs)] = w
    return {k: v.detach().cpu().to(torch.bfloat16).contiguous().clone() for k, v in out.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    tensors = named(torch.load(args.weights, map_location="cpu")["model"])
    save_file(tensors, args.out, metadata={"format": "pt"})
    print("%d tensors, %.2f MB" % (len(tensors), sum(t.numel() for t in tensors.values()) * 2 / 1e6))


if __name__ == "__main__":
    main()
