"""Evaluation of one task: adapters off (zero-shot) or on (adapted), every sample once."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import TaskIndex, build_indices
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.stream import eval_batches
from vl_mtl_lora.embeddings import EmbeddingStore, Predicted
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.metrics.bootstrap import Metric
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.ranks import everyone, rank, world
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.tasks.base import Task

_GROUPED_BY = ("dataset", "answer_type", "question_type")  # fields of samples
_MOST_GROUPS = 100


@dataclass
class Evaluation:
    """One task under one arm.

    samples: each without its pictures. rows: theirs in the index. predictions: one each. metrics: over all.
    groups: (field, value) -> the task's primary metric over the samples of that value alone.
    """

    samples: list[Sample]
    rows: list[int]
    predictions: list[Any]
    metrics: dict[str, Metric]
    groups: dict[tuple[str, str], Metric] = field(default_factory=dict)


@torch.no_grad()
def evaluate_task(model: MultiTaskModel, index: TaskIndex, *, zero_shot: bool, rows: int = 64,
                  limit: int | None = None, faults: FaultLog | None = None, thorough: bool = False,
                  task: Task | None = None, through: str | None = None,
                  store: EmbeddingStore | None = None) -> Evaluation:
    """Evaluates one task, each sample once.

    Args:
        index: the task's samples.
        zero_shot: adapters off and the task's zero-shot way of answering, instead of adapters on.
        rows: samples per batch. limit: the most samples to take. faults: counts what cannot be used.
        thorough: also the metrics that take long, and those of groups of samples.
        task: the task, where it is none of the model's own.
        through: answer the zero-shot way, but with the adapters of this task of the model.
        store: where predictions are kept.

    Raises:
        UserError: too many samples cannot be used.
    """
    model.eval()
    task = model.tasks[index.source.task] if task is None else task.eval()
    if through:
        arm, route = f"through {through}", model.router.use(through)
    else:
        arm, route = ("zero-shot", model.router.off()) if zero_shot else ("adapted", model.router.use(task.name))
    kept = store.load(task, index, arm, limit) if store else None
    if kept is None:
        kept = _predict(model, task, index, arm, route, zero_shot or bool(through), rows, limit, faults or FaultLog())
        if store:
            store.save(task, index, arm, limit, kept)
    samples, places, predictions = kept
    return Evaluation(samples, places, predictions, task.score(predictions, samples, thorough),
                      _groups(task, predictions, samples) if thorough else {})


def _predict(model: MultiTaskModel, task: Task, index: TaskIndex, arm: str, route: AbstractContextManager,
             zero_shot: bool, rows: int, limit: int | None, faults: FaultLog) -> Predicted:
    """The first good samples, `limit` at most, in their order. Several processes share them and hold all afterwards."""
    wanted = len(index) if limit is None else min(limit, len(index))
    found: list[tuple[int, Sample, Any]] = []
    taken = 0  # rows of the index
    with route, tqdm(desc=f"{task.name}, {arm}", total=wanted, unit="sample", dynamic_ncols=True, leave=False,
                     disable=rank() > 0) as bar:
        while taken < len(index) and len(found) < wanted:  # broken ones are made up for in another round
            until = min(len(index), taken + wanted - len(found))
            own = range(taken + (until - taken) * rank() // world(), taken + (until - taken) * (rank() + 1) // world())
            log = faults if world() == 1 else FaultLog(1.0)  # a share is judged over all processes
            parts = everyone((list(_predict_rows(model, task, index, own, zero_shot, rows, log, bar)), log))
            for part, others in parts:
                found += part
                faults.add(others)
            taken = until
    faults.judge(task.name, "picture")
    places, samples, predictions = zip(*found) if found else ((), (), ())
    return list(samples), list(places), list(predictions)


def _predict_rows(model: MultiTaskModel, task: Task, index: TaskIndex, among: range, zero_shot: bool, rows: int,
                  faults: FaultLog, bar: tqdm) -> Iterator[tuple[int, Sample, Any]]:
    """(row, sample without its pictures, prediction) of each good one of some rows."""
    backbone = model.backbone
    for batch in eval_batches(index, backbone.loader_preprocess([None])[0], rows=rows, faults=faults, among=among,
                              collate_images=backbone.collate_images):
        states = None
        if batch.images is not None:
            states = backbone.image_states(batch.images.to(backbone.device))
            states = states.rows(batch.image_rows.to(backbone.device))
        predictions = task.predict(backbone, states, batch.samples, zero_shot)
        samples = [replace(sample, images=()) for sample in batch.samples]  # pictures would fill the memory
        yield from zip(batch.rows, samples, predictions)
        bar.update(len(samples))


def _groups(task: Task, predictions: list[Any], samples: list[Sample]) -> dict[tuple[str, str], Metric]:
    """The primary metric of each group of samples by the fields that tell of one; a data set searches its own items."""
    found = {}
    for name in _GROUPED_BY:
        groups: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            value = sample.dataset if name == "dataset" else sample.fields.get(name)
            if isinstance(value, str):
                groups.setdefault(value, []).append(i)
        if 1 < len(groups) <= _MOST_GROUPS:
            for value, rows in sorted(groups.items()):
                metrics = task.score([predictions[i] for i in rows], [samples[i] for i in rows])
                if task.primary in metrics:
                    found[name, value] = metrics[task.primary]
    return found


def evaluate_tasks(model: MultiTaskModel, indices: Mapping[str, TaskIndex], *, zero_shot: bool = False,
                   **options) -> dict[str, dict[str, Metric]]:
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

    The logarithm lets a task gain by proportion, or CIDEr, which runs to 1000, would outweigh every recall. A
    correlation below 0, or that is no number, counts as 0.
    """
    figures = [values[model.tasks[name].primary] for name, values in metrics.items()]
    return sum(math.log1p(figure) if figure > 0 else 0.0 for figure in figures) / len(figures)
