"""What `bench` compares: the frozen model, ours, and PEFT's adapters, all on the very same frozen weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vl_mtl_lora.attention import CrossAttention, SplitAttention
from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.layer import MTLLoRALinear
from vl_mtl_lora.lora import AdapterConfig, AdapterSummary, inject
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.routing import TaskRouter
from vl_mtl_lora.sections import RunConfig
from vl_mtl_lora.tasks import build_tasks, task_needs


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy that holds the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _model(backbone: Backbone, config: RunConfig, router: TaskRouter) -> MultiTaskModel:
    return MultiTaskModel(backbone, router, build_tasks(config.tasks, backbone).to(backbone.device), AdapterSummary())


def frozen_model(backbone: Backbone, config: RunConfig) -> MultiTaskModel:
    """No adapter, and gradients that flow through every block down to the embeddings."""
    backbone = _shared_copy(backbone)

    def require_gradient(block, args, kwargs):
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()

    for block in backbone.blocks():
        block.register_forward_pre_hook(require_gradient, with_kwargs=True)
    return _model(backbone, config, TaskRouter(list(config.tasks)))


def our_model(backbone: Backbone, config: RunConfig, tasks: int | None = None, **changes) -> MultiTaskModel:
    """MTL-LoRA with the config's adapters, or with changed ones; `tasks`: so many instead of the config's."""
    names = list(config.tasks) if tasks is None else [f"task{i}" for i in range(tasks)]
    model = _model(_shared_copy(backbone), config, TaskRouter(names))
    settings = AdapterConfig(**{**config.adapter.model_dump(), **changes})
    model.summary = inject(model.backbone, settings, model.router, task_needs(model.tasks))
    with torch.no_grad():  # zeros might be multiplied faster than what training makes of them
        for parameter in model.adapter_state().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def merged_model(model: MultiTaskModel, config: RunConfig) -> MultiTaskModel:
    """The first task folded into plain linear layers."""
    backbone = _shared_copy(model.backbone)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, MTLLoRALinear):
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, module.merged(0))
    return _model(backbone, config, model.router)


def _peft(backbone: Backbone, config: RunConfig, settings: Callable) -> tuple[MultiTaskModel, dict[str, str]]:
    """PEFT's adapters on the layers that ours sit on, and the tower of each by its name.

    settings: (peft, names of the layers) -> PEFT's config.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("peft is missing: pip install 'vl_mtl_lora[bench]'") from error
    with_ours = our_model(backbone, config).backbone
    if any(isinstance(module, SplitAttention | CrossAttention) for module in with_ours.modules()):
        raise UserError("this model's attention is no linear layers of its own, which PEFT does not adapt rightly")
    towers = {name: layer.tower for name, layer in with_ours.named_modules() if isinstance(layer, MTLLoRALinear)}
    model = _model(_shared_copy(backbone), config, TaskRouter(list(config.tasks)))
    model.backbone.express()
    peft.inject_adapter_in_model(settings(peft, list(towers)), model.backbone)
    return model, towers


def peft_lora_model(backbone: Backbone, config: RunConfig) -> MultiTaskModel:
    """One LoRA for all tasks."""
    adapter = config.adapter
    return _peft(backbone, config, lambda peft, names: peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=names))[0]


def peft_poly_model(backbone: Backbone, config: RunConfig) -> MultiTaskModel:
    """Poly, the adapter of PEFT that routes rows by task; each layer is told the ids that the router holds."""
    model, towers = _peft(backbone, config, lambda peft, names: peft.PolyConfig(
        r=config.adapter.rank, n_tasks=len(config.tasks), n_skills=config.adapter.num_up, target_modules=names))

    def telling(tower):
        def hook(layer, args, kwargs):
            route = model.router.route(tower)
            ids = torch.full((len(args[0]),), route.task) if route.ids is None else route.ids
            return args, {**kwargs, "task_ids": ids}
        return hook

    for name, tower in towers.items():
        model.backbone.get_submodule(name).register_forward_pre_hook(telling(tower), with_kwargs=True)
    return model
