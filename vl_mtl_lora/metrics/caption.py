"""CIDEr-D, BLEU, ROUGE-L and METEOR as pycocoevalcap has them, on the tokens of its tokenizer, here without Java."""

import logging
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import which

import numpy as np

from vl_mtl_lora.metrics.bootstrap import Metric, mean

log = logging.getLogger(__name__)
TOKENIZER = "PTB rules in Python"
_CIDER_PICTURES = 100

# The tokens are the Penn Treebank's (Marcus, Santorini and Marcinkiewicz, Computational Linguistics 19(2), 1993) as the
# Stanford tokenizer 3.4.1 gives them; the rules were written from its output. In them
# λ is a letter (combining marks and other scripts' digits are among them), ω a letter or a digit, ʼ an apostrophe, and
# ∎ asks that no letter and no digit follow.
_LETTER = r"(?:[^\W\d_²³¹¼-¾⁰-₉⅐-ↈ①-⓿]|[\u0300-\u036f]|(?![0-9])\d)"
_SIGNS = {"λ": _LETTER, "ω": rf"(?:{_LETTER}|[0-9])", "ʼ": "['’]", "∎": rf"(?!{_LETTER}|[0-9])"}
# These keep their full stop: the first always, the second with a capital, the third before a number.
_ABBREVIATIONS = """adj|adm|adv|ala?|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|
    cie|cmdr|colo?|conn|corp|cos?|cpl|ct|dak|dec|dept|det|drs?|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|govs?|
    hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kans?|ky|ltd?|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mont?|mo|mrs?|
    msgr|ms|mtg?|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pp?tes?|pp?tys?|pres|prof|pvt|rd|reps?|rev|rt|sens?|sept?|
    seq|sfc|sgt|spc|sq|sr|ste?|supt|sys|tel|tenn|thu|thurs|tues?|univ|va|vs|vt|wed|wisc?|wm|wyo""".replace("\n    ", "")
_CAPITAL = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
# Before one of these a lone letter ends its sentence: "plan b. A man".
_OPENERS = """A|About|According|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|Once|One|
    Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You
    """.replace("\n    ", "")
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
# The longest match is the token, the first of equals. Of a rule with a group the group is the token, and the rest of
# its match, though no part of it, counts towards the length.
_RULES = [
    # Contractions, and what else an apostrophe may stand in.
    r"([A-Za-z]*[A-Za-mo-z])[nN](?:ʼ|`)[tT]", r"[nN](?:ʼ|`)[tT]λ*", r"ʼ(?:[msdMSD]|re|ve|ll|RE|VE|LL)(?!λ)",
    r"(?i:(can)not|(gon|wan)na|(got)ta|(lem|gim)me)(?!ω|ʼ[a-z])", r"(?i:('t)(?:is|was))",
    r"(?i:ʼ(?:em|till?|cause))", r"ʼ[nN](?:ʼ|∎(?!/))", r"ʼ[2-9]0[sS]", r"ʼ[0-9]{2}(?=\s|$)",
    r"λ+[aeiouyAEIOUY]ʼ[aeiouAEIOU]λ*",
    r"(?i:eʼer|cʼmon|capʼn|somethinʼ|dunkinʼ|olʼ|[dlj]ʼ(?!(?:[msd]|re|ve|ll)∎))", r"[A-HJ-XZdlno]ʼλ{2,}",
    r"(?i:(yʼ)[a-rt-z])λ",
    # Words, full stops inside them; words joined by hyphens, underscores and slashes.
    r"λω*(?:[.!?]λω*)*", r"ω+(?:_ω+)*",
    r"(?:[DLOdlo]ʼ)?ω[\w.,]*(?:[-‐‑](?:[DLOdlo]ʼ)?(?:[A-Za-z](?:\.[A-Za-z])+\.|(?:ω|_)+))+",
    rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}",
    # Abbreviations and initials.
    rf"(?i:{_ABBREVIATIONS})\.", rf"(?:{_CAPITAL}|{_CAPITAL.upper()})\.", rf"((?i:{_NUMBERED})\.) ?[0-9]",
    rf"([A-Za-z])\. (?:{_OPENERS}|{_OPENERS.upper()})(?=\s|$)", r"(?:[A-Za-z]|(?i:ph))(?:\.[A-Za-z])*\.",
    # Numbers, fractions, dates, telephones.
    r"[-+]?[0-9]+", r"[-+]?[0-9]*(?:[.,:][0-9]+)+", r"(?:[0-9]{1,4}[- ])?[0-9]{1,4}(?:\\?/|⁄)[0-9]{1,4}",
    r"[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}", r"(?:\([0-9]{3}\) ?|[0-9]{3}[- ])[0-9]{3}[- ][0-9]{4}",
    # Addresses, tags, faces.
    r"(?i:https?)://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
    r"(?:[^\s\"`'<>|.!?(){}\[\],_$/-]+\.)+(?:com|net|org|edu)∎(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?",
    r"[A-Za-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().]+", r"\#[A-Za-z]+", r"@[A-Za-z_][A-Za-z_0-9]*",
    r"</?[A-Za-z][\w:-]*(?: +[A-Za-z][\w:-]*(?: *= *(?:\"[^\"]*\"|'[^']*'|[^ \"'<>()]+))?)* */?>",
    r"<!--[^<>]*>", r"[<>]?[:;=](?:[-o]|ʼ)?[()DPp\\|O@{\[\]]∎",
    r"[-^=<>]_[-^=<>]",
    # Signs.
    r"[A-Z]+(?:[&+][A-Z]+)+", r"[A-Z]{1,3}\$", r"(?i:[cf]\#|c\+\+)", r"&(?:lt|gt|\#[0-9]+|[A-Za-z]acute);", r"[?!]{2,}",
    r"\\?\*+|_+|\#+|@+|<<|>>|-{2,}|''|\.{3,}",
    r"[!-~¡-¬®-¿×÷‖-‣…‰-※‾-⁂⁄⁰⁴-⁹₀-₉₠₤€℀-⅏⅓-⅞←-⯿、。〒・！-／：-＠［-｀｛-･￠￡￥￦]"]
