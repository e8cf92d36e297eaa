"""What a model says of pictures and texts that nobody knows the truth of: requests of any tasks, answered together."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import Sample, check_fields
from vl_mtl_lora.errors import BadSample, UserError, did_you_mean
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.tasks.base import Reply

ARMS = ("zero_shot", "adapted")


@dataclass(frozen=True)
class Asked:
    """A request that fits its task. images: as they were given, not looked at."""

    sample: Sample
    images: tuple[Any, ...]


def predict(model: MultiTaskModel, requests: Sequence[Mapping[str, Any]], zero_shot: bool = False,
            rows: int = 64) -> list[Reply]:
    """Answers requests of any tasks, mixed, in the order given.

    Args:
        requests: each an object of the schema (see data/schema.py) without the truth: `task`, `image` or `images` (a
            path, the bytes of an image file, or a PIL image), and what the task asks for, e.g. `question`.
        zero_shot: adapters off and the tasks' zero-shot way of answering.
        rows: the most requests that go through the model at once.

    Raises:
        UserError: a request that does not fit its task, or a picture that cannot be read; names the request.
    """
    asked = []
    for number, request in enumerate(requests):
        try:
            asked.append(check_request(model, request))
        except BadSample as problem:
            raise UserError(f"request {number}: {problem}") from problem
    model.eval()  # the tasks forget what they embedded with earlier weights
    arm, replies = "zero_shot" if zero_shot else "adapted", []
    for start in range(0, len(asked), rows):
        for number, found in enumerate(answer(model, asked[start:start + rows], (arm,)), start):
            if isinstance(found, BadSample):
                raise UserError(f"request {number}: {found}")
            replies.append(found[arm])
    return replies


def check_request(model: MultiTaskModel, request: Mapping[str, Any]) -> Asked:
    """Raises BadSample for a request that is none of a task of the model's."""
    fields = {name: value for name, value in request.items() if name not in ("image", "images")}
    images = request.get("images", [request["image"]] if "image" in request else [])
    if not isinstance(images, list | tuple) or {"image", "images"} <= request.keys():
        raise BadSample("expected one of the fields image: a picture, and images: a list of them")
    name = fields.get("task")
    if not isinstance(name, str) or name not in model.tasks:
        raise BadSample(f"unknown task {name!r}{did_you_mean(name, model.tasks)}")
    task = model.tasks[name]
    if len(images) != task.images:
        raise BadSample(f"{len(images) or 'no'} image{'s' * (len(images) > 1)}: task {name} takes "
                        f"{task.images or 'none'}")
    truth = {field: value for field, value in task.example.items() if field not in task.asks}
    fields = {"image_id": 0, **truth, **fields}  # any truth that fits the schema: nobody looks at it
    try:
        check_fields(fields, task.kind, len(images))
    except BadSample as problem:
        raise BadSample(f"task {name}: {problem}") from problem
    return Asked(Sample(fields, (), "", ""), tuple(images))


@torch.no_grad()
def answer(model: MultiTaskModel, asked: Sequence[Asked],
           arms: Sequence[str] = ARMS) -> list[dict[str, Reply] | BadSample]:
    """Answers requests in one batch: {arm: reply} of each, or why its picture cannot be used.

    The model must be in evaluation mode, and `model.eval()` be called again where its weights have changed.
    """
    transform = model.backbone.loader_preprocess([None])[0]  # as in evaluation
    pictures: dict[Hashable, Any] = {}  # each decoded once, however many tasks are asked about it
    found: list[dict[str, Reply] | BadSample] = []
    for request in asked:
        try:
            for image in request.images:
                if (name := _name(image)) not in pictures:
                    pictures[name] = _picture(image, transform)
            found.append({})
        except BadSample as problem:
            found.append(problem)
    good = [i for i, problem in enumerate(found) if not isinstance(problem, BadSample)]
    for arm in arms:
        for i, reply in zip(good, _replies(model, [asked[i] for i in good], pictures, arm == "zero_shot")):
            found[i][arm] = reply
    return found


def _replies(model: MultiTaskModel, asked: Sequence[Asked], pictures: Mapping[Hashable, Any],
             zero_shot: bool) -> list[Reply]:
    """One arm's. The image tower runs once over all pictures, each task's with its own adapters, as in training."""
    backbone, router = model.backbone, model.router
    tasks: dict[str, list[int]] = {}
    for i, request in enumerate(asked):
        tasks.setdefault(request.sample.task, []).append(i)
    # (task, picture) -> its row in the tower; with adapters off all tasks see the same.
    places: dict[tuple[str | None, Hashable], int] = {}
    rows = {name: [places.setdefault((None if zero_shot else name, _name(image)), len(places))
                   for i in numbers for image in asked[i].images] for name, numbers in tasks.items()}
    states = None
    if places:
        images = backbone.collate_images([pictures[picture] for _, picture in places]).to(backbone.device)
        with router.off() if zero_shot else router.use(image=router.ids([name for name, _ in places])):
            states = backbone.image_states(images)
    replies: dict[int, Reply] = {}
    for name, numbers in tasks.items():
        own = states.rows(torch.tensor(rows[name], device=backbone.device)) if rows[name] else None
        with router.off() if zero_shot else router.use(name):
            samples = [asked[i].sample for i in numbers]
            replies |= zip(numbers, model.tasks[name].reply(backbone, own, samples, zero_shot))
    return [replies[i] for i in range(len(asked))]


def _name(image: Any) -> Hashable:
    """What tells pictures of a batch apart."""
    return str(image) if isinstance(image, str | Path) else id(image)


def _picture(image: Any, transform: Any) -> Any:
    """A picture as it was given -> what `Backbone.collate_images` takes. Raises BadSample."""
    try:
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            image = decode_image(image)
    except OSError as error:
        raise BadSample(f"image cannot be read: {error.strerror}") from error
    if not isinstance(image, Image.Image):
        raise BadSample(f"an image must be a path, bytes or a PIL image, got {type(image).__name__}")
    try:
        return transform(image)
    except Exception as error:  # Pillow's, of a file half read, and those of a model's own preprocessing
        raise BadSample(f"image cannot be preprocessed: {type(error).__name__}: {error}") from error
