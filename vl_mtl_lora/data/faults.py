"""What could not be used, counted and told, and the point from which on it is too much."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field

from vl_mtl_lora.errors import UserError

log = logging.getLogger(__name__)

_EARLY = 1000  # samples after which a share of faults can be judged before all are seen


@dataclass(frozen=True)
class Fault:
    """One sample that could not be used, or a whole shard where the key is empty."""

    shard: str
    key: str
    reason: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.shard}: {self.key or '(whole shard)'}: {self.reason}"


class FaultLog:
    """Counts faults at each stage of reading, tells each sample's once, and ends the run past the allowed share.

    Stages, each with a share of its own: "record" (is there text with a known tag? among all records of a shard),
    "sample" (has a record of the task its fields and images?), "picture" (can its images be decoded?).

    max_share: the share that may be broken.
    """

    def __init__(self, max_share: float = 0.01):
        self.max_share = max_share
        self.faults: dict[Fault, tuple[str, str]] = {}  # in the order met, each once: task and stage
        self._seen: Counter[tuple[str, str]] = Counter()
        self._broken: Counter[tuple[str, str]] = Counter()

    def count(self, task: str, stage: str, fault: Fault | None = None, records: int = 1) -> bool:
        """One more record (or several) of a task at a stage, broken where a fault is given; whether it is a new fault.

        Raises:
            UserError: so many were seen that the share can be judged, and it is too high.
        """
        self._seen[task, stage] += records
        if fault is None:
            return False
        self._broken[task, stage] += records
        new = fault not in self.faults
        if new:
            self.faults[fault] = task, stage
            log.warning("skipped a sample of %s: %s", task, fault)
        if self._seen[task, stage] >= _EARLY:
            self.judge(task, stage)
        return new

    def add(self, other: "FaultLog") -> None:
        """Takes over what another process has counted."""
        if other is self:
            return
        for (task, stage), records in other._seen.items():
            self._seen[task, stage] += records - other._broken[task, stage]
        for fault, (task, stage) in other.faults.items():
            self.count(task, stage, fault)

    def seen(self, task: str, stage: str) -> int:
        """How many records of a task were counted at a stage."""
        return self._seen[task, stage]

    def judge(self, task: str, *stages: str) -> None:
        """Raises UserError where more than the allowed share of what a stage has seen is broken."""
        for stage in stages:
            seen, broken = self._seen[task, stage], self._broken[task, stage]
            if broken > self.max_share * seen:
                own = [str(fault) for fault, place in self.faults.items() if place == (task, stage)]
                listed = "\n  ".join(own[:10]) + (f"\n  and {len(own) - 10} more" if len(own) > 10 else "")
                raise UserError(f"{broken} of {seen} {stage}s read for task {task} cannot be used, more than the share "
                                f"data.max_fault_share = {self.max_share:g} allows:\n  {listed}")

    def report(self) -> list[dict]:
        """The faults as plain data, for a file."""
        return [asdict(fault) for fault in self.faults]
