#!/usr/bin/env python3
"""Golden logits of small random Qwen3 models, computed by transformers in fp32.

    python3 tools/oracles/qwen3_logits.py tests/data/qwen3_logits

needs torch and transformers (made with torch 2.11.0 and transformers 5.17.0, on the CPU). Each model
becomes one folder: config.json, and golden.safetensors with `tokens` (int32 [n]), `logits` (fp32
[n, vocab], after each token) and `seed` (int64 [1]). No weights are stored: they are bf16 values of an integer hash
of (seed, tensor name, index), computed here and by tests/support/tiny_model.cpp alike.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

U64 = np.uint64
FNV_OFFSET, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def hash_name(name: str) -> int:
    value = FNV_OFFSET
    for byte in name.encode():
        value = ((value ^ byte) * FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return value


def mix(x: np.ndarray) -> np.ndarray:  # splitmix64
    x = x + U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def amplitude(name: str, shape) -> float:
    if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
        return 0.5
    return math.sqrt(3.0 / shape[-1])


def weight(name: str, shape, seed: int) -> torch.Tensor:
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        bits = mix(U64(hash_name(name) ^ seed) + np.arange(count, dtype=U64)) >> U64(40)
    unit = bits.astype(np.float64) * 2.0**-23 - 1.0  # [-1, 1)
    if len(shape) > 1:
        values = unit * amplitude(name, shape)
    else:
        values = 1.0 + 0.25 * unit
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().reshape(shape)


def tokens_of(seed: int, count: int, vocab: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        bits = mix(U64(seed) * U64(1 << 32) + np.arange(count, dtype=U64))
    return (bits >> U64(40)).astype(np.int64) % vocab


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}

# name -> (seed, tokens, config). Between them: tied and untied heads, G = 1, 2, 4, 5, 8, YaRN, both
# head sizes, and lengths beside and across the borders of 128.
MODELS = {
    "gqa2_tied": (11, 300, dict(heads=(4, 2), tied=True)),
    "gqa4_untied": (12, 300, dict(heads=(4, 1), tied=False)),
    "gqa5_untied": (13, 150, dict(heads=(5, 1), tied=False, hidden=80, ffn=112)),
    "gqa8_tied": (14, 257, dict(heads=(8, 1), tied=True)),
    "yarn_gqa2_tied": (15, 260, dict(heads=(4, 2), tied=True, yarn=YARN)),
    "head64_gqa2_untied": (16, 150, dict(heads=(6, 3), tied=False, head_dim=64, theta=10000.0)),
}


def make_config(heads, tied, hidden=64, ffn=96, head_dim=128, theta=1e6, yarn=None) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 64 if yarn else 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": theta,
        "rope_scaling": yarn,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def build(config: dict, seed: int) -> Qwen3ForCausalLM:
    options = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    rope = dict(options.pop("rope_scaling") or {"rope_type": "default"})
    rope["rope_theta"] = options.pop("rope_theta")
    model = Qwen3ForCausalLM._from_config(
        Qwen3Config(**options, rope_parameters=rope, attn_implementation="eager"), dtype=torch.float32
    )
    assert model.config.rope_parameters["rope_type"] == rope["rope_type"]
    state = {
        name: weight(name, tuple(tensor.shape), seed)
        for name, tensor in model.state_dict().items()
        if not (config["tie_word_embeddings"] and name == "lm_head.weight")
    }
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    torch.manual_seed(0)
    for name, (seed, length, options) in MODELS.items():
        config = make_config(**options)
        model = build(config, seed)
        tokens = tokens_of(seed, length, config["vocab_size"])
        logits = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(
            {
                "tokens": tokens.astype(np.int32),
                "logits": np.ascontiguousarray(logits),
                "seed": np.array([seed], dtype=np.int64),
            },
            folder / "golden.safetensors",
        )
        top2 = np.sort(logits, axis=1)[:, -2:]
        print(
            f"{name}: {length} tokens, largest |logit| {np.abs(logits).max():.2f}, "
            f"std {logits.std():.2f}, mean margin {np.mean(top2[:, 1] - top2[:, 0]):.2f}"
        )


if __name__ == "__main__":
    main()
