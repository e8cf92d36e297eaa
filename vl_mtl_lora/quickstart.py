"""The embedded default run: packaged data, the embedded base, three tasks, zero-shot against adapted, on a CPU."""

import logging
import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml

from vl_mtl_lora.compare import compare
from vl_mtl_lora.config import RunConfig, apply_override, parse_config
from vl_mtl_lora.data import examples
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.trainer import train

log = logging.getLogger(__name__)

Example = Literal["short", "long", "kinds"]
_MADE = ("config.yaml", "log.jsonl", "tensorboard", "last", "best", "last.old", "best.old", "results.json", "report.md",
         "report.html")


def quickstart_config(out: str | Path, example: Example = "short", overrides: list[str] = ()) -> RunConfig:
    """The quickstart's configuration, its shards under OUT/shards."""
    name = {"short": "quickstart.yaml", "long": "quickstart_long.yaml", "kinds": "quickstart_kinds.yaml"}[example]
    data = yaml.safe_load((resources.files("vl_mtl_lora") / "embedded" / name).read_text(encoding="utf-8"))
    data["out"] = str(out)
    for override in overrides:
        apply_override(data, override)
    return parse_config(data, where=lambda loc: name, root=Path(out))


def quickstart(out: str | Path, example: Example = "short", overrides: list[str] = ()) -> dict:
    """Builds the shards, trains, compares; returns the results. An earlier quickstart in the folder is replaced.

    example: "short" or "long" training of retrieval, VQA and captioning; "kinds": classification, multiple choice and
        matching with and without a picture.

    Raises:
        UserError: the folder holds something else.
    """
    out = Path(out)
    config = quickstart_config(out, example, overrides)
    shards = out / "shards"
    if out.exists() and any(out.iterdir()) and not shards.is_dir():
        raise UserError(f"{out} holds something else than a quickstart: choose another --out")
    for name in _MADE:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    seconds = {}
    start = time.perf_counter()
    complete = shards / ("complete-kinds" if example == "kinds" else "complete-tasks")
    if not complete.exists():
        log.info("building shards in %s", shards)
        if example == "kinds":
            examples.write_easy_vqa(shards, ("matching", "reading"), samples_per_shard=10000)
            examples.write_emoji(shards, "emoji-category")
            examples.write_emoji(shards, "emoji-choice")
        else:
            examples.write_easy_vqa(shards, samples_per_shard=10000)
            examples.write_emoji(shards)
            examples.write_easy_vqa(shards, ("matching",), ("test",), samples_per_shard=10000)  # held out, as the next
            examples.write_emoji(shards, "emoji-category", ("test",))
        complete.touch()
    seconds["shards"] = time.perf_counter() - start
    start = time.perf_counter()
    train(config)
    seconds["training"] = time.perf_counter() - start
    return compare(out, seconds=seconds)
