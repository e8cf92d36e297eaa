"""Evaluation of the same model with adapters off (zero-shot) and on (adapted)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.data.reader import FaultLog, Source, build_source
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.stream import eval_batches
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import MultiTaskModel


@dataclass
class Evaluation:
    """One task under one arm: every sample (without its picture), its prediction, and the metrics over all."""

    samples: list[Sample]
    predictions: list[Any]
    metrics: dict[str, float]


@torch.no_grad()
def evaluate_task(model: MultiTaskModel, name: str, source: Source, *, zero_shot: bool, rows: int = 64,
                  known_tasks: tuple[str, ...] = (), limit: int | None = None,
                  faults: FaultLog | None = None) -> Evaluation:
    """Evaluates one task on one source, each sample once.

    Args:
        zero_shot: adapters off and the task's zero-shot way of answering, instead of adapters on.
        rows: samples per batch. limit: the most samples to take. known_tasks: other tags that may occur.
        faults: counts what cannot be used.
    """
    model.eval()
    task, backbone = model.tasks[name], model.backbone
    samples: list[Sample] = []
    predictions: list[Any] = []
    batches = eval_batches(source, [*model.router.task_names, *known_tasks], backbone.preprocess(False), rows=rows,
                           faults=faults or FaultLog(), collate_images=backbone.collate_images, limit=limit)
    arm = "zero-shot" if zero_shot else "adapted"
    with tqdm(desc=f"{name}, {arm}", unit="sample", dynamic_ncols=True, leave=False) as bar:
        for batch in batches:
            with model.router.off() if zero_shot else model.router.use(name):
                states = backbone.image_states(batch.images.to(backbone.device))
                states = states.rows(batch.image_rows.to(backbone.device))
                predictions += task.predict(backbone, states, batch.samples, zero_shot)
            samples += [replace(sample, images=()) for sample in batch.samples]  # pictures would fill the memory
            bar.update(len(batch.samples))
    return Evaluation(samples, predictions, task.score(predictions, samples))


def evaluate_tasks(model: MultiTaskModel, config: RunConfig, *, split: str = "test", zero_shot: bool = False,
                   limit: int | None = None) -> dict[str, dict[str, float]]:
    """Metrics of every task that has shards for the split: {task: {metric: value}}."""
    return {name: evaluate_task(model, name, source, zero_shot=zero_shot, limit=limit, **options).metrics
            for name, source, options in build_sources(config, split)}


def build_sources(config: RunConfig, split: str) -> list[tuple[str, Source, dict]]:
    """(task, source, options of `evaluate_task`) for every task that has shards for the split.

    Raises:
        UserError: no task has any.
    """
    found = []
    for name, task in config.tasks.items():
        if getattr(task, split):
            source = build_source(name, task, split)
            found.append((name, source, {"rows": config.data.eval_batch, "known_tasks": tuple(config.data.ignore_tasks),
                                         "faults": FaultLog(config.data.max_fault_share)}))
    if not found:
        raise UserError(f"no task of the config has {split} shards: add tasks.NAME.{split}")
    return found


def primary_score(model: MultiTaskModel, metrics: Mapping[str, Mapping[str, float]]) -> float:
    """What the best checkpoint is chosen by: the mean over tasks of log(1 + primary metric).

    The logarithm lets a task gain by proportion, or CIDEr, which runs to 1000, would outweigh every recall.
    """
    values = [values[model.tasks[name].primary] for name, values in metrics.items()]
    return sum(map(math.log1p, values)) / len(values)
