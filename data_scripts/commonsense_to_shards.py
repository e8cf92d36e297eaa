"""Eight commonsense sets of texts alone -> shards for multiple choice: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e,
ARC-c and OBQA.

INPUT holds, unpacked or as .zip files, the official downloads (those of a set that is not there are named):
    BoolQ/{train,val}.jsonl                                    of SuperGLUE, https://super.gluebenchmark.com
    physicaliqa-train-dev/{train,dev}.jsonl and -labels.lst    physicaliqa-train-dev.zip of AI2's, see
                                                               https://yonatanbisk.com/piqa
    socialiqa-train-dev/{train,dev}.jsonl and -labels.lst      https://maartensap.com/social-iqa
    hellaswag_{train,val}.jsonl                                https://rowanzellers.com/hellaswag
    winogrande_1.1/{train_xl,dev}.jsonl                        https://winogrande.allenai.org
    ARC-Easy/ and ARC-Challenge/ARC-*-{Train,Dev,Test}.jsonl   https://allenai.org/data/arc
    Data/Main/{train,dev,test}.jsonl                           https://allenai.org/data/open-book-qa

Writes NAME-SET-{train,valid,test} shards. Where the official test set has no answers, test is the official development
set, as the papers on adapters have it (arXiv 2304.01933), and valid every tenth training row, at most about 500; rows
about the same text stay together. Licence: see the home pages; of most CC BY or CC BY-SA.

    python data_scripts/commonsense_to_shards.py downloads/commonsense shards
"""

from collections.abc import Callable, Iterator
from functools import partial

from convert import argument_parser, command, convert, held_out
from download import Download

SOURCE = "BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC and OpenBookQA; home pages: https://super.gluebenchmark.com, " \
         "https://yonatanbisk.com/piqa, https://maartensap.com/social-iqa, https://rowanzellers.com/hellaswag, " \
         "https://winogrande.allenai.org, https://allenai.org/data/arc, https://allenai.org/data/open-book-qa"
LICENCE = "see the home pages"
HELD_OUT = 500
Rows = Iterator[tuple[str, str, list[str], int]]  # text that rows may share, question, choices, the right one's number


def boolq(download: Download, split: str) -> Rows:
    for row in download.jsonl(f"BoolQ/{'val' if split == 'test' else 'train'}.jsonl"):
        yield row["passage"], f"{row['passage']}\nQuestion: {row['question']}?", ["no", "yes"], int(row["label"])


def piqa(download: Download, split: str) -> Rows:
    for row, label in _labelled(download, "physicaliqa-train-dev", split):
        yield row["goal"], f"How would you do this? {row['goal']}", [row["sol1"], row["sol2"]], label


def siqa(download: Download, split: str) -> Rows:
    for row, label in _labelled(download, "socialiqa-train-dev", split):
        choices = [row["answerA"], row["answerB"], row["answerC"]]
        yield row["context"], f"{row['context']} {row['question']}", choices, label - 1


def _labelled(download: Download, folder: str, split: str) -> Iterator[tuple[dict, int]]:
    name = f"{folder}/{'dev' if split == 'test' else 'train'}"
    return zip(download.jsonl(f"{name}.jsonl"), download.jsonl(f"{name}-labels.lst"), strict=True)


def hellaswag(download: Download, split: str) -> Rows:
    for row in download.jsonl(f"hellaswag_{'val' if split == 'test' else 'train'}.jsonl"):
        question = f"How does this go on? {row['activity_label']}: {row['ctx']}"
        yield row["ctx"], question, row["endings"], int(row["label"])


def winogrande(download: Download, split: str) -> Rows:
    for row in download.jsonl(f"winogrande_1.1/{'dev' if split == 'test' else 'train_xl'}.jsonl"):
        twins = row["qID"].partition("-")[0]  # two sentences that differ in a word, and in the answer
        question = f"What does the _ stand for? {row['sentence']}"
        yield twins, question, [row["option1"], row["option2"]], int(row["answer"]) - 1


def arc(level: str, download: Download, split: str) -> Rows:
    part = {"train": "Train", "valid": "Dev", "test": "Test"}[split]
    yield from _lettered(download, f"ARC-{level}/ARC-{level}-{part}.jsonl")


def obqa(download: Download, split: str) -> Rows:
    yield from _lettered(download, f"Data/Main/{'dev' if split == 'valid' else split}.jsonl")


def _lettered(download: Download, name: str) -> Rows:
    for row in download.jsonl(name):
        choices, labels = zip(*((choice["text"], choice["label"]) for choice in row["question"]["choices"]))
        stem = row["question"]["stem"]
        yield stem, stem, list(choices), labels.index(row["answerKey"])


SETS: dict[str, Callable[[Download, str], Rows]] = {
    "boolq": boolq, "piqa": piqa, "siqa": siqa, "hellaswag": hellaswag, "winogrande": winogrande,
    "arc-e": partial(arc, "Easy"), "arc-c": partial(arc, "Challenge"), "obqa": obqa}
OFFICIAL = ("arc-e", "arc-c", "obqa")  # have a valid split of their own
SPLITS = [f"{name}-{split}" for name in SETS for split in ("train", "valid", "test")]


def samples(download: Download, split: str) -> Iterator[dict]:
    name, _, split = split.rpartition("-")
    rows = SETS[name](download, split)
    if name not in OFFICIAL:
        rows = held_out(rows, split, HELD_OUT, text=lambda row: row[0])
    for number, (_, question, choices, answer) in enumerate(rows):
        if len(set(choices)) < len(choices):
            download.left_out["questions with a choice twice"] += 1
            continue
        yield {"task": name, "question": question.strip(), "choices": choices, "answer": answer,
               "question_id": f"{name}/{split}/{number}", "image_id": f"{name}/{split}/{number}"}


@command
def main() -> None:
    args = argument_parser(__doc__, "commonsense", SPLITS).parse_args()
    download = Download(args.input, "the files that --help lists", keep=2)
    convert(args, partial(samples, download), SOURCE, LICENCE, download.left_out)


if __name__ == "__main__":
    main()
