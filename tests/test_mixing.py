"""Orders and schedules against their definitions, by brute force."""

from collections import Counter

import numpy as np
import pytest

from vl_mtl_lora import UserError
from vl_mtl_lora.data.mixing import SampleOrder, Schedule, Turns, expected_rows


@pytest.mark.parametrize("window", [1, 4, 7, 20, 1000])
def test_an_epoch_has_every_sample_once_and_windows_hold_whole_runs_of_shards(window):
    sizes = [3, 0, 9, 1, 7]
    order = SampleOrder("vqa", sizes, seed=3, window=window)
    places = [order(i) for i in range(60)]
    assert [epoch for epoch, _ in places] == [0] * 20 + [1] * 20 + [2] * 20
    shard_of = np.repeat(np.arange(5), sizes)
    for epoch in range(3):
        rows = [row for _, row in places[20 * epoch:20 * epoch + 20]]
        assert sorted(rows) == list(range(20))
        shards = [int(shard_of[row]) for row in rows]
        # Windows are cut out of one shuffled line of shards: each shard lies in windows that follow each other.
        windows = {shard: {i // window for i, other in enumerate(shards) if other == shard} for shard in set(shards)}
        assert all(max(found) - min(found) + 1 == len(found) for found in windows.values())


def test_orders_differ_by_epoch_seed_and_task_alone():
    def rows(task="vqa", seed=0, epoch=0):
        order = SampleOrder(task, [50, 50], seed=seed, window=30)
        return [order(100 * epoch + i)[1] for i in range(100)]

    assert rows() == rows()
    different = [rows(), rows("captioning"), rows(seed=1), rows(epoch=1)]
    assert len({tuple(r) for r in different}) == 4
    whole = SampleOrder("vqa", [50, 50], seed=0, window=100)
    assert abs(np.corrcoef([whole(i)[1] for i in range(100)], range(100))[0, 1]) < 0.3


def test_any_position_can_be_asked_for_first():
    straight = SampleOrder("vqa", [5, 8], seed=1, window=4)
    expected = [straight(i) for i in range(40)]
    for i in reversed(range(40)):
        assert SampleOrder("vqa", [5, 8], seed=1, window=4)(i) == expected[i]


@pytest.mark.parametrize("expected", [[32, 16, 16], [2.5, 0.5, 1.0], [1.2, 1.3, 1.5, 4.0], [7]])
def test_batches_have_the_expected_rows_on_average_and_the_same_sum_each(expected):
    schedule = Schedule(expected, seed=0)
    counts = np.array([schedule(n)[0] for n in range(9000)])
    assert (counts.sum(axis=1) == round(sum(expected))).all()
    assert ((counts >= np.floor(expected)) & (counts <= np.ceil(expected))).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.03)
    before = np.array([schedule(n)[1] for n in range(9000)])
    np.testing.assert_array_equal(before[1:], np.cumsum(counts, axis=0)[:-1])
    assert Schedule(expected, seed=0)(8999) == schedule(8999)  # whatever was asked for before


def test_mixing_follows_its_formulas():
    sizes, least = {"a": 100, "b": 900, "c": 3000}, dict.fromkeys("abc", 1)
    assert expected_rows("proportional", sizes, 40, least) == {"a": 1.0, "b": 9.0, "c": 30.0}
    # T5 (arXiv 1910.10683): min(size, cap) ** (1 / T), normalised
    shares = {task: min(size, 1000) ** 0.5 for task, size in sizes.items()}
    got = expected_rows("temperature", sizes, 40, least, temperature=2.0, cap=1000)
    assert got == pytest.approx({task: 40 * share / sum(shares.values()) for task, share in shares.items()})
    assert expected_rows("temperature", sizes, 40, least, temperature=1.0) == pytest.approx({"a": 1, "b": 9, "c": 30})
    assert expected_rows("weights", sizes, 8, least, weights={"a": 1, "b": 2, "c": 1}) == {"a": 2, "b": 4, "c": 2}


def test_no_task_is_ever_absent():
    sizes, least = {"a": 1, "b": 50, "c": 10_000}, {"a": 2, "b": 1, "c": 1}
    rows = expected_rows("proportional", sizes, 10, least)
    assert rows == {"a": 2.0, "b": 1.0, "c": 7.0}
    schedule = Schedule(list(rows.values()), seed=0)
    assert Counter(tuple(schedule(n)[0]) for n in range(100)) == {(2, 1, 7): 100}
    with pytest.raises(UserError, match="data.mixing.rows is 3, fewer than the tasks need at least: 4"):
        expected_rows("proportional", sizes, 3, least)


def test_windows_and_spans_of_batches_draw_anew():
    order = SampleOrder("vqa", [12], seed=0, window=4)
    rows = [order(i)[1] for i in range(12)]
    assert len({tuple(row % 4 for row in rows[i:i + 4]) for i in (0, 4, 8)}) > 1
    schedule = Schedule([0.5, 0.5], seed=0)
    assert [schedule(n)[0] for n in range(40)] != [schedule(4096 + n)[0] for n in range(40)]


@pytest.mark.parametrize("expected", [[32, 16, 16], [2.5, 0.5, 1.0], [7]])
def test_in_turns_a_batch_has_one_task_the_more_often_the_more_rows_it_has(expected):
    turns = Turns(expected, seed=0)
    counts = np.array([turns(n)[0] for n in range(9000)])
    assert (np.sort(counts, axis=1)[:, :-1] == 0).all() and (counts.sum(axis=1) == round(sum(expected))).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, rtol=0.1)
    before = np.array([turns(n)[1] for n in range(9000)])
    np.testing.assert_array_equal(before[1:], np.cumsum(counts, axis=0)[:-1])
    assert not before[0].any() and Turns(expected, seed=0)(8999) == turns(8999)
    if len(expected) > 1:
        assert [Turns(expected, seed=1)(n)[0] for n in range(50)] != counts[:50].tolist()


def test_the_batches_of_a_step_have_the_same_task():
    each, one = Turns([3, 2, 1], seed=0, each=4), Turns([3, 2, 1], seed=0)
    counts = np.array([each(n)[0] for n in range(400)])
    assert counts.tolist() == [one(n // 4)[0] for n in range(400)]
    np.testing.assert_array_equal([each(n)[1] for n in range(1, 401)], np.cumsum(counts, axis=0))
