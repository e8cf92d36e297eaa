"""Embeddings on disk: kept for the next evaluation of a model, read as a plain pair of files, ranked as TREC runs.

A file is safetensors with `embeddings` (N, E) and `groups` (N,) integers, where an image and a text of one group belong
together, or .npy with the embeddings alone, where those of one row do.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vl_mtl_lora.data.index import TaskIndex, shards_hash
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.errors import UserError
from vl_mtl_lora.metrics.bootstrap import Metric
from vl_mtl_lora.metrics.retrieval import MOST_SCORES, retrieval_metrics
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.tasks.base import Task, pictures_of
from vl_mtl_lora.tasks.retrieval import Retrieval

_DEPTH = 100  # items of each query in a TREC run

Predicted = tuple[list[Sample], list[int], list[Any]]  # samples without pictures, their rows, their predictions


class EmbeddingStore:
    """What retrieval tasks predicted, in FOLDER/TASK.ARM.images.safetensors and FOLDER/TASK.ARM.texts.safetensors.

    Used again only for the same weights, shards and number of samples; else written anew. Raises UserError where the
    folder cannot be made.
    """

    def __init__(self, folder: str | Path, model: MultiTaskModel):
        self.folder = made_folder(folder)
        digest = hashlib.sha256()
        for name, tensor in (*model.adapter_state().items(), *model.head_state().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        self._base, self._adapters = model.fingerprint, digest.hexdigest()

    def load(self, task: Task, index: TaskIndex, arm: str, limit: int | None) -> Predicted | None:
        """What was saved; None where there is nothing of this model and these samples."""
        images_file, texts_file = self.files(task, arm)
        key = self._key(index, arm, limit)
        if not isinstance(task, Retrieval) or not all(_has_key(file, key) for file in (images_file, texts_file)):
            return None
        images, texts = load_file(images_file), load_file(texts_file)
        rows = texts["rows"].tolist()
        samples = [replace(index.sample(row), images=()) for row in rows]
        image_of = dict(zip(images["groups"].tolist(), images["embeddings"]))
        own = texts["embeddings"].split(texts["counts"].tolist())
        return samples, rows, [(image_of[group], text) for group, text in zip(pictures_of(samples), own)]

    def save(self, task: Task, index: TaskIndex, arm: str, limit: int | None, predicted: Predicted) -> None:
        """Keeps what a retrieval task predicted, each picture once; nothing of other tasks."""
        if not isinstance(task, Retrieval):
            return
        samples, rows, predictions = predicted
        images, image_groups, texts, text_groups = (part.cpu() for part in task.gather(predictions, samples))
        counts = torch.tensor([len(text) for _, text in predictions])
        images_file, texts_file = self.files(task, arm)
        key = {"key": self._key(index, arm, limit)}
        _write({"embeddings": images, "groups": image_groups}, images_file, key)
        _write({"embeddings": texts, "groups": text_groups, "rows": torch.tensor(rows), "counts": counts}, texts_file,
               key)

    def files(self, task: Task, arm: str) -> tuple[Path, Path]:
        """Of the images and the texts."""
        name = f"{task.name}.{arm.replace(' ', '-')}"
        return self.folder / f"{name}.images.safetensors", self.folder / f"{name}.texts.safetensors"

    def _key(self, index: TaskIndex, arm: str, limit: int | None) -> str:
        weights = self._base if arm == "zero-shot" else f"{self._base}/{self._adapters}/{arm}"
        return f"{weights}/{shards_hash(index.source.files)}/{len(index)}/{limit}"


def made_folder(folder: str | Path) -> Path:
    """The folder, made if it is not there. Raises UserError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error}") from error
    return folder


