"""Evaluation of the same model with adapters off (zero-shot) and on (adapted)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import TaskIndex, build_indices
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.stream import eval_batches
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.sections import RunConfig


@dataclass
class Evaluation:
    """One task under one arm: every sample (without its pictures), its row in the index and its prediction, and the
    metrics over all."""

    samples: list[Sample]
    rows: list[int]
    predictions: list[Any]
    metrics: dict[str, float]


@torch.no_grad()
def evaluate_task(model: MultiTaskModel, index: TaskIndex, *, zero_shot: bool, rows: int = 64,
                  limit: int | None = None, faults: FaultLog | None = None) -> Evaluation:
    """Evaluates one task, each sample once.

    Args:
        index: the task's samples.
        zero_shot: adapters off and the task's zero-shot way of answering, instead of adapters on.
        rows: samples per batch. limit: the most samples to take. faults: counts what cannot be used.

    Raises:
        UserError: too many samples cannot be used.
    """
    model.eval()
    name = index.source.task
    task, backbone = model.tasks[name], model.backbone
    samples: list[Sample] = []
    places: list[int] = []
    predictions: list[Any] = []
    batches = eval_batches(index, backbone.loader_preprocess([None])[0], rows=rows, faults=faults or FaultLog(),
                           collate_images=backbone.collate_images, limit=limit)
    arm = "zero-shot" if zero_shot else "adapted"
    total = len(index) if limit is None else min(limit, len(index))
    with tqdm(desc=f"{name}, {arm}", total=total, unit="sample", dynamic_ncols=True, leave=False) as bar:
        for batch in batches:
            with model.router.off() if zero_shot else model.router.use(name):
                states = None
                if batch.images is not None:
                    states = backbone.image_states(batch.images.to(backbone.device))
                    states = states.rows(batch.image_rows.to(backbone.device))
                predictions += task.predict(backbone, states, batch.samples, zero_shot)
            samples += [replace(sample, images=()) for sample in batch.samples]  # pictures would fill the memory
            places += batch.rows
            bar.update(len(batch.samples))
    return Evaluation(samples, places, predictions, task.score(predictions, samples))


def evaluate_tasks(model: MultiTaskModel, indices: Mapping[str, TaskIndex], *, zero_shot: bool = False,
                   **options) -> dict[str, dict[str, float]]:
    """Metrics of every task that has samples: {task: {metric: value}}. options: as of `evaluate_task`."""
    return {name: evaluate_task(model, index, zero_shot=zero_shot, **options).metrics
            for name, index in indices.items()}


def evaluation_indices(config: RunConfig, split: str, faults: FaultLog) -> dict[str, TaskIndex]:
    """The samples of every task that has shards for the split. Raises UserError where none has."""
    indices = build_indices(config, split, faults)
    if not indices:
        raise UserError(f"no task of the config has {split} shards: add tasks.NAME.{split}")
    return indices


def primary_score(model: MultiTaskModel, metrics: Mapping[str, Mapping[str, float]]) -> float:
    """What the best checkpoint is chosen by: the mean over tasks of log(1 + primary metric).

    The logarithm lets a task gain by proportion, or CIDEr, which runs to 1000, would outweigh every recall.
    """
    values = [values[model.tasks[name].primary] for name, values in metrics.items()]
    return sum(map(math.log1p, values)) / len(values)
