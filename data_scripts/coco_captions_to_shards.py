"""COCO captions in Karpathy's splits -> shards for retrieval and captioning.

INPUT holds, unpacked or as .zip files:
    dataset_coco.json        from caption_datasets.zip, https://cs.stanford.edu/people/karpathy/deepimagesent/
    train2014/, val2014/     train2014.zip and val2014.zip, https://cocodataset.org

Splits: train (113,287 pictures: Karpathy's train and restval), valid (5,000), test (5,000). The 30,504 of restval are
of val2014, on which VQA v2 is tested: leave them out where both are trained. Each picture becomes one sample per task,
with all its captions. Licence: annotations CC BY 4.0; for the pictures Flickr's terms hold.

    python data_scripts/coco_captions_to_shards.py downloads/coco shards
"""

from collections.abc import Iterator, Sequence
from functools import partial

from convert import argument_parser, command, convert, karpathy_captions
from download import Download

SOURCE = "COCO captions, Karpathy's splits, https://cocodataset.org"
LICENCE = "annotations CC BY 4.0; pictures: Flickr terms of use"
ORIGIN = "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
SPLITS = {"train": "train", "valid": "val", "test": "test"}
TASKS = ("retrieval", "captioning")


def samples(download: Download, tasks: Sequence[str], restval: bool, split: str) -> Iterator[dict]:
    more = ["restval"] if restval and split == "train" else []
    return karpathy_captions(download, "coco", [SPLITS[split], *more], tasks)


@command
def main() -> None:
    parser = argument_parser(__doc__, "coco", SPLITS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    parser.add_argument("--no-restval", action="store_true", help="train without restval: 82,783 pictures")
    args = parser.parse_args()
    download = Download(args.input, ORIGIN)
    convert(args, partial(samples, download, args.tasks, not args.no_restval), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
