"""Places of the right answers among all candidates, without a matrix of all against all."""

import torch

BLOCK_NUMBERS = 2**24  # of the similarity matrix, computed at once


@torch.no_grad()
def places(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    pairs: torch.Tensor,
    device: torch.device,
    block_numbers: int = BLOCK_NUMBERS,
) -> torch.Tensor:
    """How many foreign candidates stand before the nearest own one of each query that has one.

    queries `[n, dim]` and candidates `[m, dim]`: features; their products are the similarities.
    pairs: int64 `[p, 2]`, (query, candidate) that belong together, in any order. Candidates that
    tie stand in their order, as in a stable sort; a similarity that is not a number counts against
    the query. Returns int64 `[k]` on the CPU, for the k distinct queries of `pairs`, ascending: 0
    is the first place.
    """
    asked, rows_of_pairs = pairs[:, 0].unique(return_inverse=True)
    order = rows_of_pairs.argsort(stable=True)
    own_rows, own_columns = rows_of_pairs[order], pairs[order, 1]
    candidates = candidates.to(device)
    columns = torch.arange(len(candidates), device=device)
    height = max(1, block_numbers // len(candidates))
    found = torch.empty(len(asked), dtype=torch.int64)
    for begin in range(0, len(asked), height):
        end = min(begin + height, len(asked))
        similarity = queries[asked[begin:end]].to(device) @ candidates.T
        low, high = torch.searchsorted(own_rows, torch.tensor([begin, end])).tolist()
        own = torch.zeros_like(similarity, dtype=torch.bool)
        own[own_rows[low:high].to(device) - begin, own_columns[low:high].to(device)] = True
        best, first = similarity.masked_fill(~own, -torch.inf).max(dim=1, keepdim=True)
        before = ~(similarity <= best) | ((similarity == best) & (columns < first))
        found[begin:end] = (before & ~own).sum(dim=1).cpu()
    return found


def recall(places: torch.Tensor, at: int) -> float:
    """Share of queries whose answer is among the first `at`."""
    return (places < at).double().mean().item()
