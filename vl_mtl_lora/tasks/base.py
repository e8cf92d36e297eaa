"""What a task is: one file holds its prompt, loss, prediction and metric."""

import random
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vl_mtl_lora.backbones.base import Backbone, ImageStates, TextCodec
from vl_mtl_lora.backbones.generation import pad_ids
from vl_mtl_lora.data.shards import Sample


class Task(Protocol):
    """Tasks are `nn.Module`s that follow this protocol; their parameters are the task's head.

    name: the tag. kind: the key in `tasks.KINDS`. needs: capabilities the backbone must have.
    primary: the metric that stands for the task, higher is better.
    """

    name: str
    kind: str
    needs: frozenset[str]
    primary: str

    def collate(self, samples: Sequence[Sample], rng: random.Random) -> dict[str, Tensor]:
        """Samples of a training slice -> the tensors that `loss` reads. Runs in loader processes."""

    def loss(self, backbone: Backbone, states: ImageStates, inputs: dict[str, Tensor]) -> Tensor:
        """Scalar loss of a slice. Runs under a route that holds the task for any number of text rows."""

    def predict(self, backbone: Backbone, states: ImageStates, samples: Sequence[Sample], zero_shot: bool) -> list[Any]:
        """One prediction per sample. `zero_shot`: answer as the base alone would, without the task's head."""

    def score(self, predictions: Sequence[Any], samples: Sequence[Sample]) -> dict[str, float]:
        """Metrics over a whole evaluation."""

    def answers(self, predictions: Sequence[Any], samples: Sequence[Sample],
                rows: Sequence[int]) -> list[tuple[str, bool]]:
        """(what the model said, whether it counts as right) of some rows, for people to read."""


def text_rows(text: TextCodec, texts: Sequence[str]) -> Tensor:
    """Texts -> (B, longest) token ids with marks: what `encode_text` reads, without the library's padding.

    The text tower is causal and pools at the end mark, so columns after the last mark change nothing but the cost.
    """
    return pad_ids([[text.bos_id, *ids, text.eos_id] for ids in text.ids(texts)])


def next_token_inputs(text: TextCodec, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, Tensor]:
    """Prompts and what shall follow -> inputs of a next-token loss on the targets and the end mark alone.

    Returns:
        tokens (B, L): begin mark, prompt, target. positions (K,): flat indices into (B, L) after which a supervised
        token comes. labels (K,): those tokens. Known on the host, so that the loss asks the device for no shape.
    """
    rows, positions, labels = [], [], []
    pairs = list(zip(text.ids(prompts), text.ids(targets)))
    limit = text.context_length
    for prompt, target in pairs:
        target = [*target, text.eos_id]
        target = target[-(limit - 1):]
        prompt = prompt[:limit - 1 - len(target)]
        rows.append([text.bos_id, *prompt, *target])
    width = max(map(len, rows)) - 1  # the last token is only predicted
    for i, (row, (_, target)) in enumerate(zip(rows, pairs)):
        first = max(1, len(row) - len(target) - 1)  # the end mark follows the target
        positions += range(i * width + first - 1, i * width + len(row) - 1)
        labels += row[first:]
    return {"tokens": pad_ids([row[:-1] for row in rows]), "positions": torch.tensor(positions),
            "labels": torch.tensor(labels)}


def next_token_loss(backbone: Backbone, states: ImageStates, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the supervised tokens of `next_token_inputs`."""
    x = backbone.token_states(states, inputs["tokens"])
    logits = backbone.logits(x.flatten(0, 1)[inputs["positions"]])
    return torch.nn.functional.cross_entropy(logits.float(), inputs["labels"])
