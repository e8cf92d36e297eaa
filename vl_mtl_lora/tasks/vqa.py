"""Visual question answering: the answer follows the question in the decoder, or comes from a closed list."""

import random
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.backbones.base import wide
from vl_mtl_lora.backbones.generation import score_continuations
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.metrics.bootstrap import mean
from vl_mtl_lora.metrics.vqa import vqa_accuracy
from vl_mtl_lora.ranks import shared_mean
from vl_mtl_lora.tasks.base import (
    Answer,
    Kept,
    Reply,
    embed_texts,
    next_token_inputs,
    next_token_loss,
    pictures_of,
    similarity,
)

_CHOICES = 8  # answers that a question is trained to choose among, where its text is ranked


class VQA(nn.Module):
    """How a question is answered (`answer_by`):

    ranking:        the likeliest of a closed list after the prompt, by mean log-probability per token; with a
                    backbone that cannot write, the one whose text with the question is most similar to the image.
    generation:     what the decoder writes after the prompt.
    classification: a linear head over a closed list, on the image's and the question's embedding and their product.

    Zero-shot: as above with adapters off where the base itself can write. A CLIP cannot: with a closed list, the answer
    whose text, put into `zero_shot_prompt`, is most similar to the image; without, what it writes after the prompt.
    """

    kind = "vqa"
    images = 1
    asks = ("question",)
    primary = "accuracy"

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        self.answer_list = list(section.answers)
        self.answer_by = section.answer_by or ("ranking" if section.answers else "generation")
        if self.answer_by == "ranking" and "generate" not in backbone.capabilities:
            self.answer_by = "similarity"
        self.prompt = backbone.prompts["vqa"] if section.prompt is None else section.prompt
        self.zero_shot_prompt = section.zero_shot_prompt
        self.max_new_tokens, self.rule = section.max_new_tokens, section.metric
        self.needs = frozenset({"embed"} if self.answer_by in ("classification", "similarity") else {"generate"})
        self.zero_shot_by_similarity = bool(section.answers) and not backbone.writes
        self.example = {"question": "what color is the circle in the picture?",
                        "answers": self.answer_list[:1] or ["red"], "question_id": 0}
        if self.answer_list and self.needs == {"generate"}:
            empty = [answer for answer, ids in zip(self.answer_list, self.text.ids(self.answer_list)) if not ids]
            if empty:
                raise UserError(f"tasks.{name}.answers: {empty[0]!r} has no token in this backbone's vocabulary")
        self.kept = Kept()
        if self.answer_by == "classification":
            width = backbone.embed_dim
            self.classifier = nn.Linear(3 * width, len(self.answer_list))
        if self.answer_by == "similarity":
            self.log_scale = nn.Parameter(torch.tensor([backbone.log_scale]))

    def _prompts(self, samples):
        return [self.prompt.format(question=s.fields["question"]) for s in samples]

    def _statements(self, question, answers):
        return [self.zero_shot_prompt.format(question=question, answer=answer) for answer in answers]

    def collate(self, samples, rng):
        """Of several human answers each epoch takes another: the loss sees them as often as people gave them."""
        answers = [s.turn(s.fields["answers"]) for s in samples]
        questions = [s.fields["question"] for s in samples]
        if self.answer_by == "classification":
            index = {answer: i for i, answer in enumerate(self.answer_list)}
            return {"tokens": self.text.rows(questions),
                    "labels": torch.tensor([index.get(answer, -100) for answer in answers])}
        if self.answer_by == "similarity":
            return self._choices(questions, answers, rng)
        return next_token_inputs(self.text, self._prompts(samples), answers)

    def _choices(self, questions, answers, rng: random.Random):
        """Each question with its answer first and others of the list, as texts (B * C, L); answers outside the list
        stand among them too."""
        count = min(_CHOICES, len(self.answer_list))
        texts = []
        for question, answer in zip(questions, answers):
            others = [other for other in self.answer_list if other != answer]
            texts += self._statements(question, [answer, *rng.sample(others, count - 1)])
        return {"tokens": self.text.rows(texts)}

    def loss(self, backbone, states, inputs):
        if self.answer_by == "similarity":
            image = backbone.encode_image(states)
            texts = backbone.encode_text(inputs["tokens"]).unflatten(0, (len(image), -1))  # (B, C, E)
            logits = self.log_scale.exp() * similarity(texts, image.unsqueeze(2)).squeeze(2)
            return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        if self.answer_by != "classification":
            return next_token_loss(backbone, states, inputs)
        total = F.cross_entropy(self._classify(backbone, states, inputs["tokens"]), inputs["labels"], reduction="sum")
        return shared_mean(total, (inputs["labels"] >= 0).sum())  # answers outside the list are ignored

    def _classify(self, backbone, states, tokens):
        """(B, answers) logits from (B, L) question tokens."""
        question, image = backbone.encode_text(tokens), backbone.encode_image(states)
        # Unit vectors have entries of about E^-1/2; the scale makes them of order one.
        features = torch.cat([image, question, image * question * image.shape[1] ** 0.5], dim=-1)
        return self.classifier(wide(features) * image.shape[1] ** 0.5)

    def predict(self, backbone, states, samples, zero_shot):
        """One answer text per sample."""
        if self.answer_by == "similarity" or zero_shot and self.zero_shot_by_similarity:
            return self._most_similar(backbone, states, samples, zero_shot)
        by = "ranking" if zero_shot and self.answer_list else "generation" if zero_shot else self.answer_by
        if by == "generation":
            return backbone.generate(states, self._prompts(samples), max_new_tokens=self.max_new_tokens)
        if by == "ranking":
            scores = score_continuations(backbone, states, self._prompts(samples), self.answer_list)
        else:
            tokens = self.text.rows([s.fields["question"] for s in samples]).to(backbone.device)
            scores = self._classify(backbone, states, tokens)
        return [self.answer_list[i] for i in scores.argmax(dim=1).tolist()]

    def reply(self, backbone, states, samples, zero_shot):
        return [Reply(answer) for answer in self.predict(backbone, states, samples, zero_shot)]

    def _most_similar(self, backbone, states, samples, zero_shot):
        best = []
        for image, sample in zip(backbone.encode_image(states), samples):
            question = sample.fields["question"]  # many samples ask the same
            texts = self.kept((zero_shot, question), lambda question=question: embed_texts(
                backbone, self._statements(question, self.answer_list)))
            best.append(texts @ image)
        return [self.answer_list[i] for i in torch.stack(best).argmax(dim=1).tolist()]

    def score(self, predictions, samples, thorough=False):
        """Accuracy by the configured rule; thorough: by the other one too."""
        metrics = {"accuracy": mean(self.quality(predictions, samples), pictures_of(samples), 100.0)}
        if thorough:
            other = "lenient" if self.rule == "official" else "official"
            metrics[f"accuracy_{other}"] = mean(_accuracies(predictions, samples, other), pictures_of(samples), 100.0)
        return metrics

    def quality(self, predictions, samples):
        return _accuracies(predictions, samples, self.rule)

    def closed(self, predictions, samples):
        """Of several human answers the most frequent is the truth."""
        if not self.answer_list:
            return []
        truths = [Counter(s.fields["answers"]).most_common(1)[0][0] for s in samples]
        return list(zip(truths, predictions))

    def notes(self, samples):
        return [f"{self.name}: accuracy by the {self.rule} VQA rule"
                + (" (the official script)." if self.rule == "official" else " (as lmms-eval).")]

    def answers(self, predictions, samples, rows):
        right = _accuracies([predictions[i] for i in rows], [samples[i] for i in rows], self.rule)
        return [Answer(predictions[i], accuracy >= 0.5) for i, accuracy in zip(rows, right)]


def _accuracies(predictions, samples, rule):
    return [vqa_accuracy(prediction, s.fields["answers"], rule) for prediction, s in zip(predictions, samples)]
