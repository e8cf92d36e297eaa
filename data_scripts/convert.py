"""What the converters share: the command line, the dry run, the writing of shards, layouts that several sets have.

A converter is a generator `samples` that turns annotations into the samples of `vl_mtl_lora.data.schema`. It names
pictures and never reads them, so that counting samples, a dry run and resuming cost no decoding.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from download import Download
from tqdm import tqdm

from vl_mtl_lora.data.shards import check_sample, partial_file, write_shards
from vl_mtl_lora.errors import BadSample, UserError

_MOST_TOLD = 20  # problems of a split that a dry run lists


def texts(values: Iterable[str]) -> list[str]:
    """Texts without outer spaces; blank ones, which some annotators left, are dropped."""
    return [text for value in values if (text := value.strip())]


def held_out(rows: Iterable[Any], split: str, most: int, text: Callable[[Any], Any]) -> list[Any]:
    """Of training rows "valid" is every tenth, or fewer where that is more than about `most`, and "train" the others;
    "test" is all of its own. Some sets are ordered by where they come from. Rows about the same `text` stay together.
    """
    rows = list(rows)
    if split == "test":
        return rows
    step = max(10, -(-len(rows) // most))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(map(text, rows)))}
    return [row for row in rows if (numbers[text(row)] % step == step - 1) == (split == "valid")]


def karpathy_captions(download: Download, name: str, splits: Sequence[str], tasks: Sequence[str]) -> Iterator[dict]:
    """Caption samples of Karpathy's splits of "coco" or "flickr30k": of each picture one per task, in a row."""
    for row in download.json(f"dataset_{name}.json")["images"]:
        if row["split"] in splits:
            folder, number = row.get("filepath", f"{name}-images"), row.get("cocoid", Path(row["filename"]).stem)
            sample = {"image": download.image(f"{folder}/{row['filename']}"), "image_id": f"{name}/{number}",
                      "captions": texts(sentence["raw"] for sentence in row["sentences"])}
            for task in tasks:
                yield {**sample, "task": task}


def coco_questions(download: Download, folder: str, version: str) -> Iterator[dict]:
    """Questions in the VQA challenge's layout about pictures of COCO 2014; those of a picture follow each other."""
    questions = download.json(f"{version}OpenEnded_mscoco_{folder}_questions.json")["questions"]
    rows = download.json(f"{version}mscoco_{folder}_annotations.json")["annotations"]
    answers = {row["question_id"]: texts(answer["answer"] for answer in row["answers"]) for row in rows}
    types = {row["question_id"]: {name: row[name] for name in ("answer_type", "question_type") if row.get(name)}
             for row in rows}  # accuracy is reported by them
    for row in sorted(questions, key=lambda row: row["image_id"]):
        yield {"image": download.image(f"{folder}/COCO_{folder}_{row['image_id']:012d}.jpg"), "task": "vqa",
               "image_id": f"coco/{row['image_id']}", "question": row["question"].strip(),
               "answers": answers[row["question_id"]], "question_id": row["question_id"], **types[row["question_id"]]}


