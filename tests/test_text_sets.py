"""Sets of texts alone: what their converters write, and a model that answers them."""

import json
import re

import pytest

from tests.downloads import build, lines, read

ROWS = range(20)  # of each training set: two are held out, of BoolQ and WinoGrande two about the same


def tsv(header, *rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in ([header] if header else []) + list(rows))


def commonsense():
    """files, and by set the question, choices and answer of a row."""
    arc = lambda number: {"id": f"Mercury_{number}", "answerKey": "B", "question": {  # noqa: E731
        "stem": f"Which is {number}?", "choices": [{"text": "ice", "label": "A"}, {"text": "steam", "label": "B"}]}}
    obqa = lambda number: {"id": f"7-{number}", "answerKey": "C", "question": {  # noqa: E731
        "stem": f"The sun {number}", "choices": [{"text": t, "label": k} for t, k in zip("xyz", "ABC")]}}
    piqa = lambda number: {"goal": f"Open jar {number}", "sol1": "twist", "sol2": "hit"}  # noqa: E731
    siqa = lambda number: {"context": f"Al ran {number}.", "question": "Why?", "answerA": "fun", "answerB": "fear",  # noqa: E731
                           "answerC": "rain"}
    files = {}
    for part, rows in (("train", ROWS), ("val", [7])):
        files[f"BoolQ/{part}.jsonl"] = lines({"question": f"is {i} odd", "passage": f"Odd {i // 2}.",
                                              "label": i % 2 == 1, "idx": i} for i in rows)
        files[f"hellaswag_{part}.jsonl"] = lines(
            {"ind": i, "activity_label": "Baking", "ctx_a": "A", "ctx_b": "B", "ctx": f"He bakes {i}", "label": 2,
             "endings": ["and", "or", "not", "so"], "split": part, "source_id": "x"} for i in rows)
    for part, rows in (("train", ROWS), ("dev", [3])):
        files[f"physicaliqa-train-dev/{part}.jsonl"] = lines(map(piqa, rows))
        files[f"physicaliqa-train-dev/{part}-labels.lst"] = "".join(f"{i % 2}\n" for i in rows)
        files[f"socialiqa-train-dev/{part}.jsonl"] = lines(map(siqa, rows))
        files[f"socialiqa-train-dev/{part}-labels.lst"] = "3\n" * len(rows)
    for part, rows in (("train_xl", ROWS), ("dev", [3])):
        files[f"winogrande_1.1/{part}.jsonl"] = lines(
            {"qID": f"3{i // 2}-{1 + i % 2}", "sentence": f"Ann saw Bea, since _ was {i}.", "option1": "Ann",
             "option2": "Bea", "answer": "2"} for i in rows)
    for level in ("Easy", "Challenge"):
        for part in ("Train", "Dev", "Test"):
            files[f"ARC-{level}/ARC-{level}-{part}.jsonl"] = lines([arc(f"{level}{part}")])
    for part in ("train", "dev", "test"):
        files[f"OpenBookQA-V1-Sep2018/Data/Main/{part}.jsonl"] = lines([obqa(part)])
    tests = {
        "boolq": ("Odd 3.\nQuestion: is 7 odd?", ["no", "yes"], 1),
        "piqa": ("How would you do this? Open jar 3", ["twist", "hit"], 1),
        "siqa": ("Al ran 3. Why?", ["fun", "fear", "rain"], 2),
        "hellaswag": ("How does this go on? Baking: He bakes 7", ["and", "or", "not", "so"], 2),
        "winogrande": ("What does the _ stand for? Ann saw Bea, since _ was 3.", ["Ann", "Bea"], 1),
        "arc-e": ("Which is EasyTest?", ["ice", "steam"], 1), "arc-c": ("Which is ChallengeTest?", ["ice", "steam"], 1),
        "obqa": ("The sun test", ["x", "y", "z"], 2)}
    return files, tests


