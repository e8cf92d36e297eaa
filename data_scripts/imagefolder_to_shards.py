"""Folders of pictures, one per class, in the manner of ImageNet -> shards for classification.

INPUT holds SPLIT/CLASS/*.jpg with splits train, val (valid, validation) and test, or CLASS/*.jpg, which counts as
train. Every file with a picture's extension is one sample; a fixed shuffle mixes the classes in each shard. The label
is the folder's name, or what --names makes of it. The classes go into OUT/NAME-classes.txt, in the order of their
folders. Licence: that of your pictures, see --licence.

    python data_scripts/imagefolder_to_shards.py downloads/imagenet shards --name imagenet --names synset_words.txt
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from convert import add_origin, argument_parser, command, convert, write_lines

from vl_mtl_lora.errors import UserError

SPLITS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}


def samples(folders: Mapping[str, Path], labels: Mapping[str, str], name: str, split: str) -> Iterator[dict]:
    files = [(folder.name, file.name) for folder in subfolders(folders[split]) for file in sorted(folder.iterdir())
             if file.suffix.lower() in EXTENSIONS]
    random.Random(0).shuffle(files)
    for folder, file in files:
        yield {"image": folders[split] / folder / file, "task": "classification",
               "image_id": f"{name}/{split}/{folder}/{file}", "label": labels[folder]}


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def split_folders(root: Path, splits: list[str]) -> dict[str, Path]:
    """The folders with the classes of each wanted split that exists."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder; expected one that holds SPLIT/CLASS/*.jpg or CLASS/*.jpg")
    found = {split: root / name for split, names in SPLITS.items() for name in names
             if (root / name).is_dir() and subfolders(root / name)} or {"train": root}
    flat = [(split, root / name) for split in splits for name in SPLITS[split]
            if (root / name).is_dir() and not subfolders(root / name)]
    for split, folder in flat:
        if split != "test":
            raise UserError(f"{folder} holds no folders of classes: sort its pictures into them, or name the other "
                            "splits with --split")
        print(f"left out: {folder} holds no folders of classes, so no labels", file=sys.stderr)
    wanted = {split: folder for split, folder in found.items() if split in splits}
    if not wanted:
        raise UserError(f"{root} has no split {' or '.join(splits)}, only {', '.join(found)}")
    return wanted


def class_labels(folders: list[str], names: Path | None) -> dict[str, str]:
    """Folder -> label. `names`: a file with lines "n01440764 tench, Tinca tinca", or JSON {"n01440764": "tench"}."""
    if names is None:
        return {folder: folder for folder in folders}
    try:
        text = names.read_text(encoding="utf-8").strip()
        table = json.loads(text) if text.startswith("{") else dict(line.split(None, 1) for line in text.splitlines())
        first = {folder: table[folder].partition(",")[0].strip() for folder in folders}
    except KeyError as error:
        raise UserError(f"{names} has no name for the folder {error}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f'{names}: expected lines "n01440764 tench, Tinca tinca" or JSON {{"n01440764": "tench"}}: '
                        f"{error}") from error
    times = Counter(first.values())  # ImageNet has two classes called crane
    return {folder: name if times[name] == 1 else f"{name} ({folder})" for folder, name in first.items()}


@command
def main() -> None:
    parser = argument_parser(__doc__, "imagefolder", SPLITS, source="folder with SPLIT/CLASS/*.jpg or CLASS/*.jpg")
    parser.add_argument("--names", type=Path, help="file with the classes' names, of which the first is taken")
    add_origin(parser)
    args = parser.parse_args()
    folders = split_folders(args.input, args.split)
    args.split = list(folders)
    classes = sorted({path.name for folder in folders.values() for path in subfolders(folder)})
    labels = class_labels(classes, args.names)
    convert(args, partial(samples, folders, labels, args.name), args.source, args.licence)
    write_lines(args, "classes", [labels[folder] for folder in classes])


if __name__ == "__main__":
    main()
