"""A picture, a folder of pictures or a file of requests -> records with a model's answers, a batch at a time."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vl_mtl_lora.data.schema import IMAGE_EXTENSIONS
from vl_mtl_lora.data.shards import read_jsonl
from vl_mtl_lora.errors import BadSample, UserError
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.predict import Asked, answer, check_request
from vl_mtl_lora.tasks.base import Reply, Task

Request = Mapping[str, Any]
_SHOWN = 100  # of the pictures found, in a terminal


def predict_files(model: MultiTaskModel, path: str | Path, tasks: Sequence[str] = (), texts: Sequence[str] = (), *,
                  arms: Sequence[str] = ("adapted",), rows: int = 64,
                  skip: Callable[[str, BadSample], None]) -> Iterator[dict[str, Any]]:
    """Answers about one picture, all pictures of a folder and the folders in it, or a JSON-lines file of requests.

    Args:
        tasks: those to ask; none: each that one picture and the texts are enough for. A file has its own.
        texts: what the tasks ask for, in the order of their fields.
        rows: requests that go through the model at once.
        skip: is told of each picture that cannot be used.

    Yields:
        {"image" or "images", "task", what was asked, and for each arm {"answer", "scores": [[text, score], ..]}}. One
        text that pictures of a folder are searched for gives one record, after the others, with
        {"images": [[image, score], ..]} of each arm, best first.

    Raises:
        UserError: a folder without pictures, an unknown task, texts that do not fit a task, a request that does not.
    """
    path = Path(path)
    requests, total = _requests(model, path, tasks, texts)
    model.eval()
    searched: dict[str, dict[str, list]] = {}  # task -> arm -> [image, score] of all pictures
    searching = path.is_dir() and len(texts) == 1
    with tqdm(total=total, unit="request", leave=False, delay=2, disable=None) as bar:
        while part := list(itertools.islice(requests, rows)):
            for (request, _), found in zip(part, answer(model, [asked for _, asked in part], arms)):
                bar.update()
                if isinstance(found, BadSample):
                    skip(_images(request), found)
                elif searching and model.tasks[request["task"]].kind == "retrieval":
                    for arm, reply in found.items():
                        pairs = searched.setdefault(request["task"], {}).setdefault(arm, [])
                        pairs.append([_images(request), reply.scores[0][1]])
                else:
                    yield {**_plain(request), **{arm: _said(reply) for arm, reply in found.items()}}
    for task, of_arms in searched.items():
        yield {"task": task, "captions": list(texts), **{arm: {"images": sorted(pairs, key=lambda pair: -pair[1])}
                                                         for arm, pairs in of_arms.items()}}


def as_json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def write_lines(lines: Iterable[str], path: Path) -> int:
    """Writes lines to a file, all or nothing; returns how many. Raises UserError where it cannot be written."""
    part, count = path.with_name(path.name + ".part"), 0
    try:
        with open(part, "w", encoding="utf-8") as file:
            for count, line in enumerate(lines, 1):  # noqa: B007
                file.write(line + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def as_text(record: Mapping[str, Any]) -> str:
    """A record as lines for a terminal."""
    arms = [arm for arm in ("zero_shot", "adapted") if arm in record]
    asked = [record[name] for name in ("question", "text", "text_pair", "captions", "choices") if name in record]
    about = " / ".join(", ".join(each) if isinstance(each, list) else each for each in asked)
    image = record.get("image") or ", ".join(record.get("images", ()))
    lines = [": ".join(filter(None, ("  ".join(filter(None, (image, record["task"]))), about)))]
    for arm in arms:
        said, name = record[arm], f"  {arm.replace('_', '-') + ':':<11}" if len(arms) > 1 else "  "
        if "images" in said:
            lines += [f"{name}{score:.3f}  {image}" for image, score in said["images"][:_SHOWN]]
            continue
        scores = said.get("scores", [])
        shown = ", ".join(f"{text} {score:.3f}" for text, score in scores)
        lines.append(f"{name}{said['answer']}" + f"  ({shown})" * any(text == said["answer"] for text, _ in scores))
    return "\n".join(lines)


def fields_from(task: Task, texts: Sequence[str]) -> dict[str, Any] | None:
    """What a task asks for, taken from texts in order: a list of texts takes all that are left.

    Returns:
        None where there are too few or too many.
    """
    fields: dict[str, Any] = {}
    left = list(texts)
    for name in task.asks:
        if isinstance(task.example[name], list):
            fields[name], left = left, []
        elif left:
            fields[name] = left.pop(0)
    return None if left or not all(map(fields.get, task.asks)) else fields


def _requests(model: MultiTaskModel, path: Path, tasks: Sequence[str],
              texts: Sequence[str]) -> tuple[Iterator[tuple[Request, Asked]], int]:
    """What is asked, and how many requests that makes."""
    if path.suffix == ".jsonl":
        if tasks or texts:
            raise UserError(f"{path} has the task and the texts of each request; leave out --task and --text")
        found = list(_checked(model, read_jsonl(path), str(path)))
        return iter(found), len(found)
    parts = _parts(model, tasks, texts)
    pictures = [path]
    if path.is_dir():
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower()[1:] in IMAGE_EXTENSIONS)
        if not pictures:
            raise UserError(f"there is no picture in {path}: expected files .{', .'.join(IMAGE_EXTENSIONS)}")
    requests = ({"image": str(file), **part} for file in pictures for part in parts)
    return _checked(model, requests, "the texts"), len(pictures) * len(parts)


def _parts(model: MultiTaskModel, tasks: Sequence[str], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The requests about any one picture, which is left out of them."""
    for name in tasks:
        if name not in model.tasks:
            raise UserError(f"unknown task {name!r}", near=(name, model.tasks))
    fitting = {name: fields_from(task, texts if task.asks else ()) for name, task in model.tasks.items()}
    if not tasks:
        parts = [{"task": name, **fields} for name, fields in fitting.items()
                 if fields is not None and model.tasks[name].images == 1]
        if not parts or texts and not any(len(part) > 1 for part in parts):
            raise UserError("no task can answer this: " + "; ".join(map(_usage, model.tasks.values())))
        return parts
    for name in tasks:
        task = model.tasks[name]
        if task.images != 1 or fields_from(task, texts) is None and (task.asks or len(tasks) == 1):
            raise UserError(f"{_usage(task)}; got {len(texts)}")
    return [{"task": name, **fitting[name]} for name in dict.fromkeys(tasks)]


