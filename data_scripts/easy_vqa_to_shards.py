"""easy-VQA (the PyPI package easy-vqa, MIT licence) -> shards for VQA, captioning and matching.

Writes easy-vqa-{vqa,captioning,matching,reading}-{train,valid,test}-*.tar with a manifest each. "valid" holds out the
last 200 training pictures; "test" is the official test split. Captions are derived from the questions and answers;
"reading" has them in place of the pictures.

    python data_scripts/easy_vqa_to_shards.py shards
"""

from collections.abc import Iterator

from convert import argument_parser, command, convert

from vl_mtl_lora.data import examples

SOURCE = "easy-vqa, https://github.com/vzhou842/easy-VQA"
LICENCE = "MIT"
SPLITS = [f"{task}-{split}" for split in examples.SPLITS for task in examples.EASY_VQA]


def samples(split: str) -> Iterator[dict]:
    task, _, split = split.partition("-")
    return examples.EASY_VQA[task](split)


@command
def main() -> None:
    convert(argument_parser(__doc__, "easy-vqa", SPLITS, source=None).parse_args(), samples, SOURCE, LICENCE)


if __name__ == "__main__":
    main()
