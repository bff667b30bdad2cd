"""The order of draws depends on (size, seed, position) only."""

import json

import pytest

from rlhf.data import Draw, DrawSampler


def rows(sampler: DrawSampler, k: int) -> list[int]:
    return [draw.row for draw in sampler.next(k)]


def test_every_epoch_is_a_new_permutation() -> None:
    sampler = DrawSampler(50, seed=3)
    epochs = [rows(sampler, 50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_does_not_depend_on_how_many_are_drawn_at_once() -> None:
    whole, parts = DrawSampler(7, seed=0), DrawSampler(7, seed=0)
    assert whole.next(40) == [draw for k in (1, 6, 9, 0, 24) for draw in parts.next(k)]


def test_draw_index_ever_increases_over_epochs() -> None:
    assert [draw.draw for draw in DrawSampler(3, seed=0).next(10)] == list(range(10))


def test_without_shuffle_in_file_order() -> None:
    assert DrawSampler(2, seed=9, shuffle=False).next(5) == [Draw(0, 0), Draw(1, 1), Draw(2, 0), Draw(3, 1), Draw(4, 0)]


def test_seeds_give_different_orders_and_the_order_is_pinned() -> None:
    assert rows(DrawSampler(100, seed=1), 100) != rows(DrawSampler(100, seed=2), 100)
    # A change here changes the data order of every run that was started before.
    assert rows(DrawSampler(8, seed=0), 16) == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


@pytest.mark.parametrize("position", [0, 4, 7, 8, 23])
def test_resumed_sampler_goes_on_bit_equal(position: int) -> None:
    straight = DrawSampler(8, seed=5)
    straight.next(position)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = DrawSampler(8, seed=5)
    resumed.load_state_dict(state)
    assert resumed.next(20) == straight.next(20)


def test_a_used_sampler_goes_back() -> None:
    sampler = DrawSampler(8, seed=5)
    start, first = sampler.state_dict(), sampler.next(20)
    sampler.load_state_dict(start)
    assert sampler.next(20) == first


def test_over_other_rows_the_draws_go_on_counting() -> None:
    sampler, more = DrawSampler(8, seed=0), DrawSampler(9, seed=0)
    sampler.next(12)
    more.load_state_dict(sampler.state_dict())
    assert [draw.draw for draw in more.next(15)] == list(range(12, 27))
    assert sorted(rows(more, 9)) == list(range(9))


def test_empty_data_is_refused() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        DrawSampler(0, seed=0)
