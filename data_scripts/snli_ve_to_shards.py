"""SNLI-VE -> shards for matching: a picture and a hypothesis that follows from it, contradicts it, or neither.

INPUT holds, unpacked or as .zip files:
    snli_ve_{train,dev,test}.jsonl   as made by https://github.com/necla-ml/SNLI-VE
    flickr30k-images/                the pictures of Flickr30k, also as flickr30k_images/

Splits: train (529,527 pairs), valid (dev: 17,858), test (17,901). Labels: contradiction, neutral, entailment; rows on
which the annotators found no label ("-") are left out. Licence: SNLI CC BY-SA 4.0, SNLI-VE's code BSD-3-Clause;
the pictures for research and education only.

    python data_scripts/snli_ve_to_shards.py downloads/snli_ve shards
"""

from collections.abc import Iterator
from functools import partial

from convert import argument_parser, command, convert
from download import Download

SOURCE = "SNLI-VE, https://github.com/necla-ml/SNLI-VE"
LICENCE = "SNLI CC BY-SA 4.0, SNLI-VE code BSD-3-Clause; pictures of Flickr30k: research and education only"
ORIGIN = "the data of https://github.com/necla-ml/SNLI-VE"
SPLITS = {"train": "train", "valid": "dev", "test": "test"}


def samples(download: Download, split: str) -> Iterator[dict]:
    for row in download.jsonl(f"snli_ve_{SPLITS[split]}.jsonl"):
        if row["gold_label"] == "-":
            download.left_out["without a gold label"] += 1
            continue
        places = [f"{folder}/{row['Flickr30K_ID']}.jpg" for folder in ("flickr30k-images", "flickr30k_images")]
        yield {"image": download.image(*places), "task": "matching", "image_id": f"flickr30k/{row['Flickr30K_ID']}",
               "text": row["sentence2"].strip(), "label": row["gold_label"], "question_id": row["pairID"]}


@command
def main() -> None:
    args = argument_parser(__doc__, "snli-ve", SPLITS).parse_args()
    download = Download(args.input, ORIGIN)
    convert(args, partial(samples, download), SOURCE, LICENCE, download.left_out)


if __name__ == "__main__":
    main()
