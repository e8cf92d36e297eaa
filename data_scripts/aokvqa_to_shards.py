"""A-OKVQA -> shards for multiple choice, or for VQA with ten direct answers.

INPUT holds, unpacked or as .zip files:
    aokvqa_v1p0_{train,val}.json   from aokvqa_v1p0.tar.gz (unpack it), https://allenai.org/project/a-okvqa
    train2017/, val2017/           train2017.zip and val2017.zip, https://cocodataset.org

Splits: train (17,056 questions), valid (1,145); test has no public answers. Licence: Apache-2.0; for the pictures
Flickr's terms hold.

    python data_scripts/aokvqa_to_shards.py downloads/aokvqa shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, command, convert, texts
from download import Download

SOURCE = "A-OKVQA, https://allenai.org/project/a-okvqa"
LICENCE = "Apache-2.0; pictures: Flickr terms of use"
ORIGIN = "aokvqa_v1p0.tar.gz of https://allenai.org/project/a-okvqa, to be unpacked"
SPLITS = {"train": "train", "valid": "val"}


def samples(download: Download, direct: bool, split: str) -> Iterator[dict]:
    rows = download.json(f"aokvqa_v1p0_{SPLITS[split]}.json")
    for row in sorted(rows, key=lambda row: row["image_id"]):
        sample = {"image": download.image(f"{SPLITS[split]}2017/{row['image_id']:012d}.jpg"),
                  "image_id": f"coco/{row['image_id']}", "question": row["question"].strip(),
                  "question_id": row["question_id"]}
        if direct:
            yield {**sample, "task": "vqa", "answers": texts(row["direct_answers"])}
        else:
            right = row["choices"][row["correct_choice_idx"]]
            choices = list(dict.fromkeys(row["choices"]))  # one written twice would make two right answers
            yield {**sample, "task": "multiple_choice", "choices": choices, "answer": choices.index(right)}


@command
def main() -> None:
    parser = argument_parser(__doc__, "aokvqa", SPLITS)
    parser.add_argument("--direct", action="store_true", help="VQA samples with the direct answers instead")
    args = parser.parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN), args.direct), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
