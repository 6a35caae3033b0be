"""Qwen3 for training: packed sequences of any length in one row, attention within each sequence.

Weights of all layers are stacked ([layers, out, in]), which lets one optimiser call serve them all. The maths is
Qwen3's: RMSNorm, per-head norm of q and k, rotary positions (halves, not pairs), GQA, SwiGLU, tied head.
"""

import json

import torch
import torch.nn.functional as F
from torch import nn

import codec


class Shape:
    """The fields of config.json that the maths needs."""

    def __init__(self, path):
        c = json.load(open(path))
        self.vocab, self.hidden, self.layers = c["vocab_size"], c["hidden_size"], c["num_hidden_layers"]
        self.q_heads, self.kv_heads, self.head_dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.mlp, self.eps, self.theta = c["intermediate_size"], c["rms_norm_eps"], c["rope_theta"]
        self.context = c["max_position_embeddings"]


def rms_norm(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate_positions(x, cos, sin):
    """x [tokens, heads, head_dim]; cos, sin [tokens, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def project_qkv(x, norm, w_qkv, q_norm, k_norm, cos, sin, heads, dtype):
    """q, k (normalised, with positions) and v of x [tokens, hidden]; heads = (q heads, kv heads, head_dim, eps)."""
    hq, hk, d, eps = heads
    y = F.linear(rms_norm(x, norm, eps).to(dtype), w_qkv)
    q, k, v = y.view(x.shape[0], hq + 2 * hk, d).split((hq, hk, hk), 1)
    q = rotate_positions(rms_norm(q, q_norm, eps), cos, sin).to(dtype)
    k = rotate_positions(rms_norm(k, k_norm, eps), cos, sin).to(dtype)
    return q, k, v.contiguous()


def finish_layer(x, attended, w_o, norm, w_gate_up, w_down, eps, dtype):
    """Residual of the attention output [tokens, q heads * head_dim], then the MLP."""
    x = x + F.linear(attended, w_o).float()
    gate, up = F.linear(rms_norm(x, norm, eps).to(dtype), w_gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w_down).float()


def token_losses(x, norm, embedding, targets, eps, dtype):
    logits = F.linear(rms_norm(x, norm, eps).to(dtype), embedding).float()
    return F.cross_entropy(logits, targets, reduction="none")


def through_codec(k, v, positions, rotation):
    """Keys and values as a reader of coded pages sees them; gradients pass straight through.

    An approximation good enough to train against: tiles follow the packed row instead of each sequence's start,
    two balancing passes instead of eight, and a query reads its own tile coded too.
    """
    with torch.no_grad():
        tiles = lambda t: (t.float() @ rotation).view(-1, codec.TILE, *t.shape[1:]).transpose(1, 2)
        coded = codec.round_trip(tiles(k), tiles(v), passes=2)
        back = [(c.transpose(1, 2).reshape(k.shape) @ rotation) for c in coded]
        late = (positions >= codec.TILE)[:, None, None]
        dk, dv = (torch.where(late, c - t.float(), 0.0).to(t.dtype) for c, t in zip(back, (k, v)))
    return k + dk, v + dv


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        s = self.shape = shape
        q, kv = s.q_heads * s.head_dim, s.kv_heads * s.head_dim

        def matrix(rows, cols, zero=False):
            w = torch.zeros(s.layers, rows, cols) if zero else torch.randn(s.layers, rows, cols) * 0.02
            return nn.Parameter(w)

        self.embedding = nn.Parameter(torch.randn(s.vocab, s.hidden) * 0.02)
        self.wq, self.wk, self.wv = matrix(q, s.hidden), matrix(kv, s.hidden), matrix(kv, s.hidden)
        self.wo = matrix(s.hidden, q, zero=True)
        self.gate, self.up = matrix(s.mlp, s.hidden), matrix(s.mlp, s.hidden)
        self.down = matrix(s.hidden, s.mlp, zero=True)
        self.norm1 = nn.Parameter(torch.ones(s.layers, s.hidden))
        self.norm2 = nn.Parameter(torch.ones(s.layers, s.hidden))
        self.q_norm = nn.Parameter(torch.ones(s.layers, s.head_dim))
        self.k_norm = nn.Parameter(torch.ones(s.layers, s.head_dim))
        self.final_norm = nn.Parameter(torch.ones(s.hidden))
        self.project, self.finish, self.losses, self.code = project_qkv, finish_layer, token_losses, through_codec

    def matrices(self):
        return [self.wq, self.wk, self.wv, self.wo, self.gate, self.up, self.down]

    def compile(self):
        """Each function is compiled once: all layers and all mixes of lengths share its shapes."""
        torch._dynamo.config.cache_size_limit = 64
        self.project, self.finish = torch.compile(project_qkv), torch.compile(finish_layer)
        self.losses, self.code = torch.compile(token_losses), torch.compile(through_codec)

    def tables(self, device):
        s = self.shape
        freq = s.theta ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float64) / s.head_dim)
        angle = torch.arange(s.context, dtype=torch.float64)[:, None] * freq[None]
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def forward(self, tokens, targets, positions, tables, attend, dtype, coded=None):
        """Loss of every token of a packed row. attend(q, k, v) -> [tokens, q heads, head_dim].

        coded: the Hadamard matrix, to train against coded keys and values; None for exact ones.
        """
        s = self.shape
        heads = (s.q_heads, s.kv_heads, s.head_dim, s.eps)
        cos, sin = tables[0][positions], tables[1][positions]
        cast = lambda *ws: torch.cat([w.to(dtype) for w in ws], 1)
        w_qkv, w_gu = cast(self.wq, self.wk, self.wv), cast(self.gate, self.up)
        w_o, w_down, emb = self.wo.to(dtype), self.down.to(dtype), self.embedding.to(dtype)
        x = F.embedding(tokens, self.embedding)
        for i in range(s.layers):
            q, k, v = self.project(x, self.norm1[i], w_qkv[i], self.q_norm[i], self.k_norm[i], cos, sin, heads, dtype)
            if coded is not None:
                k, v = self.code(k, v, positions, coded)
            a = attend(q, k, v).flatten(1)
            x = self.finish(x, a, w_o[i], self.norm2[i], w_gu[i], w_down[i], s.eps, dtype)
        return self.losses(x, self.final_norm, emb, targets, s.eps, dtype)


def slow_attention(bounds):
    """attend(q, k, v) as packed_attention's, sequence by sequence: for the CPU and as the check of the fast one."""

    def attend(q, k, v):
        parts = []
        for a, b in zip(bounds, bounds[1:]):
            qs, ks, vs = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
            parts.append(F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


def fast_attention(bounds, longest, expand):
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v):
        if expand:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))

    return attend


