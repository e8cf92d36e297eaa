"""Matching: how well a text fits one image, two images together, or another text; one of some ordered labels."""

from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.backbones.base import wide
from vl_mtl_lora.metrics.classification import concordance, spearman, topk_accuracy
from vl_mtl_lora.tasks.base import Answer, Reply, embed_texts, pictures_of, similarity


class Matching(nn.Module):
    """A linear head on the embeddings of both sides and their products, trained by cross-entropy over the labels.

    Labels are ordered from the least to the best match. The score of a sample is the mean of their numbers under the
    head's probabilities; zero-shot the cosine of both sides, of two images the mean of both cosines.
    Zero-shot labels are the scores cut into as many equal parts as there are labels, over the whole evaluation: a
    cosine has no threshold of its own.
    """

    kind = "matching"
    needs = frozenset({"embed"})
    primary = "accuracy"

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name, self.images = name, section.images
        self.text = backbone.text
        self.primary, self.labels = section.metric, list(section.labels)
        self.numbers = {label: i for i, label in enumerate(self.labels)}
        self.asks = ("text",) if self.images else ("text", "text_pair")
        self.example = {"text": "there is a red circle", "text_pair": "the circle is blue", "label": self.labels[0]}
        parts = 1 + (self.images or 1)
        self.head = nn.Linear((parts + parts * (parts - 1) // 2) * backbone.embed_dim, len(self.labels))

    def _texts(self, samples):
        """Without an image both texts of each sample, in a row."""
        return [s.fields[name] for s in samples for name in (("text",) if self.images else ("text", "text_pair"))]

    def collate(self, samples, rng):
        """tokens (B, L), without images (2 B, L). labels (B,)."""
        return {"tokens": self.text.rows(self._texts(samples)),
                "labels": torch.tensor([self.numbers[s.fields["label"]] for s in samples])}

    def loss(self, backbone, states, inputs):
        parts = self._parts(backbone, states, backbone.encode_text(inputs["tokens"]))
        return F.cross_entropy(self._logits(parts), inputs["labels"])

    def _parts(self, backbone, states, text):
        """(B, P, E): the embeddings of a sample's images and texts."""
        if not self.images:
            return text.unflatten(0, (-1, 2))
        image = backbone.encode_image(states).unflatten(0, (-1, self.images))
        return torch.cat([image, text.unsqueeze(1)], dim=1)

    def _logits(self, parts):
        # Unit vectors have entries of about E^-1/2; the scale makes them, and their products, of order one.
        parts = wide(parts) * parts.shape[-1] ** 0.5
        products = [parts[:, i] * parts[:, j] for i, j in combinations(range(parts.shape[1]), 2)]
        return self.head(torch.cat([*parts.unbind(1), *products], dim=-1))

    def predict(self, backbone, states, samples, zero_shot):
        """(score, number of the label) per sample; zero-shot the label is None until all scores are known."""
        parts = self._parts(backbone, states, embed_texts(backbone, self._texts(samples)))
        if zero_shot:
            return [(score, None) for score in _cosines(parts).tolist()]
        likely = self._logits(parts).softmax(dim=-1)
        scores = likely @ torch.arange(len(self.labels), dtype=likely.dtype, device=likely.device)
        return list(zip(scores.tolist(), likely.argmax(dim=-1).tolist()))

    def reply(self, backbone, states, samples, zero_shot):
        """The labels with their probabilities; zero-shot the cosine, which is no label yet."""
        parts = self._parts(backbone, states, embed_texts(backbone, self._texts(samples)))
        if zero_shot:
            return [Reply(f"cosine {score:.3f}", (("cosine", score),)) for score in _cosines(parts).tolist()]
        ranked = [sorted(zip(self.labels, row), key=lambda pair: -pair[1])
                  for row in self._logits(parts).softmax(dim=-1).tolist()]
        return [Reply(row[0][0], tuple(row)) for row in ranked]

    def _chosen(self, predictions):
        """The number of the label of each prediction."""
        if any(number is not None for _, number in predictions):
            return [number for _, number in predictions]
        ranks = np.argsort(np.argsort([score for score, _ in predictions], kind="stable"), kind="stable")
        return (ranks * len(self.labels) // len(predictions)).tolist()

    def score(self, predictions, samples, thorough=False):
        labels, pictures = [self.numbers[s.fields["label"]] for s in samples], pictures_of(samples)
        metrics = {"accuracy": topk_accuracy([[number] for number in self._chosen(predictions)], labels, 1, pictures)}
        scores = [score for score, _ in predictions]
        truths = [s.fields.get("score", label) for s, label in zip(samples, labels)]
        if len(set(labels)) > 1 or self.primary == "AUC":  # else there is nothing to put in order
            metrics["AUC"] = concordance(scores, labels, pictures)
        if len(set(truths)) > 2 or self.primary == "Spearman":  # of two it says what AUC says
            metrics["Spearman"] = spearman(scores, truths, pictures)
        return metrics

    def quality(self, predictions, samples):
        return [float(number == self.numbers[s.fields["label"]])
                for number, s in zip(self._chosen(predictions), samples)]

    def closed(self, predictions, samples):
        return [(s.fields["label"], self.labels[number]) for number, s in zip(self._chosen(predictions), samples)]

    def notes(self, samples):
        return [f"{self.name}: AUC, in per cent, is the share of pairs of different labels that the score puts in the "
                "right order; Spearman's correlation is with the samples' own scores, or else the labels' numbers; "
                "zero-shot labels are the cosines cut into equal parts."]

    def answers(self, predictions, samples, rows):
        chosen = self._chosen(predictions)
        return [Answer(self.labels[chosen[i]], self.labels[chosen[i]] == samples[i].fields["label"]) for i in rows]


def _cosines(parts):
    """(B, P, E) -> (B,): of the last part, a text, with the others, on average."""
    *others, last = parts.unbind(1)
    cosines = [similarity(other.unsqueeze(1), last.unsqueeze(2)).flatten() for other in others]
    return torch.stack(cosines).mean(dim=0)
