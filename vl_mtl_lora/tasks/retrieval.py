"""Image-text retrieval: symmetric contrastive loss within the slice, recall@k both ways."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.metrics.retrieval import retrieval_metrics
from vl_mtl_lora.tasks.base import text_rows


class Retrieval(nn.Module):
    """CLIP's loss (arXiv 2103.00020); pairs of one image, or of one caption, are no negatives of each other.

    Head: `log_scale`, the logarithm of the similarity's scale, starting at the base's or as the config says.
    """

    kind = "retrieval"
    needs = frozenset({"embed"})
    primary = "text_to_image_recall@1"
    max_log_scale = math.log(100.0)

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        start = math.log(section.scale) if section.scale else backbone.log_scale
        self.log_scale = nn.Parameter(torch.tensor(min(start, self.max_log_scale)))

    def collate(self, samples, rng):
        """tokens (B, L): one caption of each sample, drawn anew. positives (B, B): same image, or same caption."""
        captions = [rng.choice(s.fields["captions"]) for s in samples]
        positives = [[a.image_id == b.image_id or x == y for b, y in zip(samples, captions)]
                     for a, x in zip(samples, captions)]
        return {"tokens": text_rows(self.text, captions), "positives": torch.tensor(positives)}

    def loss(self, backbone, states, inputs):
        with torch.no_grad():  # as CLIP does; a clamp in the loss would leave the parameter without a slope
            self.log_scale.clamp_(max=self.max_log_scale)
        return contrastive_loss(states.embedding, backbone.encode_text(inputs["tokens"]), inputs["positives"],
                                self.log_scale.exp())

    def predict(self, backbone, states, samples, zero_shot):
        """(image embedding (E,), caption embeddings (captions, E)) per sample."""
        captions = [s.fields["captions"] for s in samples]
        text = backbone.encode_text(text_rows(self.text, sum(captions, [])).to(backbone.device)).float().cpu()
        return list(zip(states.embedding.float().cpu(), text.split([len(c) for c in captions])))

    def score(self, predictions, samples):
        return retrieval_metrics(*self._gather(predictions, samples))

    def answers(self, predictions, samples, rows):
        """The nearest caption of each picture."""
        _, _, texts, text_groups = self._gather(predictions, samples)
        captions = [caption for s in samples for caption in s.fields["captions"]]
        groups = self._groups(samples)
        nearest = [int((texts @ predictions[i][0]).argmax()) for i in rows]
        return [(captions[text], int(text_groups[text]) == groups[i]) for i, text in zip(rows, nearest)]

    @staticmethod
    def _groups(samples) -> list[int]:
        ids: dict[str, int] = {}
        return [ids.setdefault(s.image_id, len(ids)) for s in samples]

    def _gather(self, predictions, samples):
        """Each image once, every caption: (N, E), (N,), (M, E), (M,)."""
        groups = self._groups(samples)
        first = {group: i for i, group in reversed(list(enumerate(groups)))}
        rows = sorted(first.values())
        images = torch.stack([predictions[i][0] for i in rows])
        texts = torch.cat([texts for _, texts in predictions])
        text_groups = torch.tensor([group for group, (_, t) in zip(groups, predictions) for _ in range(len(t))])
        return images, torch.tensor([groups[i] for i in rows]), texts, text_groups


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, positives: torch.Tensor,
                     scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of (B, E) images and texts; a row's positives (B, B), symmetric, share the probability mass."""
    logits = scale * (image @ text.T).float()
    target = positives.to(logits.dtype)
    target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
