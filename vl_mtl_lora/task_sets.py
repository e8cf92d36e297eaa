"""The set of tasks of a trained adapter: a new one joins, one leaves or is renamed, two sets become one.

A, B and the base are the tasks' common ground. What a task has of its own are its rows of Lambda and of the mixture in
every layer, and its head: where the rest stays, so does what the other tasks compute, bit for bit.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vl_mtl_lora.checkpoint import check_hyperparameters, write_checkpoint
from vl_mtl_lora.checkpoint_files import check_sizes, find_checkpoint, read_description, read_tensors
from vl_mtl_lora.config import parse_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.model import MultiTaskModel, build_model
from vl_mtl_lora.sections import RunConfig, StartSection, TaskSection

log = logging.getLogger(__name__)
_OWN = (".transform", ".mix")  # have a row for each task in dim 1
# Where a task's samples come from and how often; all else decides what its parameters mean.
_DATA = {"tag", "rows", "weight", "train", "valid", "test", "format", "augment", "faiss_from"}


@dataclass
class TaskSet:
    """A checkpoint's parts, read without its base: the adapters and heads by name, as `MultiTaskModel` has them."""

    folder: Path
    config: RunConfig
    step: int
    base: str
    adapters: dict[str, Tensor]
    heads: dict[str, Tensor]


def read_task_set(run: str | Path) -> TaskSet:
    """Reads the checkpoint of a run. Raises UserError for one that `load_run` would refuse."""
    folder = find_checkpoint(run)
    description = read_description(folder)
    config = description["config"]
    check_sizes(folder, config)
    like = build_model(config, dry_run="shapes")
    return TaskSet(folder, config, description["step"], description["base"],
                   read_tensors(folder / "adapter_model.safetensors", like.adapter_state()),
                   read_tensors(folder / "heads.safetensors", like.head_state()))


def describe(run: str | Path) -> list[tuple[int, str, str, int]]:
    """(id, name, kind, numbers of its own) of each task of a run."""
    old = read_task_set(run)
    rows = sum(tensor[:, 0].numel() for name, tensor in old.adapters.items() if name.endswith(_OWN))
    heads = {name: sum(head.numel() for key, head in old.heads.items() if _task_of(key) == name)
             for name in old.config.tasks}
    return [(i, name, section.kind, rows + heads[name]) for i, (name, section) in enumerate(old.config.tasks.items())]


# -- a run that starts from a trained adapter -------------------------------------------------------------------


def with_old_tasks(config: RunConfig) -> RunConfig:
    """The config of a run with `start.run`: the tasks of that come first, in their order, those left out of the config
    as they were there; `start.train` is filled in. Other configs stay.

    Raises:
        UserError: a task that is none of the old ones any more, or nothing to train.
    """
    if config.start.run is None:
        return config
    saved = read_description(find_checkpoint(config.start.run))["config"]
    for name in saved.tasks.keys() & config.tasks.keys():
        if (before := _meaning(saved.tasks[name])) != (after := _meaning(config.tasks[name])):
            key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
            raise UserError(f"tasks.{name}.{key} differs from that of {config.start.run}, where the task was trained: "
                            "set it back, leave the task out, or give the new task another name")
    tasks = {**saved.tasks, **config.tasks}
    new = [name for name in config.tasks if name not in saved.tasks]
    trained = config.start.train or (list(tasks) if config.start.rehearse else new)
    if not trained:
        raise UserError(f"every task of the config is one of {config.start.run}: add a new one under tasks, or train "
                        "the old ones on with start.rehearse=true")
    for name in trained:
        if name not in tasks:
            raise UserError(f"start.train: unknown task {name!r}", near=(name, tasks))
    if idle := set(new) - set(trained):
        raise UserError(f"start.train: the new task {sorted(idle)[0]} would never be trained: add it")
    return _config(config, tasks, saved.data.ignore_tasks, start=config.start.model_copy(
        update={"train": [name for name in tasks if name in trained]}))


def trained_part(config: RunConfig) -> RunConfig:
    """The config with the tasks alone that are trained; samples of the others are passed over."""
    trained = config.start.train or config.tasks
    tags = [section.tag or name for name, section in config.tasks.items() if name not in trained]
    data = config.data.model_copy(update={"ignore_tasks": [*config.data.ignore_tasks, *tags]})
    return config.model_copy(update={"data": data, "tasks": {name: config.tasks[name] for name in trained}})


