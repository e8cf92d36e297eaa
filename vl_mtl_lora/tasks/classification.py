"""Classification by the text tower: the class whose description is most similar to the image, or to the text."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.metrics.classification import mean_per_class_accuracy, topk_accuracy
from vl_mtl_lora.tasks.base import Answer, Kept, Reply, embed_texts, pictures_of, similarity

_BEST = 5  # classes kept of each prediction


class Classification(nn.Module):
    """CLIP's zero-shot classifier (arXiv 2103.00020, section 3.1), and the same with adapters in both towers.

    A class is the normalised mean of its templates' embeddings. Trained by cross-entropy among the classes of a batch
    and others drawn at random, `negatives` in all, each described by one template.
    Head: `log_scale`, the logarithm of the similarities' scale.
    """

    kind = "classification"
    needs = frozenset({"embed"})
    primary = "accuracy@1"

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name, self.images = name, section.images
        self.text = backbone.text
        self.classes, self.templates, self.negatives = list(section.labels), list(section.templates), section.negatives
        self.numbers = {label: i for i, label in enumerate(self.classes)}
        self.asks = () if self.images else ("text",)
        self.example = {"label": self.classes[0], "text": "a picture of something red"}
        self.log_scale = nn.Parameter(torch.tensor([backbone.log_scale]))
        self.kept = Kept()

    def collate(self, samples, rng):
        """tokens (C, L): a description of each class to choose among. labels (B,): which of them is right. Without
        images also queries (B, L)."""
        own = list(dict.fromkeys(s.fields["label"] for s in samples))
        others = [label for label in self.classes if label not in set(own)]
        classes = own + rng.sample(others, min(len(others), max(0, self.negatives - len(own))))
        place = {label: i for i, label in enumerate(classes)}
        inputs = {"tokens": self.text.rows([rng.choice(self.templates).format(label=label) for label in classes]),
                  "labels": torch.tensor([place[s.fields["label"]] for s in samples])}
        return inputs if self.images else {**inputs, "queries": self.text.rows([s.fields["text"] for s in samples])}

    def loss(self, backbone, states, inputs):
        classes = backbone.encode_text(inputs["tokens"])
        query = backbone.encode_image(states) if self.images else backbone.encode_text(inputs["queries"])
        return F.cross_entropy(self.log_scale.exp() * similarity(query, classes.T), inputs["labels"])

    def predict(self, backbone, states, samples, zero_shot):
        """The numbers of the five likeliest classes of each sample, best first."""
        return self._best(self._similarities(backbone, states, samples, zero_shot)).indices.tolist()

    def reply(self, backbone, states, samples, zero_shot):
        """The likeliest classes with their probabilities among all; zero-shot by the base's own scale."""
        scale = math.exp(backbone.log_scale) if zero_shot else self.log_scale.exp()
        best = self._best((scale * self._similarities(backbone, states, samples, zero_shot)).softmax(dim=1))
        return [Reply(self.classes[numbers[0]], tuple((self.classes[i], p) for i, p in zip(numbers, likely)))
                for numbers, likely in zip(best.indices.tolist(), best.values.tolist())]

    def _similarities(self, backbone, states, samples, zero_shot):
        """(B, classes)"""
        classes = self.kept((zero_shot, "classes"), lambda: self._class_embeddings(backbone))
        if self.images:
            query = backbone.encode_image(states)
        else:
            query = embed_texts(backbone, [s.fields["text"] for s in samples])
        return similarity(query, classes.T)

    def _best(self, scores):
        return scores.topk(min(_BEST, len(self.classes)), dim=1)

    def _class_embeddings(self, backbone):
        texts = [template.format(label=label) for label in self.classes for template in self.templates]
        return F.normalize(embed_texts(backbone, texts).unflatten(0, (len(self.classes), -1)).mean(dim=1), dim=-1)

    def score(self, predictions, samples, thorough=False):
        labels, pictures = [self.numbers[s.fields["label"]] for s in samples], pictures_of(samples)
        metrics = {f"accuracy@{k}": topk_accuracy(predictions, labels, k, pictures)
                   for k in (1, _BEST) if k < len(self.classes)}  # five of five are always right
        chosen = [best for best, *_ in predictions]
        return {**metrics, "mean_per_class": mean_per_class_accuracy(chosen, labels, pictures)}

    def quality(self, predictions, samples):
        return [float(best == self.numbers[s.fields["label"]]) for (best, *_), s in zip(predictions, samples)]

    def closed(self, predictions, samples):
        return [(s.fields["label"], self.classes[best]) for (best, *_), s in zip(predictions, samples)]

    def notes(self, samples):
        return [f"{self.name}: each of {len(self.classes)} classes is the normalised mean of {len(self.templates)} "
                "templates' embeddings, as in CLIP_benchmark."]

    def answers(self, predictions, samples, rows):
        said = [self.classes[predictions[i][0]] for i in rows]
        return [Answer(label, label == samples[i].fields["label"]) for label, i in zip(said, rows)]
