"""Retrieval by inner product: recall@k as CLIP_benchmark defines it, ranks, mAP and nDCG, in bounded memory.

Recall@k is the share of queries with any right item among the k nearest. Among equal scores `torch.topk` chooses, one
call for each k, as in CLIP_benchmark 1.6 (zeroshot_retrieval.py), so both give the same figure for the same scores.
Ranks are not left to such a choice: an item's rank counts each wrong item of the same score as half ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.metrics.bootstrap import Metric, mean, median

KS = (1, 5, 10, 50)
MOST_SCORES = 1 << 25  # held at once, 128 MB of them
_FEW = 8  # right items of a query; of more their places are looked up in the sorted scores


@dataclass
class Ranking:
    """What a search found for each of Q queries.

    hits: k -> (Q,) whether a right item is among the k nearest. first: (Q,) rank of the best right item, from 1; one
    more than there are items where none is right. precision, gain: (Q,) average precision and nDCG, 0 where none is.
    The last three are None where only the nearest items were searched for.
    """

    hits: dict[int, np.ndarray]
    first: np.ndarray | None = None
    precision: np.ndarray | None = None
    gain: np.ndarray | None = None


def search(queries: Tensor, items: Tensor, query_groups: Tensor, item_groups: Tensor, ks: Sequence[int] = KS,
           chunk: int | None = None) -> Ranking:
    """Ranks all items for each query by inner product, exactly.

    Args:
        queries: (Q, E). items: (N, E), on the same device.
        query_groups, item_groups: (Q,) and (N,) integers; an item is right for a query of the same group.
        ks: how many neighbours count; k above N counts all.
        chunk: queries compared at once, which bounds the memory at a few times chunk x N; None: `MOST_SCORES` / N.

    Average precision and nDCG have binary relevance and no cut (Manning, Raghavan and Schuetze, Introduction to
    Information Retrieval, 2008, section 8.4). A score that is no number is never found, and ranks last.
    """
    queries, items = queries.detach(), items.detach()
    query_groups, item_groups = query_groups.to(queries.device), item_groups.to(queries.device)
    chunk = chunk or max(1, MOST_SCORES // max(1, len(items)))
    order, starts, counts = _right_items(query_groups, item_groups)
    finite = bool(queries.sum().isfinite() and items.sum().isfinite())  # no mask as large as the embeddings
    buffer = torch.empty(min(chunk, len(queries)), len(items), dtype=queries.dtype, device=queries.device)
    found: dict[object, list[Tensor]] = {key: [] for key in (*ks, "first", "precision", "gain")}
    for rows in torch.arange(len(queries), device=queries.device).split(chunk):
        scores = queries[rows] @ items.T
        if not finite:
            scores.nan_to_num_(nan=-torch.inf)
        number = torch.arange(max(1, int(counts[rows].max())), device=rows.device)
        last = (counts[rows, None] - 1).clamp(min=0)  # queries with fewer right items name their last again
        places = order[(starts[rows, None] + torch.minimum(number, last)).clamp(max=len(items) - 1)]
        real = number < counts[rows, None]
        own = scores.gather(1, places).masked_fill(~real, -torch.inf).sort(dim=1, descending=True).values
        above, equal = _competitors(scores.scatter(1, places, -torch.inf), own, buffer[:len(rows)])
        for k in ks:
            found[k].append(_hits(k, scores, item_groups, query_groups[rows], above, equal, real))
        for name, values in zip(("first", "precision", "gain"), _ranked(above + equal / 2, counts[rows], len(items))):
            found[name].append(values)
    arrays = {key: torch.cat(parts).cpu().numpy() for key, parts in found.items()}
    return Ranking({k: arrays.pop(k) for k in ks}, **arrays)


def _right_items(query_groups: Tensor, item_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(items sorted by group (N,), where each query's begin in that (Q,), how many they are (Q,))."""
    order = torch.argsort(item_groups, stable=True)
    groups = item_groups[order]
    starts = torch.searchsorted(groups, query_groups)
    return order, starts, torch.searchsorted(groups, query_groups, right=True) - starts


