"""Evaluation as a whole: every kind of target, kept embeddings, TREC runs, held-out sets, and what a result says."""

import json
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import COLOURS, tiny_samples
from vl_mtl_lora import UserError, load_run, parse_config, write_shards
from vl_mtl_lora.compare import compare
from vl_mtl_lora.config import dump_config
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.index import build_indices, shards_hash
from vl_mtl_lora.embeddings import EmbeddingStore, evaluate_files, read_embeddings
from vl_mtl_lora.evaluate import evaluate_task, evaluation_indices
from vl_mtl_lora.evaluation import evaluate_embeddings, evaluate_model
from vl_mtl_lora.forgetting import check_base, forgetting
from vl_mtl_lora.metrics.retrieval import retrieval_metrics
from vl_mtl_lora.model import build_model
from vl_mtl_lora.trainer import train


@pytest.fixture
def run(tiny_config):
    """A trained run with two held-out tasks, one of them over the shards it was trained on."""
    config = tiny_config(steps=8)
    shards = config.tasks["vqa"].test
    data = config.model_dump()
    data["held_out"] = {"colours": {"kind": "vqa", "tag": "vqa", "answers": list(COLOURS), "test": shards},
                        "retrieval_again": {"kind": "retrieval", "tag": "retrieval", "test": shards}}
    train(parse_config(data))
    return config.out


def figures(results, arm):
    return {task: values["metrics"] if arm is None else values[arm] for task, values in results["tasks"].items()}


def test_a_run_its_base_and_a_merged_model_are_measured_alike(run, tmp_path, command):
    compared = compare(run)
    assert figures(evaluate_model(run), None) == figures(compared, "adapted")
    assert figures(evaluate_model(run, zero_shot=True), None) == figures(compared, "zero_shot")
    config = tmp_path / "again.yaml"
    config.write_text((tmp_path / "run" / "config.yaml").read_text())
    assert figures(evaluate_model(config), None) == figures(compared, "zero_shot")
    assert command("export", run, "--task", "retrieval", "--out", tmp_path / "m.safetensors")[0] == 0
    evaluate_model(run, embeddings=tmp_path / "e")
    evaluate_model(config, [f"backbone.pretrained={tmp_path / 'm.safetensors'}"], embeddings=tmp_path / "e")
    for side in ("images", "texts"):
        adapted, merged = (load_file(tmp_path / "e" / f"retrieval.{arm}.{side}.safetensors")["embeddings"]
                           for arm in ("adapted", "zero-shot"))
        torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="is a run, which has its config"):
        evaluate_model(run, ["train.steps=3"])


