"""VQA accuracy, by the official script's rules ("official") and as lmms-eval's VQAv2 task applies them ("lenient").

Source of the rules: the VQA evaluation code of Antol et al. (arXiv 1505.00468), https://visualqa.org/evaluation.html.
Its quirks are kept, so that figures can be compared.
"""

import re
from collections.abc import Sequence

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
            "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
# The official table restores one missing apostrophe, whichever it is; never two, nor those of "I'm", "I've", "I'd've",
# which it holds in capitals and looks up in lower case. One entry goes the other way.
_CONTRACTIONS = {word[:match.start()] + word[match.end():]: word
                 for word in _CONTRACTED for match in re.finditer("'", word)} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # a lookbehind misspelt: a period goes unless a digit follows it
_PERIODS = 32  # the script hands re.UNICODE, which is 32, to sub() as the number of periods to take out
_COMMA_IN_NUMBER = {"official": re.compile(r"\d,\d"), "lenient": re.compile(r"\d,+\d")}


def normalize_answer(answer: str, rule: str = "official") -> str:
    """Lower case, punctuation, number words, articles and contractions, as the official script does it.

    A mark of punctuation becomes a blank, or nothing where it stands beside a blank anywhere in the answer, or where
    the answer has a comma within a number. That is one comma for "official", one or more in a row for "lenient"; the
    rules treat a text alike in all else.
    """
    text = _on_one_line(answer)
    comma_in_number = _COMMA_IN_NUMBER[rule].search(text)
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if comma_in_number or f"{mark} " in text or f" {mark}" in text else " ")
    out = _PERIOD.sub("", out, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str = "official") -> float:
    """Accuracy of one answer in [0, 1] against its human answers.

    With at least four answers: the mean over them of min(1, matches among the others / 3). With fewer, as in sets of
    a single truth, where that could not reach 1: whether it equals any. "official" normalises only where answers
    differ among themselves, as the official script does on its ten, or are fewer than ten; "lenient" always does.
    """
    clean, prediction = [_on_one_line(answer) for answer in answers], _on_one_line(prediction)
    if rule == "lenient" or len(clean) < 10 or len(set(clean)) > 1:
        clean, prediction = [normalize_answer(answer, rule) for answer in clean], normalize_answer(prediction, rule)
    if len(clean) < 4:
        return float(prediction in clean)
    matches = [answer == prediction for answer in clean]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(clean)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
