"""Files from strangers, read without running anything that is in them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vl_mtl_lora.errors import UserError

_MOST_JSON = 2**20  # bytes of a file of settings
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Floating-point tensors by name, from safetensors or from a pickle of tensors alone.

    Raises:
        UserError: a file that cannot be read or holds anything else, or a value that is no number.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except Exception as error:  # torch raises many types for what is no pickle of tensors
        raise UserError(f"cannot read {path} as tensors and nothing else: {type(error).__name__}: "
                        f"{str(error).splitlines()[0] if str(error) else ''}") from error
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path}: expected tensors by name, got a {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES or (
                tensor.layout != torch.strided or tensor.device.type != "cpu"):
            raise UserError(f"{path}: {name!r} is no tensor of floating-point numbers")
        # A tensor may claim more elements than the file holds, and would be made real by any step on it.
        if not tensor.numel() or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} claims a shape of {tuple(tensor.shape)} and has other data")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds a value that is no number")
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError for a file that cannot be read or holds anything else."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError("it is larger than any such file")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


def one_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is in the folder. Raises UserError where none is."""
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder}: the weights are missing: expected {' or '.join(names)}")
    return found


def some(names: Sequence[str]) -> str:
    """The first names of a long list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
