"""What a sweep runs: methods x budgets x learning rates x seeds over one config, methods matched by their size."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from vl_mtl_lora.config import load_config, load_strict
from vl_mtl_lora.data.files import shard_files
from vl_mtl_lora.errors import UserError, did_you_mean
from vl_mtl_lora.model import build_model
from vl_mtl_lora.sections import MixingSection, RunConfig, Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.,+=-]*$", max_length=100)]  # also of a folder

_SET_HERE = {"train.lr": "lr.values", "train.seed": "seeds", "out": "out"}


class TuningSection(Strict):
    """The learning rate is the one of `values` with the best score on the valid split, for each method and budget."""

    values: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    seed: int = Field(1000, ge=0, lt=2**32)


class MethodSection(Strict):
    """A method: what it changes in the config."""

    set: list[str] = []  # key.key=value
    parameters: float | None = Field(None, gt=0)  # the largest rank with at most so many times those of `match`
    alone: bool = False  # each task is trained by itself


class SweepConfig(Strict):
    """A sweep. `config` is relative to the sweep's file."""

    out: str
    config: str
    set: list[str] = []  # for all runs
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(min_length=3)  # fewer have no interval to speak of
    lr: TuningSection
    budgets: dict[Name, list[str]] = Field(min_length=1)
    methods: dict[Name, MethodSection] = Field(min_length=2)
    reference: str  # the method that others are compared with
    match: str  # the method whose trainable parameters `parameters` multiplies
    groups: dict[Name, list[str]] = {}  # of tasks, to be reported by themselves
    metrics: dict[str, str] = {}  # by task, what stands for it in place of its primary metric
    jobs: int = Field(1, ge=1)  # runs at the same time

    @property
    def tuned(self) -> bool:
        """Whether there is a learning rate to choose."""
        return len(self.lr.values) > 1

    @property
    def measure(self) -> str:
        """The method whose figures are 100 %."""
        return next((name for name, method in self.methods.items() if method.alone), self.reference)

    @model_validator(mode="after")
    def _fits(self):
        for key in ("reference", "match"):
            if (name := getattr(self, key)) not in self.methods:
                raise ValueError(f"{key}: no method {name!r}{did_you_mean(name, self.methods)}")
            if self.methods[name].alone:
                raise ValueError(f"{key}: {name} trains tasks alone; name one that trains them together")
        if self.methods[self.match].parameters is not None:
            raise ValueError(f"match: {self.match} has `parameters` itself")
        if len(set(self.lr.values)) < len(self.lr.values):
            raise ValueError("lr.values must be distinct")
        if len(set(self.seeds)) < len(self.seeds) or self.lr.seed in self.seeds:
            raise ValueError("seeds must be distinct, and lr.seed none of them: nothing is tuned on what is reported")
        if sum(method.alone for method in self.methods.values()) > 1:
            raise ValueError("only one method can be `alone`: what others are measured by")
        return self


@dataclass(frozen=True)
class SweepRun:
    """One training.

    name: of its folder below the sweep's. task: the only one it has, None where it has all. parameters: trainable ones,
    heads included. split: on which it is measured. digest: of all that decides the outcome.
    """

    name: str
    method: str
    budget: str
    lr: float
    seed: int
    task: str | None
    split: str
    parameters: int
    config: RunConfig
    digest: str


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Reads a sweep's YAML file. Raises UserError as `load_config`."""
    sweep = load_strict(path, SweepConfig, list(overrides))
    return sweep.model_copy(update={"config": str(Path(path).parent / Path(sweep.config).expanduser())})


