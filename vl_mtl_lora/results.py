"""The content of results.json: figures with intervals, and everything needed to have them again."""

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.data.index import TaskIndex, shards_hash
from vl_mtl_lora.evaluate import Evaluation
from vl_mtl_lora.metrics.bootstrap import Metric, interval, paired_interval
from vl_mtl_lora.model import MultiTaskModel

_PACKAGES = ("vl_mtl_lora", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "webdataset", "pillow",
             "numpy", "pycocoevalcap", "faiss-cpu")


def arm_results(evaluation: Evaluation) -> dict:
    """One task under one arm: {"metrics", "interval", "n", "groups", "samples"}; intervals are of 95 %."""
    metrics = evaluation.metrics
    return {"metrics": {name: float(value) for name, value in metrics.items()},
            "interval": {name: interval(value) for name, value in metrics.items()},
            "n": {name: value.n for name, value in metrics.items()},
            "groups": [{"by": by, "value": value, **_figure(metric)}
                       for (by, value), metric in evaluation.groups.items()],
            "samples": len(evaluation.samples)}


def paired_results(zero_shot: Evaluation, adapted: Evaluation, notes: Sequence[str]) -> dict:
    """One task under both arms: {"zero_shot": {metric: x}, "adapted", "interval": {"zero_shot", "adapted", "change"},
    "n", "groups", "samples", "notes"}; intervals are of 95 %, that of the change is paired."""
    before, after = zero_shot.metrics, adapted.metrics
    return {"zero_shot": {name: float(value) for name, value in before.items()},
            "adapted": {name: float(value) for name, value in after.items()},
            "interval": {"zero_shot": {name: interval(value) for name, value in before.items()},
                         "adapted": {name: interval(value) for name, value in after.items()},
                         "change": {name: paired_interval(before[name], value) for name, value in after.items()}},
            "n": {name: value.n for name, value in after.items()},
            "groups": [{"by": by, "value": value, "n": metric.n, "zero_shot": float(zero_shot.groups[by, value]),
                        "adapted": float(metric), "change": paired_interval(zero_shot.groups[by, value], metric)}
                       for (by, value), metric in adapted.groups.items() if (by, value) in zero_shot.groups],
            "samples": len(adapted.samples), "notes": list(notes)}


def provenance(config: RunConfig, model: MultiTaskModel, indices: Mapping[str, TaskIndex], split: str) -> dict:
    """What the figures hang on: versions, git revision, machine, config, seed and shards."""
    device = model.backbone.device
    return {"split": split, "seed": config.train.seed, "config": config.model_dump(),
            "shards": {name: {"hash": shards_hash(index.source.files), "files": len(index.source.files),
                              "samples": len(index)} for name, index in indices.items()},
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "git_revision": git_revision(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
            "precision": str(model.backbone.dtype).removeprefix("torch.")}


def git_revision() -> str | None:
    """The commit of the checkout that this package lies in, with "+" where files differ from it; None outside one."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True,
                              check=True, timeout=10).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[1]:
            return None  # installed into an environment inside some other project
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _figure(metric: Metric) -> dict:
    return {"figure": float(metric), "interval": interval(metric), "n": metric.n}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