def glue():
    """files, and by shards the question, choices and answer of its first row."""
    files, nli = {}, ["index", "promptID", "sentence1", "sentence2", "label1", "gold_label"]
    for part, rows in (("train", ROWS), ("dev", [3])):
        files[f"CoLA/{part}.tsv"] = tsv(None, *(("gj04", i % 2, "*", f'Cats "sleep {i}.') for i in rows))
        files[f"SST-2/{part}.tsv"] = tsv(["sentence", "label"], *((f"good {i} ", 1) for i in rows))
        files[f"QQP/{part}.tsv"] = tsv(["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
                                       ("9", "cut off"), *((i, 1, 2, f"Who {i}?", "What?", 0) for i in rows))
        files[f"QNLI/{part}.tsv"] = tsv(["index", "question", "sentence", "label"],
                                        *((i, f"Who {i}?", "Bo.", "entailment") for i in rows))
        files[f"RTE/{part}.tsv"] = tsv(["index", "sentence1", "sentence2", "label"],
                                       *((i, f"It is {i}.", "It is.", "not_entailment") for i in rows))
        files[f"WNLI/{part}.tsv"] = tsv(["index", "sentence1", "sentence2", "label"],
                                        *((i, f"He is {i}.", "Bo is.", 1) for i in rows))
        files[f"STS-B/{part}.tsv"] = tsv(["index", "genre", "sentence1", "sentence2", "score"],
                                         *((i, "news", f"A {i}.", "B.", "3.800") for i in rows))
    for part, rows in (("train", ROWS), ("dev_matched", [3, 4]), ("dev_mismatched", [5])):
        files[f"MNLI/{part}.tsv"] = tsv(nli, *((i, "1e", f"So {i}.", "Is it.", "-", "-" if i == 4 else "neutral")
                                               for i in rows))
    for part, rows in (("train", ROWS), ("test", [3])):
        files[f"MRPC/msr_paraphrase_{part}.txt"] = "\ufeff" + tsv(
            ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], *((1, 5, 6, f"Up {i}.", "Rise.") for i in rows))
    mnli = "{}\nDoes it follow that: {}"
    tests = {
        "cola-test": ('Is this sentence grammatical?\nCats "sleep 3.', ["no", "yes"], 1),
        "sst2-test": ("What is the sentiment of this review?\ngood 3", ["negative", "positive"], 1),
        "mrpc-test": ("Do these two sentences say the same?\n1. Up 3.\n2. Rise.", ["no", "yes"], 1),
        "qqp-test": ("Do these two questions ask the same?\n1. Who 3?\n2. What?", ["no", "yes"], 0),
        "mnli-test": (mnli.format("So 3.", "Is it."), ["no", "maybe", "yes"], 1),
        "mnli-mm-test": (mnli.format("So 5.", "Is it."), ["no", "maybe", "yes"], 1),
        "qnli-test": ("Who 3?\nIs it answered here? Bo.", ["no", "yes"], 1),
        "rte-test": (mnli.format("It is 3.", "It is."), ["no", "yes"], 0),
        "wnli-test": (mnli.format("He is 3.", "Bo is."), ["no", "yes"], 1)}
    return files, tests


def test_commonsense(tmp_path, run):
    files, tests = commonsense()
    code, _, error = run("commonsense_to_shards", build(tmp_path / "download", files), tmp_path / "out")
    assert code == 0, error
    for name, (question, choices, answer) in tests.items():
        (fields, images), = read(tmp_path / "out", f"commonsense-{name}-test")
        assert not images
        assert (fields["task"], fields["question"], fields["choices"], fields["answer"]) == (
            name, question, choices, answer)
        train, valid = (read(tmp_path / "out", f"commonsense-{name}-{part}") for part in ("train", "valid"))
        assert (len(train), len(valid)) == ((1, 1) if name in ("arc-e", "arc-c", "obqa") else (18, 2))
        assert len({fields["question_id"] for fields, _ in [*train, *valid]}) == len(train) + len(valid)
        if name in ("boolq", "winogrande"):  # the last two, about the same
            assert [re.search(r"(\d+)( odd\?|\.)$", fields["question"])[1] for fields, _ in valid] == ["18", "19"]


def test_glue(tmp_path, run):
    files, tests = glue()
    code, told, error = run("glue_to_shards", build(tmp_path / "download", files), tmp_path / "out")
    assert code == 0, error
    for name, (question, choices, answer) in tests.items():
        (fields, images), = read(tmp_path / "out", f"glue-{name}")
        assert not images
        assert (fields["task"], fields["question"], fields["choices"], fields["answer"]) == (
            name.partition("-")[0], question, choices, answer)
    (fields, _), = read(tmp_path / "out", "glue-stsb-test")
    assert (fields["text"], fields["text_pair"], fields["label"], fields["score"]) == ("A 3.", "B.", "4", 3.8)
    assert len(read(tmp_path / "out", "glue-rte-train")) == 18
    for name, splits in (("mnli", 2), ("qqp", 2)):  # of train and test, where valid has none
        assert told.count(f"left out: 1 rows of {name} without one of its labels\n") == splits


@pytest.mark.parametrize("script, there, lost", [
    ("commonsense_to_shards", "BoolQ/train.jsonl", "Data/Main/train.jsonl"),
    ("glue_to_shards", "CoLA/train.tsv", "RTE/train.tsv")])
def test_a_set_that_is_not_there_is_named_though_others_have_files_of_that_name(script, there, lost, tmp_path, run):
    files, _ = commonsense() if "sense" in script else glue()
    folder = build(tmp_path / "download", {there: files[there]})
    split = "obqa-train" if "sense" in script else "rte-train"
    code, _, error = run(script, folder, tmp_path / "out", "--split", split)
    assert code == 2 and f"{lost} is neither in" in error and not (tmp_path / "out").exists()


def test_damaged_text_is_told(tmp_path, run):
    files, _ = glue()
    files["CoLA/train.tsv"] = b"gj04\t1\t\t\xff\n"
    code, _, error = run("glue_to_shards", build(tmp_path / "download", files), tmp_path / "out", "--split",
                         "cola-train")
    assert code == 2 and "train.tsv:1 is no text in UTF-8" in error


def test_shards_are_read_again_as_they_were_checked(tmp_path, run):
    files, _ = commonsense()
    run("commonsense_to_shards", build(tmp_path / "download", files), tmp_path / "out", "--split", "piqa-test")
    manifest = json.loads((tmp_path / "out" / "commonsense-piqa-test.manifest.json").read_text())
    assert manifest["samples"] == 1 and manifest["tasks"] == {"piqa": 1}
