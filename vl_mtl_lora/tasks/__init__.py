"""Task kinds: `KINDS` and `build_tasks`."""

from collections.abc import Mapping

from torch import nn

from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.config import TaskSection
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.tasks.captioning import Captioning
from vl_mtl_lora.tasks.retrieval import Retrieval
from vl_mtl_lora.tasks.vqa import VQA

KINDS = {"retrieval": Retrieval, "vqa": VQA, "captioning": Captioning}


def build_tasks(sections: Mapping[str, TaskSection], backbone: Backbone) -> nn.ModuleDict:
    """One task per section, in order.

    Raises:
        UserError: a task that needs what the backbone cannot do.
    """
    tasks = nn.ModuleDict()
    for name, section in sections.items():
        try:
            tasks[name] = KINDS[section.kind](name, section, backbone)
        except KeyError as error:  # torch has names of its own
            raise UserError(f"tasks.{name}: this name cannot be used: {error}") from error
    for name, task in tasks.items():
        missing = sorted(task.needs - backbone.capabilities)
        if missing:
            raise UserError(f"task {name} needs a backbone that can {' and '.join(missing)}; this one can "
                            f"{', '.join(sorted(backbone.capabilities))}")
    return tasks


def task_needs(tasks: nn.ModuleDict) -> frozenset[str]:
    """The capabilities of a backbone that any of the tasks uses."""
    return frozenset().union(*(task.needs for task in tasks.values()))
