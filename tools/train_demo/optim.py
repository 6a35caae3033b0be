"""Muon for the stacked matrices, Adam for the rest.

Muon (Keller Jordan, 2024): momentum, made nearly orthogonal by five Newton-Schulz steps. All layers of a matrix
kind go through one batched product.
"""

import torch


def orthogonal(g, steps=5):
    """Nearest semi-orthogonal matrices of g [layers, m, n], roughly: singular values land in about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon:
    def __init__(self, params, decay=0.05, momentum=0.95):
        self.params, self.decay, self.momentum = params, decay, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.buffers):
            m.lerp_(p.grad, 1 - self.momentum)
            update = orthogonal(p.grad.lerp(m, self.momentum))
            p.mul_(1 - lr * self.decay)
            p.add_(update.to(p.dtype), alpha=-lr * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
            p.grad = None