def test_results_say_what_is_needed_to_have_them_again(run):
    results = compare(run, limit=20)
    shards = build_indices(load_run(run)[1], "test", FaultLog())["vqa"].source.files
    assert results["shards"]["vqa"] == {"hash": shards_hash(shards), "files": len(shards), "samples": 24}
    assert results["seed"] == 0 and results["limit"] == 20 and results["config"]["adapter"]["rank"] == 4
    assert results["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert results["seconds"].keys() >= {"evaluation, zero-shot", "evaluation, adapted", "held-out sets"}
    assert results["tasks"]["vqa"]["n"] == {"accuracy": 20, "accuracy_lenient": 20}
    low, high = results["tasks"]["vqa"]["interval"]["adapted"]["accuracy"]
    assert low <= results["tasks"]["vqa"]["adapted"]["accuracy"] <= high
    assert "official" in results["tasks"]["vqa"]["notes"][0]
    assert "tokenizer" in results["tasks"]["captioning"]["notes"][0]
    json.dumps(results, allow_nan=False)


def test_shards_are_told_apart_by_what_is_in_them(tmp_path):
    hashes = []
    for folder, samples in (("a", 8), ("b", 8), ("c", 9)):
        write_shards(tiny_samples(samples), tmp_path / folder, name="x")
        hashes.append(shards_hash([str(tmp_path / folder / "x-000000.tar")]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_embeddings_are_kept_and_used_again(run, tmp_path, monkeypatch):
    model, config = load_run(run)
    index = evaluation_indices(config, "test", FaultLog())["retrieval"]
    calls = []
    monkeypatch.setattr(model.backbone, "encode_text",
                        lambda tokens, encode=model.backbone.encode_text: calls.append(1) or encode(tokens))

    def measure(zero_shot=False, limit=None):
        calls.clear()
        found = evaluate_task(model, index, zero_shot=zero_shot, limit=limit, rows=10,
                              store=EmbeddingStore(tmp_path / "e", model))
        return dict(found.metrics), [sample.key for sample in found.samples], found.rows, bool(calls)

    first, again = measure(), measure()
    assert first[:3] == again[:3] and (first[3], again[3]) == (True, False)
    assert measure(limit=5)[3] and measure()[3]  # another number of samples is another file's content
    assert measure(zero_shot=True)[3] and not measure(zero_shot=True)[3] and not measure()[3]
    with torch.no_grad():
        next(iter(model.summary.layers.values())).up.add_(0.01)
    assert measure()[3] and not measure(zero_shot=True)[3]  # other adapters, but the same base
    images, texts = EmbeddingStore(tmp_path / "e", model).files(model.tasks["retrieval"], "adapted")
    assert dict(evaluate_files(images, texts)) == pytest.approx(measure()[0])
    images.write_bytes(images.read_bytes()[:100])
    assert measure()[3]


def test_plain_files_of_embeddings(tmp_path, command):
    rng = np.random.default_rng(0)
    images, texts = (rng.standard_normal((n, 6)).astype(np.float32) for n in (12, 24))
    groups = torch.arange(12).repeat_interleave(2)
    np.save(tmp_path / "i.npy", images)
    save_file({"embeddings": torch.from_numpy(texts), "groups": groups}, tmp_path / "t.safetensors")
    units = [torch.nn.functional.normalize(torch.from_numpy(vectors), dim=-1) for vectors in (images, texts)]
    expected = retrieval_metrics(units[0], torch.arange(12), units[1], groups)
    results = evaluate_embeddings(tmp_path / "i.npy", tmp_path / "t.safetensors")
    assert results["tasks"]["retrieval"]["metrics"] == {name: float(value) for name, value in expected.items()}
    code, out, _ = command("evaluate", tmp_path / "i.npy", tmp_path / "t.safetensors", "--out", tmp_path / "r.json")
    line = f"retrieval\ttext_to_image_recall@5\t{expected['text_to_image_recall@5']:.2f}\t"
    assert code == 0 and any(row.startswith(line) and row.endswith("\t24") for row in out.splitlines())
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["tasks"]["retrieval"]["metrics"] == results["tasks"]["retrieval"]["metrics"]


@pytest.mark.parametrize("tensors,message", [
    ({"vectors": torch.zeros(2, 3)}, "expected a tensor `embeddings`"),
    ({"embeddings": torch.zeros(3)}, r"\(N, E\) of floats, got .*\(3,\)"),
    ({"embeddings": torch.full((2, 3), torch.nan)}, "no number"),
    ({"embeddings": torch.ones(2, 3), "groups": torch.arange(3)}, r"`groups` \(2,\) of integers, got \(3,\)"),
])
def test_files_that_hold_no_embeddings_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_embeddings(tmp_path / "x.safetensors")


def test_pairs_that_do_not_fit_are_refused(tmp_path):
    for name, tensor in (("a", torch.ones(2, 3)), ("b", torch.ones(2, 4))):
        save_file({"embeddings": tensor}, tmp_path / f"{name}.safetensors")
    save_file({"embeddings": torch.ones(2, 3), "groups": torch.tensor([7, 8])}, tmp_path / "c.safetensors")
    for name, message in (("b", "of two models"), ("c", "no text belongs to any image")):
        with pytest.raises(UserError, match=message):
            evaluate_files(tmp_path / "a.safetensors", tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="cannot read the embeddings"):
        read_embeddings(tmp_path / "gone.npy")


def test_trec_runs_hold_the_same_ranking(run, tmp_path):
    results = evaluate_model(run, trec=tmp_path / "trec")
    hits, queries = 0, 0
    right = {}
    for line in (tmp_path / "trec" / "retrieval.text_to_image.qrels").read_text().splitlines():
        query, _, item, _ = line.split(" ")
        right.setdefault(query, set()).add(item)
    ranking = {}
    for line in (tmp_path / "trec" / "retrieval.adapted.text_to_image.run").read_text().splitlines():
        query, q0, item, rank, score, tag = line.split(" ")
        assert (q0, tag) == ("Q0", "adapted")
        ranking.setdefault(query, []).append((int(rank), float(score), item))
    for query, items in ranking.items():
        assert [rank for rank, _, _ in items] == list(range(1, len(items) + 1))
        assert [score for _, score, _ in items] == sorted((score for _, score, _ in items), reverse=True)
        hits += any(item in right[query] for _, _, item in items[:5])
        queries += 1
        assert unquote(query).rpartition("#")[0] in {str(i) for i in range(24)}
    assert queries == 48
    assert 100 * hits / queries == pytest.approx(results["tasks"]["retrieval"]["metrics"]["text_to_image_recall@5"])


def test_held_out_sets_are_answered_through_each_task_s_adapters(run):
    model, config = load_run(run)
    faults = FaultLog()
    indices = build_indices(config, "test", faults, held_out=True)
    found = {one["task"]: one for one in forgetting(model, config, indices, None, faults)}
    assert found.keys() == {"colours", "retrieval_again"}
    for one, task in ((found["colours"], "vqa"), (found["retrieval_again"], "retrieval")):
        index = evaluation_indices(config, "test", faults)[task]
        frozen = evaluate_task(model, index, zero_shot=True).metrics[one["metric"]]
        assert one["frozen"] == float(frozen) and one["through"].keys() == {"retrieval", "vqa", "captioning"}
    # What retrieval's adapters answer on retrieval's own shards, without its head, is the adapted arm.
    own = evaluate_task(model, evaluation_indices(config, "test", faults)["retrieval"], zero_shot=False)
    assert found["retrieval_again"]["through"]["retrieval"]["figure"] == pytest.approx(
        own.metrics["text_to_image_recall@1"])


def test_the_base_is_proven_untouched_and_a_touched_one_found(run, monkeypatch):
    model, _ = load_run(run)
    before = {name: layer for name, layer in model.summary.layers.items()}
    assert check_base(model) > 1000
    assert all(getattr(place.parent, place.attribute) is before[name] for name, place in model.summary.places.items())
    layer = model.summary.layers["image.0.mlp.in"]
    monkeypatch.setattr(layer, "forward", lambda x: layer.base(x) + 1e-6)  # adapters that do not quite go off
    with pytest.raises(UserError, match="differs from the frozen base's"):
        check_base(model)


def test_groups_of_samples_have_figures_of_their_own(tiny_config, tmp_path):
    def samples():
        for i, sample in enumerate(s for s in tiny_samples(24) if s["task"] == "vqa"):
            yield {**sample, "answer_type": "number" if i % 3 else "yes/no", "question_type": "what is"}
    write_shards(samples(), tmp_path / "s", name="typed-test")
    write_shards(tiny_samples(5), tmp_path / "s", name="more-test")
    data = tiny_config().model_dump()
    data["tasks"] = {"vqa": {**data["tasks"]["vqa"], "test": str(tmp_path / "s" / "*.tar")}}
    data["data"]["ignore_tasks"] = ["retrieval", "captioning"]
    config = parse_config(data)
    model = build_model(config)
    index = evaluation_indices(config, "test", FaultLog())["vqa"]
    found = evaluate_task(model, index, zero_shot=True, thorough=True)
    assert {key: metric.n for key, metric in found.groups.items()} == {
        ("answer_type", "number"): 16, ("answer_type", "yes/no"): 8, ("dataset", "more-test"): 5,
        ("dataset", "typed-test"): 24}  # one type of question is no group
    right = [p in s.fields["answers"] for p, s in zip(found.predictions, found.samples)
             if s.fields.get("answer_type") == "yes/no"]
    assert found.groups["answer_type", "yes/no"] == 100 * sum(right) / 8
    assert not evaluate_task(model, index, zero_shot=True).groups


def test_a_held_out_task_needs_no_train_shards_and_mistakes_in_it_are_told(tiny_config, tmp_path, command):
    data = tiny_config().model_dump()
    test = data["tasks"]["vqa"]["test"]
    assert parse_config({**data, "held_out": {"x": {"kind": "captioning", "test": test}}}).held_out["x"].test
    for section, message in (({"kind": "vqa", "tset": test}, "held_out.x.tset: unknown key; did you mean test"),
                             ({"kind": "vqa"}, "held_out.x.test: missing"),
                             ({"kind": "clasification", "test": test}, "did you mean classification")):
        with pytest.raises(UserError, match=message):
            parse_config({**data, "held_out": {"x": section}})
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(parse_config({**data, "held_out": {"x": {"kind": "captioning", "test": test}}})))
    assert command("inspect", path)[0] == 0


def test_kept_files_name_the_pictures_once(run, tmp_path):
    evaluate_model(run, embeddings=tmp_path / "e", limit=12)
    images = load_file(tmp_path / "e" / "retrieval.adapted.images.safetensors")
    texts = load_file(tmp_path / "e" / "retrieval.adapted.texts.safetensors")
    assert images["groups"].tolist() == list(range(12)) and texts["groups"].tolist() == sorted([*range(12)] * 2)
