"""Visual question answering: the answer follows the question in the decoder, or comes from a closed list."""

import torch
import torch.nn.functional as F
from torch import nn

from vl_mtl_lora.backbones.generation import score_continuations
from vl_mtl_lora.metrics.vqa import vqa_accuracy
from vl_mtl_lora.tasks.base import next_token_inputs, next_token_loss, text_rows

_CACHED_TEXTS = 100_000  # embeddings of question and answer kept at once in a zero-shot evaluation


class VQA(nn.Module):
    """How a question is answered (`answer_by`):

    ranking:        the likeliest of a closed list after the prompt, by mean log-probability per token.
    generation:     what the decoder writes after the prompt.
    classification: a linear head over a closed list, on the image's and the question's embedding and their product.

    Zero-shot with a closed list: the answer whose text, put into `zero_shot_prompt`, is most similar to the image;
    without a list: what the base writes after the prompt.
    """

    kind = "vqa"
    primary = "accuracy"

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        self.answer_list = list(section.answers)
        self.answer_by = section.answer_by or ("ranking" if section.answers else "generation")
        self.prompt, self.zero_shot_prompt = section.prompt, section.zero_shot_prompt
        self.max_new_tokens, self.rule = section.max_new_tokens, section.metric
        self.needs = frozenset({"embed"} if self.answer_by == "classification" else {"generate"})
        self._zero_shot_texts: dict[str, torch.Tensor] = {}
        if self.answer_by == "classification":
            width = backbone.embed_dim
            self.classifier = nn.Linear(3 * width, len(self.answer_list))

    def _prompts(self, samples):
        return [self.prompt.format(question=s.fields["question"]) for s in samples]

    def collate(self, samples, rng):
        """Of several human answers one is drawn, so that the loss sees them as often as they were given."""
        answers = [rng.choice(s.fields["answers"]) for s in samples]
        if self.answer_by != "classification":
            return next_token_inputs(self.text, self._prompts(samples), answers)
        index = {answer: i for i, answer in enumerate(self.answer_list)}
        return {"tokens": text_rows(self.text, [s.fields["question"] for s in samples]),
                "labels": torch.tensor([index.get(answer, -100) for answer in answers])}

    def loss(self, backbone, states, inputs):
        if self.answer_by != "classification":
            return next_token_loss(backbone, states, inputs)
        # Answers outside the list are ignored; clamp keeps a slice of none of the others from dividing by zero.
        total = F.cross_entropy(self._classify(backbone, states, inputs["tokens"]), inputs["labels"], reduction="sum")
        return total / (inputs["labels"] >= 0).sum().clamp(min=1)

    def _classify(self, backbone, states, tokens):
        """(B, answers) logits from (B, L) question tokens."""
        question, image = backbone.encode_text(tokens), states.embedding
        # Unit vectors have entries of about E^-1/2; the scale makes them of order one.
        features = torch.cat([image, question, image * question * image.shape[1] ** 0.5], dim=-1)
        return self.classifier(features.float() * image.shape[1] ** 0.5)

    def predict(self, backbone, states, samples, zero_shot):
        """One answer text per sample."""
        if zero_shot and self.answer_list:
            return self._most_similar(backbone, states, samples)
        if self.answer_by == "generation" or zero_shot:
            return backbone.generate(states, self._prompts(samples), max_new_tokens=self.max_new_tokens)
        if self.answer_by == "ranking":
            scores = score_continuations(backbone, states, self._prompts(samples), self.answer_list)
        else:
            tokens = text_rows(self.text, [s.fields["question"] for s in samples]).to(backbone.device)
            scores = self._classify(backbone, states, tokens)
        return [self.answer_list[i] for i in scores.argmax(dim=1).tolist()]

    def _most_similar(self, backbone, states, samples):
        questions = [s.fields["question"] for s in samples]
        best = []
        for image, question in zip(states.embedding, questions):
            if question not in self._zero_shot_texts:  # many samples ask the same; the base does not change
                if len(self._zero_shot_texts) * len(self.answer_list) > _CACHED_TEXTS:
                    self._zero_shot_texts.clear()
                texts = [self.zero_shot_prompt.format(question=question, answer=a) for a in self.answer_list]
                self._zero_shot_texts[question] = torch.cat([
                    backbone.encode_text(rows.to(backbone.device)) for rows in text_rows(self.text, texts).split(1024)])
            best.append(self._zero_shot_texts[question] @ image)
        return [self.answer_list[i] for i in torch.stack(best).argmax(dim=1).tolist()]

    def score(self, predictions, samples):
        hits = [vqa_accuracy(p, s.fields["answers"], self.rule) for p, s in zip(predictions, samples)]
        return {"accuracy": 100.0 * sum(hits) / max(len(hits), 1)}

    def answers(self, predictions, samples, rows):
        return [(predictions[i], vqa_accuracy(predictions[i], samples[i].fields["answers"], self.rule) >= 0.5)
                for i in rows]
