"""CIDEr-D and BLEU-4 by pycocoevalcap's scorers, with a tokenizer that needs no Java."""

import contextlib
import io
import re
from collections.abc import Sequence

TOKENIZER = "lower-case words, punctuation dropped (not PTB)"
_WORD = re.compile(r"\w+(?:'\w+)?")


def tokenize_caption(text: str) -> str:
    """Lower case, punctuation dropped, words joined by one space."""
    return " ".join(_WORD.findall(text.lower()))


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr (x 100) and BLEU-4 (per cent) of predictions against one or more references each.

    CIDEr is CIDEr-D: its document frequencies come from these very references, so it means little on a handful.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    truth = {i: [tokenize_caption(text) for text in texts] for i, texts in enumerate(references)}
    told = {i: [tokenize_caption(text)] for i, text in enumerate(predictions)}
    with contextlib.redirect_stdout(io.StringIO()):  # the BLEU scorer prints
        bleu, _ = Bleu(4).compute_score(truth, told, verbose=0)
        cider, _ = Cider().compute_score(truth, told)
    return {"CIDEr": 100.0 * float(cider), "BLEU-4": 100.0 * float(bleu[3])}
