"""Batches: which samples they hold, whoever asks for them and whatever is broken in them."""

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

from tests.shard_files import TASKS, index_of, members, png, vqa, write_tar
from vl_mtl_lora import UserError, write_shards
from vl_mtl_lora.data.faults import FaultLog
from vl_mtl_lora.data.stream import BatchStream, Feed, eval_batches, loader_deaths_told, train_batches


def to_tensor(image):
    return torch.tensor(list(image.resize((2, 2)).tobytes())).float().view(3, 2, 2)


def collate(samples, rng):
    return {"id": torch.tensor([int(s.image_id) for s in samples])}


def stream_of(folder, rows=(4, 3, 2), tasks=TASKS, transform=to_tensor, **options):
    shards = sorted(folder.glob("*.tar"))
    return BatchStream([Feed(index_of(*shards, task=task), transform, collate) for task in tasks], rows, **options)


def take(stream, count, workers=0, **options):
    batches = train_batches(stream, workers, **options)
    return [next(batches) for _ in range(count)]


def told(batches):
    return [(b.index, b.keys, b.images.sum().item()) for b in batches]


def test_batches_have_fixed_quotas_sorted_by_task(tiny_shards):
    (batch,) = take(stream_of(tiny_shards), 1)
    assert batch.ids.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert batch.slices == {"retrieval": slice(0, 4), "vqa": slice(4, 7), "captioning": slice(7, 9)}
    assert batch.images.shape == (9, 3, 2, 2) and batch.inputs["vqa"]["id"].shape == (3,)
    assert batch.epochs == {"retrieval": 4 / 24, "vqa": 3 / 24, "captioning": 2 / 24}


def test_in_turns_a_batch_holds_one_task_and_every_sample_comes_once_in_each_epoch(tiny_shards):
    batches = take(stream_of(tiny_shards, rows=(3, 2, 1), turns=1), 60)
    ids = {name: [] for name in TASKS}
    for batch in batches:
        (task,) = batch.slices
        assert batch.slices[task] == slice(0, 6) and batch.ids.tolist() == [TASKS.index(task)] * 6
        assert list(batch.inputs) == [task]
        ids[task] += batch.inputs[task]["id"].tolist()
        assert batch.epochs == {name: len(seen) / 24 for name, seen in ids.items()}
    assert all(sorted(seen[:24]) == list(range(24)) for seen in ids.values())


def test_every_sample_comes_once_in_each_epoch(tiny_shards):
    batches = take(stream_of(tiny_shards, rows=[6], tasks=["vqa"], window=5), 8)
    ids = [b.inputs["vqa"]["id"].tolist() for b in batches]
    first, second = sum(ids[:4], []), sum(ids[4:], [])
    assert sorted(first) == sorted(second) == list(range(24)) and first != second
    assert [b.epochs["vqa"] for b in batches] == [0.25 * (i + 1) for i in range(8)]


def test_a_set_smaller_than_a_batch_repeats(tmp_path):
    write_tar(tmp_path / "a.tar", members({"0": vqa(0), "1": vqa(1)}))
    batches = take(stream_of(tmp_path, rows=[5], tasks=["vqa"]), 2)
    assert [sorted(b.keys) for b in batches][0].count("0") in (2, 3)
    assert sorted(batches[0].keys + batches[1].keys) == ["0"] * 5 + ["1"] * 5


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_depend_on_seed_and_number_alone(tiny_shards, workers):
    straight = told(take(stream_of(tiny_shards, window=7), 7))
    assert told(take(stream_of(tiny_shards, window=7), 7, workers)) == straight
    assert told(take(stream_of(tiny_shards, window=7), 5, workers, start=2)) == straight[2:]
    assert told(take(stream_of(tiny_shards, window=7, seed=1), 7)) != straight


@pytest.mark.parametrize("world,workers", [(2, 0), (3, 2), (5, 0)])
def test_ranks_share_the_batches_of_one_process(tiny_shards, world, workers):
    straight = told(take(stream_of(tiny_shards), 3 * world))
    ranks = [told(take(stream_of(tiny_shards, world=world), 2, workers, start=1, rank=rank)) for rank in range(world)]
    assert [batch for turn in zip(*ranks) for batch in turn] == straight[world:]


def test_the_batches_of_a_turn_have_the_same_rows_of_each_task(tiny_shards):
    stream = stream_of(tiny_shards, rows=(3.4, 1.6, 1), world=3)
    ranks = [take(stream, 5, rank=rank) for rank in range(3)]
    turns = [[[len(b.inputs[task]["id"]) for task in TASKS] for b in turn] for turn in zip(*ranks)]
    assert all(counts == turn[0] for turn in turns for counts in turn) and len({tuple(turn[0]) for turn in turns}) > 1


