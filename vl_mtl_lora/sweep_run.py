"""One run of a sweep, in a process of its own: trains what its folder's config says, and writes what it scored."""

import statistics
import sys
from pathlib import Path

from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.checkpoint_files import find_checkpoint
from vl_mtl_lora.config import load_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.evaluate import evaluate_tasks, evaluation_indices
from vl_mtl_lora.evaluation import write_json
from vl_mtl_lora.journal import read_log
from vl_mtl_lora.results import provenance
from vl_mtl_lora.trainer import train

SCORE = "score.json"


def run(folder: str | Path, split: str) -> None:
    """Trains, or goes on with, the run of a folder that holds its config.yaml; writes score.json into it.

    Raises:
        UserError: as `train` and `evaluate_tasks`.
    """
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    train(config, resume=(folder / "last" / "adapter_config.json").is_file())
    model, _ = load_run(folder)
    faults = FaultLog(config.data.max_fault_share)
    indices = evaluation_indices(config, split, faults)
    limit = config.train.eval_samples if split == "valid" else None
    tasks = evaluate_tasks(model, indices, rows=config.data.eval_batch, limit=limit, faults=faults)
    about = provenance(config, model, indices, split)
    write_json({"tasks": tasks, "primary": {name: model.tasks[name].primary for name in tasks},
                "samples_per_second": statistics.median(
                    entry["samples_per_second"] for entry in read_log(folder) if "samples_per_second" in entry),
                "checkpoint": find_checkpoint(folder).name,
                **{name: about[name] for name in ("shards", "versions", "git_revision", "date", "device")}},
               folder / SCORE)


if __name__ == "__main__":
    try:
        run(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
