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
    tasks = nn.ModuleDict({name: KINDS[section.kind](name, section, backbone) for name, section in sections.items()})
    for name, task in tasks.items():
        missing = sorted(task.needs - backbone.capabilities)
        if missing:
            raise UserError(f"task {name} needs a backbone that can {' and '.join(missing)}; this one can "
                            f"{', '.join(sorted(backbone.capabilities))}")
    return tasks
