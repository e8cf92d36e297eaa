"""easy-VQA (the PyPI package easy-vqa, MIT licence) -> shards for VQA and captioning.

Writes easy-vqa-{vqa,captioning}-{train,valid,test}-*.tar with a manifest each. "valid" holds out the last 200 training
pictures; "test" is the official test split. Captions are derived from the questions and answers.

    python data_scripts/easy_vqa_to_shards.py shards
"""

from collections.abc import Iterator

from convert import argument_parser, command, convert

from vl_mtl_lora.data import examples

SOURCE = "easy-vqa, https://github.com/vzhou842/easy-VQA"
LICENCE = "MIT"
SPLITS = [f"{task}-{split}" for split in ("train", "valid", "test") for task in ("vqa", "captioning")]


def samples(split: str) -> Iterator[dict]:
    task, _, split = split.partition("-")
    return examples.easy_vqa_samples(split) if task == "vqa" else examples.easy_vqa_caption_samples(split)


@command
def main() -> None:
    convert(argument_parser(__doc__, "easy-vqa", SPLITS, source=None).parse_args(), samples, SOURCE, LICENCE)


if __name__ == "__main__":
    main()
