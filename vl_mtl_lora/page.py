"""A page in this machine's browser: a picture and texts in, the answers of all tasks out, zero-shot beside adapted."""

import itertools
import tempfile
import threading
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from vl_mtl_lora.checkpoint import load_run
from vl_mtl_lora.config import RunConfig
from vl_mtl_lora.data.files import shard_files
from vl_mtl_lora.data.pictures import decode_image
from vl_mtl_lora.data.schema import Sample
from vl_mtl_lora.data.survey import Entry, read_entries, read_sample
from vl_mtl_lora.errors import BadSample, UserError
from vl_mtl_lora.model import MultiTaskModel
from vl_mtl_lora.predict import ARMS, answer, check_request
from vl_mtl_lora.tasks.base import Reply

# Fields that tasks ask for -> what their box is called, and what a task lacks without.
_BOXES = {"question": ("Question", "a question"), "captions": ("Texts to rank, one a line", "texts to rank"),
          "choices": ("Choices, one a line", "choices"), "text": ("Text to match", "a text to match"),
          "text_pair": ("Text that it is held to", "a second text")}
_EXAMPLES = 3  # of each task
_LOOKED_AT = 500  # records of its shards, to find them
_CSS = """
.answers { width: 100%; border-collapse: collapse; table-layout: fixed }
.answers, .answers thead, .answers tbody, .answers tr { border: 0 !important }
.answers th, .answers td { padding: .7rem .9rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border: 0; border-bottom: 1px solid var(--border-color-primary) }
.answers th:first-child { width: 24% }
.answers thead th { color: var(--body-text-color-subdued); font-weight: 500 }
.answers small { display: block; color: var(--body-text-color-subdued); font-weight: 400 }
.answers .score { display: flex; justify-content: space-between; gap: .6rem; margin-top: .25rem; font-size: .85em;
  border-bottom: 3px solid transparent; font-variant-numeric: tabular-nums;
  background: linear-gradient(var(--color-accent), var(--color-accent)) left bottom / var(--share) 2px no-repeat }
.answers .none { color: var(--body-text-color-subdued) }
"""


class Row(NamedTuple):
    """A task on the page: what each arm says, or what is missing."""

    task: str
    kind: str
    replies: Mapping[str, Reply]
    problem: str = ""


def answer_all(model: MultiTaskModel, images: Sequence[Any], texts: Mapping[str, str]) -> list[Row]:
    """Asks every task of the model about the same pictures and texts; see `answer` for the model's mode.

    images: up to two, as in a request; a task takes the first ones. texts: of the boxes, by the field they fill.
    """
    rows, asked = [], []
    for name, task in model.tasks.items():
        missing = [_BOXES[field][1] for field in task.asks if not texts.get(field, "").strip()]
        if task.images > len(images):
            missing.insert(0, "two pictures" if task.images == 2 else "a picture")
        if missing:
            rows.append(Row(name, task.kind, {}, f"needs {' and '.join(missing)}"))
            continue
        request = {"task": name, "images": list(images[:task.images])}
        for field in task.asks:
            lines = [line.strip() for line in texts[field].splitlines() if line.strip()]
            request[field] = lines if isinstance(task.example[field], list) else texts[field].strip()
        try:
            asked.append(check_request(model, request))
            rows.append(Row(name, task.kind, {}))
        except BadSample as problem:
            rows.append(Row(name, task.kind, {}, str(problem)))
    found = iter(answer(model, asked))
    for i, row in enumerate(rows):
        if not row.problem:
            said = next(found)
            rows[i] = row._replace(problem=str(said)) if isinstance(said, BadSample) else row._replace(replies=said)
    return rows