def read_embeddings(path: str | Path) -> tuple[Tensor, Tensor]:
    """(embeddings (N, E) made unit vectors, groups (N,)) of a .safetensors or .npy file. Raises UserError."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            parts = {"embeddings": torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            parts = load_file(path)
    except (OSError, ValueError, SafetensorError, TypeError) as error:
        raise UserError(f"cannot read the embeddings {path}: {error}") from error
    found = parts.get("embeddings")
    if found is None or found.dim() != 2 or not found.is_floating_point() or not len(found):
        raise UserError(f"{path}: expected a tensor `embeddings` (N, E) of floats, got "
                        f"{ {name: tuple(tensor.shape) for name, tensor in parts.items()} }")
    if not found.isfinite().all():
        raise UserError(f"{path}: an embedding holds a value that is no number")
    groups = parts.get("groups", torch.arange(len(found)))
    if groups.shape != found.shape[:1] or groups.is_floating_point():
        raise UserError(f"{path}: expected `groups` ({len(found)},) of integers, got {tuple(groups.shape)}")
    found = found.float()
    if (found.norm(dim=-1) - 1).abs().max() > 1e-3:  # else they stay as they are, and so do equal scores
        found = F.normalize(found, dim=-1)
    return found, groups.long()


def evaluate_files(images: str | Path, texts: str | Path, faiss_from: int | None = None) -> dict[str, Metric]:
    """The retrieval metrics of a pair of embedding files, on a GPU where there is one. Raises UserError."""
    (image, image_groups), (text, text_groups) = read_embeddings(images), read_embeddings(texts)
    if image.shape[1] != text.shape[1]:
        raise UserError(f"{images} has {image.shape[1]} columns, {texts} {text.shape[1]}: they are of two models")
    if not set(image_groups.tolist()) & set(text_groups.tolist()):
        raise UserError(f"no group of {images} occurs in {texts}: no text belongs to any image")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return retrieval_metrics(image.to(device), image_groups.to(device), text.to(device), text_groups.to(device),
                             faiss_from)


def write_trec(folder: str | Path, task: Retrieval, samples: list[Sample], predictions: list[Any], tag: str) -> None:
    """Writes FOLDER/TASK.TAG.DIRECTION.run, the nearest items of each query, and FOLDER/TASK.DIRECTION.qrels.

    The format of trec_eval: `query Q0 item rank score tag` and `query 0 item 1`. A picture is called by its image_id, a
    text by its picture's and its number, both percent-encoded, since fields are separated by blanks.
    """
    folder = made_folder(folder)
    images, image_groups, texts, text_groups = task.gather(predictions, samples)
    names = {group: quote(sample.image_id, safe="/:@") for group, sample in zip(pictures_of(samples), samples)}
    image_names = [names[group] for group in image_groups.tolist()]
    seen: dict[int, int] = {}
    text_names = []
    for group in text_groups.tolist():
        seen[group] = seen.get(group, -1) + 1
        text_names.append(f"{names[group]}#{seen[group]}")
    sides = {"image_to_text": (images, image_groups, image_names, texts, text_groups, text_names),
             "text_to_image": (texts, text_groups, text_names, images, image_groups, image_names)}
    for direction, (queries, query_groups, query_names, items, item_groups, item_names) in sides.items():
        right: dict[int, list[str]] = {}
        for group, name in zip(item_groups.tolist(), item_names):
            right.setdefault(group, []).append(name)
        with open(folder / f"{task.name}.{direction}.qrels", "w", encoding="utf-8") as stream:
            stream.writelines(f"{query} 0 {item} 1\n" for query, group in zip(query_names, query_groups.tolist())
                              for item in right.get(group, ()))
        with open(folder / f"{task.name}.{tag}.{direction}.run", "w", encoding="utf-8") as stream:
            chunk = max(1, MOST_SCORES // len(items))
            for start in range(0, len(queries), chunk):
                best = (queries[start:start + chunk] @ items.T).topk(min(_DEPTH, len(items)), dim=1)
                for query, scores, places in zip(query_names[start:], best.values.tolist(), best.indices.tolist()):
                    stream.writelines(f"{query} Q0 {item_names[place]} {rank} {score:.9g} {tag}\n"
                                      for rank, (score, place) in enumerate(zip(scores, places), 1))


def _has_key(file: Path, key: str) -> bool:
    try:
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("key") == key
    except (OSError, SafetensorError):
        return False


def _write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    part = file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    part.replace(file)
