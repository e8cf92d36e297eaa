"""VQA v2 -> shards for VQA with ten human answers, and the list of the most frequent answers.

INPUT holds, unpacked or as .zip files (https://visualqa.org/download.html):
    v2_OpenEnded_mscoco_train2014_questions.json, ..val2014..   from v2_Questions_{Train,Val}_mscoco.zip
    v2_mscoco_train2014_annotations.json, ..val2014..           from v2_Annotations_{Train,Val}_mscoco.zip
    train2014/, val2014/                                        train2014.zip and val2014.zip, https://cocodataset.org

Splits: train (443,757 questions), valid (214,354); test has no public answers. With train, the answers most frequent in
it go into OUT/NAME-answers.txt, one a line, for the `answers` of a config. Licence: annotations CC BY 4.0; for the
pictures Flickr's terms hold.

    python data_scripts/vqav2_to_shards.py downloads/vqav2 shards
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial

from convert import argument_parser, coco_questions, command, convert, positive_int, texts, write_lines
from download import Download

SOURCE = "VQA v2, https://visualqa.org"
LICENCE = "annotations CC BY 4.0; pictures: Flickr terms of use"
ORIGIN = "v2_{Questions,Annotations}_{Train,Val}_mscoco.zip of https://visualqa.org/download.html"
SPLITS = {"train": "train2014", "valid": "val2014"}


def samples(download: Download, split: str) -> Iterator[dict]:
    return coco_questions(download, SPLITS[split], version="v2_")


def frequent_answers(download: Download, count: int) -> list[str]:
    """The answers that most train questions have; among equals those met first."""
    rows = download.json(f"v2_mscoco_{SPLITS['train']}_annotations.json")["annotations"]
    return [answer for answer, _ in Counter(texts(r["multiple_choice_answer"] for r in rows)).most_common(count)]


@command
def main() -> None:
    parser = argument_parser(__doc__, "vqav2", SPLITS)
    parser.add_argument("--answers", type=positive_int, default=3129, help="how many to list; default: 3129")
    args = parser.parse_args()
    download = Download(args.input, ORIGIN)
    convert(args, partial(samples, download), SOURCE, LICENCE)
    if "train" in args.split:
        write_lines(args, "answers", frequent_answers(download, args.answers))


if __name__ == "__main__":
    main()
