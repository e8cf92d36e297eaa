"""GLUE, texts alone -> shards for multiple choice, and of STS-B for matching.

INPUT holds, unpacked or as .zip files (https://gluebenchmark.com/tasks):
    {CoLA,SST-2,QQP,QNLI,RTE,WNLI,STS-B}/{train,dev}.tsv
    MNLI/{train,dev_matched,dev_mismatched}.tsv
    MRPC/msr_paraphrase_{train,test}.txt                    its official test set has labels

Writes NAME-SET-{train,valid,test} shards of cola, sst2, mrpc, qqp, mnli, qnli, rte, wnli and stsb, and for mnli also
NAME-mnli-mm-test, the mismatched one. The official test sets have no labels: test is the official development set,
valid every tenth training row, at most about 1,000; rows with the same first text stay together, but not the phrases of
one sentence of SST-2, whose valid figures are too good. Licence: that of each set, see the home page.

    python data_scripts/glue_to_shards.py downloads/glue shards
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from convert import argument_parser, command, convert, held_out
from download import Download

SOURCE = "GLUE, https://gluebenchmark.com"
LICENCE = "that of each set, see https://gluebenchmark.com/tasks"
HELD_OUT = 1000
NO, YES = "no", "yes"


class Set(NamedTuple):
    """files: of training and of test. question: with the names of columns. label: its column. choices: by the label,
    in the order of the classes; the second of two is GLUE's positive one."""

    files: tuple[str, str]
    question: str
    label: str
    choices: dict[str, str]


_PAIR = "Do these two sentences say the same?\n1. {#1 String}\n2. {#2 String}"
_NLI = {"contradiction": NO, "neutral": "maybe", "entailment": YES}
_MNLI = "{sentence1}\nDoes it follow that: {sentence2}"
SETS = {
    "cola": Set(("CoLA/train.tsv", "CoLA/dev.tsv"), "Is this sentence grammatical?\n{sentence}", "label",
                {"0": NO, "1": YES}),
    "sst2": Set(("SST-2/train.tsv", "SST-2/dev.tsv"), "What is the sentiment of this review?\n{sentence}", "label",
                {"0": "negative", "1": "positive"}),
    "mrpc": Set(("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt"), _PAIR, "Quality",
                {"0": NO, "1": YES}),
    "qqp": Set(("QQP/train.tsv", "QQP/dev.tsv"), "Do these two questions ask the same?\n1. {question1}\n2. {question2}",
               "is_duplicate", {"0": NO, "1": YES}),
    "mnli": Set(("MNLI/train.tsv", "MNLI/dev_matched.tsv"), _MNLI, "gold_label", _NLI),
    "qnli": Set(("QNLI/train.tsv", "QNLI/dev.tsv"), "{question}\nIs it answered here? {sentence}", "label",
                {"not_entailment": NO, "entailment": YES}),
    "rte": Set(("RTE/train.tsv", "RTE/dev.tsv"), _MNLI, "label", {"not_entailment": NO, "entailment": YES}),
    "wnli": Set(("WNLI/train.tsv", "WNLI/dev.tsv"), _MNLI, "label", {"0": NO, "1": YES}),
}
COLA_COLUMNS = ("source", "label", "original label", "sentence")  # it has no header
STSB = ("STS-B/train.tsv", "STS-B/dev.tsv")
MISMATCHED = "mnli-mm-test"
SPLITS = [*(f"{name}-{split}" for name in (*SETS, "stsb") for split in ("train", "valid", "test")), MISMATCHED]


def samples(download: Download, split: str) -> Iterator[dict]:
    name, part = split.partition("-")[0], split.rpartition("-")[2]
    train, test = SETS[name].files if name in SETS else STSB
    file = "MNLI/dev_mismatched.tsv" if split == MISMATCHED else test if part == "test" else train
    rows = table(download, file, COLA_COLUMNS if name == "cola" else ())
    first = re.search("{(.+?)}", SETS[name].question)[1] if name in SETS else "sentence1"
    for number, row in held_out(enumerate(rows), part, HELD_OUT, text=lambda row: row[1].get(first)):
        fields = similarity(row) if name == "stsb" else choice(SETS[name], row)
        if fields is None:
            download.left_out[f"rows of {name} without one of its labels"] += 1
        else:
            yield {"task": name, **fields, "question_id": f"{split}/{number}", "image_id": f"{split}/{number}"}


def table(download: Download, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of a file with tabs, by column; those of its header where none are given. Some rows are cut off."""
    lines = download.lines(name)
    columns = columns or next(lines, "").split("\t")
    for line in lines:
        yield dict(zip(columns, line.split("\t")))


def choice(of: Set, row: dict[str, str]) -> dict | None:
    """A multiple-choice sample; None where the row has none of the labels."""
    labels = list(of.choices)
    if row.get(of.label) not in labels:
        return None
    return {"question": of.question.format_map(row).strip(), "choices": list(of.choices.values()),
            "answer": labels.index(row[of.label])}


def similarity(row: dict[str, str]) -> dict | None:
    """A matching sample with its score from 0 to 5, the label being the nearest whole number."""
    if not row.get("score"):
        return None
    score = float(row["score"])
    return {"text": row["sentence1"], "text_pair": row["sentence2"], "label": str(int(score + 0.5)), "score": score}


@command
def main() -> None:
    args = argument_parser(__doc__, "glue", SPLITS).parse_args()
    download = Download(args.input, "the .zip files of https://gluebenchmark.com/tasks", keep=2)
    convert(args, partial(samples, download), SOURCE, LICENCE, download.left_out)


if __name__ == "__main__":
    main()