def _usage(task: Task) -> str:
    if task.images != 1:
        return f"task {task.name} takes {task.images or 'no'} pictures, ask it in a .jsonl file"
    words = [f"--text {name.upper()}" if not isinstance(task.example[name], list)
             else f"--text {name.upper().removesuffix('S')} ..." for name in task.asks]
    return f"task {task.name} takes {' '.join(words) or 'no --text'}"


def _checked(model: MultiTaskModel, requests: Iterable[Request], where: str) -> Iterator[tuple[Request, Asked]]:
    for number, request in enumerate(requests, 1):
        try:
            yield request, check_request(model, request)
        except BadSample as problem:
            raise UserError(f"{where}, request {number}: {problem}") from problem


def _images(request: Request) -> str:
    return ", ".join(map(str, request.get("images", [request["image"]] if "image" in request else [])))


def _plain(request: Request) -> dict[str, Any]:
    """A request as JSON has it."""
    fields = dict(request)
    if "image" in fields:
        fields["image"] = str(fields["image"])
    if "images" in fields:
        fields["images"] = list(map(str, fields["images"]))
    return fields


def _said(reply: Reply) -> dict[str, Any]:
    return {"answer": reply.answer, **({"scores": [list(pair) for pair in reply.scores]} if reply.scores else {})}
