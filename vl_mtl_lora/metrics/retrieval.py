"""Recall@k as CLIP_benchmark defines it: the share of queries with any right answer among the k nearest."""

from collections.abc import Sequence

from torch import Tensor


def recall_at_k(queries: Tensor, items: Tensor, query_groups: Tensor, item_groups: Tensor,
                ks: Sequence[int] = (1, 5, 10), chunk: int = 1024) -> dict[int, float]:
    """Hit rate of nearest-neighbour search by inner product.

    Args:
        queries: (Q, E). items: (N, E).
        query_groups, item_groups: (Q,) and (N,) integers; an item is right for a query of the same group.
        ks: how many neighbours count; k above N counts all.
        chunk: queries compared at once, which bounds the memory at chunk x N.

    Returns:
        {k: share of queries in [0, 1]}.

    A query's rank is that of its best right item; a wrong item of exactly the same score counts as ahead of it, so
    that a model which maps everything to one point scores nothing.
    """
    hits = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), chunk):
        scores = queries[start:start + chunk] @ items.T
        right = query_groups[start:start + chunk, None] == item_groups[None]
        best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        ahead = (~(scores < best) & ~right).sum(dim=1)  # a score that is no number is ahead too
        found = right.any(dim=1)
        for k in ks:
            hits[k] += int(((ahead < k) & found).sum())
    return {k: count / max(len(queries), 1) for k, count in hits.items()}


def retrieval_metrics(image_embeddings: Tensor, image_groups: Tensor, text_embeddings: Tensor,
                      text_groups: Tensor) -> dict[str, float]:
    """Recall@1/5/10 both ways, in per cent, for (N, E) images and (M, E) texts with integer groups."""
    out = {}
    for name, (queries, query_groups, items, item_groups) in {
        "image_to_text": (image_embeddings, image_groups, text_embeddings, text_groups),
        "text_to_image": (text_embeddings, text_groups, image_embeddings, image_groups),
    }.items():
        for k, share in recall_at_k(queries, items, query_groups, item_groups).items():
            out[f"{name}_recall@{k}"] = 100.0 * share
    return out
