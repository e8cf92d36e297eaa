"""Image captioning: the caption follows the image in the decoder; CIDEr and BLEU-4."""

from torch import nn

from vl_mtl_lora.metrics.caption import caption_metrics, tokenize_caption
from vl_mtl_lora.tasks.base import next_token_inputs, next_token_loss


class Captioning(nn.Module):
    """Next-token loss on one caption per sample, in every epoch another; greedy or beam search at evaluation."""

    kind = "captioning"
    images = 1
    needs = frozenset({"generate"})
    primary = "CIDEr"
    example = {"captions": ["a photo of a red circle on a blue square in the picture"]}

    def __init__(self, name, section, backbone):
        super().__init__()
        self.name = name
        self.text = backbone.text
        self.prompt = backbone.prompts["captioning"] if section.prompt is None else section.prompt
        self.max_new_tokens, self.num_beams = section.max_new_tokens, section.num_beams

    def collate(self, samples, rng):
        return next_token_inputs(self.text, [self.prompt] * len(samples),
                                 [s.turn(s.fields["captions"]) for s in samples])

    def loss(self, backbone, states, inputs):
        return next_token_loss(backbone, states, inputs)

    def predict(self, backbone, states, samples, zero_shot):
        """One caption per sample; the base alone writes its caption the same way."""
        return backbone.generate(states, [self.prompt] * len(samples), max_new_tokens=self.max_new_tokens,
                                 num_beams=self.num_beams)

    def score(self, predictions, samples):
        # One prediction per picture, whatever the number of samples that show it.
        seen: dict[str, tuple[str, list[str]]] = {}
        for prediction, sample in zip(predictions, samples):
            references = seen.setdefault(sample.image_id, (prediction, []))[1]
            references += [c for c in sample.fields["captions"] if c not in references]
        return caption_metrics(*zip(*seen.values()))

    def answers(self, predictions, samples, rows):
        return [(said := predictions[i], tokenize_caption(said) in map(tokenize_caption, samples[i].fields["captions"]))
                for i in rows]
