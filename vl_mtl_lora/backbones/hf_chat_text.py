"""The `TextCodec` of a chat model: every prompt goes through the model's own chat template, and its placeholders become
the ids of pictures."""

from collections.abc import Sequence

from vl_mtl_lora.backbones.generation import pad_ids
from vl_mtl_lora.errors import UserError

_TEXT_INSTRUCTION = "Summarize the sentence in one word."
_KEPT_END = 32  # tokens at the end of a text that is too long


class ChatText:
    """See `TextCodec`. image_id: the placeholder, the token that stands for one picture until the model runs.

    Answers are tokenised as they follow the template's generation prompt, and end with the template's end mark.
    """

    def __init__(self, processor, context_length: int):
        self.processor, self.tokenizer, self.context_length = processor, processor.tokenizer, context_length
        self.image_token = processor.image_token
        self.image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        question, answer = "QUESTION", "ANSWER"
        self._in_parts = True
        if not self._renders(question):  # older templates take a message as one text
            self._in_parts = False
            if not self._renders(question):
                raise UserError("backbone: the model's chat template shows no user's text with a picture in it")
        # What the template writes between a user's text and an answer X, and after X.
        opened = self.render(question, 1)
        closed = self.render(question, 1, answer)
        before, after = "", ""
        if closed.startswith(opened) and answer in closed[len(opened):]:
            before, _, after = closed[len(opened):].partition(answer)
        self._tail = opened[opened.index(question) + len(question):]
        self._before = before
        end = self.tokenizer(after.strip(), add_special_tokens=False).input_ids if after.strip() else []
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        self.eos_id = end[0] if end and end[0] in special else self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id
        self.pad_id = self.tokenizer.eos_token_id if pad is None or pad == self.image_id else pad

    def render(self, text: str, pictures: int, answer: str | None = None) -> str:
        """One user turn, pictures first, up to where the answer begins, or with the answer."""
        text = self._harmless(text)
        if getattr(self.processor, "chat_template", None) is None:
            return self.image_token * pictures + f"\n{text}\n" + (answer or "")
        turns = [{"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if not self._in_parts:
            for turn in turns:
                shown = [self.image_token for part in turn["content"] if part["type"] == "image"]
                turn["content"] = "\n".join([*shown, turn["content"][-1]["text"]])
        return self.processor.apply_chat_template(turns, add_generation_prompt=answer is None, tokenize=False)

    def _renders(self, text: str) -> bool:
        try:
            rendered = self.render(text, 1)
        except Exception:  # a template may fail in any way on a message that it does not expect
            return False
        return text in rendered and rendered.count(self.image_token) == 1

    def _harmless(self, text: str) -> str:
        """A text that smuggles in no picture, end of turn or other mark of the tokenizer's."""
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, " ")
        return text.replace(self.image_token, " ")

    def _ids(self, rendered: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(rendered), add_special_tokens=self.adds_marks(rendered[0])).input_ids

    def adds_marks(self, rendered: str) -> bool:
        """A template that writes the begin mark itself must not get a second one."""
        bos = self.tokenizer.bos_token
        return not (bos and rendered.startswith(bos))

    def prompts(self, texts, room, pictures=None):
        if not texts:
            return []
        pictures = [1] * len(texts) if pictures is None else pictures
        rows = self._ids([self.render(text, count) for text, count in zip(texts, pictures)])
        for i, more in enumerate(room):
            if (excess := len(rows[i]) + more - self.context_length) > 0:
                # The middle of the text is cut: never the template, nor an instruction at either end.
                words = self.tokenizer(texts[i], add_special_tokens=False).input_ids
                room_left = max(0, len(words) - excess)
                end = min(room_left // 2, _KEPT_END)
                halves = (words[:room_left - end], words[len(words) - end:])
                text = " ".join(self.tokenizer.decode(half) for half in halves if half)
                rows[i] = self._ids([self.render(text, pictures[i])])[0]
        return rows

    def rows(self, texts):
        """A text's embedding is read after the instruction to sum it up."""
        texts = [f"{text}\n{_TEXT_INSTRUCTION}" for text in texts]
        return pad_ids(self.prompts(texts, [0] * len(texts), [0] * len(texts)), self.pad_id)

    def tokenize(self, texts):
        return self.rows(texts)

    def ids(self, texts):
        if not texts:
            return []
        texts = [self._harmless(text) for text in texts]
        tail = self.tokenizer(self._tail, add_special_tokens=False).input_ids
        whole = self.tokenizer([self._tail + self._before + text for text in texts], add_special_tokens=False).input_ids
        if all(row[:len(tail)] == tail for row in whole):
            return [row[len(tail):] for row in whole]
        return self.tokenizer([self._before + text for text in texts], add_special_tokens=False).input_ids

    def decode(self, ids):
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def expand(rows: Sequence[Sequence[int]], placeholder: int, pictures: Sequence[Sequence[int]],
           counts: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Every placeholder -> its picture's ids. Returns the rows, and where each token's last id stands in them.

    Raises:
        ValueError: a row has another number of placeholders than `counts` says it has pictures.
    """
    left = iter(pictures)
    expanded, ends = [], []
    for row, count in zip(rows, counts):
        if (got := row.count(placeholder)) != count:
            raise ValueError(f"a text has {got} placeholders for its {count} pictures")
        out, last = [], []
        for token in row:
            out += next(left) if token == placeholder else [token]
            last.append(len(out) - 1)
        expanded.append(out)
        ends.append(last)
    return expanded, ends