def start_from(model: MultiTaskModel, config: RunConfig) -> None:
    """Loads what a config of `with_old_tasks` starts from, and freezes what the old tasks need where it is to stay.

    The rows of other tasks in Lambda and the mixture get no gradient from a batch without them, and no weight decay, so
    that Adam moves them by exactly nothing. A layer that no old task reads is new and trains whole.

    Raises:
        UserError: another base, other hyperparameters or targets; a checkpoint that cannot be read.
    """
    if config.start.run is None:
        return
    old = read_task_set(config.start.run)
    _check_joinable(old.config)
    if old.base != model.fingerprint:
        raise UserError(f"start.run: {old.folder} was trained on another base ({old.config.backbone.model_dump()}): "
                        "set backbone to that")
    check_hyperparameters(old.folder, old.config, model.summary)
    if sorted(old.config.adapter.targets) != sorted(config.adapter.targets):
        raise UserError(f"adapter.targets are {config.adapter.targets}, those of {old.folder} "
                        f"{old.config.adapter.targets}: set them to these")
    adapters, heads = model.adapter_state(), model.head_state()
    with torch.no_grad():
        for own, tensors in ((adapters, old.adapters), (heads, old.heads)):
            for name, tensor in tensors.items():
                part = own[name][:, :tensor.shape[1]] if name.endswith(_OWN) else own[name]  # old tasks come first
                part.copy_(tensor)
    if not config.start.rehearse:
        for name in old.adapters:
            adapters[name].requires_grad_(name.endswith(_OWN) and adapters[name].requires_grad)  # "none" stays fixed
        for name, parameter in heads.items():
            parameter.requires_grad_(_task_of(name) in config.start.train)
    log.info("from %s: %s; training %s%s", old.folder, ", ".join(old.config.tasks), ", ".join(config.start.train),
             " and what they share" if config.start.rehearse else "")


# -- checkpoints made of checkpoints ----------------------------------------------------------------------------


def remove_task(run: str | Path, task: str, out: str | Path) -> None:
    """Writes a checkpoint without one of its tasks. Raises UserError for an unknown or the only task."""
    old = read_task_set(run)
    _check_known(old, task)
    tasks = {name: section for name, section in old.config.tasks.items() if name != task}
    if not tasks:
        raise UserError(f"{task} is the only task of {old.folder}; an adapter has at least one")
    tag = old.config.tasks[task].tag or task
    _write(out, _config(old.config, tasks, [tag]), [old])


def rename_task(run: str | Path, task: str, name: str, out: str | Path) -> None:
    """Writes a checkpoint where a task has another name; its samples keep their tag. Raises UserError."""
    old = read_task_set(run)
    _check_known(old, task)
    if name in old.config.tasks:
        raise UserError(f"{old.folder} already has a task {name!r}: choose another name")

    def renamed(key: str) -> str:
        return name if key == task else key

    tasks = {renamed(key): section.model_copy(update={"tag": section.tag or key})
             if key == task else section for key, section in old.config.tasks.items()}
    old.heads = {f"{renamed(_task_of(key))}.{key.partition('.')[2]}": head for key, head in old.heads.items()}
    weights = {renamed(key): value for key, value in old.config.data.mixing.weights.items()}
    old.config = _config(old.config, tasks, (), weights=weights)  # under the new name, as its heads now are
    _write(out, old.config, [old])


def merge_tasks(runs: list[str | Path], out: str | Path) -> None:
    """Writes one checkpoint with the tasks of several that share base, hyperparameters, A and B bit for bit.

    A task that several have, equal in every bit, is taken once.

    Raises:
        UserError: sets that do not share these, or different tasks of one name.
    """
    sets = [read_task_set(run) for run in runs]
    tasks, ignored, weights = {}, [], {}
    for one, other in itertools.combinations(sets, 2):
        _check_shared(one, other)
    for i, one in enumerate(sets):
        for name, section in one.config.tasks.items():
            for before in sets[:i]:
                if name in before.config.tasks and not _same_task(before, one, name):
                    raise UserError(f"{before.folder} and {one.folder} have different tasks of the name {name}: rename "
                                    f"one first (vl-mtl-lora tasks rename {runs[i]} {name} OTHER_NAME --out FOLDER)")
            tasks.setdefault(name, section)
        ignored += one.config.data.ignore_tasks
        weights = {**dict.fromkeys(one.config.tasks, 1.0), **one.config.data.mixing.weights, **weights}
    _write(out, _config(sets[0].config, tasks, ignored, weights=weights), sets)


