"""Caption metrics and tokens against what pycocoevalcap and its Java programs gave, and against them live."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from vl_mtl_lora.metrics.caption import caption_metrics, cider_warning, tokenize_caption

STORED = json.loads((Path(__file__).parent / "data" / "captions.json").read_text(encoding="utf-8"))
TOLD = [picture["prediction"] for picture in STORED["pictures"]]
TRUTH = [picture["references"] for picture in STORED["pictures"]]
NAMES = {"CIDEr": "CIDEr", "BLEU-1": "Bleu_1", "BLEU-2": "Bleu_2", "BLEU-3": "Bleu_3", "BLEU-4": "Bleu_4",
         "ROUGE-L": "ROUGE_L", "METEOR": "METEOR"}
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="compares with a Java program")


@pytest.fixture(scope="module")
def metrics():
    return caption_metrics(TOLD, TRUTH, meteor=True)


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Puts a shell script in java's place."""
    def put(script):
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return put


def corpus_bleu(told, truth):
    from pycocoevalcap.bleu.bleu import Bleu
    truth = {i: [tokenize_caption(text) for text in texts] for i, texts in enumerate(truth)}
    return Bleu(4).compute_score(truth, {i: [tokenize_caption(text)] for i, text in enumerate(told)}, verbose=0)[0]


@pytest.mark.parametrize("text", STORED["tokens"])
def test_tokens_are_those_of_the_java_tokenizer(text):
    assert tokenize_caption(text) == STORED["tokens"][text]


@needs_java
def test_the_java_tokenizer_still_says_so():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    # It looks beyond the end of a line, so each text is followed by one that means nothing to it.
    told = PTBTokenizer().tokenize({text: [{"caption": text}, {"caption": "a"}] for text in STORED["tokens"]})
    assert {text: tokens[0] for text, tokens in told.items()} == STORED["tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_equal_the_stored_ones(metrics, name):
    if name == "METEOR" and shutil.which("java") is None:
        assert name not in metrics
        return
    assert metrics[name] == pytest.approx(100 * STORED["scores"][NAMES[name]], rel=1e-9)
    assert metrics[name].n == metrics[name].clusters == len(TOLD)


def test_a_resample_that_draws_each_picture_once_is_the_figure(metrics):
    for metric in metrics.values():
        assert metric.resampled(np.ones((1, metric.clusters))) == pytest.approx([metric], rel=1e-12)


def test_a_picture_drawn_thrice_counts_as_three():
    drawn = np.random.default_rng(0).integers(0, 4, (5, len(TOLD))).astype(float)
    metrics = caption_metrics(TOLD, TRUTH)
    figures = {name: metric.resampled(drawn) for name, metric in metrics.items()}
    for row, weights in enumerate(drawn.astype(int)):
        told, truth = np.repeat(TOLD, weights).tolist(), [TRUTH[i] for i in np.repeat(np.arange(len(TOLD)), weights)]
        for n, bleu in enumerate(corpus_bleu(told, truth)):
            assert figures[f"BLEU-{n + 1}"][row] == pytest.approx(100 * bleu, rel=1e-9)
        again = caption_metrics(told, truth)
        assert figures["ROUGE-L"][row] == pytest.approx(again["ROUGE-L"], rel=1e-9)
        # Its document frequencies are not drawn anew.
        assert figures["CIDEr"][row] != pytest.approx(again["CIDEr"], rel=1e-3)


@needs_java
def test_meteor_of_a_repeated_corpus_is_its_resample(metrics):
    weights = np.arange(len(TOLD)) % 3
    again = caption_metrics(np.repeat(TOLD, weights).tolist(),
                            [TRUTH[i] for i in np.repeat(np.arange(len(TOLD)), weights)], meteor=True)
    assert metrics["METEOR"].resampled(weights[None].astype(float)) == pytest.approx([again["METEOR"]], rel=1e-9)


@needs_java
def test_meteor_of_empty_and_of_perfect_captions():
    texts = ["a red circle on the left", "2 1/2 dogs", "a café | bar", "b"]
    assert caption_metrics(texts, [[t] for t in texts], meteor=True)["METEOR"] == pytest.approx(100)
    assert caption_metrics(["", "", "a"], [["a dog"], [""], [""]], meteor=True)["METEOR"] == 0


@pytest.mark.parametrize("script", ["echo broken >&2; exit 1", "echo broken", "kill -9 $$"])
def test_a_java_that_fails_loses_meteor_only(java, caplog, script):
    java(script)
    with caplog.at_level(logging.WARNING):
        assert list(caption_metrics(TOLD, TRUTH, meteor=True)) == [n for n in NAMES if n != "METEOR"]
    assert "METEOR" in caplog.text


def test_meteor_is_for_who_asks_and_has_java(java, monkeypatch, caplog):
    java("echo broken >&2; exit 1")
    assert "METEOR" not in caption_metrics(TOLD, TRUTH)
    monkeypatch.setenv("PATH", "")
    assert "METEOR" not in caption_metrics(TOLD, TRUTH, meteor=True) and not caplog.text


def test_a_perfect_caption_scores_full_marks():
    texts = ["a red circle on the left", "a blue square at the top", "three green stars in a row"]
    metrics = caption_metrics(texts, [[t] for t in texts])
    assert metrics["BLEU-4"] == pytest.approx(100, abs=1e-3)
    assert metrics["CIDEr"] == pytest.approx(1000) and metrics["ROUGE-L"] == pytest.approx(100)


@pytest.mark.parametrize("told,truth", [([""], [["a dog"]]), (["a dog"], [["😀"]]), (["", "!"], [["."], ["", "?"]])])
def test_captions_without_a_token(told, truth):
    metrics = caption_metrics(told, truth)
    assert metrics["CIDEr"] == 0 and metrics["BLEU-1"] == pytest.approx(0, abs=1e-3)
    assert all(np.isfinite(metric.resampled(np.ones((1, len(told))))).all() for metric in metrics.values())


@pytest.mark.parametrize("told,truth", [(["a", "b"], [["a"]]), (["a", "b"], [["a"], []])])
def test_every_picture_wants_a_reference(told, truth):
    with pytest.raises(ValueError, match="2 predictions want"):
        caption_metrics(told, truth)


def test_few_pictures_and_few_words_are_too_little_for_cider():
    texts = [[f"picture {i} shows thing {i}"] for i in range(100)]
    assert cider_warning(texts) is None
    assert "99 pictures" in cider_warning(texts[:99])
    # One, two and three words in order make 3 + 2 + 1 n-grams; 95 more words stand alone.
    alone = [[f"w{i}"] for i in range(95)]
    assert "100 pictures with 99 distinct" in cider_warning(alone[:93] + [["a b c"]] * 7)
    assert cider_warning(alone[:94] + [["a b c"]] * 6) is None
