import pytest
import torch

from vl_mtl_lora import TaskRouter, UserError


def route_of(router, tower="image"):
    route = router.route(tower)
    return None if route is None else route.task if route.ids is None else route.ids.tolist()


def test_routes_nest_and_are_restored_after_an_error():
    router = TaskRouter(["a", "b"])
    with router.use("a"):
        with router.use(torch.tensor([0, 1])):
            assert route_of(router) == [0, 1]
            with router.off():
                assert route_of(router) is None
            assert route_of(router) == [0, 1]
        with pytest.raises(ZeroDivisionError), router.use("b"):
            1 / 0  # noqa: B018
        assert route_of(router) == 0
    with pytest.raises(RuntimeError, match="no route"):
        router.route("image")


def test_towers_take_routes_of_their_own_and_keep_the_others():
    router = TaskRouter(["a", "b"])
    with router.use(image=torch.tensor([0, 1]), text=torch.tensor([1])):
        assert (route_of(router), route_of(router, "text")) == ([0, 1], [1])
        with router.use(text="a"):
            assert (route_of(router), route_of(router, "text")) == ([0, 1], 0)
        with router.use("b"):
            assert (route_of(router), route_of(router, "text")) == (1, 1)
    with router.use(image="a"), pytest.raises(RuntimeError, match="text tower"):
        router.route("text")


def test_rows_are_repeated_each_by_its_own_number_and_a_part_of_a_tower_has_rows_of_its_own():
    router = TaskRouter(["a", "b"])
    router.towers = frozenset({"image", "text"})
    with router.use(torch.tensor([1, 0, 1])), router.repeat(**{"image": [4, 8, 4], "image.merged": [1, 2, 1]}):
        assert router.route("image").ids.tolist() == [1] * 4 + [0] * 8 + [1] * 4
        assert router.route("image.merged").ids.tolist() == [1, 0, 0, 1]
        assert router.route("text").ids.tolist() == [1, 0, 1]
        with router.use(image=torch.tensor([0])):
            assert router.route("image.merged").ids.tolist() == [1, 0, 0, 1]  # its own route stays
    with pytest.raises(RuntimeError, match="the image tower got 3 rows, but the router holds 2 ids"), \
            router.use(torch.tensor([1, 0])), router.repeat(image=[1, 1, 1]):
        pass
    with router.use(image=torch.tensor([1])):
        assert router.route("image.merged").ids.tolist() == [1]  # the tower's, having none
    with router.use("b"), router.repeat(image=[3, 2]):
        assert router.route("image").task == 1
    with router.off(), router.repeat(image=[3, 2]):
        assert router.route("image") is None


def test_repeat_follows_the_order_of_beams():
    router = TaskRouter(["a", "b"])
    with router.use(torch.tensor([0, 1])), router.repeat(text=3):
        assert route_of(router, "text") == [0, 0, 0, 1, 1, 1]
        assert route_of(router, "image") == [0, 1]
    with router.use("b"), router.repeat(text=3):
        assert route_of(router, "text") == 1


@pytest.mark.parametrize("ids,tokens,blocks,segments", [
    ([2, 2, 2, 2, 0, 0, 0, 0], 50, [2, 2, 0, 0], [(0, 400, 4, 0)]),  # at least four blocks where quotas allow it
    ([2, 0, 2], 50, [2, 0, 2], [(0, 150, 3, 0)]),
    ([1] * 5 + [0] * 3, 2, [1, 0], [(0, 10, 1, 0), (10, 16, 1, 1)]),  # blocks of one row would be too short
    ([0, 1] * 20, 1, [0, 1] * 20, [(0, 40, 40, 0)]), ([], 50, [], [])])
def test_blocks_of_tokens(ids, tokens, blocks, segments):
    route = TaskRouter(["a", "b", "c"])._route(torch.tensor(ids, dtype=torch.int64))
    got = route.blocks(torch.device("cpu"), len(ids), tokens, rank=8)
    assert got.tasks.tolist() == blocks
    assert [tuple(segment) for segment in got.segments] == segments


@pytest.mark.parametrize("rows,tokens,blocks,segments", [
    (6, 50, [1] * 4, [(0, 300, 4, 0)]), (7, 50, [1] * 2, [(0, 350, 2, 0)]), (7, 51, [1], [(0, 357, 1, 0)]),
    (4, 2, [1], [(0, 8, 1, 0)])])  # too short to be shared
def test_blocks_of_one_task(rows, tokens, blocks, segments):
    got = TaskRouter(["a", "b"])._route("b").blocks(torch.device("cpu"), rows, tokens, rank=8)
    assert got.tasks.tolist() == blocks
    assert [tuple(segment) for segment in got.segments] == segments


@pytest.mark.parametrize("bad", [torch.tensor([0, 2]), torch.tensor([-1]), torch.tensor([0.0]),
                                 torch.zeros(2, 2).long(), "c", 3, torch.tensor([True])])
def test_bad_targets_are_refused(bad):
    with pytest.raises(UserError):
        TaskRouter(["a", "b"]).use(bad)


def test_use_takes_one_way_of_naming_towers():
    router = TaskRouter(["a"])
    with pytest.raises(UserError):
        router.use()
    with pytest.raises(UserError):
        router.use("a", text="a")


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_task_names_must_be_distinct(names):
    with pytest.raises(UserError):
        TaskRouter(names)
