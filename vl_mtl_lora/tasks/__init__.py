"""Task kinds: `KINDS` and `build_tasks`."""

from collections.abc import Mapping

from torch import nn

from vl_mtl_lora.backbones.base import Backbone
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.sections import TaskSection
from vl_mtl_lora.tasks.captioning import Captioning
from vl_mtl_lora.tasks.classification import Classification
from vl_mtl_lora.tasks.matching import Matching
from vl_mtl_lora.tasks.multiple_choice import MultipleChoice
from vl_mtl_lora.tasks.retrieval import Retrieval
from vl_mtl_lora.tasks.vqa import VQA

KINDS = {"retrieval": Retrieval, "vqa": VQA, "captioning": Captioning, "classification": Classification,
         "multiple_choice": MultipleChoice, "matching": Matching}


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
    """The capabilities of a backbone that any of the tasks uses, and "images" where any has pictures."""
    images = {"images"} if any(task.images for task in tasks.values()) else set()
    return frozenset(images).union(*(task.needs for task in tasks.values()))
