"""A checkpoint goes to the hub: which files, with a card of what is known by then, and no paths of this machine."""

import json
from pathlib import Path

from vl_mtl_lora.checkpoint_files import find_checkpoint, read_description
from vl_mtl_lora.compare import results_of
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.hub import FILES, check_repo, hub_address, upload
from vl_mtl_lora.model_card import model_card
from vl_mtl_lora.sections import DataSection


def push(run: str | Path, repo: str, *, private: bool = False, message: str | None = None,
         revision: str | None = None, licence: str | None = None) -> str:
    """Uploads the five files of a checkpoint in one commit; nothing else that lies in its folder.

    results.json and the card are those of the last `compare` where it was of this checkpoint, else those of the last
    evaluation in training. Of the shards' paths the last two parts are kept, so that whoever loads the run finds shards
    of that name in the folder they work in.

    Args:
        run: a run's or checkpoint's folder. repo: USER/NAME. revision: a branch, made if needed; None: main.
        licence: of the adapters, by the hub's name for it, e.g. "mit".

    Returns:
        The URL of the repository.

    Raises:
        UserError: no checkpoint, a file of it that leads elsewhere, a name that cannot be one, and all that `upload`
            raises.
    """
    if hub_address(run):
        raise UserError(f"{run} is on the hub already: push takes the folder of a run")
    address = hub_address(f"hf://{check_repo(repo)}" + (f"@{revision}" if revision is not None else ""))
    folder = find_checkpoint(run)
    files: dict[str, Path | bytes] = {name: folder / name for name in FILES}
    for path in files.values():
        if not path.is_file() or path.resolve().parent != folder.resolve():
            raise UserError(f"{path} is missing, or a link that leads elsewhere: expected a file of the checkpoint")
    description = read_description(folder)
    try:
        results = results_of(folder, folder.parent) or json.loads((folder / "results.json").read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'results.json'} is damaged: {error}") from error
    description["config"] = _portable(description["config"].model_dump())
    if "config" in results:
        results["config"] = description["config"]
        results["faults"] = [{**fault, "shard": _short(fault["shard"])} for fault in results["faults"]]
    files |= {"adapter_config.json": _json(description), "results.json": _json(results),
              "README.md": model_card(description, results, repo, licence).encode()}
    return upload(address, files, private=private,
                  message=message or f"MTL-LoRA adapters after {description['step']} steps")


def _portable(config: dict) -> dict:
    """A config without the paths of this machine."""
    sections = {key: {name: {**task, **{split: list(map(_short, task[split])) for split in ("train", "valid", "test")}}
                      for name, task in config[key].items()} for key in ("tasks", "held_out")}
    return {**config, **sections, "out": Path(config["out"]).name,
            "data": {**config["data"], "cache": DataSection().cache}}


def _short(shard: str) -> str:
    return shard if "://" in shard or shard.startswith("pipe:") else "/".join(Path(shard).parts[-2:])


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
