"""How long retrieval metrics take and how much memory, as the number of pictures grows."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from vl_mtl_lora.metrics.retrieval import MOST_SCORES, retrieval_metrics

_STEPS = 4  # sizes, each twice the one before


def retrieval_growth(images: int, captions: int = 5, dim: int = 512) -> Iterator[dict]:
    """Measures the metrics of random embeddings, of an eighth, a quarter, half and all of the images.

    Each size runs in a process of its own, so that its peak is its own.

    Yields:
        {"images", "texts", "seconds", "pairs_per_second", "peak_bytes": beyond the embeddings, "bound_bytes": what
        the chunks may take} of each size.
    """
    context = multiprocessing.get_context("spawn")
    for step in reversed(range(_STEPS)):
        with context.Pool(1) as pool:
            yield pool.apply(measure, (max(1, images >> step), captions, dim))


def measure(images: int, captions: int, dim: int) -> dict:
    """One size, in this process; see `retrieval_growth`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = torch.eye(dim, device=device)[:8]
    retrieval_metrics(small, torch.arange(8), small, torch.arange(8))  # what loads once
    generator = torch.Generator(device).manual_seed(0)
    image = torch.empty(images, dim, device=device)
    text = torch.empty(images * captions, dim, device=device)
    owner = torch.arange(images, device=device).repeat_interleave(captions)
    for rows in torch.arange(images, device=device).split(4096):
        image[rows] = F.normalize(torch.randn(len(rows), dim, device=device, generator=generator), dim=-1)
        noise = torch.randn(len(rows) * captions, dim, device=device, generator=generator)
        own = slice(int(rows[0]) * captions, (int(rows[-1]) + 1) * captions)
        text[own] = F.normalize(image[owner[own]] + 0.2 * noise, dim=-1)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held, start = _peak(device), time.perf_counter()
    retrieval_metrics(image, torch.arange(images, device=device), text, owner)
    seconds = time.perf_counter() - start
    return {"images": images, "texts": images * captions, "seconds": seconds,
            "pairs_per_second": 2 * images * images * captions / seconds, "peak_bytes": _peak(device) - held,
            "bound_bytes": 3 * 4 * MOST_SCORES}


def table(results: list[dict]) -> str:
    """The sizes as text."""
    lines = [f"{'images':>9} {'texts':>9} {'seconds':>9} {'pairs/s':>10} {'peak MB':>9}  (chunks: at most "
             f"{results[0]['bound_bytes'] / 1e6:.0f} MB)"]
    lines += [f"{r['images']:>9,} {r['texts']:>9,} {r['seconds']:>9.2f} {r['pairs_per_second']:>10.2e} "
              f"{r['peak_bytes'] / 1e6:>9.0f}" for r in results]
    return "\n".join(lines)


def _peak(device: torch.device) -> int:
    """The most memory held so far: on a GPU what tensors took, else what the process did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