_MATCHES = [re.compile(re.sub("[λωʼ∎]", lambda sign: _SIGNS[sign[0]], rule)).match for rule in _RULES]
_PLAIN = re.compile(r"(?!(?i:cannot|[gw]...a|lemme|gimme)\b)[A-Za-z]{2,}(?=[ \n]|$)").match  # most words: no rule asked
_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " ", "\xad": ""}
_SPELT = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "₠": "$", "¤": "$", "¢": "cents",
          "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&lt;": "<", "&gt;": ">"}
_DROPPED = re.compile("['`’‘‛‹›«»“”\"?!,:–—―…;]|''|-{1,4}|[.]+").fullmatch  # as pycocoevalcap does, which keeps "-----"
_CURLY = re.compile("(?<=^n)’(?=t)|^’(?=(?:[msd]|re|ve|ll)$)")  # 's and n't become straight, o’clock does not


def tokenize_caption(text: str) -> str:
    """The lower-case Penn Treebank tokens of an English caption, joined by spaces; punctuation and emoji left out.

    They are those of pycocoevalcap's PTBTokenizer, peculiarities included: brackets become "-lrb-", a number and its
    fraction one token with a no-break space in it, and "€" becomes "$". Markup and program text may differ.
    """
    text = re.sub("&(?:amp|quot|apos|nbsp);|\xad", lambda entity: _ENTITIES[entity[0]], text)
    tokens, at = [], 0
    while at < len(text):
        found = _PLAIN(text, at) or max(filter(None, (match(text, at) for match in _MATCHES)),
                                        key=lambda match: match.end(), default=None)
        if found is None:  # a space, or what is no token: emoji, most of all
            at += 1
            continue
        token = found[found.lastindex or 0]
        at += len(token)
        if not _DROPPED(token):
            token = _CURLY.sub("'", _SPELT.get(token, token).lower()).replace(" ", "\xa0")
            tokens.append(token if "//" in token else token.replace("(", "-lrb-").replace(")", "-rrb-"))
    return " ".join(tokens)


