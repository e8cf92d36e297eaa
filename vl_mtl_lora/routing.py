"""Which task each row of a batch belongs to: one `TaskRouter`, shared by reference with every adapted layer."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vl_mtl_lora.errors import UserError

_MANY_RUNS = 16  # more are computed all at once, whatever their length
_FEW_BLOCKS = 4  # or more, where possible: processor cores share them evenly


class Segment(NamedTuple):
    """Neighbouring tokens that are computed at once, in blocks of equal length, each of one task.

    start, stop: the first token, and the one after the last. count: how many blocks. first: which block is their first.
    """

    start: int
    stop: int
    count: int
    first: int


class Blocks(NamedTuple):
    """Rows as a layer computes them.

    tasks: (K,) of the blocks, on the device. segments: what the blocks make up. waiting: whatever layers have computed
    for one another under these tasks.
    """

    tasks: Tensor
    segments: tuple[Segment, ...]
    waiting: dict


@dataclass(frozen=True)
class Route:
    """The tasks of the rows (dim 0) that a layer is about to see, known on the host: no layer asks the device.

    ids:  (B,) task ids on the CPU; None where every row, however many, is of task `task`.
    runs: the same as (task id, first row, row after the last), for neighbouring rows of one task.
    block: rows per block, a number that divides every run.
    """

    ids: Tensor | None = None
    runs: tuple[tuple[int, int, int], ...] = ()
    block: int = 1
    task: int | None = None
    _cached: dict = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of_task(task: int) -> "Route":
        return Route(task=task)

    @staticmethod
    def of_rows(ids: Tensor) -> "Route":
        """ids (B,), any order."""
        ids = ids.detach().to("cpu", torch.int64)
        values, counts = torch.unique_consecutive(ids, return_counts=True)
        stops = counts.cumsum(0)
        runs = tuple(zip(values.tolist(), (stops - counts).tolist(), stops.tolist()))
        block = math.gcd(*counts.tolist()) or 1
        while block % 2 == 0 and len(ids) // block < _FEW_BLOCKS:
            block //= 2
        return Route(ids=ids, runs=runs, block=block)

    @property
    def num_rows(self) -> int | None:
        return None if self.ids is None else len(self.ids)

    def blocks(self, device: torch.device, rows: int, tokens: int, rank: int) -> Blocks:
        """Equal blocks in one segment, unless these would be so short that what each costs, `rank` rows of output
        columns, outweighs its own tokens: then each run is a segment of one block.

        Args:
            device, rows, tokens: of the input; so many tokens in each row. rank: of the adapters.
        """
        length = rows * tokens // _FEW_BLOCKS if self.ids is None else self.block * tokens
        equal = len(self.runs) > _MANY_RUNS or length >= 4 * rank
        key = device, rows * tokens, equal
        if key not in self._cached:
            tasks, segments = self._blocks(rows, tokens, equal) if rows * tokens else (torch.empty(0).long(), ())
            self._cached[key] = Blocks(tasks.to(device, non_blocking=True), segments, {})
        return self._cached[key]

    def _blocks(self, rows: int, tokens: int, equal: bool) -> tuple[Tensor, tuple[Segment, ...]]:
        if self.ids is None:
            count = math.gcd(rows * tokens, _FEW_BLOCKS) if equal else 1
            return torch.full((count,), self.task), (Segment(0, rows * tokens, count, 0),)
        if equal:
            return self.ids[::self.block], (Segment(0, rows * tokens, rows // self.block, 0),)
        segments = (Segment(start * tokens, stop * tokens, 1, i) for i, (_, start, stop) in enumerate(self.runs))
        return torch.tensor([task for task, _, _ in self.runs], dtype=torch.int64), tuple(segments)


class TaskRouter:
    """Holds the current route of each tower. `use` and `off` are context managers and nest.

    The state is a plain attribute: autograd's device threads, which run checkpointed blocks again, see it too.

        router = TaskRouter(["retrieval", "vqa"])
        with router.use(torch.tensor([0, 0, 1])): ...          # three rows, all towers
        with router.use(image=image_ids, text=text_ids): ...   # towers with different rows
        with router.use("vqa"): ...                            # any number of rows, all of one task
        with router.off(): ...                                 # the frozen base
    """

    def __init__(self, task_names: Sequence[str]):
        self.task_names = tuple(task_names)
        if not self.task_names or len(set(self.task_names)) != len(self.task_names):
            raise UserError(f"task names must be distinct and at least one, got {list(task_names)}")
        self.towers: frozenset[str] = frozenset()  # the backbone's, set by inject; names are not checked before
        # Tower -> route; "*" stands for the towers not named; None means off.
        self._state: dict[str, Route | None] = {}

    def index(self, task: str) -> int:
        """The id of a task. Raises UserError for an unknown name."""
        if task not in self.task_names:
            raise UserError(f"unknown task {task!r}", near=(task, self.task_names))
        return self.task_names.index(task)

    def ids(self, tasks: Sequence[str]) -> Tensor:
        """Task names of rows -> (B,) ids."""
        return torch.tensor([self.index(task) for task in tasks], dtype=torch.int64)

    def use(self, target: "Tensor | str | None" = None, /, **towers: "Tensor | str") -> AbstractContextManager:
        """Routes rows to tasks: `target` for all towers, or one target per tower (the others keep theirs).

        A target is a (B,) integer tensor of task ids, a task's name, or a `Route`.

        Raises:
            UserError: an unknown task, or ids of the wrong type, shape or range.
        """
        if (target is None) == (not towers):
            raise UserError("router.use takes one target for all towers, or one per tower by name")
        for tower in towers:
            if self.towers and tower.partition(".")[0] not in self.towers:
                raise UserError(f"router.use: unknown tower {tower!r}", near=(tower, self.towers))
        if target is not None:
            return self._set({"*": self._route(target)})
        return self._set({**self._state, **{tower: self._route(t) for tower, t in towers.items()}})

    def off(self) -> AbstractContextManager:
        """Adapters off: every layer computes its frozen base."""
        return self._set({"*": None})

    def route(self, tower: str) -> Route | None:
        """The current route of a tower; None means off. Raises RuntimeError where no route is set.

        A part of a tower that sees other rows, such as `image.merged`, has the tower's route until it gets its own.
        """
        for key in (tower, tower.partition(".")[0], "*"):
            if key in self._state:
                return self._state[key]
        raise RuntimeError(f"no route is set for the {tower} tower: run the model under router.use(...) or "
                           "router.off()")

    def repeat(self, **times: "int | Sequence[int]") -> AbstractContextManager:
        """Rows of towers repeated in the order a a b b: every row so often, or each as often as its own number says.

        So beam search repeats rows of text, crops repeat rows of pictures, and patches do in a tower without a batch
        axis. A route of one task, or none, holds for any number of rows and stays.
        """
        state = dict(self._state)
        for tower, count in times.items():
            route = self.route(tower)
            if route is not None and route.ids is not None:
                count = torch.as_tensor(count, dtype=torch.int64)
                if count.dim() and len(count) != len(route.ids):
                    raise RuntimeError(f"the {tower} tower got {len(count)} rows, but the router holds "
                                       f"{len(route.ids)} ids for it")
                state[tower] = Route.of_rows(route.ids.repeat_interleave(count))
        return self._set(state)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: a block run again in the backward pass sees its first route."""
        return nullcontext(), self._set(dict(self._state))

    def _route(self, target) -> Route:
        if isinstance(target, Route):
            return target
        if isinstance(target, str):
            return Route.of_task(self.index(target))
        if not isinstance(target, Tensor) or target.dim() != 1 or target.dtype.is_floating_point \
                or target.dtype == torch.bool:
            got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise UserError(f"task ids must be a (B,) tensor of integers or a task's name, got {got}")
        route = Route.of_rows(target)
        if len(route.ids) and not 0 <= int(route.ids.min()) <= int(route.ids.max()) < len(self.task_names):
            raise UserError(f"task ids must lie in 0..{len(self.task_names) - 1} ({', '.join(self.task_names)}), "
                            f"got {sorted(set(route.ids.tolist()))}")
        return route

    @contextmanager
    def _set(self, state: dict[str, Route | None]) -> Iterator["TaskRouter"]:
        before, self._state = self._state, state
        try:
            yield self
        finally:
            self._state = before
