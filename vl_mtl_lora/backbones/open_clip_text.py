"""The `TextCodec` of an open_clip tokenizer, SimpleTokenizer or one that wraps a Hugging Face tokenizer."""

import torch
from torch import Tensor

from vl_mtl_lora.backbones.generation import marked_prompts, pad_ids


class OpenClipText:
    """See `TextCodec`. trims: whether `encode_text` reads nothing after the end mark, so that rows can be short."""

    def __init__(self, tokenizer, context_length: int, trims: bool):
        self.tokenizer, self.context_length, self.trims = tokenizer, context_length, trims
        # HFTokenizer and SigLipTokenizer wrap a tokenizer, SimpleTokenizer is one.
        self._inner = getattr(tokenizer, "tokenizer", tokenizer)
        if self._inner is tokenizer:
            self.pad_id, start = 0, 1
            self.bos_id, self.eos_id = (int(i) for i in tokenizer([""])[0][:2])
        else:
            plain = self._inner("a", add_special_tokens=False).input_ids
            marked = self._inner("a").input_ids
            start = next(i for i in range(len(marked)) if marked[i:i + len(plain)] == plain)
            end = marked[start + len(plain):]
            self.pad_id = self._inner.pad_token_id or 0
            self.eos_id = end[0] if end else next(
                (i for i in (self._inner.eos_token_id, self._inner.sep_token_id) if i is not None), self.pad_id)
            # T5 has no begin mark; its decoders start from the pad token, and so does ours.
            self.bos_id = marked[start - 1] if start else self.pad_id
        self._start = start

    def tokenize(self, texts):
        return self.tokenizer(list(texts), context_length=self.context_length)

    def rows(self, texts) -> Tensor:
        if not self.trims:
            return self.tokenize(texts)
        return pad_ids([[self.bos_id, *ids, self.eos_id] for ids in self.ids(texts)], self.pad_id)

    def prompts(self, texts, room, pictures=None):
        return marked_prompts(self, texts, room)

    def ids(self, texts):
        rows = self.tokenize(texts).tolist() if texts else []
        ends = (self.eos_id, self.pad_id)
        return [[*_until(row[self._start:], ends)] for row in rows]

    def decode(self, ids):
        marks = (self.bos_id, self.eos_id, self.pad_id)
        return self._inner.decode([i for i in map(int, ids) if i not in marks]).strip()


def _until(ids, ends):
    for i in ids:
        if i in ends:
            return
        yield i


def scalar(parameter: Tensor | None) -> float:
    """The value of a one-element parameter; 0 where there is none, or on the meta device, where there are no values."""
    return 0.0 if parameter is None or parameter.is_meta else float(parameter.detach().reshape(()))


class StandInTokenizer:
    """Takes the place of a tokenizer that cannot be had, in dry runs: ids of the right range and number."""

    def __init__(self, context_length: int, vocab_size: int):
        from open_clip import SimpleTokenizer

        self._simple, self._vocab_size = SimpleTokenizer(context_length=context_length), vocab_size

    def __call__(self, texts, context_length=None) -> Tensor:
        return torch.remainder(self._simple(texts, context_length), self._vocab_size)

    def decode(self, ids) -> str:
        return self._simple.decode(ids)
