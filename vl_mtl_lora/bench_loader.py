"""The training loader's speed on the user's own shards, against Pillow alone on the same pictures.

The bare arm holds the files in memory and does nothing but decode, convert to RGB and resize the shorter side to the
model's, in as many processes as the loader.
"""

import io
import itertools
import statistics
import time
from collections.abc import Iterable

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import build_indices
from vl_mtl_lora.data.pictures import output_side
from vl_mtl_lora.data.stream import BatchStream, train_batches
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.trainer import build_stream

_BATCHES = 16  # per loader process and round


def loader_speed(config: RunConfig, model: MultiTaskModel, rounds: int) -> dict[str, float]:
    """Interleaved rounds of the loader as `train` builds it, and of Pillow alone.

    Returns:
        images_per_second, bare_images_per_second: medians. ratio: the median of the rounds' ratios.

    Raises:
        UserError: shards that cannot be read.
    """
    faults = FaultLog(config.data.max_fault_share)
    stream, workers = build_stream(config, model, build_indices(config, "train", faults)), config.data.workers
    size, count = output_side(stream.feeds[0].transform) or 336, 1 + _BATCHES * max(1, workers)
    files = [_files(stream, number) for number in range(count)]
    images = sum(map(len, files[1:]))
    ours, bare = [], []
    for _ in tqdm(range(rounds), desc="loader", unit="round", dynamic_ncols=True):
        ours.append(images / _seconds(train_batches(stream, workers), count))
        bare.append(images / _seconds(DataLoader(
            _Bare(files, size), batch_size=None, sampler=itertools.cycle(range(count)), num_workers=workers,
            prefetch_factor=4 if workers else None), count))
    return {"images_per_second": statistics.median(ours), "bare_images_per_second": statistics.median(bare),
            "ratio": statistics.median(a / b for a, b in zip(ours, bare)), "workers": workers}


def _files(stream: BatchStream, number: int) -> list[bytes]:
    """The image files of a batch."""
    places, _ = stream.places(number)
    return [image for feed, rows in zip(stream.feeds, places) for epoch, row in rows
            for image in feed.index.sample(row, epoch).images]


class _Bare:
    """A dataset of batches of files, each decoded and resized, and thrown away."""

    def __init__(self, files: list[list[bytes]], size: int):
        self.files, self.size = files, size

    def __getitem__(self, index: int) -> int:
        for data in self.files[index]:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = self.size / min(image.size)
            image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        return index


def _seconds(batches: Iterable, count: int) -> float:
    """From the first of `count` batches to the last: starting and stopping processes is no speed.

    The last must not be the end of `batches`, or the time would hold the stop.
    """
    batches = iter(batches)
    next(batches)
    start = time.perf_counter()
    for _ in range(count - 1):
        next(batches)
    return time.perf_counter() - start