def caption_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]], *,
                    meteor: bool = False) -> dict[str, Metric]:
    """CIDEr (x 100), BLEU-1 to BLEU-4, ROUGE-L and, where asked for and Java is there, METEOR (all in per cent).

    predictions: one caption per picture; references: one or more for each. Every picture is a cluster of its own.
    CIDEr is CIDEr-D (Vedantam, Zitnick and Parikh, 2015); in resamples too its document frequencies are those of all
    the references. BLEU (Papineni et al., 2002) and METEOR (Denkowski and Lavie, 2014) are figures of the whole
    corpus: resamples add up the pictures' counts anew. ROUGE-L (Lin, 2004) and CIDEr are means over pictures.

    Raises:
        ValueError: predictions and references differ in number, or a picture has no reference.
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if len(predictions) != len(references) or not all(references):
        raise ValueError(f"{len(predictions)} predictions want as many lists of one or more references, "
                         f"got {len(references)} with {[len(texts) for texts in references].count(0)} empty")
    told = [tokenize_caption(text) for text in predictions]
    truth = [[tokenize_caption(text) for text in texts] for texts in references]
    both = dict(enumerate(truth)), {i: [text] for i, text in enumerate(told)}
    # The scorer takes the greatest document frequency, which references without a single token lack.
    cider = Cider().compute_score(*both)[1] if any(map(any, truth)) else np.zeros(len(told))
    cooked = [cook_test(text, cook_refs(texts), eff="closest") for text, texts in zip(told, truth)]
    counts = np.array([[*c["correct"], *c["guess"], c["testlen"], c["reflen"]] for c in cooked], dtype=np.float64)
    metrics = {"CIDEr": mean(cider, scale=100.0)}
    for n in range(4):
        metrics[f"BLEU-{n + 1}"] = _corpus_metric(counts, lambda sums, n=n: 100.0 * _bleu(sums)[:, n])
    metrics["ROUGE-L"] = mean(Rouge().compute_score(*both)[1], scale=100.0)
    if meteor and (statistics := _meteor_statistics(told, truth)) is not None:
        metrics["METEOR"] = _corpus_metric(statistics, lambda sums: 100.0 * _meteor(sums))
    return metrics


def cider_warning(references: Sequence[Sequence[str]]) -> str | None:
    """Why CIDEr means little on these references (one list per picture); None where they will do."""
    # An n-gram weighs log(pictures / pictures it is in). With few pictures nearly every n-gram is in one of them and
    # weighs the same, common or rare; with fewer n-grams than pictures each is in many, and hardly any weighs at all.
    if len(references) < _CIDER_PICTURES:
        return (f"CIDEr over {len(references)} pictures says little: it weighs words by how many of the pictures have "
                f"them, which wants {_CIDER_PICTURES} or more.")
    seen: set[tuple[str, ...]] = set()
    for texts in references:
        for words in (tokenize_caption(text).split() for text in texts):
            seen.update(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))
        if len(seen) >= len(references):
            return None
    return (f"CIDEr over {len(references)} pictures with {len(seen)} distinct n-grams says little: it weighs words by "
            "how few of the pictures have them, and here many have each.")


def _corpus_metric(counts: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """counts: (pictures, K), figure: (R, K) sums of them -> (R,)."""
    return Metric(float(figure(counts.sum(0, keepdims=True))[0]), len(counts), len(counts),
                  lambda drawn: figure(drawn @ counts))


def _bleu(sums: np.ndarray) -> np.ndarray:
    """sums: (R, 10), n-grams right and n-grams written for n = 1 to 4, words written and of the references -> (R, 4).

    pycocoevalcap's constants keep it from dividing by zero; the reference nearest in length counts.
    """
    tiny, small = 1e-15, 1e-9
    bleus = np.cumprod((sums[:, :4] + tiny) / (sums[:, 4:8] + small), axis=1) ** (1 / np.arange(1, 5))
    ratio = (sums[:, 8:9] + tiny) / (sums[:, 9:10] + small)
    return bleus * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _meteor(sums: np.ndarray) -> np.ndarray:
    """sums: (R, 23), statistics as METEOR 1.5 prints them -> (R,), by its parameters for English.

    First the words of caption and reference, then the function words of both; for each of four kinds of match the
    content words matched in either, then the function words; chunks; words matched in either.
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    kinds = np.array([1.0, 0.6, 0.8, 0.6])  # exact, stem, synonym, paraphrase
    lengths = delta * (sums[:, :2] - sums[:, 2:4]) + (1 - delta) * sums[:, 2:4]
    matched = np.einsum("rkwt,k,w->rt", sums[:, 4:20].reshape(-1, 4, 2, 2), kinds, [delta, 1 - delta])
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing matched or nothing written: no score
        precision, recall = (matched / lengths).T
        f_mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
        return np.nan_to_num(f_mean * (1 - gamma * (sums[:, 20] / sums[:, 21:].mean(1)) ** beta))


def _meteor_statistics(told: Sequence[str], truth: Sequence[Sequence[str]]) -> np.ndarray | None:
    """(pictures, 23) of tokenized captions; None, with a warning logged, where Java is missing or fails."""
    from pycocoevalcap.meteor import meteor

    if which("java") is None:
        return None
    # Run once over all lines: pycocoevalcap's own wrapper keeps a Java process open, and waits for ever if it fails.
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", meteor.METEOR_JAR, "-", "-", "-stdio", "-l", "en",
               "-norm"]
    lines = "".join(" ||| ".join(["SCORE", *texts, text]) + "\n" for text, texts in zip(told, truth))
    try:
        printed = subprocess.run(command, cwd=Path(meteor.__file__).parent, input=lines, capture_output=True,
                                 check=True, encoding="utf-8", timeout=300 + 0.1 * len(told)).stdout
        statistics = np.array([line.split() for line in printed.splitlines()], dtype=np.float64).reshape(len(told), 23)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning("METEOR is left out, Java failed: %s", str(reason).strip()[-500:])
        return None
    # A match of everything in one chunk is no fragment, and METEOR's corpus figure counts none for it.
    statistics[(statistics[:, 20] == 1) & (statistics[:, 21:] == statistics[:, :2]).all(1), 20] = 0
    return statistics


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L (Lin, Text Summarization Branches Out, 2004) of one caption, in [0, 1], as pycocoevalcap computes it."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().calc_score([tokenize_caption(prediction)], [tokenize_caption(text) for text in references]))