@pytest.mark.parametrize("rows", [(4, 3, 2), (3.4, 1.6, 1)])
def test_another_number_of_ranks_goes_on_with_the_samples_that_nobody_has_seen(tiny_shards, rows):
    def ids(batches):
        return {task: sum([b.inputs[task]["id"].tolist() for b in batches], []) for task in TASKS}

    three = stream_of(tiny_shards, rows=rows, world=3)
    before = ids([batch for turn in zip(*(take(three, 2, rank=rank) for rank in range(3))) for batch in turn])
    assert three.used(2) == [len(before[task]) for task in TASKS]
    two = stream_of(tiny_shards, rows=rows, world=2, start=2, used=three.used(2))
    after = ids([batch for turn in zip(*(take(two, 3, rank=rank, start=2) for rank in range(2))) for batch in turn])
    alone = ids(take(stream_of(tiny_shards, rows=rows), 20))
    for task in TASKS:
        assert before[task] + after[task] == alone[task][:len(before[task] + after[task])]


def test_resuming_decodes_nothing_of_what_came_before(tiny_shards):
    decoded = []
    stream = stream_of(tiny_shards, transform=lambda image: decoded.append(image) or to_tensor(image))
    take(stream, 1, start=10_000)
    assert len(decoded) == 9


def test_samples_know_their_epoch_and_texts_take_turns(tmp_path):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i, answers=["x", "y", "z"]) for i in range(4)}))
    seen = {str(i): [] for i in range(4)}
    stream = BatchStream([Feed(index_of(tmp_path / "a.tar"), to_tensor, lambda samples, rng: [
        seen[s.key].append((s.epoch, s.turn(s.fields["answers"]))) for s in samples] and {})], [4])
    take(stream, 6)
    for turns in seen.values():
        assert [epoch for epoch, _ in turns] == list(range(6))
        answers = [answer for _, answer in turns]
        assert sorted(answers[:3]) == ["x", "y", "z"] and answers[3:] == answers[:3]
    assert len({turns[0][1] for turns in seen.values()}) > 1  # not all begin with the first


def test_samples_of_two_pictures_and_of_none_lie_in_one_batch(tmp_path):
    about = {"text": "a", "label": "yes"}
    write_shards([{"task": "pair", **about, "image_id": i, "images": [png((i, 0, 0)), png((i, 9, 0))]}
                  for i in range(3)]
                 + [{"task": "texts", **about, "image_id": 5, "text_pair": "b"} for _ in range(3)], tmp_path)
    shard, known = tmp_path / "shard-000000.tar", ["pair", "texts"]
    feeds = [Feed(index_of(shard, task=task, kind="matching", known=known, images=count), to_tensor, collate)
             for task, count in (("pair", 2), ("texts", 0))]
    (batch,) = take(BatchStream(feeds, [2, 3]), 1)
    assert batch.slices == {"pair": slice(0, 4), "texts": slice(4, 4)} and batch.ids.tolist() == [0] * 4
    first = batch.inputs["pair"]["id"].tolist()
    assert batch.images[:, :2, 0, 0].tolist() == [[i, g] for i in first for g in (0, 9)]
    assert len(batch.keys) == 5
    (batch,) = take(BatchStream(feeds[1:], [3]), 1)
    assert batch.images is None and batch.to("cpu").images is None
    evaluated = list(eval_batches(feeds[0].index, to_tensor, rows=2, faults=FaultLog(0.0)))
    assert [b.image_rows.tolist() for b in evaluated] == [[0, 1, 2, 3], [0, 1]]
    assert evaluated[0].images[:, 1, 0, 0].tolist() == [0, 9, 0, 9]
    (texts,) = eval_batches(feeds[1].index, to_tensor, rows=5, faults=FaultLog(0.0))
    assert texts.images is None and len(texts.samples) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_told_and_end_training_past_the_share(tmp_path, workers):
    write_tar(tmp_path / "a.tar", [pair for i in range(10) for pair in members(
        {str(i): vqa(i)}, picture=b"broken" if i == 1 else png())])
    stream = stream_of(tmp_path, rows=[5], tasks=["vqa"])
    with pytest.raises(UserError, match=r"^1 of 10 pictures read for task vqa.*(.|\n)*a\.tar: 1: image cannot be dec"):
        take(stream, 12, workers, faults=FaultLog(0.06))
    batches = take(stream, 8, workers, faults=FaultLog(0.3))
    assert [f.key for b in batches for f in b.faults] == ["1"]  # told once
    for first, second in zip(batches[::2], batches[1::2]):
        assert set(first.keys + second.keys) == set("023456789") and len(first.keys) == len(second.keys) == 5


