"""Retrieval metrics against CLIP_benchmark's own figures, its definition written out, and brute force in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vl_mtl_lora import UserError
from vl_mtl_lora.metrics import retrieval
from vl_mtl_lora.metrics.retrieval import KS, recall_at_k, retrieval_metrics, search

# Made by CLIP_benchmark 1.6.2's zeroshot_retrieval.evaluate on the embeddings of `embeddings`.
CASES = json.loads((Path(__file__).parent / "data" / "clip_benchmark.json").read_text())["retrieval"]
DIRECTIONS = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}


def embeddings(case):
    """(N, E) images, (M, E) texts, and the (M,) image of each text."""
    rng = np.random.default_rng(case["seed"])
    captions = np.broadcast_to(case["captions_per_image"], case["images"])
    owner = np.repeat(np.arange(case["images"]), captions)
    if case["kind"] == "ties":  # small integers: products are exact, and many of them equal
        images = rng.integers(-2, 3, (case["images"], case["dim"])).astype(np.float32)
        texts = np.clip(images[owner] + rng.integers(-1, 2, (len(owner), case["dim"])), -2, 2).astype(np.float32)
    else:
        images = rng.standard_normal((case["images"], case["dim"]))
        texts = images[owner] + case["noise"] * rng.standard_normal((len(owner), case["dim"]))
        images, texts = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (images, texts))
    return torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['images']}")
def test_recall_is_clip_benchmark_s(case, monkeypatch):
    images, texts, owner = embeddings(case)
    monkeypatch.setattr(retrieval, "MOST_SCORES", 1000)  # several chunks
    ours = retrieval_metrics(images, torch.arange(len(images)), texts, owner)
    scores = texts @ images.T  # CLIP_benchmark's definition, line by line
    right = torch.nn.functional.one_hot(owner, len(images)).bool()
    for theirs, name in DIRECTIONS.items():
        rows, positive = (scores, right) if name == "text_to_image" else (scores.T, right.T)
        for k in [k for k in KS if k <= rows.shape[1] and f"{name}_recall@{k}" in ours]:
            hit = positive.gather(1, rows.topk(k, dim=1).indices).any(dim=1).double().mean()
            assert ours[f"{name}_recall@{k}"] == pytest.approx(100 * float(hit), abs=1e-9)
            figure = case["figures"][f"{theirs}_recall@{k}"]
            if case["kind"] == "ties":  # another torch may choose otherwise among equals
                best = rows.masked_fill(~positive, -math.inf).amax(1, keepdim=True)
                worst = ((rows >= best) & ~positive).sum(1) < k
                lucky = (rows > best).sum(1) < k
                assert worst.double().mean() - 1e-7 <= figure <= lucky.double().mean() + 1e-7
            else:
                assert ours[f"{name}_recall@{k}"] / 100 == pytest.approx(figure, abs=1e-7)


@pytest.mark.parametrize("seed,groups", [(0, 12), (1, 3), (2, 30), (3, 1)])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_ranks_map_and_ndcg_equal_brute_force(seed, groups, chunk):
    """With many positives and few, queries without any, and many equal scores."""
    rng = np.random.default_rng(seed)
    queries, items = (torch.from_numpy(rng.integers(-2, 3, (n, 3)).astype(np.float32)) for n in (25, 60))
    query_groups, item_groups = torch.from_numpy(rng.integers(0, groups + 2, 25)), \
        torch.from_numpy(rng.integers(0, groups, 60))
    found = search(queries, items, query_groups, item_groups, chunk=chunk)
    scores = (queries.double() @ items.double().T).tolist()
    for i, row in enumerate(scores):
        mine = sorted((s for s, g in zip(row, item_groups) if g == query_groups[i]), reverse=True)
        others = [s for s, g in zip(row, item_groups) if g != query_groups[i]]
        ranks = [n + sum(o > s for o in others) + sum(o == s for o in others) / 2 for n, s in enumerate(mine, 1)]
        if not ranks:
            assert (found.first[i], found.precision[i], found.gain[i]) == (61, 0, 0)
            continue
        assert found.first[i] == ranks[0]
        assert found.precision[i] == pytest.approx(sum(n / r for n, r in enumerate(ranks, 1)) / len(ranks), abs=1e-12)
        ideal = sum(1 / math.log2(1 + n) for n in range(1, len(ranks) + 1))
        assert found.gain[i] == pytest.approx(sum(1 / math.log2(1 + r) for r in ranks) / ideal, abs=1e-12)


def test_ndcg_and_map_equal_scikit_learn_s():
    from sklearn.metrics import average_precision_score, ndcg_score

    rng = np.random.default_rng(5)
    queries, items = (torch.from_numpy(rng.standard_normal((n, 8)).astype(np.float32)) for n in (20, 90))
    query_groups, item_groups = torch.from_numpy(np.arange(20) % 10), torch.from_numpy(rng.integers(0, 10, 90))
    found = search(queries, items, query_groups, item_groups)
    relevant, scores = (item_groups == query_groups[:, None]).numpy(), (queries @ items.T).numpy()
    for i in range(20):
        assert found.gain[i] == pytest.approx(ndcg_score(relevant[i:i + 1], scores[i:i + 1]), abs=1e-9)
        assert found.precision[i] == pytest.approx(average_precision_score(relevant[i], scores[i]), abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_recall_equals_brute_force_with_several_positives(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)
    query_groups = torch.randint(0, 12, (20,), generator=generator)
    item_groups = torch.randint(0, 10, (50,), generator=generator)  # groups 10 and 11 have no right item
    got = recall_at_k(queries, items, query_groups, item_groups, ks=(1, 5, 10, 99), chunk=chunk)
    for k, share in got.items():
        hits = 0
        for query, group in zip(queries.double(), query_groups.tolist()):
            order = sorted(range(50), key=lambda i: -float(query @ items[i].double()))
            hits += any(int(item_groups[i]) == group for i in order[:k])
        assert share == hits / 20


def test_a_model_that_maps_everything_to_one_point_ranks_in_the_middle():
    same = torch.ones(40, 3)
    found = search(same, same, torch.arange(40), torch.arange(40), ks=(1, 40))
    assert set(found.first) == {1 + 39 / 2} and found.hits[1].sum() <= 1 and found.hits[40].all()


def test_embeddings_that_are_no_numbers_hit_nothing():
    broken = torch.full((4, 3), float("nan"))
    assert recall_at_k(broken, broken, torch.arange(4), torch.arange(4), ks=(1, 3)) == {1: 0.0, 3: 0.0}
    items = torch.eye(4)
    items[2] = float("nan")
    assert recall_at_k(torch.eye(4), items, torch.arange(4), torch.arange(4), ks=(1,)) == {1: 0.75}


def test_metrics_go_both_ways_and_median_ranks_are_over_queries():
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 1, 2, 1]]  # the last caption belongs to image 2
    metrics = retrieval_metrics(images, torch.tensor([7, 8, 9]), texts, torch.tensor([7, 7, 8, 9, 9]))
    assert metrics["text_to_image_recall@1"] == pytest.approx(100 * 4 / 5)
    # Image 8's caption ties with a wrong one: rank 1.5. The last caption's picture: one above, one that equals it.
    assert metrics["image_to_text_mean_rank"] == pytest.approx((1 + 1.5 + 1) / 3)
    assert metrics["text_to_image_mean_rank"] == pytest.approx((1 + 1 + 1 + 1 + 2.5) / 5)
    assert metrics["text_to_image_median_rank"] == 1 and metrics["text_to_image_recall@1"].n == 5
    assert "text_to_image_recall@50" not in metrics  # all that there are


def test_faiss_finds_what_the_search_finds(monkeypatch):
    pytest.importorskip("faiss")
    images, texts, owner = embeddings(CASES[2])
    exact = retrieval_metrics(images, torch.arange(len(images)), texts, owner)
    faiss = retrieval_metrics(images, torch.arange(len(images)), texts, owner, faiss_from=1000)
    # From a thousand items on: the 2,500 texts are, the 500 images are not.
    assert {name for name in exact if name not in faiss} == {
        f"image_to_text_{name}" for name in ("mAP", "nDCG", "mean_rank", "median_rank")}
    assert {name: float(value) for name, value in faiss.items()} == {name: float(exact[name]) for name in faiss}


def test_faiss_is_told_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'vl_mtl_lora\[faiss\]'"):
        retrieval_metrics(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), faiss_from=1)
