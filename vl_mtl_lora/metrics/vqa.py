"""VQA accuracy, by the official script's rules ("official") and as lmms-eval applies them ("lenient").

Source of the rules: the VQA evaluation code of Antol et al. (arXiv 1505.00468), https://visualqa.org/evaluation.html.
"""

import re
from collections.abc import Sequence

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
# The official table, which restores apostrophes, follows from these words written without theirs.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}
_PUNCTUATION = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?",
                "!"]
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as in the official script, quirk included
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")


def normalize_answer(answer: str) -> str:
    """Lower case, punctuation, number words, articles and contractions, as the official script does it."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text):
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = _PERIOD.sub("", out)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str = "official") -> float:
    """Accuracy of one answer in [0, 1] against its human answers.

    With at least four answers: the mean over them of min(1, matches among the others / 3). With fewer, as in sets of
    a single truth, where that could not reach 1: whether it equals any. "official" normalises only where ten or more
    answers differ among themselves, as the official script does on its ten; "lenient" always does.
    """
    clean = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if rule == "lenient" or len(clean) < 10 or len(set(clean)) > 1:
        clean, prediction = [normalize_answer(answer) for answer in clean], normalize_answer(prediction)
    if len(clean) < 4:
        return float(prediction in clean)
    matches = [answer == prediction for answer in clean]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(clean)
