"""Image-text retrieval: contrastive loss within the slice, recall and ranks both ways."""

import math
from collections.abc import Iterable
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vl_mtl_lora.metrics.retrieval import retrieval_metrics, search
from vl_mtl_lora.ranks import joined
from vl_mtl_lora.tasks.base import Answer, Reply, pictures_of, similarity

_SHOWN = 5  # of the pictures found
_CHUNK = 8192  # texts that the sigmoid loss holds against its images at once


class Retrieval(nn.Module):
    """CLIP's loss (arXiv 2103.00020) or SigLIP's (arXiv 2303.15343), by default the one that the base was trained with.

    Pairs of one image, or of one caption, are no negatives of each other. With several processes the negatives are
    those of all of them.
    Head: `log_scale`, the logarithm of the similarity's scale, starting at the base's or as the config says; with
    SigLIP's loss also `bias`, which is added to the scaled similarity.
    """

    kind = "retrieval"
    images = 1
    needs = frozenset({"embed"})
    primary = "text_to_image_recall@1"
    asks = ("captions",)
    max_log_scale = math.log(100.0)  # of CLIP's loss
    example = {"captions": ["a photo of a red circle on a blue square in the picture"]}

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        self.faiss_from = section.faiss_from
        self.contrastive = section.loss or backbone.contrastive
        start = math.log(section.scale) if section.scale else backbone.log_scale
        if self.contrastive == "sigmoid":
            # A base of the other loss has no bias; SigLIP started at this one.
            bias = backbone.logit_bias if backbone.contrastive == "sigmoid" else -10.0
            self.bias = nn.Parameter(torch.tensor([bias]))
        else:
            start = min(start, self.max_log_scale)
        self.log_scale = nn.Parameter(torch.tensor([start]))

    def collate(self, samples, rng):
        """tokens (B, L): a caption of each sample, in every epoch another. names (B, 2): numbers of the image and the
        caption, equal where they are, in whatever process."""
        captions = [s.turn(s.fields["captions"]) for s in samples]
        names = torch.stack([_numbers(s.image_id for s in samples), _numbers(captions)], dim=1)
        return {"tokens": self.text.rows(captions), "names": names}

    def loss(self, backbone, states, inputs):
        image, text = backbone.encode_image(states), backbone.encode_text(inputs["tokens"])
        if self.contrastive == "sigmoid":
            return sigmoid_loss(image, text, inputs["names"], self.log_scale.exp(), self.bias)
        with torch.no_grad():  # as CLIP does; a clamp in the loss would leave the parameter without a slope
            self.log_scale.clamp_(max=self.max_log_scale)
        return contrastive_loss(image, text, inputs["names"], self.log_scale.exp())

    def predict(self, backbone, states, samples, zero_shot):
        """(image embedding (E,), caption embeddings (captions, E)) per sample."""
        captions = [s.fields["captions"] for s in samples]
        text = backbone.encode_text(self.text.rows(sum(captions, [])).to(backbone.device)).float().cpu()
        return list(zip(backbone.encode_image(states).float().cpu(), text.split([len(c) for c in captions])))

    def reply(self, backbone, states, samples, zero_shot):
        """The texts by their cosine with the picture."""
        replies = []
        for s, (image, texts) in zip(samples, self.predict(backbone, states, samples, zero_shot)):
            ranked = sorted(zip(s.fields["captions"], (texts @ image).tolist()), key=lambda pair: -pair[1])
            replies.append(Reply(ranked[0][0], tuple(ranked)))
        return replies

    def score(self, predictions, samples, thorough=False):
        images, image_groups, texts, text_groups = self.gather(predictions, samples)
        return retrieval_metrics(images, image_groups, texts, text_groups, self.faiss_from)

    def quality(self, predictions, samples):
        """One over the rank of the sample's picture among all, for its first caption."""
        images, image_groups, _, _ = self.gather(predictions, samples)
        queries = torch.stack([texts[0] for _, texts in predictions]).to(images.device)
        ranking = search(queries, images, torch.tensor(pictures_of(samples)), image_groups, ks=())
        return (1 / ranking.first).tolist()

    def closed(self, predictions, samples):
        return []

    def notes(self, samples):
        return [f"{self.name}: recall@k is the share of queries with a right answer among the k nearest, as in "
                "CLIP_benchmark; in ranks, mAP and nDCG a wrong item of the same score counts as half ahead."]

    def answers(self, predictions, samples, rows):
        """The pictures nearest to each sample's first caption."""
        images, image_groups, _, _ = self.gather(predictions, samples)
        groups = pictures_of(samples)
        first = {group: i for i, group in reversed(list(enumerate(groups)))}  # the row that shows the picture
        out = []
        for i in rows:
            scores = images @ predictions[i][1][0].to(images.device)
            rank = 1 + int((scores > scores[image_groups == groups[i]].max()).sum())
            nearest = [int(image_groups[j]) for j in scores.topk(min(_SHOWN, len(images))).indices.tolist()]
            out.append(Answer(f"picture at rank {rank}", nearest[0] == groups[i],
                              tuple((first[group], group == groups[i]) for group in nearest)))
        return out

    def gather(self, predictions, samples):
        """Each image once, every caption, on the model's device: (N, E), (N,), (M, E), (M,)."""
        groups, device = pictures_of(samples), self.log_scale.device
        first = {group: i for i, group in reversed(list(enumerate(groups)))}
        rows = sorted(first.values())
        images = torch.stack([predictions[i][0] for i in rows])
        texts = torch.cat([texts for _, texts in predictions])
        text_groups = torch.tensor([group for group, (_, t) in zip(groups, predictions) for _ in range(len(t))])
        parts = images, torch.tensor([groups[i] for i in rows]), texts, text_groups
        return tuple(part.to(device) for part in parts)


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, names: torch.Tensor,
                     scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of (B, E) images and texts, each against those of all processes; the processes' mean is the
    loss of the joined batch. A row's positives, those with one of its (B, 2) names, share the probability mass."""
    target = _positives(names, joined(names)).to(image.dtype)  # (B, all)
    target = target / target.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(scale * similarity(image, joined(text).T), target)
    return (to_text + F.cross_entropy(scale * similarity(text, joined(image).T), target)) / 2


def sigmoid_loss(image: torch.Tensor, text: torch.Tensor, names: torch.Tensor, scale: torch.Tensor,
                 bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss (arXiv 2303.15343, algorithm 1) of (B, E) images and texts with (B, 2) names, as above.

    A process's images are held against the texts of all, in chunks whose logits are computed again in the backward
    pass, so that memory does not grow with the number of processes.
    """
    def part(texts, their_names):
        logits = scale * similarity(image, texts.T) + bias
        return -F.logsigmoid(torch.where(_positives(names, their_names), logits, -logits)).sum()

    chunks = zip(joined(text).split(_CHUNK), joined(names).split(_CHUNK))
    return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks) / len(image)


def _positives(names: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B, M): which of (M, 2) names have the image or the caption of each of (B, 2)."""
    return (names.unsqueeze(1) == others).any(dim=-1)


def _numbers(names: Iterable) -> torch.Tensor:
    """A 64-bit number of each name; by chance two of a batch of 100,000 agree about once in four thousand million."""
    digests = [blake2b(repr(name).encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
