"""The patterns of `adapter.targets` against the logical places of a backbone; see `AdapterConfig`."""

import fnmatch

from vl_mtl_lora.backbones.base import Place


def matched_slices(target: str, place: Place) -> set[int]:
    """Which output slices of a place a target stands for."""
    if _matches(target, place, place.role):
        return set(range(place.splits))
    if place.splits != 3:
        return set()
    stem = place.role.removesuffix("qkv")
    return {i for i, part in enumerate("qkv") if _matches(target, place, stem + part)}


def _matches(target: str, place: Place, role: str) -> bool:
    """Anchored at both ends: a pattern for one tower never leaks into another."""
    if target == place.tower or _matches_role(target, role):
        return True
    tower, _, rest = target.partition(".")
    if not fnmatch.fnmatchcase(place.tower, tower):
        return False
    if _matches_role(rest, role):
        return True
    blocks, _, pattern = rest.partition(".")
    if place.block < 0 or not _matches_role(pattern, role):
        return False
    first, _, last = blocks.partition("-")
    if first.isdigit() and (not last or last.isdigit()):
        return int(first) <= place.block <= int(last or first)
    return fnmatch.fnmatchcase(str(place.block), blocks)


def _matches_role(pattern: str, role: str) -> bool:
    return bool(pattern) and (fnmatch.fnmatchcase(role, pattern) or role.startswith(pattern + "."))
