"""The page in the browser says what `predict` says, of all tasks and both arms, and asks nothing of other machines."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlparse

import pytest
import torch

from tests.conftest import COLOURS
from tests.test_task_kinds import SECTIONS, all_kinds
from vl_mtl_lora import UserError, build_model, parse_config, predict, write_shards
from vl_mtl_lora.page import answer_all, as_table, build_page, example_samples, open_page, serve

TEXTS = {"question": "what color is it ?", "captions": "a red circle\n\n  a blue square ",
         "choices": "red\nblue\ngreen", "text": "it is red", "text_pair": "it is blue"}


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    """A model of tasks of all kinds whose adapters are no longer fresh, its config, and a picture's file."""
    folder = tmp_path_factory.mktemp("page")
    samples = list(all_kinds(6))
    write_shards(samples, folder / "shards", name="all")
    sections = {"retrieval": {}, "vqa": {"answers": list(COLOURS)}, "captioning": {"max_new_tokens": 5}, **SECTIONS}
    shards = {split: str(folder / "shards" / "all-*.tar") for split in ("train", "test")}
    config = parse_config({
        "out": str(folder / "run"), "backbone": {"name": f"local-dir:{tiny_folder}"}, "adapter": {"rank": 4},
        "tasks": {name: {**section, **shards} for name, section in sections.items()}})
    torch.manual_seed(3)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in (*model.adapter_state().values(), *model.head_state().values()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    for i in range(2):
        samples[i]["image"].save(folder / f"{i}.png")
    return model, config, [str(folder / f"{i}.png") for i in range(2)]


def request(task, name, pictures):
    """What the page asks, written as a request by hand."""
    lines = {"captions": ["a red circle", "a blue square"], "choices": ["red", "blue", "green"]}
    fields = {field: lines.get(field, TEXTS[field]) for field in task.asks}
    return {"task": name, "images": pictures[:task.images], **fields}


def test_every_task_says_in_both_arms_what_predict_says(made):
    model, _, pictures = made
    rows = answer_all(model, pictures, TEXTS)
    assert [row.task for row in rows] == list(model.tasks) and not any(row.problem for row in rows)
    requests = [request(task, name, pictures) for name, task in model.tasks.items()]
    for arm, zero_shot in (("zero_shot", True), ("adapted", False)):
        for row, wanted in zip(rows, predict(model, requests, zero_shot)):
            assert row.replies[arm].answer == wanted.answer
            assert [text for text, _ in row.replies[arm].scores] == [text for text, _ in wanted.scores]
            assert [s for _, s in row.replies[arm].scores] == pytest.approx([s for _, s in wanted.scores], abs=1e-5)
    table = as_table(rows)
    assert all(f"<th>{name}" in table for name in model.tasks) and rows[0].replies["adapted"].answer in table


def test_what_is_missing_is_said_task_by_task(made):
    model, _, pictures = made
    said = {row.task: row.problem for row in answer_all(model, [], {})}
    assert said["captioning"] == "needs a picture" and said["vqa"] == "needs a picture and a question"
    said = {row.task: row.problem for row in answer_all(model, pictures[:1], {})}
    assert said["captioning"] == "" and said["vqa"] == "needs a question" and said["retrieval"] == "needs texts to rank"
    for name, task in model.tasks.items():
        assert ("two pictures" in said[name]) == (task.images == 2)


def test_a_broken_picture_is_told_and_texts_stay_texts(made, tmp_path):
    model, _, pictures = made
    (tmp_path / "broken.png").write_text("no picture")
    row = {row.task: row for row in answer_all(model, [str(tmp_path / "broken.png")], TEXTS)}["captioning"]
    assert "image" in row.problem and not row.replies
    rows = answer_all(model, pictures, {**TEXTS, "captions": "<script>alert(1)</script>\na & b"})
    assert "<script>" not in as_table(rows) and "&lt;script&gt;alert(1)" in as_table(rows)


def test_examples_come_from_the_test_shards_and_let_every_task_answer(made):
    model, config, _ = made
    samples = example_samples(config)
    assert {sample.task for sample in samples} == {name for name, task in model.tasks.items() if task.images == 1}
    pytest.importorskip("gradio")
    page = build_page(model, config, samples)
    (table,) = [block for block in page.blocks.values() if type(block).__name__ == "HTML"]
    told = table.value
    assert "needs a question" not in told and "needs texts to rank" not in told


def test_a_missing_gradio_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the page needs gradio: pip install 'vl_mtl_lora\[page\]'"):
        serve("nowhere", 7860)


# -- served -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(made):
    pytest.importorskip("gradio")
    model, config, _ = made
    page = build_page(model, config, example_samples(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield open_page(page, port, wait=False), port, page
    page.close()


def test_a_port_in_use_is_told_and_no_other_machine_reaches_the_page(made, served):
    url, port, page = served
    assert urlparse(url).hostname == "127.0.0.1" and page.share_url is None
    with pytest.raises(UserError, match=f"--port {port} cannot be used, perhaps another page has it"):
        open_page(build_page(*made[:2]), port, wait=False)


class Browser:
    """Headless Chromium, told what to do through its pipe (Chrome DevTools Protocol)."""

    def __init__(self, folder):
        name = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
        if name is None:
            pytest.skip("no Chromium on this machine")
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {name} --headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe "
             f"--user-data-dir={folder} about:blank 3<&{theirs_in} 4>&{theirs_out}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self._numbers, self._rest, self.requests = itertools.count(1), b"", []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = None
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Network.enable")

    def send(self, method, **params):
        number = next(self._numbers)
        session = {"sessionId": self._session} if getattr(self, "_session", None) else {}
        os.write(self._out, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                self._rest += os.read(self._in, 65536) or pytest.fail("Chromium has ended")
            line, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(line)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script):
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script):
        for _ in range(200):
            if value := self.run(script):
                return value
            time.sleep(0.1)
        pytest.fail(f"never true: {script}")

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._out), os.close(self._in)


def test_one_asks_in_a_browser_and_nothing_comes_from_elsewhere(made, served, tmp_path):
    model, _, _ = made
    browser = Browser(tmp_path)
    try:
        browser.send("Page.navigate", url=served[0])
        text = browser.wait_for("document.querySelector('.answers')?.innerText")
        assert all(name in text for name in model.tasks) and "zero-shot" in text and "adapted" in text
        browser.wait_for("[...document.querySelectorAll('button')].some(b => b.innerText.trim() == 'Answer')")
        browser.run("""
            const label = [...document.querySelectorAll('label')].find(l => l.innerText.includes('Texts to rank'));
            const box = label.querySelector('textarea');
            const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;
            set.call(box, 'zebra <b>1</b>\\nlion');
            box.dispatchEvent(new Event('input', {bubbles: true}));
            [...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Answer').click();""")
        text = browser.wait_for("(t => t.includes('zebra') && t)(document.querySelector('.answers').innerText)")
        assert "zebra <b>1</b>" in text and "lion" in text
    finally:
        browser.close()
    assert len(browser.requests) > 5
    assert {urlparse(url).hostname for url in browser.requests if not url.startswith(("data:", "blob:", "about:"))
            } == {"127.0.0.1"}
