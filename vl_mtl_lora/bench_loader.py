"""The training loader's speed on the user's own shards, against Pillow alone on the same pictures.

The bare arm holds the files in memory and does nothing but decode, convert to RGB and resize the shorter side to the
model's, in as many processes as the loader.
"""

import io
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.data.pictures import output_side
from vl_mtl_lora.data.reader import FaultLog
from vl_mtl_lora.data.stream import BatchStream, TaskStream, train_batches
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.trainer import build_stream

_BATCHES = 16  # per loader process and round


def loader_speed(config: RunConfig, model: MultiTaskModel, rounds: int) -> dict[str, float]:
    """Interleaved rounds of the loader as `train` builds it, and of Pillow alone.

    Returns:
        images_per_second, bare_images_per_second: medians. ratio: the median of the rounds' ratios.

    Raises:
        UserError: shards that cannot be read.
    """
    stream, workers = build_stream(config, model), config.data.workers
    size, count = output_side(stream.quotas[0].transform) or 336, 1 + _BATCHES * max(1, workers)
    files = [[sample.images[0] for sample in batch] for batch in itertools.islice(_raw_batches(stream), count)]
    rows = len(files[0])
    ours, bare = [], []
    for _ in tqdm(range(rounds), desc="loader", unit="round", dynamic_ncols=True):
        ours.append(_images_per_second(itertools.islice(train_batches(stream, workers), count), rows))
        bare.append(_images_per_second(DataLoader(_Bare(files, size), batch_size=None, num_workers=workers,
                                                  prefetch_factor=4 if workers else None), rows))
    return {"images_per_second": statistics.median(ours), "bare_images_per_second": statistics.median(bare),
            "ratio": statistics.median(a / b for a, b in zip(ours, bare)), "workers": workers}


def _raw_batches(stream: BatchStream) -> Iterator[list]:
    """The samples of the stream's batches, not decoded."""
    tasks = [(quota.rows, iter(TaskStream(quota.source, stream.known_tasks, seed=stream.seed, shuffle=stream.shuffle,
                                          faults=FaultLog(quiet=True)))) for quota in stream.quotas]
    while True:
        yield [next(samples) for rows, samples in tasks for _ in range(rows)]


class _Bare:
    """A dataset of batches of files, each decoded and resized, and thrown away."""

    def __init__(self, files: list[list[bytes]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> int:
        for data in self.files[index]:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = self.size / min(image.size)
            image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        return index


def _images_per_second(batches: Iterable, rows: int) -> float:
    """From the first batch on: starting processes and filling the shuffle buffer is no speed."""
    batches = iter(batches)
    next(batches)
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * rows / (time.perf_counter() - start)
