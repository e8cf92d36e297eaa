"""What a task is: one file holds its prompt, loss, prediction and metric."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vl_mtl_lora.backbones.base import Backbone, ImageStates, TextCodec
from vl_mtl_lora.backbones.generation import pad_ids
from vl_mtl_lora.data.schema import Sample


class Task(Protocol):
    """Tasks are `nn.Module`s that follow this protocol; their parameters are the task's head.

    name: the tag. kind: the key in `tasks.KINDS`. needs: capabilities the backbone must have.
    images: of each sample; without any, `states` are None, with several a sample's states follow each other.
    primary: the metric that stands for the task, higher is better.
    example: fields of a sample, for a dry run.
    """

    name: str
    kind: str
    needs: frozenset[str]
    images: int
    primary: str
    example: Mapping[str, Any]

    def collate(self, samples: Sequence[Sample], rng: random.Random) -> dict[str, Tensor]:
        """Samples of a training slice -> the tensors that `loss` reads. Runs in loader processes."""

    def loss(self, backbone: Backbone, states: ImageStates | None, inputs: dict[str, Tensor]) -> Tensor:
        """Scalar loss of a slice. Runs under a route that holds the task for any number of text rows."""

    def predict(self, backbone: Backbone, states: ImageStates | None, samples: Sequence[Sample],
                zero_shot: bool) -> list[Any]:
        """One prediction per sample. `zero_shot`: answer as the base alone would, without the task's head."""

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics over a whole evaluation."""

    def answers(self, predictions: Sequence[Any], samples: Sequence[Sample],
                rows: Sequence[int]) -> list[tuple[str, bool]]:
        """(what the model said, whether it counts as right) of some rows, for people to read."""


def next_token_inputs(text: TextCodec, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """Prompts and what shall follow -> inputs of a next-token loss on the targets and the end mark alone.

    Returns:
        tokens (B, L): prompt, target. positions (K,): flat indices into (B, L) after which a supervised token comes.
        labels (K,): those tokens. Known on the host, so that the loss asks the device for no shape.
    """
    ends = [[*ids[:text.context_length - 2], text.eos_id] for ids in text.ids(targets)]
    starts = text.prompts(prompts, [len(end) for end in ends])
    rows = [[*start, *end[:-1]] for start, end in zip(starts, ends)]  # the end mark is only predicted
    width = max(map(len, rows))
    positions = [i * width + j for i, (start, row) in enumerate(zip(starts, rows))
                 for j in range(len(start) - 1, len(row))]
    return {"tokens": pad_ids(rows, text.pad_id), "positions": torch.tensor(positions),
            "labels": torch.tensor([token for end in ends for token in end])}


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of unit vectors in float32, also under autocast: in bf16 near ones would be equal."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def next_token_loss(backbone: Backbone, states: ImageStates, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the supervised tokens of `next_token_inputs`."""
    x = backbone.token_states(states, inputs["tokens"])
    logits = backbone.logits(x.flatten(0, 1)[inputs["positions"]])
    return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"])
