"""Qwen2-VL's vision tower over many pictures of equal size in one batched pass."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo.base_model import PATCH, TEMPORAL

GRID = torch.tensor([[1, 8, 8]])  # patches of a 64x64 picture


class Tower:
    """The vision tower on a batch of 64x64 pictures; transformers' own loops over pictures."""

    def __init__(self, visual: nn.Module) -> None:
        self.visual = visual
        captured = {}
        hook = visual.blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: captured.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            visual(torch.zeros(64, 3 * TEMPORAL * PATCH**2), grid_thw=GRID)
        hook.remove()
        self.cos, self.sin = (t[:, None, :] for t in captured["position_embeddings"])

    def __call__(self, patches: Tensor) -> Tensor:
        """(n, 64, patch_dim) → patches before the last block (n, 64, width) and visual tokens (n, 16, HIDDEN)."""
        n, visual = len(patches), self.visual
        x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
        for block in visual.blocks:
            middle = x
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(x)).view(n, 64, 3, attention.num_heads, -1).unbind(2)
            q, k = self._rotate(q), self._rotate(k)
            mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + attention.proj(mixed.transpose(1, 2).reshape(n, 64, -1))
            x = x + block.mlp(block.norm2(x))
        return middle, visual.merger(x.flatten(0, 1)).view(n, 16, -1)

    def _rotate(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin
