"""What a run tells of itself while it trains: means, speed, and the log that a resumed run goes on with.

Of several processes the first one writes, for all.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from vl_mtl_lora.errors import UserError
from vl_mtl_lora.ranks import everyone, rank, world


class Meter:
    """Means of the losses and the speed since the last reading."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}  # by loss: not every batch has every task
        self._rows = 0
        self.restart()

    def restart(self) -> None:
        """Takes time anew: what was done in between is no training."""
        self._start, self._waited, self._rows = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, rows: int, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach()
            self._batches[name] = self._batches.get(name, 0) + 1
        self._rows += rows

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """(mean loss by name, samples per second and the share of the time that went into waiting for data), over all
        processes, which must all call it."""
        passed = time.perf_counter() - self._start
        own = ({name: float(value) / self._batches[name] for name, value in self._sums.items()},
               self._rows / passed, self._waited / passed)
        self.__init__()
        means, speeds, waits = zip(*everyone(own))
        return ({name: sum(each[name] for each in means) / world() for name in means[0]},
                {"samples_per_second": sum(speeds), "data_wait": sum(waits) / world()})


class Journal:
    """A run's log: every entry a line of log.jsonl, every number a point in tensorboard."""

    def __init__(self, out: Path, after: int):
        """after: entries of later steps are dropped, so that a resumed run tells no step twice."""
        self._stream = self._board = None
        if rank() > 0:
            return
        kept = [entry for entry in read_log(out) if entry["step"] <= after] if after else []
        self._stream = open(out / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._stream.writelines(json.dumps(entry) + "\n" for entry in kept)
        self._stream.flush()
        self._board = SummaryWriter(out / "tensorboard", purge_step=after + 1)

    def write(self, entry: dict) -> None:
        if self._stream is None:
            return
        self._stream.write(json.dumps(entry) + "\n")
        self._stream.flush()
        for name, value in entry.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, entry["step"])

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        if self._stream is not None:
            self._stream.close()
            self._board.close()


def read_log(run: str | Path) -> list[dict]:
    """The entries of a run's log.jsonl; none where there is no log.

    A line that was being written when the run broke off is left out. Raises UserError where the log is damaged.
    """
    path = Path(run) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
