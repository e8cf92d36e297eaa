"""LLaVA's instruction data -> shards for VQA: each turn of a conversation is a question with one answer.

INPUT holds, unpacked or as .zip files:
    llava_instruct_150k.json         from https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; or another
                                     file of there, such as llava_v1_5_mix665k.json: name it with --file
    train2017/ (or train2014/ and    train2017.zip, https://cocodataset.org; for mix665k also gqa/images/,
    val2014/)                        ocr_vqa/images/, textvqa/train_images/, vg/VG_100K/ and vg/VG_100K_2/

A question stands alone, without the turns before it. Entries without a picture are left out. Licence: CC BY 4.0, made
with GPT-4: OpenAI's terms of use hold; each set of pictures has its own.

    python data_scripts/llava_instruct_to_shards.py downloads/llava shards
"""

from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from convert import argument_parser, command, convert
from download import Download

SOURCE = "LLaVA-Instruct, https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"
LICENCE = "CC BY 4.0, subject to OpenAI's terms of use; pictures: those of each set"
ORIGIN = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; --file names another one"
SPLITS = ("train",)


def samples(download: Download, file: str, split: str) -> Iterator[dict]:
    for number, entry in enumerate(download.json(file)):
        if not entry.get("image"):
            download.left_out["entries without a picture"] += 1
            continue
        names, image_id = picture(entry["image"])
        turns = entry["conversations"]
        for turn, (asked, told) in enumerate(zip(turns[::2], turns[1::2])):
            if (asked["from"], told["from"]) != ("human", "gpt"):
                download.left_out["turns that are no question and answer"] += 1
                continue
            yield {"image": download.image(*names), "task": "vqa", "image_id": image_id,
                   "question": asked["value"].replace("<image>", "").strip(), "answers": [told["value"].strip()],
                   "question_id": f"{entry['id']}/{number}/{turn}"}  # ids occur several times


def picture(image: str) -> tuple[list[str], str]:
    """Where a picture may lie, and its id, the same as in the other converters."""
    path = PurePosixPath(image)
    if len(path.parts) == 1 or path.parts[0] == "coco":
        number = int(path.stem.rpartition("_")[2])  # the same in all releases of COCO
        return [f"train2017/{number:012d}.jpg", f"train2014/COCO_train2014_{number:012d}.jpg",
                f"val2014/COCO_val2014_{number:012d}.jpg"], f"coco/{number}"
    return [image], f"{'vg' if path.parts[0] == 'gqa' else path.parts[0]}/{path.stem}"


@command
def main() -> None:
    parser = argument_parser(__doc__, "llava-instruct", SPLITS)
    parser.add_argument("--file", default="llava_instruct_150k.json", help="default: llava_instruct_150k.json")
    args = parser.parse_args()
    download = Download(args.input, ORIGIN)
    convert(args, partial(samples, download, args.file), SOURCE, LICENCE, download.left_out)


if __name__ == "__main__":
    main()
