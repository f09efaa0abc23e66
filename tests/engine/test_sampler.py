from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from unteach.engine.data.sampler import Stream, draw, rank_batches, share_contexts
from unteach.engine.data.tokens import Example


def examples(prefix: str, count: int) -> tuple[Example, ...]:
    return tuple(
        Example(f"{prefix}{i}", "forget", (1,) * (3 + i % 5), (2,), first_row=i)
        for i in range(count)
    )


def test_every_epoch_shows_every_example_once_in_a_new_order() -> None:
    streams = [Stream(examples("a", 7), 3)]
    seen = [e.record_id for step in range(14) for e in draw(streams, 1, step)]
    epochs = [seen[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_draw_depends_on_seed_and_step_alone() -> None:
    streams = [Stream(examples("a", 9), 2), Stream(examples("b", 4), 3)]
    late = draw(streams, 3, 11)
    assert late == draw(streams, 3, 11)
    assert Counter(e.record_id[0] for e in late) == {"a": 2, "b": 3}
    assert any(draw(streams, 3, s) != draw(streams, 4, s) for s in range(3))


def test_drawing_never_walks_over_the_whole_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Example] = []

    def watched(example: Example) -> int:
        hashed.append(example)
        return id(example)

    monkeypatch.setattr(Example, "__hash__", watched)
    rows = examples("a", 50)
    for streams in ([Stream(rows, 4)], [Stream(rows, 4, steps=3)]):
        again = [Stream(rows, 4, steps=streams[0].steps)]
        assert [draw(streams, 1, s) for s in range(20)] == [draw(again, 1, s) for s in range(20)]
    assert not hashed


def test_streams_that_step_alone_share_the_run_by_their_steps() -> None:
    streams = [Stream(examples("a", 6), 3, steps=4), Stream(examples("b", 5), 5, steps=2)]
    run = [draw(streams, 2, step) for step in range(6)]
    kinds = [{e.record_id[0] for e in step} for step in run]
    assert sorted(kinds, key=str) == [{"a"}] * 4 + [{"b"}] * 2
    seen = Counter(e.record_id for step in run for e in step)
    assert set(seen.values()) == {2}, "two epochs of each"
    later = [e.record_id for step in range(6, 12) for e in draw(streams, 2, step)]
    assert Counter(later) == seen


def test_a_stream_that_steps_alone_meets_like_lengths() -> None:
    rows = examples("a", 60)
    run = [draw([Stream(rows, 5, steps=12)], 0, step) for step in range(12)]
    spread = [max(len(e.context) for e in s) - min(len(e.context) for e in s) for s in run]
    mixed = [draw([Stream(rows, 5)], 0, step) for step in range(12)]
    loose = [max(len(e.context) for e in s) - min(len(e.context) for e in s) for s in mixed]
    assert sum(spread) < 0.5 * sum(loose)
    assert sorted(e.record_id for s in run for e in s) == sorted(e.record_id for e in rows)


def test_shared_contexts_are_those_that_can_meet() -> None:
    one = Stream(
        (Example("a", "forget", (1, 2, 3), (9,)), Example("b", "forget", (1, 2, 4), (9,))), 1
    )
    other = Stream((Example("c", "forget", (1, 5, 3), (9,)),), 1)
    assert [e.shared for s in share_contexts([one, other]) for e in s.examples] == [1, 1, 1]
    alone = [replace(one, steps=1), replace(other, steps=1)]
    assert [e.shared for s in share_contexts(alone) for e in s.examples] == [2, 2, 2]


@pytest.mark.parametrize(("size", "accumulation"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2)])
def test_ranks_and_micro_batches_share_the_step_without_loss(size: int, accumulation: int) -> None:
    step = examples("a", 5)
    parts = [rank_batches(step, rank, size, accumulation) for rank in range(size)]
    assert all(len(part) == accumulation for part in parts)
    shared = [e.record_id for part in parts for batch in part for e in batch]
    assert sorted(shared) == sorted(e.record_id for e in step)