def check_sweep(sweep: SweepConfig) -> None:
    """Raises UserError for what would show only in the middle: a method that cannot be built, shards that are not named
    or not there, settings that the sweep makes itself."""
    for item in [*sweep.set, *(item for part in (*sweep.budgets.values(), *(m.set for m in sweep.methods.values()))
                               for item in part)]:
        key = item.partition("=")[0].strip()
        if key in _SET_HERE:
            raise UserError(f"set: {item}: a sweep sets {key} itself; write {_SET_HERE[key]} of the sweep")
    known: set[str] = set()
    for budget in sweep.budgets:
        configs = {method: load_config(sweep.config, settings(sweep, method, budget)) for method in sweep.methods}
        tasks = list(next(iter(configs.values())).tasks)
        for method, config in configs.items():
            if list(config.tasks) != tasks:
                raise UserError(f"methods.{method}: its tasks are others than those of the other methods; a budget may "
                                "choose tasks, a method may not")
            _check_config(sweep, method, config)
        known.update(tasks)
    for key, names in {"metrics": sweep.metrics, **{f"groups.{g}": n for g, n in sweep.groups.items()}}.items():
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{key}: no task {unknown[0]!r}", near=(unknown[0], known))


def _check_config(sweep: SweepConfig, method: str, config: RunConfig) -> None:
    if config.start.run is not None:
        raise UserError(f"methods.{method}: start.run: methods are compared from the base on; leave it out")
    mixing = config.data.mixing
    if any(m.alone for m in sweep.methods.values()) and (mixing.by != "quotas" or mixing.turns):
        raise UserError(f"methods.{method}: only where all train with data.mixing.by: quotas and without turns can a "
                        "task alone see as many samples as among others; leave out the method that is `alone`")
    splits = {"train": "methods train", "test": "methods are compared",
              **({"valid": "learning rates are tuned"} if sweep.tuned else {})}
    for name, task in config.tasks.items():
        for split, why in splits.items():
            if not getattr(task, split):
                raise UserError(f"{sweep.config}: tasks.{name}.{split}: missing; {why} on it")
            shard_files(getattr(task, split), config.data.cache, config.data.allow_pipe)


def sweep_runs(sweep: SweepConfig, method: str, budget: str, lr: float, seeds: Sequence[int],
               split: str) -> Iterator[SweepRun]:
    """The trainings of a method with a learning rate, one for each seed, and task where tasks are trained alone."""
    common = settings(sweep, method, budget)
    for seed in seeds:
        overrides = [*common, f"train.lr={lr!r}", f"train.seed={seed}"]
        whole = load_config(sweep.config, overrides)
        if split == "test" and not whole.train.eval_every:  # then the valid split chooses nothing
            whole = whole.model_copy(update={"tasks": {
                name: task.model_copy(update={"valid": []}) for name, task in whole.tasks.items()}})
        for task in whole.tasks if sweep.methods[method].alone else (None,):
            config = alone(whole, task) if task else whole
            name = "/".join([method, budget, f"lr-{lr:g}", f"seed-{seed}", *([task] if task else [])])
            yield SweepRun(name, method, budget, lr, seed, task, split, _size(sweep.config, tuple(common), task),
                           config.model_copy(update={"out": str(Path(sweep.out) / name)}),
                           _digest(config, split))


def _digest(config: RunConfig, split: str) -> str:
    """The same on every machine: without defaults and `out`, shards by their files' names."""
    data = config.model_dump(mode="json", exclude={"out"}, exclude_defaults=True)
    for key in ("tasks", "held_out"):
        for name, task in data.get(key, {}).items():
            task["kind"] = getattr(config, key)[name].kind
            for part in {"train", "valid", "test"} & task.keys():
                task[part] = [url.rpartition("/")[2] for url in task[part]]
    return hashlib.sha256(json.dumps([data, split], sort_keys=True).encode()).hexdigest()[:16]


def settings(sweep: SweepConfig, method: str, budget: str) -> list[str]:
    """What a method and a budget change in the config, the matched rank included."""
    section = sweep.methods[method]
    overrides = [*sweep.set, *sweep.budgets[budget], *section.set]
    if section.parameters is None:
        return overrides
    adapter = load_config(sweep.config, overrides).adapter
    most = section.parameters * _size(sweep.config, tuple(settings(sweep, sweep.match, budget)))
    rank = _matched_rank(method, sweep.config, tuple(overrides), most)
    return [*overrides, f"adapter.rank={rank}", f"adapter.alpha={float(adapter.alpha / adapter.rank * rank)!r}"]


