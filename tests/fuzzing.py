"""What the fuzz tests draw from: texts, values of JSON and YAML, damaged bytes."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FIELDS = {"task": "t", "image_id": 0, "captions": ["a"], "question": "what?", "answers": ["a"], "question_id": 0,
          "label": "a", "text": "a", "text_pair": "b", "choices": ["a", "b"], "answer": 1}


def fuzz(examples):
    """Settings of a fuzz test: the same examples in every run; FUZZ_SCALE times as many to search for faults."""
    scale = float(os.environ.get("FUZZ_SCALE", 1))
    return settings(max_examples=int(examples * scale), derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


texts = st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Cc", "Nd", "Zs", "L"]), max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10 ** 30, 2 ** 64, ""])
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(
    texts | st.sampled_from([*FIELDS]), v, max_size=4), max_leaves=8)


@st.composite
def damaged(draw, data):
    """(data with one to three mutations, the first place that changed)."""
    first = len(data)
    for _ in range(draw(st.integers(1, 3))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(1, 8) | st.sampled_from([512, 1024, 2048]))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "copy", "zero"]))
        piece = data[at:at + length]
        data = data[:at] + {
            "flip": bytes(b ^ 1 << draw(st.integers(0, 7)) for b in piece[:2]) + piece[2:],
            "set": (new := draw(st.binary(max_size=8))) + piece[len(new):],
            "cut": b"", "insert": draw(st.binary(max_size=600)) + piece, "remove": b"", "zero": bytes(len(piece)),
            "copy": piece + piece}[kind] + (data[at + length:] if kind != "cut" else b"")
        first = min(first, at)
    return data, first