def packed_attention(bounds, longest, expand=False):
    """attend(q, k, v) over a packed row: causal within each sequence [bounds[i], bounds[i+1])."""
    return fast_attention(bounds, longest, expand) if bounds.is_cuda else slow_attention(bounds.tolist())


def must_expand(device):
    """Whether the fast attention needs keys and values repeated for each query head; checked by gradients."""
    if device != "cuda":
        return False
    torch.manual_seed(0)
    bounds = torch.tensor([0, 100, 357, 1024], dtype=torch.int32, device=device)
    base = [torch.randn(1024, h, 128, device=device, dtype=torch.bfloat16) for h in (4, 2, 2)]

    def run(attend):
        leaves = [t.clone().requires_grad_() for t in base]
        out = attend(*leaves)
        (out.float() * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
        return [out] + [t.grad for t in leaves]

    want = run(slow_attention(bounds.tolist()))
    for expand in (False, True):
        try:
            got = run(fast_attention(bounds, 667, expand))
            worst = max(((g - t).norm() / t.norm()).item() for g, t in zip(got, want))
        except (RuntimeError, AssertionError) as error:
            print("attention, expand=%s: %s" % (expand, str(error)[:200]))
            continue
        print("attention, expand=%s: relative difference %.4f" % (expand, worst))
        if worst < 0.02:
            return expand
    raise SystemExit("the packed attention does not agree with the plain one")
