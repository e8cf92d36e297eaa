"""The `TextCodec` of a Hugging Face tokenizer, as CLIP, SigLIP and text encoders read it."""

from vl_mtl_lora.backbones.generation import marked_prompts


class HFText:
    """See `TextCodec`. trims: whether padding after the end mark may be left out."""

    def __init__(self, tokenizer, context_length: int, trims: bool):
        self.tokenizer, self.context_length, self.trims = tokenizer, context_length, trims
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else self.pad_id
        marked = tokenizer("a").input_ids
        plain = tokenizer("a", add_special_tokens=False).input_ids
        # SigLIP's tokenizer adds no begin mark; like a T5 decoder, ours then starts from the pad token.
        self.bos_id = marked[0] if marked[:len(plain)] != plain else self.pad_id

    def tokenize(self, texts):
        return self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.context_length,
                              return_tensors="pt").input_ids

    def rows(self, texts):
        if not self.trims:  # SigLIP reads its padding
            return self.tokenize(texts)
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.context_length,
                              return_tensors="pt").input_ids

    def prompts(self, texts, room, pictures=None):
        return marked_prompts(self, texts, room)

    def ids(self, texts):
        return self.tokenizer(list(texts), add_special_tokens=False, truncation=True,
                              max_length=self.context_length - 2).input_ids if texts else []

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
