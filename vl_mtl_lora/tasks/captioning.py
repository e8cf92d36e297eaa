"""Image captioning: the caption follows the image in the decoder; CIDEr, BLEU, ROUGE-L and METEOR."""

from torch import nn

from vl_mtl_lora.metrics.caption import TOKENIZER, caption_metrics, cider_warning, rouge_l, tokenize_caption
from vl_mtl_lora.tasks.base import Answer, Reply, next_token_inputs, next_token_loss, pictures_of


class Captioning(nn.Module):
    """Next-token loss on one caption per sample, in every epoch another; greedy or beam search at evaluation."""

    kind = "captioning"
    images = 1
    needs = frozenset({"generate"})
    primary = "CIDEr"
    asks = ()
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

    def reply(self, backbone, states, samples, zero_shot):
        return [Reply(caption) for caption in self.predict(backbone, states, samples, zero_shot)]

    def score(self, predictions, samples, thorough=False):
        """CIDEr, BLEU and ROUGE-L; thorough: METEOR too, where Java is there."""
        first = {picture: i for i, picture in reversed(list(enumerate(pictures_of(samples))))}
        return caption_metrics([predictions[i] for i in sorted(first.values())], _references(samples), meteor=thorough)

    def quality(self, predictions, samples):
        """Each caption's ROUGE-L against its picture's own: CIDEr has no upper end."""
        references = _references(samples)
        return [rouge_l(prediction, references[picture])
                for prediction, picture in zip(predictions, pictures_of(samples))]

    def closed(self, predictions, samples):
        return []

    def notes(self, samples):
        warning = cider_warning(_references(samples))
        return [f"{self.name}: CIDEr is CIDEr-D x 100 with document frequencies from the test references; tokenizer: "
                f"{TOKENIZER}."] + [f"{self.name}: {warning}"] * (warning is not None)

    def answers(self, predictions, samples, rows):
        references = [map(tokenize_caption, samples[i].fields["captions"]) for i in rows]
        return [Answer(predictions[i], tokenize_caption(predictions[i]) in own) for i, own in zip(rows, references)]


def _references(samples) -> list[list[str]]:
    """The captions of each picture, whatever the number of samples that show it."""
    found: dict[int, list[str]] = {}
    for picture, sample in zip(pictures_of(samples), samples):
        found.setdefault(picture, []).extend(sample.fields["captions"])
    return [list(dict.fromkeys(captions)) for captions in found.values()]
