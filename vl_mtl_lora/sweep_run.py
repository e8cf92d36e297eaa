"""One run of a sweep, in a process of its own: trains what its folder's config says, and writes what it scored."""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vl_mtl_lora.checkpoint import load_run, recover_checkpoint
from vl_mtl_lora.config import load_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.errors import Diverged, UserError
from vl_mtl_lora.evaluate import evaluate_tasks, evaluation_indices
from vl_mtl_lora.evaluation import write_json
from vl_mtl_lora.journal import read_log
from vl_mtl_lora.results import provenance
from vl_mtl_lora.trainer import train

SCORE = "score.json"


def run(folder: str | Path, split: str) -> None:
    """Trains, or goes on with, the run of a folder that holds its config.yaml; writes score.json into it, of a training
    that diverged only that.

    split: "test"; or "valid", on which training itself has measured.

    Raises:
        UserError: as `train` and `evaluate_tasks`; another process works in the folder.
    """
    folder = Path(folder)
    with alone_in(folder):
        config = load_config(folder / "config.yaml")
        recover_checkpoint(folder / "last")
        try:
            train(config, resume=(folder / "last" / "adapter_config.json").is_file())
        except Diverged as error:
            write_json({"diverged": str(error)}, folder / SCORE)
            return
        model, _ = load_run(folder)
        faults = FaultLog(config.data.max_fault_share)
        indices = evaluation_indices(config, split, faults)
        if split == "valid":
            tasks = json.loads((folder / "best" / "results.json").read_text(encoding="utf-8"))["tasks"]
        else:
            tasks = evaluate_tasks(model, indices, rows=config.data.eval_batch, faults=faults)
        about = provenance(config, model, indices, split)
        speeds = [entry["samples_per_second"] for entry in read_log(folder) if "samples_per_second" in entry]
        write_json({"tasks": tasks, "primary": {name: model.tasks[name].primary for name in tasks},
                    "samples_per_second": statistics.median(speeds),
                    **{name: about[name] for name in ("shards", "versions", "git_revision", "date", "device")}},
                   folder / SCORE)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError where another process is inside for this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"another process works in {folder}: wait until it ends, or stop it") from error
    try:
        yield
    finally:
        lock.release()


if __name__ == "__main__":
    try:
        run(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
