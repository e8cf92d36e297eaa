"""Multiple choice: each question comes with choices of its own, one of which is right."""

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.backbones.generation import score_choices
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.metrics.bootstrap import mean
from vl_mtl_lora.metrics.classification import f1, matthews_correlation
from vl_mtl_lora.tasks.base import (
    Answer,
    Reply,
    embed_texts,
    next_token_inputs,
    next_token_loss,
    pictures_of,
    similarity,
)


class MultipleChoice(nn.Module):
    """How a choice is made (`answer_by`):

    ranking:    the likeliest after the question, by mean log-probability per token of the decoder; the default where
                the decoder can, without images only where the base itself was trained to write.
    similarity: the one whose text with the question is most similar to the image; without images, the one most similar
                to the question.

    Zero-shot: the same with adapters off, but by similarity where the base itself was not trained to write.
    Where all samples have the same choices, these are classes: then `metric` may be F1 or Matthews.
    """

    kind = "multiple_choice"
    primary = "accuracy"
    asks = ("question", "choices")
    example = {"question": "what color is the circle in the picture?", "choices": ["red", "dark blue"], "answer": 0,
               "question_id": 0}

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name, self.images = name, section.images
        self.text = backbone.text
        self.primary = section.metric
        writing = "generate" if section.images else "generate_text"
        can_rank = writing in backbone.capabilities and (bool(section.images) or backbone.writes)
        self.answer_by = section.answer_by or ("ranking" if can_rank else "similarity")
        self.needs = frozenset({writing} if self.answer_by == "ranking" else {"embed"})
        self.zero_shot_by_similarity = not backbone.writes and "embed" in backbone.capabilities
        self.prompt = backbone.prompts["vqa"] if section.prompt is None else section.prompt
        self.zero_shot_prompt = section.zero_shot_prompt
        if self.answer_by == "similarity":
            self.log_scale = nn.Parameter(torch.tensor([backbone.log_scale]))

    def _prompts(self, samples):
        return [self.prompt.format(question=s.fields["question"]) for s in samples]

    def _statements(self, samples):
        """The text of each choice of each sample, in a row."""
        form = self.zero_shot_prompt if self.images else "{answer}"
        return [form.format(question=s.fields["question"], answer=choice)
                for s in samples for choice in s.fields["choices"]]

    def collate(self, samples, rng):
        """By similarity: tokens (N, L) of all choices, places (B, C): see `_places`, labels (B,); without images also
        queries (B, L)."""
        if self.answer_by == "ranking":
            return next_token_inputs(self.text, self._prompts(samples),
                                     [s.fields["choices"][s.fields["answer"]] for s in samples], self.images)
        inputs = {"tokens": self.text.rows(self._statements(samples)), "places": _places(samples),
                  "labels": torch.tensor([s.fields["answer"] for s in samples])}
        return inputs if self.images else {**inputs, "queries": self.text.rows([s.fields["question"] for s in samples])}

    def loss(self, backbone, states, inputs):
        if self.answer_by == "ranking":
            return next_token_loss(backbone, states or backbone.no_pictures(len(inputs["tokens"])), inputs)
        query = backbone.encode_image(states) if self.images else backbone.encode_text(inputs["queries"])
        choices = backbone.encode_text(inputs["tokens"])
        return F.cross_entropy(_scores(query, choices, inputs["places"], self.log_scale.exp()), inputs["labels"])

    def predict(self, backbone, states, samples, zero_shot):
        """The number of one choice per sample."""
        if self.answer_by == "ranking" and not (zero_shot and self.zero_shot_by_similarity):
            return score_choices(backbone, states or backbone.no_pictures(len(samples)), self._prompts(samples),
                                 [s.fields["choices"] for s in samples], self.images).argmax(dim=1).tolist()
        if self.images:
            query = backbone.encode_image(states)
        else:
            query = embed_texts(backbone, [s.fields["question"] for s in samples])
        choices = embed_texts(backbone, self._statements(samples))
        return _scores(query, choices, _places(samples).to(query.device)).argmax(dim=1).tolist()

    def reply(self, backbone, states, samples, zero_shot):
        return [Reply(s.fields["choices"][number])
                for s, number in zip(samples, self.predict(backbone, states, samples, zero_shot))]

    def score(self, predictions, samples, thorough=False):
        pictures = pictures_of(samples)
        metrics = {"accuracy": mean(self.quality(predictions, samples), pictures, 100.0)}
        classes = _classes(samples)
        if classes:
            labels = [s.fields["answer"] for s in samples]
            metrics["Matthews"] = matthews_correlation(predictions, labels, pictures)
            if len(classes) == 2:
                metrics["F1"] = f1(predictions, labels, pictures)
        if self.primary not in metrics:
            raise UserError(f"tasks.{self.name}.metric: {self.primary} is of samples that have the same "
                            + ("two " if self.primary == "F1" else "") + "choices; these have not")
        return metrics

    def quality(self, predictions, samples):
        return [float(prediction == s.fields["answer"]) for prediction, s in zip(predictions, samples)]

    def closed(self, predictions, samples):
        classes = _classes(samples)
        return [(classes[s.fields["answer"]], classes[number]) for s, number in zip(samples, predictions)
                ] if classes else []

    def notes(self, samples):
        classes = _classes(samples)
        return [f"{self.name}: F1 is of {classes[1]!r}."] if len(classes) == 2 else []

    def answers(self, predictions, samples, rows):
        return [Answer(samples[i].fields["choices"][predictions[i]], predictions[i] == samples[i].fields["answer"])
                for i in rows]


def _classes(samples) -> tuple[str, ...]:
    """The choices, where they are the same for all samples; else none."""
    found = {tuple(s.fields["choices"]) for s in samples}
    return found.pop() if len(found) == 1 else ()


def _places(samples) -> torch.Tensor:
    """(B, C): where the choices of each sample lie in a row of them all; -1 where a sample has fewer than C."""
    counts = [len(s.fields["choices"]) for s in samples]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return torch.tensor([[start + j if j < count else -1 for j in range(max(counts))]
                         for start, count in zip(starts, counts)])


def _scores(query, choices, places, scale=1.0):
    """(B, C) scaled similarities of queries (B, E) and their own of the choices (N, E); -inf where there is none."""
    own = choices[places.clamp(min=0)]  # (B, C, E)
    # Scaled before it is masked: the slope of a scale at -inf is no number.
    return (scale * similarity(own, query.unsqueeze(2)).squeeze(2)).masked_fill(places < 0, float("-inf"))
