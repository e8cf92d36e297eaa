"""GQA, the balanced questions -> shards for VQA.

INPUT holds, unpacked or as .zip files (https://cs.stanford.edu/people/dorarad/gqa/download.html):
    {train,val,testdev}_balanced_questions.json   from questions1.2.zip
    images/                                       images.zip

Splits: train (943,000 questions), valid (132,062), test (testdev: 12,578). Licence: CC BY 4.0; the pictures are
those of Visual Genome.

    python data_scripts/gqa_to_shards.py downloads/gqa shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, command, convert
from download import Download

SOURCE = "GQA, https://cs.stanford.edu/people/dorarad/gqa/"
LICENCE = "CC BY 4.0"
ORIGIN = "questions1.2.zip of https://cs.stanford.edu/people/dorarad/gqa/download.html"
SPLITS = {"train": "train", "valid": "val", "test": "testdev"}


def samples(download: Download, split: str) -> Iterator[dict]:
    questions = download.json(f"{SPLITS[split]}_balanced_questions.json")
    for number, row in sorted(questions.items(), key=lambda item: item[1]["imageId"]):  # a picture is read once
        yield {"image": download.image(f"images/{row['imageId']}.jpg"), "task": "vqa",
               "image_id": f"vg/{row['imageId']}", "question": row["question"].strip(),
               "answers": [row["answer"].strip()], "question_id": number,
               **({"question_type": row["types"]["structural"]} if "types" in row else {})}  # verify, query, ..


@command
def main() -> None:
    args = argument_parser(__doc__, "gqa", SPLITS).parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN)), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