def argument_parser(doc: str, name: str, splits: Iterable[str] = (),
                    source: str | None = "folder of the download; its .zip files need not be unpacked"
                    ) -> argparse.ArgumentParser:
    """The options that all converters have.

    name: what shards are called by default. splits: those of the data set; without any there is no --split. source:
    what INPUT is; None: there is no INPUT.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if source:
        parser.add_argument("input", metavar="INPUT", type=Path, help=source)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    if splits:
        parser.add_argument("--split", nargs="+", choices=list(splits), default=list(splits), help="default: all")
    else:
        parser.set_defaults(split=[""])
    called = "NAME-SPLIT-000000.tar" if splits else "NAME-000000.tar"
    parser.add_argument("--name", default=name, help=f"shards are called {called} and so on; default: {name}")
    parser.add_argument("--samples-per-shard", type=positive_int, default=2000, help="default: 2000")
    parser.add_argument("--max-side", type=positive_int, help="scale larger pictures down to so many pixels")
    parser.add_argument("--limit", type=positive_int, help="only so many samples of each split")
    parser.add_argument("--skip-broken", action="store_true",
                        help="leave out samples that cannot be used, and name them in the manifest")
    parser.add_argument("--resume", action="store_true",
                        help="go on with a write that broke off; splits that are whole stay as they are")
    parser.add_argument("--dry-run", action="store_true",
                        help="count the samples and look for every picture; write nothing")
    return parser


def add_origin(parser: argparse.ArgumentParser) -> None:
    """Options for data whose origin the script cannot know."""
    parser.add_argument("--source", default="", help="where the data comes from, for the manifest")
    parser.add_argument("--licence", "--license", default="", help="the data's licence, for the manifest")


def positive_int(text: str) -> int:
    """For options that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def convert(args: argparse.Namespace, samples: Callable[[str], Iterable[Mapping[str, Any]]], source: str, licence: str,
            left_out: Counter[str] | None = None) -> None:
    """Writes the shards of each split that `args` names, or makes the dry run. Exits with 1 where that finds a problem.

    samples: a split -> its samples. They are gone through twice, first to count them: an annotation file that is
        missing or damaged shows before hours of writing.
    left_out: what `samples` counts while it runs.
    """
    names = {split: f"{args.name}-{split}" if split else args.name for split in args.split}
    left_out = Counter() if left_out is None else left_out
    counts, broken = {}, False
    for split, name in names.items():
        left_out.clear()
        tasks, problems = _survey(islice(_rows(samples(split), source), args.limit), name, args.dry_run)
        if not tasks:
            raise UserError("".join([f"there is no sample for {name}; --help names the files that are expected",
                                     *(f"\n  left out: {count:,} {reason}" for reason, count in left_out.items())]))
        counts[split], broken = tasks.total(), broken or bool(problems)
        print(f"{name}: {_told(tasks)}")
        print("".join(f"  left out: {count:,} {reason}\n" for reason, count in left_out.items()), end="")
        print("".join(f"  {problem}\n" for problem in problems[:_MOST_TOLD]), end="")
        if len(problems) > _MOST_TOLD:
            print(f"  and {len(problems) - _MOST_TOLD:,} more")
    if args.dry_run:
        if broken:
            sys.exit(1)
        return
    for split, name in names.items():
        if args.resume and _is_whole(args.out, name, counts[split], args):
            print(f"{name} is whole already")
            continue
        rows = tqdm(islice(_rows(samples(split), source), args.limit), total=counts[split], desc=name, unit="sample",
                    disable=None)
        manifest = write_shards(rows, args.out, name=name, samples_per_shard=args.samples_per_shard, source=source,
                                licence=licence, max_side=args.max_side, skip_broken=args.skip_broken,
                                resume=args.resume)
        print(f"wrote {args.out / name}-*.tar: {_told(manifest['tasks'])}, shards: {len(manifest['shards']):,}"
              + (f", skipped: {len(manifest['skipped']):,}" if manifest["skipped"] else ""))


def write_lines(args: argparse.Namespace, what: str, lines: Sequence[str]) -> None:
    """Writes OUT/NAME-WHAT.txt, unless the run is a dry one."""
    if not args.dry_run:
        file = args.out / f"{args.name}-{what}.txt"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"wrote {file}: {len(lines):,} {what}")


def _rows(samples: Iterable[Mapping[str, Any]], source: str) -> Iterator[Mapping[str, Any]]:
    try:
        yield from samples
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"the annotations have not the layout of {source or 'the format'}: {type(error).__name__}: "
                        f"{error}; --help names the official files") from error


def _survey(samples: Iterable[Mapping[str, Any]], name: str, check: bool) -> tuple[Counter[str], list[str]]:
    """Counts samples by task; `check`: also what is wrong with them, each missing picture once."""
    tasks, problems = Counter(), {}
    for number, sample in enumerate(tqdm(samples, desc=f"count {name}", unit="sample", disable=None)):
        tasks[str(sample.get("task"))] += 1
        if check:
            problems |= dict.fromkeys(_problems(number, sample))
    return tasks, list(problems)


def _problems(number: int, sample: Mapping[str, Any]) -> Iterator[str]:
    try:
        _, images = check_sample(sample)
    except BadSample as problem:
        yield f"sample {number}: {problem}"
        return
    for image in images:
        place = Path(image) if isinstance(image, str) else image
        if not (hasattr(place, "exists") and place.exists()):
            yield f"missing: {image}"


def _told(tasks: Mapping[str, int]) -> str:
    listed = ", ".join(f"{task} {count:,}" for task, count in sorted(tasks.items()))
    return f"{sum(tasks.values()):,} samples ({listed})"


def _is_whole(out: Path, name: str, samples: int, args: argparse.Namespace) -> bool:
    """Whether the shards of a split are there and were made of as many samples in the same way."""
    try:
        manifest = json.loads((out / f"{name}.manifest.json").read_text(encoding="utf-8"))
        sizes = [(out / shard["file"]).stat().st_size == shard["bytes"] for shard in manifest["shards"]]
        same = (manifest["samples"] + len(manifest["skipped"]) == samples
                and (manifest["samples_per_shard"], manifest["max_side"]) == (args.samples_per_shard, args.max_side))
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return same and all(sizes) and not partial_file(out, name).exists()


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A script's `main` that tells errors in one line: exit code 2 for them, 130 after Ctrl-C."""
    @functools.wraps(main)
    def told() -> None:
        try:
            main()
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; go on with --resume", file=sys.stderr)
            sys.exit(130)
    return told
