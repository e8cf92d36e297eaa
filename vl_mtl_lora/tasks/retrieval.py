"""Image-text retrieval: contrastive loss within the slice, recall@k both ways."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.metrics.retrieval import retrieval_metrics
from vl_mtl_lora.tasks.base import similarity


class Retrieval(nn.Module):
    """CLIP's loss (arXiv 2103.00020) or SigLIP's (arXiv 2303.15343), by default the one that the base was trained with.

    Pairs of one image, or of one caption, are no negatives of each other.
    Head: `log_scale`, the logarithm of the similarity's scale, starting at the base's or as the config says; with
    SigLIP's loss also `bias`, which is added to the scaled similarity.
    """

    kind = "retrieval"
    images = 1
    needs = frozenset({"embed"})
    primary = "text_to_image_recall@1"
    max_log_scale = math.log(100.0)  # of CLIP's loss
    example = {"captions": ["a photo of a red circle on a blue square in the picture"]}

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        self.contrastive = section.loss or backbone.contrastive
        start = math.log(section.scale) if section.scale else backbone.log_scale
        if self.contrastive == "sigmoid":
            # A base of the other loss has no bias; SigLIP started at this one.
            self.bias = nn.Parameter(torch.tensor(backbone.logit_bias if backbone.contrastive == "sigmoid" else -10.0))
        else:
            start = min(start, self.max_log_scale)
        self.log_scale = nn.Parameter(torch.tensor(start))

    def collate(self, samples, rng):
        """tokens (B, L): a caption of each sample, in every epoch another. positives (B, B): same image or caption."""
        captions = [s.turn(s.fields["captions"]) for s in samples]
        images, texts = (torch.tensor(_numbered(names)) for names in ([s.image_id for s in samples], captions))
        positives = (images[:, None] == images) | (texts[:, None] == texts)
        return {"tokens": self.text.rows(captions), "positives": positives}

    def loss(self, backbone, states, inputs):
        image, text = backbone.encode_image(states), backbone.encode_text(inputs["tokens"])
        if self.contrastive == "sigmoid":
            return sigmoid_loss(image, text, inputs["positives"], self.log_scale.exp(), self.bias)
        with torch.no_grad():  # as CLIP does; a clamp in the loss would leave the parameter without a slope
            self.log_scale.clamp_(max=self.max_log_scale)
        return contrastive_loss(image, text, inputs["positives"], self.log_scale.exp())

    def predict(self, backbone, states, samples, zero_shot):
        """(image embedding (E,), caption embeddings (captions, E)) per sample."""
        captions = [s.fields["captions"] for s in samples]
        text = backbone.encode_text(self.text.rows(sum(captions, [])).to(backbone.device)).float().cpu()
        return list(zip(backbone.encode_image(states).float().cpu(), text.split([len(c) for c in captions])))

    def score(self, predictions, samples):
        return retrieval_metrics(*self._gather(predictions, samples))

    def answers(self, predictions, samples, rows):
        """The nearest caption of each picture."""
        _, _, texts, text_groups = self._gather(predictions, samples)
        captions = [caption for s in samples for caption in s.fields["captions"]]
        groups = _numbered(s.image_id for s in samples)
        nearest = [int((texts @ predictions[i][0]).argmax()) for i in rows]
        return [(captions[text], int(text_groups[text]) == groups[i]) for i, text in zip(rows, nearest)]

    def _gather(self, predictions, samples):
        """Each image once, every caption: (N, E), (N,), (M, E), (M,)."""
        groups = _numbered(s.image_id for s in samples)
        first = {group: i for i, group in reversed(list(enumerate(groups)))}
        rows = sorted(first.values())
        images = torch.stack([predictions[i][0] for i in rows])
        texts = torch.cat([texts for _, texts in predictions])
        text_groups = torch.tensor([group for group, (_, t) in zip(groups, predictions) for _ in range(len(t))])
        return images, torch.tensor([groups[i] for i in rows]), texts, text_groups


def _numbered(names) -> list[int]:
    """Equal names get equal numbers."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, positives: torch.Tensor,
                     scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of (B, E) images and texts; a row's positives (B, B), symmetric, share the probability mass."""
    logits = scale * similarity(image, text.T)
    target = positives.to(logits.dtype)
    target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image: torch.Tensor, text: torch.Tensor, positives: torch.Tensor, scale: torch.Tensor,
                 bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss (arXiv 2303.15343, algorithm 1) of (B, E) images and texts with (B, B) positives."""
    logits = scale * similarity(image, text.T) + bias
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(logits)
