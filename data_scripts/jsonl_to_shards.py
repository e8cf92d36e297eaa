"""A JSON-lines file of samples and the images it names -> shards. Start here with your own data.

Each line is one sample: "image" (a path, absolute or relative to the file; "images": a list of them), "task" (the tag),
"image_id", and
    retrieval, captioning:  "captions": ["a dog", ...]
    vqa:                    "question": "...", "answers": ["..."], "question_id": ...
    classification:         "label": "dog"; instead of an image also "text"
    multiple_choice:        "question": "...", "choices": ["...", ...], "answer": 0, "question_id": ...
    matching:               "text": "...", "label": "true"; instead of an image also "text_pair"

Licence: that of your data, see --licence.

    python data_scripts/jsonl_to_shards.py samples.jsonl shards --name train
"""

from convert import add_origin, argument_parser, command, convert

from vl_mtl_lora.data.shards import read_jsonl


@command
def main() -> None:
    parser = argument_parser(__doc__, "shard", source="the JSON-lines file")
    add_origin(parser)
    args = parser.parse_args()
    convert(args, lambda split: read_jsonl(args.input), args.source, args.licence)


if __name__ == "__main__":
    main()