@pytest.mark.parametrize("start", [0, 3, 10])
def test_one_broken_picture_ends_no_batch_of_one_row_and_no_resumed_run(tmp_path, start):
    write_tar(tmp_path / "a.tar", [pair for i in range(10) for pair in members(
        {str(i): vqa(i)}, picture=b"broken" if i == 1 else png())])
    batches = take(stream_of(tmp_path, rows=[1], tasks=["vqa"]), 25, faults=FaultLog(0.2), start=start)
    assert all(len(b.keys) == 1 and b.keys[0] != "1" for b in batches)
    assert [f.key for b in batches for f in b.faults] == ["1"]


def test_augmentation_of_any_library_is_a_function_of_the_batch(tiny_shards):
    def noisy(image):
        return torch.tensor([[[random.random(), np.random.rand(), float(torch.rand(()))]]])

    random.seed(5), np.random.seed(5)
    batches = [take(stream_of(tiny_shards, transform=noisy), 3, workers)[2].images for workers in (0, 2)]
    assert torch.equal(*batches)
    state = random.getstate(), np.random.get_state()[1].tolist()
    take(stream_of(tiny_shards, transform=noisy), 1)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_picture_that_the_model_cannot_take_is_a_fault(tmp_path):
    write_tar(tmp_path / "a.tar", [*members({"0": vqa(0)}), *members({"1": vqa(1)}, png(size=(400, 1)))])

    def narrow(image):
        if image.width > 200 * image.height:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return to_tensor(image)

    (batch,) = take(stream_of(tmp_path, rows=[2], tasks=["vqa"], transform=narrow), 1, faults=FaultLog(0.5))
    assert batch.keys == ["0", "0"] and [f.key for f in batch.faults] == ["1"]
    assert "aspect ratio" in batch.faults[0].reason


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_during_the_run_ends_it_with_a_message(tmp_path, workers):
    (tmp_path / "alone").mkdir()
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", members({f"{i}{j}": vqa(j) for j in range(3)}))
    stream = stream_of(tmp_path, rows=[6], tasks=["vqa"])
    (tmp_path / "2.tar").unlink()
    with pytest.raises(UserError, match=r"^3 of 12 pictures read for task vqa(.|\n)*2\.tar: 2\d: the shard cannot"):
        take(stream, 5, workers)
    alone = write_tar(tmp_path / "alone" / "a.tar", members({"0": vqa(0)}))
    stream = stream_of(tmp_path / "alone", rows=[6], tasks=["vqa"])
    alone.unlink()
    with pytest.raises(UserError, match="no sample of a batch of task vqa can be used(.|\n)*No such file"):
        take(stream, 1, workers)


# torch raises from its SIGCHLD handler, in whatever code runs just then: in a callback of the
# garbage collector Python drops that error with a warning, and the loader's next poll tells.
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_a_loader_process_that_dies_ends_training_with_a_message(tiny_shards):
    before = set(multiprocessing.active_children())
    batches = train_batches(stream_of(tiny_shards), workers=1)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a loader process has died.*data.workers"), loader_deaths_told():
        for _ in range(100):
            next(batches)


def test_evaluation_sees_every_good_sample_once_in_order(tmp_path):
    write_tar(tmp_path / "a.tar", [pair for i in range(7) for pair in members(
        {str(i): vqa(i)}, picture=b"broken" if i == 3 else png())])
    index, faults = index_of(tmp_path / "a.tar"), FaultLog(1.0)
    batches = list(eval_batches(index, to_tensor, rows=4, faults=faults))
    assert [s.key for b in batches for s in b.samples] == ["0", "1", "2", "4", "5", "6"]
    assert [row for b in batches for row in b.rows] == [0, 1, 2, 4, 5, 6]
    assert [fault["key"] for fault in faults.report()] == ["3"]
    batches = list(eval_batches(index, to_tensor, rows=2, faults=FaultLog(1.0), among=range(2, 6)))
    assert [row for b in batches for row in b.rows] == [2, 4, 5]
    with pytest.raises(UserError, match="1 of 7 pictures"):
        list(eval_batches(index, to_tensor, rows=4, faults=FaultLog()))


def test_a_picture_shown_by_several_samples_is_decoded_once(tmp_path):
    write_tar(tmp_path / "a.tar", members({str(i): vqa(i, image_id=i // 3) for i in range(6)}))
    (batch,) = eval_batches(index_of(tmp_path / "a.tar"), to_tensor, rows=10, faults=FaultLog(0.0))
    assert len(batch.images) == 2 and batch.image_rows.tolist() == [0, 0, 0, 1, 1, 1]