def _write(out: str | Path, config: RunConfig, sets: list[TaskSet]) -> None:
    """Writes a run's folder that holds the tasks of a config, each from the first set that has it, as best/.

    What only tasks read that are no more is left out. A layer that only some tasks read has for the others what a fresh
    one starts with, for its shape's sake.

    Raises:
        UserError: a folder that is already there, or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"--out: {out} is already there; give a folder that is not")
    config = parse_config(config.model_copy(update={"out": str(out)}).model_dump())
    _check_joinable(config)
    like = build_model(config, dry_run="shapes")
    owners = {name: next(one for one in sets if name in one.config.tasks) for name in config.tasks}
    adapters = {}
    for name, parameter in like.adapter_state().items():
        having = [one for one in sets if name in one.adapters]
        adapters[name] = having[0].adapters[name]
        if name.endswith(_OWN):
            fresh = _fresh_row(name, parameter)
            adapters[name] = torch.stack([_row(owners[task], name, task) if owners[task] in having else fresh
                                          for task in config.tasks], dim=1)
    heads = {name: owners[_task_of(name)].heads[name] for name in like.head_state()}
    temporary = out.with_name(out.name + ".part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        write_checkpoint(temporary / "best", config, like.summary, step=max(one.step for one in sets),
                         base=sets[0].base, adapters=adapters, heads=heads)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error}") from error


def _config(config: RunConfig, tasks: Mapping[str, TaskSection], ignored: Iterable[str], *,
            start: StartSection | None = None, weights: Mapping[str, float] | None = None) -> RunConfig:
    """A config with other tasks; samples of the tags `ignored` may be in the shards too."""
    start = start or StartSection()
    mixing = config.data.mixing
    if mixing.weights:
        weights, trained = mixing.weights if weights is None else weights, start.train or tasks
        mixing = mixing.model_copy(update={"weights": {key: weights[key] for key in trained if key in weights}})
    known = {section.tag or name for name, section in tasks.items()}
    ignored = [tag for tag in dict.fromkeys([*config.data.ignore_tasks, *ignored]) if tag not in known]
    data = config.data.model_copy(update={"mixing": mixing, "ignore_tasks": ignored})
    return parse_config(config.model_copy(update={"tasks": dict(tasks), "data": data, "start": start}).model_dump())


def _check_joinable(config: RunConfig) -> None:
    """Raises UserError where tasks have nothing of their own beside what they share, or share nothing."""
    method, transform = config.adapter.method, config.adapter.transform
    if method not in ("mtl_lora", "moe_lora") or transform == "own":
        kind = f"adapter.transform: {transform}" if method == "mtl_lora" else f"adapter.method: {method}"
        raise UserError(f"{kind} has no A and B that tasks share beside something of their own: tasks cannot join, "
                        "leave or be renamed; train all of them in one run")


def _check_known(old: TaskSet, task: str) -> None:
    if task not in old.config.tasks:
        raise UserError(f"{old.folder} has no task {task!r}", near=(task, old.config.tasks))


def _check_shared(first: TaskSet, other: TaskSet) -> None:
    """Raises UserError where two sets do not compute alike but for what each task has of its own."""
    where = f"{first.folder} and {other.folder} cannot be merged: "
    if first.base != other.base:
        raise UserError(f"{where}they were trained on different bases")
    for name, value in first.config.adapter.model_dump().items():
        if name != "dropout" and value != (got := getattr(other.config.adapter, name)):
            raise UserError(f"{where}adapter.{name} is {value} and {got}")
    for name in first.adapters.keys() & other.adapters.keys():
        if not name.endswith(_OWN) and not torch.equal(first.adapters[name], other.adapters[name]):
            raise UserError(f"{where}what their tasks share differs ({name}); both must come from one adapter by "
                            "`tasks add` without --rehearse")


def _same_task(one: TaskSet, other: TaskSet, task: str) -> bool:
    def parts(of: TaskSet, other: TaskSet) -> dict[str, Tensor]:
        rows = {name: _row(of, name, task) for name in of.adapters.keys() & other.adapters.keys()
                if name.endswith(_OWN)}
        return rows | {name: head for name, head in of.heads.items() if _task_of(name) == task}

    ours, theirs = parts(one, other), parts(other, one)
    return (_meaning(one.config.tasks[task]) == _meaning(other.config.tasks[task]) and ours.keys() == theirs.keys()
            and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()))


def _row(of: TaskSet, name: str, task: str) -> Tensor:
    return of.adapters[name][:, list(of.config.tasks).index(task)]


def _fresh_row(name: str, like: Tensor) -> Tensor:
    """(S, R, R), (S, R) or (S, N): the identity as Lambda, an even mixture. like: (S, T, ...)."""
    shape = like.shape[:1] + like.shape[2:]
    if name.endswith(".mix"):
        return torch.zeros(shape, dtype=like.dtype)
    if like.dim() == 3:
        return torch.ones(shape, dtype=like.dtype)
    return torch.eye(shape[-1], dtype=like.dtype).expand(shape)


def _task_of(head: str) -> str:
    return head.partition(".")[0]


def _meaning(section: TaskSection) -> dict:
    return section.model_dump(exclude=_DATA)
