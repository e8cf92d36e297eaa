"""Shards for the tests of reading: pictures and samples in a few bytes, and tars written member by member."""

import io
import json
import tarfile

from PIL import Image

from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import Source, index_sources

TASKS = ["retrieval", "vqa", "captioning"]


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(colour="red", size=(8, 8)):
    return encode(Image.new("RGB", size, colour), "PNG")


def vqa(i=0, **change):
    return {"task": "vqa", "image_id": i, "question": "what?", "answers": ["red"], "question_id": i, **change}


def members(fields, picture=None):
    """[(name, data)] of samples {key: fields}, each with a picture."""
    return [(f"{key}.{extension}", data) for key, value in fields.items()
            for extension, data in (("png", picture or png()), ("json", value))]


def write_tar(path, contents):
    """contents: [(name, bytes or what becomes JSON)]."""
    with tarfile.open(path, "w") as tar:
        for name, data in contents:
            data = json.dumps(data).encode() if not isinstance(data, bytes) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def index_of(*shards, task="vqa", known=TASKS, faults=None, **options):
    """The index of one task's samples in some shards."""
    source = Source(task, options.pop("kind", task), tuple(map(str, shards)), **options)
    (index,) = index_sources([source], known, faults or FaultLog(0.0))
    return index


def samples_of(index):
    return [index.sample(row) for row in range(len(index))]
