"""The files of a checkpoint folder, read with distrust: they may be anyone's.

Only plain files are opened, links to such included. Names, shapes and types are compared in a file's head before any
tensor is read, so that a file takes no more memory than what it is read for.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vl_mtl_lora.config import RunConfig, parse_config
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.hub import download, hub_address
from vl_mtl_lora.lora import METHODS

FORMAT = "vl_mtl_lora/1"
_LARGEST = 64 << 20  # bytes of a description; its closed lists are the most of it
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.uint8: "U8"}
_KEYS = {"step": (int, "a number"), "tasks": (list, "a list"), "base": (str, "a text"), "config": (dict, "a mapping")}


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint folder that a run, a checkpoint folder or an address on the hub stands for; what lies on the hub
    is downloaded. Raises UserError where there is none."""
    if address := hub_address(folder):
        return download(address)
    folder = Path(folder)
    for candidate in (folder, folder / "best", folder / "last"):
        for path in (candidate, earlier_name(candidate)):
            if (path / "adapter_config.json").is_file():
                return path
    raise UserError(f"no checkpoint in {folder}: expected a run's folder with best/ or last/, or one of those")


def earlier_name(folder: Path) -> Path:
    """Where a checkpoint is for the moment in which a newer one takes its place; a run killed then leaves it there."""
    return folder.with_name(folder.name + ".old")


def read_description(folder: str | Path) -> dict:
    """adapter_config.json, its "config" as a `RunConfig`.

    Raises:
        UserError: a file that is none of ours, is too large, or holds something else than we write.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        _check_plain(path)
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MiB")
        description = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        json.dumps(description, ensure_ascii=False).encode()  # refuses what is no Unicode
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no checkpoint: cannot read {path.name}: {error}") from error
    got = description.get("format") if isinstance(description, dict) else description
    if not isinstance(got, str) or got != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT!r}, got {_short(got)}")
    for key, (kind, noun) in _KEYS.items():
        if type(description.get(key)) is not kind:
            raise UserError(f"{path}: {key}: expected {noun}, got {_short(description.get(key))}")
    if description["step"] < 0:
        raise UserError(f"{path}: step: expected a number from 0 on, got {_short(description['step'])}")
    config = _parse_config(description["config"], path)
    if description["tasks"] != list(config.tasks):
        raise UserError(f"{path}: its tasks are {_short(description['tasks'])}, its config's {list(config.tasks)}")
    return {**description, "config": config}


def _parse_config(data: dict, path: Path) -> RunConfig:
    """Where a config on its way to a run may name a file of labels or answers, a checkpoint holds the list itself: no
    file of this machine is read for another's checkpoint."""
    for key in ("tasks", "held_out"):
        for name, task in data[key].items() if isinstance(data.get(key), dict) else ():
            for field in ("answers", "labels"):
                if isinstance(task, dict) and isinstance(task.get(field), str):
                    raise UserError(f"{path}: config.{key}.{_name(name)}.{field}: expected the list itself, got "
                                    f"{_short(task[field])}; a checkpoint names no files")
    try:
        return parse_config(data, where=lambda loc: str(path))
    except RecursionError as error:
        raise UserError(f"{path}: its config is nested too deeply") from error


def check_sizes(folder: str | Path, config: RunConfig) -> None:
    """Compares the sizes that a checkpoint's config asks for with its adapters' shapes, before anything of such a size
    is made. Raises UserError where they differ."""
    path = Path(folder) / "adapter_model.safetensors"
    adapter = config.adapter
    tasks, rank, ups = len(config.tasks), adapter.rank, adapter.num_up
    shapes = {name: shape for name, (shape, _) in read_heads(path).items()}
    if adapter.method == "heads":  # an empty file, as `read_tensors` will see
        return
    if not shapes:
        raise UserError(f"{path}: it holds no tensor")
    expected = METHODS[adapter.method].sizes(tasks, rank, ups, adapter.transform)
    for name, shape in shapes.items():
        sizes = expected.get(name.rpartition(".")[2], ())
        if shape[1:1 + len(sizes)] != sizes or not math.prod(shape):
            raise UserError(f"{path}: {_name(name)} has shape {shape}, which does not fit rank {rank}, {tasks} tasks "
                            f"and {ups} up-projections of adapter_config.json")


def read_heads(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the type, as safetensors names it, of every tensor of a file. Raises UserError."""
    try:
        _check_plain(path)
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_tensors(path: str | Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file: exactly the `expected` names, with their shapes and types, every value finite.

    Raises:
        UserError: anything else, or a file that cannot be read.
    """
    heads = read_heads(path)
    if missing := sorted(expected.keys() - heads.keys()):
        raise UserError(f"{path}: tensors are missing: {', '.join(missing[:5])} ({len(missing)} in all)")
    if unknown := sorted(heads.keys() - expected.keys()):
        raise UserError(f"{path}: unknown tensors: {', '.join(map(_name, unknown[:5]))} ({len(unknown)} in all)")
    for name, own in expected.items():
        shape, kind = heads[name]
        if shape != tuple(own.shape):
            raise UserError(f"{path}: {name} has shape {shape}, expected {tuple(own.shape)}")
        if kind != _TYPES[own.dtype]:
            raise UserError(f"{path}: {name} is of type {kind}, expected {_TYPES[own.dtype]}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds a value that is no number")
    return tensors


def load_resume(folder: str | Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors saved as `resume`: Adam's moments of some or all of the parameters, generators, sizes of the data.

    Raises:
        UserError: a file that cannot be read, or holds anything else.
    """
    path = Path(folder) / "resume.safetensors"
    try:
        names = read_heads(path)
        expected = {"random.torch.0": torch.get_rng_state()}
        for name, (shape, _) in names.items():
            if name.startswith("random.torch."):
                expected[name] = expected["random.torch.0"]
            elif name.startswith("random."):
                expected[name] = torch.empty(shape, dtype=torch.uint8, device="meta")
            if name.startswith("data."):
                expected[name] = torch.empty(shape, dtype=torch.int64, device="meta")
        for name, parameter in parameters.items():
            if any(f"adam.{key}.{name}" in names for key in ("step", "exp_avg", "exp_avg_sq")):  # it was trained
                expected |= {f"adam.step.{name}": torch.empty(()), f"adam.exp_avg.{name}": parameter,
                             f"adam.exp_avg_sq.{name}": parameter}
        return read_tensors(path, expected)
    except UserError as error:
        raise UserError(f"{folder} cannot be resumed: {error}") from error


def _check_plain(path: str | Path) -> None:
    """Raises OSError for what is there but is no plain file: a folder would not open, a device or a pipe never end."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(f"{path} is no plain file")


def _no_number(word: str):
    raise ValueError(f"{word} is no number")


def _name(name: str) -> str:
    return name[:100] if name.isprintable() else repr(name)[:100]


def _short(value: object) -> str:
    """A value for a message of one line."""
    return repr(value)[:60]