def alone(config: RunConfig, task: str) -> RunConfig:
    """A config of one of its tasks, with that task's quota of rows; the others' samples are passed over."""
    tags = {name: section.tag or name for name, section in [*config.held_out.items(), *config.tasks.items()]}
    others = set(tags.values()) - {tags[task]}
    data = config.data.model_copy(update={
        "mixing": MixingSection(), "ignore_tasks": sorted({*config.data.ignore_tasks, *others})})
    return config.model_copy(update={"tasks": {task: config.tasks[task]}, "held_out": {}, "data": data})


@cache
def _matched_rank(method: str, config: str, overrides: tuple[str, ...], most: float) -> int:
    """The largest rank with at most so many trainable parameters."""
    def fits(rank: int) -> bool:
        return _size(config, (*overrides, f"adapter.rank={rank}")) <= most

    if _size(config, (*overrides, "adapter.rank=1")) == _size(config, (*overrides, "adapter.rank=2")):
        raise UserError(f"methods.{method}.parameters: its size does not depend on a rank; leave it out")
    if not fits(1):
        least = _size(config, (*overrides, "adapter.rank=1"))
        raise UserError(f"methods.{method}.parameters: of rank 1 it has {least:,} trainable parameters, more than "
                        f"{most:,.0f}; leave it out, or give `match` a higher rank")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@cache
def _size(config: str, overrides: tuple[str, ...], task: str | None = None) -> int:
    """Trainable parameters of adapters and heads, of a task alone where one is given. Needs no weights."""
    run = load_config(config, list(overrides))
    model = build_model(alone(run, task) if task else run, dry_run="shapes")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def task_values(sweep: SweepConfig, record: Mapping) -> dict[str, float]:
    """Each task's figure in a run's record; a correlation that is no number counts as 0. Raises UserError where
    `metrics` names one that the task has not."""
    metrics = {task: sweep.metrics.get(task, primary) for task, primary in record["primary"].items()}
    for task, metric in metrics.items():
        if metric not in record["tasks"][task]:
            raise UserError(f"metrics.{task}: no metric {metric!r}", near=(metric, record["tasks"][task]))
    figures = {task: record["tasks"][task][metric] for task, metric in metrics.items()}
    return {task: 0.0 if math.isnan(figure) else figure for task, figure in figures.items()}


def valid_scores(sweep: SweepConfig, records: Sequence[Mapping]) -> dict[tuple[str, float], float]:
    """(method, learning rate) -> score, from one budget's records of the valid split: what the report scores, the mean
    over tasks of a figure in per cent of the measure's; here of the best that it has with any learning rate.

    Raises:
        UserError: the measure is above 0 on no task.
    """
    figures: dict[tuple[str, float], dict[str, float]] = {}
    for record in records:
        figures.setdefault((record["method"], record["lr"]), {}).update(task_values(sweep, record))
    measures = [values for (method, _), values in figures.items() if method == sweep.measure]
    best = above_zero(sweep, {task: max(values[task] for values in measures) for task in measures[0]})
    return {setting: sum(100 * values[task] / figure for task, figure in best.items()) / len(best)
            for setting, values in figures.items()}


def above_zero(sweep: SweepConfig, figures: Mapping[str, float]) -> dict[str, float]:
    """The tasks on which the measure's figure is above 0, so that others can be in per cent of it. Raises UserError
    where there are none."""
    if not any(figure > 0 for figure in figures.values()):
        raise UserError(f"{sweep.measure} is above 0 on no task: nothing can be in per cent of that; train for more "
                        "steps, or name other `metrics`")
    return {task: figure for task, figure in figures.items() if figure > 0}
