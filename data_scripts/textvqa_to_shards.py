"""TextVQA -> shards for VQA with ten human answers.

INPUT holds, unpacked or as .zip files (https://textvqa.org/dataset/):
    TextVQA_0.5.1_{train,val}.json
    train_images/                    from train_val_images.zip; the pictures of both splits

Splits: train (34,602 questions), valid (5,000); test has no public answers. Licence: CC BY 4.0; the pictures are those
of Open Images.

    python data_scripts/textvqa_to_shards.py downloads/textvqa shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, command, convert, texts
from download import Download

SOURCE = "TextVQA 0.5.1, https://textvqa.org"
LICENCE = "CC BY 4.0"
ORIGIN = "the list of files on https://textvqa.org/dataset/"
SPLITS = {"train": "train", "valid": "val"}


def samples(download: Download, split: str) -> Iterator[dict]:
    rows = download.json(f"TextVQA_0.5.1_{SPLITS[split]}.json")["data"]
    for row in sorted(rows, key=lambda row: row["image_id"]):
        yield {"image": download.image(f"train_images/{row['image_id']}.jpg"), "task": "vqa",
               "image_id": f"textvqa/{row['image_id']}", "question": row["question"].strip(),
               "answers": texts(row["answers"]), "question_id": row["question_id"]}


@command
def main() -> None:
    args = argument_parser(__doc__, "textvqa", SPLITS).parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN)), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