def _competitors(wrong: Tensor, own: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the wrong items' scores (C, N) are above each of the right ones' (C, P), and how many equal it."""
    if own.shape[1] > _FEW:
        ordered = wrong.sort(dim=1).values
        below = torch.searchsorted(ordered, own)
        up_to = torch.searchsorted(ordered, own, right=True)
        return wrong.shape[1] - up_to, up_to - below
    above, equal = torch.zeros_like(own, dtype=torch.int64), torch.zeros_like(own, dtype=torch.int64)
    for i, score in enumerate(own.split(1, dim=1)):
        # Summed as floats: ten times as fast on a CPU as bools, and exact up to 2^24 items.
        above[:, i] = torch.gt(wrong, score, out=buffer).sum(dim=1)
        equal[:, i] = torch.ge(wrong, score, out=buffer).sum(dim=1).long() - above[:, i]
    return above, equal


def _hits(k: int, scores: Tensor, item_groups: Tensor, query_groups: Tensor, above: Tensor, equal: Tensor,
          real: Tensor) -> Tensor:
    """(C,) whether a right item is among the k nearest; where equal scores leave that open, `torch.topk` decides."""
    sure = real[:, 0] & (above[:, 0] + equal[:, 0] < k)
    open_rows = torch.nonzero(real[:, 0] & ~sure & (above[:, 0] < k)).flatten()
    if len(open_rows):
        nearest = scores[open_rows].topk(min(k, scores.shape[1]), dim=1)
        right = (item_groups[nearest.indices] == query_groups[open_rows, None]) & (nearest.values > -torch.inf)
        sure[open_rows] = right.any(dim=1)
    return sure


def _ranked(ahead: Tensor, counts: Tensor, items: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rank of the best right item, average precision, nDCG), (C,) each.

    ahead: (C, P), wrong items ahead of each right one, of which the first counts (C,) of a row are real.
    """
    number = torch.arange(1, ahead.shape[1] + 1, device=ahead.device, dtype=torch.float64)
    real, none = number <= counts[:, None], counts == 0
    ranks = number + ahead
    first = ranks[:, 0].masked_fill(none, items + 1)
    precision = (number / ranks * real).sum(1) / counts.clamp(min=1)
    gain, ideal = ((real / torch.log2(1 + at)).sum(1) for at in (ranks, number))
    return first, precision, gain / ideal.masked_fill(none, 1)


def search_nearest(queries: Tensor, items: Tensor, query_groups: Tensor, item_groups: Tensor,
                   ks: Sequence[int] = KS) -> Ranking:
    """As `search`, by faiss's exact index of inner products: the nearest items alone, so no ranks.

    Raises:
        UserError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("evaluation.faiss_from needs faiss: pip install 'vl_mtl_lora[faiss]'") from error
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items.detach().float().cpu().numpy())
    _, nearest = index.search(queries.detach().float().cpu().numpy(), min(max(ks), len(items)))
    # -1 stands for what is not found, such as a score that is no number
    right = (item_groups.cpu().numpy()[nearest] == query_groups.cpu().numpy()[:, None]) & (nearest >= 0)
    return Ranking({k: right[:, :k].any(axis=1) for k in ks})


def recall_at_k(queries: Tensor, items: Tensor, query_groups: Tensor, item_groups: Tensor,
                ks: Sequence[int] = (1, 5, 10), chunk: int | None = None) -> dict[int, float]:
    """{k: share of queries with a right item among the k nearest, in [0, 1]}; arguments as of `search`."""
    ranking = search(queries, items, query_groups, item_groups, ks, chunk)
    return {k: float(hits.mean()) if len(hits) else 0.0 for k, hits in ranking.hits.items()}


def retrieval_metrics(image_embeddings: Tensor, image_groups: Tensor, text_embeddings: Tensor, text_groups: Tensor,
                      faiss_from: int | None = None) -> dict[str, Metric]:
    """Recall@1/5/10/50, mAP and nDCG in per cent, median and mean rank, both ways.

    Args:
        image_embeddings: (N, E). text_embeddings: (M, E). image_groups, text_groups: (N,) and (M,) integers.
        faiss_from: from so many items on recall alone, by faiss.

    Recall@50 is left out where there are no more than 50 items. Intervals draw groups (pictures) of queries; the items
    that are searched stay the same.
    """
    _, numbers = torch.cat([image_groups, text_groups]).unique(return_inverse=True)  # the same clusters both ways
    image_clusters, text_clusters = numbers.cpu().numpy()[:len(image_groups)], numbers.cpu().numpy()[len(image_groups):]
    out = {}
    for name, queries, query_groups, clusters, items, item_groups in (
            ("image_to_text", image_embeddings, image_groups, image_clusters, text_embeddings, text_groups),
            ("text_to_image", text_embeddings, text_groups, text_clusters, image_embeddings, image_groups)):
        nearest = faiss_from is not None and len(items) >= faiss_from
        ranking = (search_nearest if nearest else search)(queries, items, query_groups, item_groups)
        for k, hits in ranking.hits.items():
            if k < max(KS) or len(items) > k:
                out[f"{name}_recall@{k}"] = mean(hits, clusters, 100.0)
        if not nearest:
            out[f"{name}_mAP"] = mean(ranking.precision, clusters, 100.0)
            out[f"{name}_nDCG"] = mean(ranking.gain, clusters, 100.0)
            out[f"{name}_mean_rank"] = mean(ranking.first, clusters)
            out[f"{name}_median_rank"] = median(ranking.first, clusters)
    return out
