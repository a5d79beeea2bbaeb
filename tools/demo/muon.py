"""Muon, an optimizer with orthogonalized momentum, fast for a small number of steps (Jordan et al. 2024)."""

import math

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by five Newton-Schulz iterations in fp32; updates have AdamW's RMS."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                if x.shape[0] > x.shape[1]:
                    x = x.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                x = x if x.shape == p.shape else x.T
                p.mul_(1 - group["lr"] * 0.05).add_(x, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))
