"""Both arms of a run over its test shards, and the report on them."""

import time
from collections.abc import Mapping
from pathlib import Path

from vl_mtl_lora.checkpoint import find_checkpoint, load_run, read_description
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.evaluate import Evaluation, evaluate_task, evaluation_indices
from vl_mtl_lora.journal import read_log
from vl_mtl_lora.report import pick_examples, results_dict, write_report


def compare(run: str | Path, split: str = "test", limit: int | None = None,
            seconds: Mapping[str, float] | None = None) -> dict:
    """Evaluates a run's tasks zero-shot and adapted, writes results.json, report.md and report.html into its folder.

    Args:
        run: a run's folder, or a checkpoint in one.
        limit: the most samples of each task.
        seconds: stages timed before, for the report.

    Returns:
        The content of results.json.
    """
    checkpoint = find_checkpoint(run)
    folder = checkpoint.parent  # a checkpoint has a results.json of its own
    model, config = load_run(checkpoint)
    seconds = dict(seconds or {})
    arms: dict[str, dict[str, Evaluation]] = {}
    faults = FaultLog(config.data.max_fault_share)
    indices = evaluation_indices(config, split, faults)
    for arm in ("zero_shot", "adapted"):
        start = time.perf_counter()
        arms[arm] = {name: evaluate_task(model, index, zero_shot=arm == "zero_shot", rows=config.data.eval_batch,
                                         limit=limit, faults=faults) for name, index in indices.items()}
        seconds[f"evaluation, {arm.replace('_', '-')}"] = time.perf_counter() - start
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    about = {"base": config.backbone.name, "rank": config.adapter.rank, "modules": sum(model.summary.modules.values()),
             "trainable": model.summary.total, "share": 100.0 * model.summary.total / frozen,
             "steps": read_description(checkpoint)["step"], "checkpoint": checkpoint.name}
    results = results_dict(arms["zero_shot"], arms["adapted"], run=about, split=split, seconds=seconds,
                           faults=faults.report())
    examples = pick_examples(model.tasks, arms["zero_shot"], arms["adapted"],
                             lambda task, row: indices[task].sample(row).images)
    write_report(folder, results, examples, read_log(folder))
    return results
