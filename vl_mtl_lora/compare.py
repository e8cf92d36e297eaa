"""Both arms of a run over its test shards, and the report on them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vl_mtl_lora.checkpoint import find_checkpoint, load_run, read_description
from vl_mtl_lora.data.reader import FaultLog, Source, read_samples
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.evaluate import Evaluation, build_sources, evaluate_task
from vl_mtl_lora.report import pick_examples, results_dict, write_report
from vl_mtl_lora.trainer import read_log


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
    sources = build_sources(config, split)
    for arm in ("zero_shot", "adapted"):
        start = time.perf_counter()
        arms[arm] = {name: evaluate_task(model, name, source, zero_shot=arm == "zero_shot", limit=limit, **options)
                     for name, source, options in sources}
        seconds[f"evaluation, {arm.replace('_', '-')}"] = time.perf_counter() - start
    frozen = sum(p.numel() for p in model.backbone.parameters() if not p.requires_grad)
    about = {"base": config.backbone.name, "rank": config.adapter.rank, "modules": sum(model.summary.modules.values()),
             "trainable": model.summary.total, "share": 100.0 * model.summary.total / frozen,
             "steps": read_description(checkpoint)["step"], "checkpoint": checkpoint.name}
    results = results_dict(arms["zero_shot"], arms["adapted"], run=about, split=split, seconds=seconds,
                           faults=[fault for *_, options in sources for fault in options["faults"].report()])
    by_task = {name: source for name, source, _ in sources}
    examples = pick_examples(model.tasks, arms["zero_shot"], arms["adapted"],
                             lambda samples: _pictures(samples, by_task[samples[0].task]))
    write_report(folder, results, examples, read_log(folder))
    return results


def _pictures(samples: Sequence[Sample], source: Source) -> list[bytes]:
    """Reads the images of one task's samples from their shards again, each shard once."""
    shards = dict.fromkeys(sample.shard for sample in samples)
    wanted = {(sample.shard, sample.key) for sample in samples}
    faults = FaultLog(1.0, quiet=True)  # told when the samples were evaluated
    again = read_samples(source, [source.task], faults, list(shards))
    found = {(s.shard, s.key): s.images[0] for s in again if (s.shard, s.key) in wanted}
    return [found[sample.shard, sample.key] for sample in samples]
