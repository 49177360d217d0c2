"""The captions of a batch end to end, as the loader gives them and the text tower takes them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedCaptions(NamedTuple):
    """Captions end to end on the host, one variant of the whole batch after the other.

    A caption ends in its first end-of-text token; for a tower that pools at the last place of a
    padded caption, it is padded to the context length.
    """

    token_ids: Tensor  # int32 [tokens]
    cu_seqlens: Tensor  # int32 [captions + 1], where each caption begins and the last one ends
    shape: tuple[int, ...]  # (batch,) or (variants, batch)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each caption, int32 [captions]."""
        return self.cu_seqlens.diff()

    def part(self, samples: slice) -> "PackedCaptions":
        """The captions of consecutive samples, all variants of them."""
        if samples.indices(self.shape[-1])[:2] == (0, self.shape[-1]):
            return self
        begins, ends = (
            cut.view(self.shape)[..., samples]
            for cut in (self.cu_seqlens[:-1], self.cu_seqlens[1:])
        )
        runs = zip(begins[..., 0].flatten().tolist(), ends[..., -1].flatten().tolist())
        token_ids = torch.cat([self.token_ids[begin:end] for begin, end in runs])
        cu_seqlens = F.pad((ends - begins).flatten().cumsum(0, dtype=torch.int32), (1, 0))
        return PackedCaptions(token_ids, cu_seqlens, tuple(begins.shape))


def pack(token_ids: Tensor, eot_token: int | None) -> PackedCaptions:
    """Packs padded captions, int32 [..., tokens]; those on an accelerator are waited for.

    eot_token: cut each caption after its first one; one that has none keeps its first token alone,
    which the text tower refuses. None: keep captions whole.
    """
    rows = token_ids.cpu().flatten(0, -2)
    lengths = torch.full([len(rows)], rows.shape[1])
    if eot_token is not None:
        lengths = (rows == eot_token).int().argmax(dim=1) + 1
    kept = torch.arange(rows.shape[1]) < lengths[:, None]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return PackedCaptions(rows[kept].int(), cu_seqlens, tuple(token_ids.shape[:-1]))