def as_table(rows: Sequence[Row]) -> str:
    """Rows as HTML."""
    lines = ["<table class='answers'><thead><tr><th>task</th><th>zero-shot</th><th>adapted</th></tr></thead><tbody>"]
    for row in rows:
        kind = f"<small>{escape(row.kind.replace('_', ' '))}</small>" * (row.kind != row.task)
        cells = "".join(f"<td>{_cell(row.replies[arm])}</td>" for arm in ARMS if arm in row.replies)
        lines.append(f"<tr><th>{escape(row.task)}{kind}</th>"
                     + (cells or f"<td colspan='2' class='none'>{escape(row.problem)}</td>") + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _cell(reply: Reply) -> str:
    scores = reply.scores if any(text == reply.answer for text, _ in reply.scores) else ()
    return f"<b>{escape(reply.answer) or '(nothing)'}</b>" + "".join(
        f"<div class='score' style='--share: {100 * min(max(score, 0), 1):.0f}%'><span>{escape(text)}</span>"
        f"<span>{score:.3f}</span></div>" for text, score in scores)


def example_samples(config: RunConfig) -> list[Sample]:
    """Some samples of each task with a picture, from the first of its test shards where that lies on this machine."""
    found = []
    for name, section in config.tasks.items():
        here = [pattern for pattern in section.test if "://" not in pattern and not pattern.startswith("pipe:")]
        try:
            files = shard_files(here, config.data.cache) if section.images == 1 else ()
        except UserError:  # the shards have gone since; the page goes without
            continue
        pictures: dict[Any, Sample] = {}
        for entry in itertools.islice(read_entries(files[0], section.format), _LOOKED_AT) if files else ():
            if isinstance(entry, Entry) and len(entry.images) == 1 and (
                    section.format != "tagged" or entry.fields["task"] == (section.tag or name)):
                sample = read_sample(files[0], entry)
                pictures.setdefault(sample.image_id, sample)
            if len(pictures) == _EXAMPLES:
                break
        found += pictures.values()
    return found


def build_page(model: MultiTaskModel, config: RunConfig, samples: Sequence[Sample] = ()) -> Any:
    """The page as gradio's Blocks, with the answers about the first sample. Raises UserError without gradio."""
    gr = _gradio()
    model.eval()
    one_at_a_time = threading.Lock()  # the router is the model's own: two requests at once would mix up its routes
    boxes = {field: label for field, (label, _) in _BOXES.items()
             if any(field in task.asks for task in model.tasks.values())}
    pictures = max(task.images for task in model.tasks.values())

    def respond(*values: str | None) -> str:
        images = [value for value in values[:pictures] if value]
        texts = {field: value or "" for field, value in zip(boxes, values[pictures:])}
        with one_at_a_time:
            return as_table(answer_all(model, images, texts))

    base = config.backbone
    with gr.Blocks(title=f"{base.name}: zero-shot and adapted", analytics_enabled=False) as page:
        gr.Markdown(f"# {Path(config.out).name}\n`{base.name}`"
                    + (f" (`{base.pretrained}`)" if base.pretrained else "")
                    + f" from {base.library}, adapted to {len(model.tasks)} tasks: {', '.join(model.tasks)}")
        with tempfile.TemporaryDirectory() as folder:
            examples = [[*_picture_files(sample, Path(folder) / str(i), pictures), *_texts(sample, boxes, samples)]
                        for i, sample in enumerate(samples)] if pictures else []
            first = examples[0] if examples else [None] * (pictures + len(boxes))
            with gr.Row():
                with gr.Column(scale=2):
                    inputs = [gr.Image(value=value, type="filepath", image_mode=None, height=300,
                                       sources=["upload", "clipboard"], label="Picture" if i == 0 else "Second picture")
                              for i, value in enumerate(first[:pictures])]
                    inputs += [gr.Textbox(value=value, label=label, lines=1 if field == "question" else 2)
                               for (field, label), value in zip(boxes.items(), first[pictures:])]
                    button = gr.Button("Answer", variant="primary")
                with gr.Column(scale=3):
                    table = gr.HTML(respond(*first))
            if examples:
                gr.Examples(examples, inputs, table, respond, cache_examples=False, run_on_click=True,
                            label="Test samples", examples_per_page=12)
        for event in (button.click, *(box.submit for box in inputs[pictures:])):
            event(respond, inputs, table, api_name="answer" if event == button.click else None)
    return page


def open_page(page: Any, port: int, wait: bool = True) -> str:
    """Serves the page to this machine alone; returns its address. wait: until it is interrupted.

    Raises:
        UserError: the port is taken.
    """
    gr = _gradio()
    # System fonts, no footer of links, no record of runs: nothing is asked of any other machine.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, share=False, quiet=True, theme=theme,
                                css=_CSS, ssr_mode=False, footer_links=[], run_history=False, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {port} cannot be used, perhaps another page has it: choose another") from error
    print(f"page: {url} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return url


def serve(run: str | Path, port: int) -> None:
    """Loads a run and shows its page until it is interrupted."""
    _gradio()  # before the model is loaded
    model, config = load_run(run)
    open_page(build_page(model, config, example_samples(config)), port)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs gradio: pip install 'vl_mtl_lora[page]'") from error
    return gradio


def _picture_files(sample: Sample, path: Path, count: int) -> list[str | None]:
    """The sample's picture as a file, and as many places more as the page has."""
    path = path.with_suffix(".png")
    decode_image(sample.images[0]).save(path)
    return [str(path)] + [None] * (count - 1)


def _texts(sample: Sample, boxes: Mapping[str, str], samples: Sequence[Sample]) -> list[str]:
    """What fills the boxes: the sample's own texts, and those of others where it has none, so that every task answers.

    What is ranked are captions of all samples of its task.
    """
    filled = {}
    for other in (*samples[::-1], sample):
        filled |= {field: other.fields[field] for field in boxes if field in other.fields}
    if "captions" in boxes:
        ranked = sample.task if "captions" in sample.fields else None
        own = [other for other in samples if "captions" in other.fields and ranked in (None, other.task)]
        filled["captions"] = list(dict.fromkeys(text for other in own for text in other.fields["captions"][:1]))
    return ["\n".join(value) if isinstance(value := filled.get(field, ""), list) else value for field in boxes]
