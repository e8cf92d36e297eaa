"""Overhead measured on the user's own machine: a training step and an inference pass, adapted against frozen.

All arms hold the same frozen weights and see the same batch; they run in turn, round after round, so that what else
the machine does falls on all alike. A ratio is the median over rounds of an arm's time over the frozen model's in its
round.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vl_mtl_lora.backbones import load_backbone
from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.bench_arms import frozen_model, merged_model, our_model, peft_lora_model, peft_poly_model
from vl_mtl_lora.bench_loader import loader_speed
from vl_mtl_lora.data.stream import Batch
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.lora import freeze
from vl_mtl_lora.model import MultiTaskModel, example_batch
from vl_mtl_lora.sections import RunConfig

GROWTH = {"tasks": (1, 3, 10, 30, 100), "rank": (8, 16, 64), "num_up": (1, 3, 10)}


def bench(config: RunConfig, rounds: int = 7, growth: bool = True) -> dict:
    """Measures a config with random weights; needs no shards, but measures the loader too where it finds them.

    Returns:
        ratios: to the frozen model, by arm: "ours", "peft_lora", "peft_poly" of a training step (forward and backward
        of a batch, no optimizer), "ours_inference" (mixed tasks) and "ours_merged" (one task folded in) of a forward
        pass. seconds: by arm, median, least and most. peak_bytes: the most that a training step holds beyond the
        weights. growth: ratio of "ours" to frozen for other numbers of tasks, ranks and up-projections, over both
        towers.
        loader: see `loader_speed`. left_out: arm -> why it was not measured. device, threads, torch, rows, rounds.

    Raises:
        UserError: a config that cannot be built.
    """
    section, device = config.backbone, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = load_backbone(section.library, section.name, dry_run="random", **section.options).to(device)
    freeze(backbone)
    arms, left_out = {"frozen": frozen_model(backbone, config), "ours": our_model(backbone, config)}, {}
    for name, build in (("peft_lora", peft_lora_model), ("peft_poly", peft_poly_model)):
        try:
            arms[name] = build(backbone, config)
        except UserError as error:
            left_out[name] = str(error)
    batch = example_batch(arms["frozen"], {name: task.rows for name, task in config.tasks.items()})
    steps = {name: _step(model, batch, config) for name, model in arms.items()}
    seconds = _interleaved(steps, rounds, "steps")
    peaks = {name: _peak_bytes(step, arms[name], device) for name, step in steps.items()}
    ratios = {name: _ratio(values, seconds["frozen"]) for name, values in seconds.items()}
    passes = {"frozen": _inference(arms["frozen"], batch, config), "ours": _inference(arms["ours"], batch, config)}
    try:
        passes["merged"] = _inference(merged_model(arms["ours"], config), batch, config)
    except UserError as error:
        left_out["ours_merged"] = str(error)
    inference = _interleaved(passes, rounds, "inference")
    for name, arm in (("ours_inference", "ours"), ("ours_merged", "merged")):
        if arm in inference:
            ratios[name] = _ratio(inference[arm], inference["frozen"])
    seconds |= {f"{name}_inference": values for name, values in inference.items()}
    result = {"ratios": ratios, "peak_bytes": peaks,
              "seconds": {name: {"median": statistics.median(v), "least": min(v), "most": max(v)}
                          for name, v in seconds.items()},
              "left_out": left_out, "device": _device_name(device), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "rows": len(batch.ids), "rounds": rounds}
    try:
        result["loader"] = loader_speed(config, arms["ours"], rounds)
    except UserError as error:
        left_out["loader"] = str(error)
    if growth:
        del arms, steps, passes
        result["growth"] = _growth(backbone, config, batch, rounds)
    return result


def table(result: dict) -> str:
    """The result for a terminal."""
    seconds, peaks, ratios = result["seconds"], result["peak_bytes"], result["ratios"]
    lines = [f"{result['device']}, {result['threads']} threads, torch {result['torch']}: {result['rows']} rows, median "
             f"of {result['rounds']} rounds", "",
             f"{'training step':24}{'x frozen':>10}{'seconds':>10}{'least - most':>18}{'peak memory':>14}"]
    for name in peaks:
        one = seconds[name]
        lines.append(f"{name:24}{ratios[name]:10.3f}{one['median']:10.3f}{one['least']:10.3f} -{one['most']:6.3f}"
                     f"{peaks[name] / 1e6:11.0f} MB")
    lines += ["", f"{'inference':24}{'x frozen':>10}{'seconds':>10}{'least - most':>18}"]
    for key, name, label in (("frozen_inference", "frozen", "frozen"),
                             ("ours_inference", "ours_inference", "ours, mixed tasks"),
                             ("merged_inference", "ours_merged", "ours, one task merged")):
        if key in seconds:
            one = seconds[key]
            lines.append(f"{label:24}{ratios[name]:10.3f}{one['median']:10.3f}{one['least']:10.3f} -{one['most']:6.3f}")
    if "loader" in result:
        loader = result["loader"]
        lines += ["", f"loader, {loader['workers']} processes: {loader['images_per_second']:.0f} images/s, "
                      f"{loader['ratio']:.2f} of decoding and resizing alone"]
    for what, values in result.get("growth", {}).items():
        lines += ["", f"{what:24}" + "".join(f"{value:>8}" for value in values),
                  f"{'ours x frozen':24}" + "".join(f"{ratio:8.3f}" for ratio in values.values())]
    lines += [f"{name} is not measured: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def write(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, config.train.precision == "bf16")


def _step(model: MultiTaskModel, batch: Batch, config: RunConfig) -> Callable[[], None]:
    """Forward and backward pass of a batch."""
    def run():
        model.train()
        model.zero_grad(set_to_none=True)
        with _autocast(config, model.backbone.device):
            loss = sum(model(batch).values())
        loss.backward()
    return run


def _inference(model: MultiTaskModel, batch: Batch, config: RunConfig) -> Callable[[], None]:
    """The forward pass alone."""
    def run():
        model.eval()
        with torch.no_grad(), _autocast(config, model.backbone.device):
            model(batch)
    return run


def _towers(model: MultiTaskModel, batch: Batch, config: RunConfig) -> Callable[[], None]:
    """Forward and backward pass of both towers, rows spread evenly over the model's tasks."""
    rows = len(batch.ids)
    ids = torch.arange(rows) * len(model.router.task_names) // rows
    texts = [f"a picture that shows {i} things and more" for i in range(rows)]
    tokens = model.backbone.text.rows(texts).to(model.backbone.device)

    def run():
        model.train()
        model.zero_grad(set_to_none=True)
        with _autocast(config, model.backbone.device), model.router.use(ids):
            image, text = model.backbone.encode_image(batch.images), model.backbone.encode_text(tokens)
        (image * text).sum().backward()
    return run


def _growth(backbone: Backbone, config: RunConfig, batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """Ratio to the frozen towers for each value of what might cost: arms of one kind run interleaved."""
    result = {}
    for what, values in GROWTH.items():
        arms = {"frozen": _towers(frozen_model(backbone, config), batch, config)}
        for value in values:
            model = our_model(backbone, config, **{what: value})
            arms[str(value)] = _towers(model, batch, config)
        seconds = _interleaved(arms, rounds, what)
        result[what] = {name: _ratio(seconds[name], seconds["frozen"]) for name in arms if name != "frozen"}
    return result


def _interleaved(arms: dict[str, Callable[[], None]], rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of each arm in each round; every arm runs once before, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in tqdm(range(rounds + 1), desc=label, unit="round", dynamic_ncols=True):
        for name in names[i % len(names):] + names[:i % len(names)]:  # none always follows the same one
            _wait_for_device()
            start = time.perf_counter()
            arms[name]()
            _wait_for_device()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratio(values: Sequence[float], frozen: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(values, frozen))


def _peak_bytes(step: Callable[[], None], model: MultiTaskModel, device: torch.device) -> int:
    """The most that a step holds at once beyond what is there before it: activations, gradients, temporaries."""
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports a missing GPU as an error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
                        key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
