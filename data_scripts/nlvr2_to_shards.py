"""NLVR2 -> shards for matching: two pictures and a sentence that is true or false of them.

INPUT holds, unpacked or as .zip files:
    {train,dev,test1}.json       from nlvr2/data of https://github.com/lil-lab/nlvr
    images/train/, dev/, test1/  the pictures, to be asked for at https://lil.nlp.cornell.edu/nlvr/

Splits: train (86,373 sentences), valid (dev: 6,982), test (test1: 6,967). Labels: true, false. Licence: annotations
CC BY 4.0; the pictures belong to their owners.

    python data_scripts/nlvr2_to_shards.py downloads/nlvr2 shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, command, convert
from download import Download

SOURCE = "NLVR2, https://lil.nlp.cornell.edu/nlvr/"
LICENCE = "annotations CC BY 4.0; pictures: see the home page"
ORIGIN = "nlvr2/data of https://github.com/lil-lab/nlvr"
SPLITS = {"train": "train", "valid": "dev", "test": "test1"}


def samples(download: Download, split: str) -> Iterator[dict]:
    for row in download.jsonl(f"nlvr2/data/{SPLITS[split]}.json"):
        pair = row["identifier"].rpartition("-")[0]  # several sentences are about one pair of pictures
        folder = f"images/train/{row['directory']}" if split == "train" else SPLITS[split]
        yield {"images": [download.image(f"{folder}/{pair}-img{side}.png") for side in (0, 1)], "task": "matching",
               "image_id": f"nlvr2/{pair}", "text": row["sentence"].strip(), "label": row["label"].lower(),
               "question_id": row["identifier"]}


@command
def main() -> None:
    args = argument_parser(__doc__, "nlvr2", SPLITS).parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN)), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
