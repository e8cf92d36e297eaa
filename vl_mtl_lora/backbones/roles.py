"""Which logical role a linear layer has, told by the name that its library gives it inside a transformer block."""

from collections.abc import Iterable

from torch import nn

from vl_mtl_lora.backbones.base import Place

# The end of a layer's name inside its block -> role; the longest end that is listed counts.
_NAMES = {
    "attn.qkv": ("qkv", "qkv_proj", "query_key_value", "Wqkv"),
    "attn.q": ("q", "q_proj", "query", "q_lin"),
    "attn.k": ("k", "k_proj", "key", "k_lin"),
    "attn.v": ("v", "v_proj", "value", "v_lin"),
    "attn.kv": ("kv",),
    "attn.out": ("out_proj", "o_proj", "proj", "o", "out_lin", "projection_layer", "attention.output.dense",
                 "self_attn.dense"),
    "mlp.gate": ("gate_proj", "fc1_g", "wi_0", "w1"),
    "mlp.in": ("c_fc", "fc1", "up_proj", "fc1_x", "linear_fc1", "lin1", "wi", "wi_1", "w2", "gate_up_proj",
               "intermediate.dense"),
    "mlp.out": ("c_proj", "fc2", "down_proj", "linear_fc2", "lin2", "wo", "w3", "output.dense"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}


def role_of(name: str) -> str | None:
    """`self_attn.q_proj` -> `attn.q`; None for a name that is not known."""
    parts = name.split(".")
    return next((ROLES[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in ROLES), None)


def block_places(tower: str, index: int, block: nn.Module, left_out: dict[str, str], stem: str = "") -> list[Place]:
    """The places in one block, in the order of its modules; layers of unknown names go to `left_out`.

    index: of the block, -1 for a module outside the blocks. stem: put before the roles, "pool." gives pool.q.
    """
    found = []
    for name, layer in block.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        role = role_of(name)
        if role is None:
            left_out[f"{tower}.{index}.{name}" if index >= 0 else f"{tower}.{name}"] = "its name tells no role"
            continue
        parent = block.get_submodule(name.rpartition(".")[0])
        fused = role == "attn.qkv" and layer.out_features == 3 * layer.in_features
        role = stem + (role.removeprefix("attn.") if stem else role)
        found.append(Place(tower, index, role, parent, name.rpartition(".")[2], splits=3 if fused else 1))
    return found


def tower_places(tower: str, blocks: Iterable[nn.Module], left_out: dict[str, str]) -> list[Place]:
    """The places of a tower's blocks."""
    return [place for index, block in enumerate(blocks) for place in block_places(tower, index, block, left_out)]


def outermost_stack(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a tower: the first list of modules in it."""
    return list(next(m for m in module.modules() if isinstance(m, nn.ModuleList)))
