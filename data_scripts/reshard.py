"""Shards of img2dataset, of CLIP_benchmark, or our own -> our shards, tagged and of another size.

INPUT is a folder with .tar files, or a quoted glob of them. --format says what is in them:
    img2dataset      KEY.jpg, KEY.txt with one caption; KEY.json, its metadata, is not needed
    clip_benchmark   KEY.{jpg,png,webp}, and KEY.txt with a caption a line, or KEY.cls with the number of a class, whose
                     name stands in classnames.txt beside the .tar files or one folder above
    tagged           what write_shards writes: one or several pictures and KEY.json

Samples get the tag --task and "NAME/KEY" for an image_id; those of format tagged keep both, and --task picks the
samples of one tag. What has no picture, no text or is damaged is left out, and told. Nothing is unpickled. Licence:
that of the shards, see --licence.

    python data_scripts/reshard.py downloads/cc3m shards --name cc3m --format img2dataset --task retrieval
"""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import BinaryIO

from convert import add_origin, argument_parser, command, convert

from vl_mtl_lora.data.records import description, image_places, tagged_fields, untagged_fields
from vl_mtl_lora.data.tar import Record, read_records
from vl_mtl_lora.errors import BadSample, UserError

FORMATS = ("img2dataset", "clip_benchmark", "tagged")


@dataclass(frozen=True)
class Member:
    """A file inside a tar, read when its bytes are asked for."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"

    def exists(self) -> bool:
        return True

    def read_bytes(self) -> bytes:
        with open(self.tar, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def samples(tars: Sequence[Path], form: str, task: str | None, name: str, left_out: Counter[str],
            split: str) -> Iterator[dict]:
    for tar in tars:
        with open(tar, "rb") as stream:
            for record in read_records(stream):
                try:
                    fields = fields_of(stream, tar, record, form, task, name)
                except BadSample as problem:
                    left_out[f"{tar}: {record.key or 'the rest'}: {problem}"] += 1
                    continue
                images = [Member(tar, f"{record.key}, image {i}", *place)
                          for i, place in enumerate(image_places(record))]
                if form == "tagged" and task not in (None, fields["task"]):
                    continue
                if not images and form != "tagged":
                    left_out["records without a picture"] += 1
                elif len(images) == 1:
                    yield {**fields, "image": images[0]}
                else:
                    yield {**fields, "images": images} if images else fields


def fields_of(stream: BinaryIO, tar: Path, record: Record, form: str, task: str | None, name: str) -> dict:
    """What a record says, read as training reads it. Raises BadSample."""
    if form == "tagged":
        return tagged_fields(description(stream, record, form)[1])
    kind = "classification" if form == "clip_benchmark" and "cls" in record.members else "captions"
    labels = class_names(tar.parent) if kind == "classification" else None
    fields = untagged_fields(description(stream, record, form, kind)[1], f"{name}/{record.key}", task, kind, form,
                             labels)
    if fields.get("captions") == []:
        raise BadSample("no text")
    return fields


@cache
def class_names(folder: Path) -> list[str]:
    for file in (folder / "classnames.txt", folder.parent / "classnames.txt"):
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    raise UserError(f"classnames.txt is neither in {folder} nor in {folder.parent}; it names the classes of .cls files")


def tar_files(where: Path, out: Path) -> list[Path]:
    files = where.glob("*.tar") if where.is_dir() else map(Path, glob.glob(str(where)))
    files = sorted(files, key=lambda file: (len(file.name), file))  # 2.tar stands before 10.tar
    if not files:
        raise UserError(f"no .tar file in {where}; expected a folder that holds them, or a quoted glob")
    if any(file.parent.resolve() == out.resolve() for file in files):
        raise UserError(f"{out} holds the shards to read; give another folder, so that none is overwritten")
    return files


@command
def main() -> None:
    parser = argument_parser(__doc__, "shard", source="folder with .tar files, or a glob of them in quotes")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what is in INPUT")
    parser.add_argument("--task", help="the samples' tag; with --format tagged: only samples of this tag")
    add_origin(parser)
    args = parser.parse_args()
    if args.format != "tagged" and not args.task:
        parser.error(f"--format {args.format} needs --task, the tag of the samples")
    left_out: Counter[str] = Counter()
    convert(args, partial(samples, tar_files(args.input, args.out), args.format, args.task, args.name, left_out),
            args.source, args.licence, left_out)


if __name__ == "__main__":
    main()
