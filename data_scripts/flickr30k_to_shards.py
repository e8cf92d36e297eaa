"""Flickr30k in Karpathy's splits -> shards for retrieval and captioning.

INPUT holds, unpacked or as .zip files:
    dataset_flickr30k.json   from caption_datasets.zip, https://cs.stanford.edu/people/karpathy/deepimagesent/
    flickr30k-images/        flickr30k-images.tar.gz (unpack it), https://shannon.cs.illinois.edu/DenotationGraph/

Splits: train (29,000 pictures), valid (1,014), test (1,000). Each picture becomes one sample per task, with all its
captions. Licence: for research and education only; for the pictures Flickr's terms hold.

    python data_scripts/flickr30k_to_shards.py downloads/flickr30k shards
"""

from collections.abc import Iterator, Sequence
from functools import partial

from convert import argument_parser, command, convert, karpathy_captions
from download import Download

SOURCE = "Flickr30k, Karpathy's splits, https://shannon.cs.illinois.edu/DenotationGraph/"
LICENCE = "research and education only; pictures: Flickr terms of use"
ORIGIN = "caption_datasets.zip of https://cs.stanford.edu/people/karpathy/deepimagesent/"
SPLITS = {"train": ("train",), "valid": ("val",), "test": ("test",)}
TASKS = ("retrieval", "captioning")


def samples(download: Download, tasks: Sequence[str], split: str) -> Iterator[dict]:
    return karpathy_captions(download, "flickr30k", SPLITS[split], tasks)


@command
def main() -> None:
    parser = argument_parser(__doc__, "flickr30k", SPLITS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    args = parser.parse_args()
    convert(args, partial(samples, Download(args.input, ORIGIN), args.tasks), SOURCE, LICENCE)


if __name__ == "__main__":
    main()
