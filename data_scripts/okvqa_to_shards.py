"""OK-VQA -> shards for VQA with ten answers.

INPUT holds, unpacked or as .zip files (https://okvqa.allenai.org/download.html):
    OpenEnded_mscoco_{train,val}2014_questions.json   each from the .zip file of its name
    mscoco_{train,val}2014_annotations.json           likewise
    train2014/, val2014/                              train2014.zip and val2014.zip, https://cocodataset.org

Splits: train (9,009 questions), valid (5,046; papers call it test). The answers are those that the official evaluation
compares with (`answer`, not `raw_answer`). Licence: see the home page; for the pictures Flickr's terms hold.

    python data_scripts/okvqa_to_shards.py downloads/okvqa shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, coco_questions, command, convert
from download import Download

SOURCE = "OK-VQA, https://okvqa.allenai.org"
LICENCE = "see the home page; pictures: Flickr terms of use"
ORIGIN = "{OpenEnded_mscoco_*_questions,mscoco_*_annotations}.json.zip of https://okvqa.allenai.org/download.html"
SPLITS = {"train": "train2014", "valid": "val2014"}


def samples(download: Download, split: str) -> Iterator[dict]:
    return coco_questions(download, SPLITS[split], version="")


@command
def main() -> None:
    args = argument_parser(__doc__, "okvqa", SPLITS).parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN)), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
