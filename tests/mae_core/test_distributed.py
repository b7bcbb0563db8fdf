import pytest

from mae_core import distributed


@pytest.mark.parametrize(("count", "size", "world"), [(11, 2, 1), (11, 2, 2), (11, 2, 4), (4, 8, 3), (0, 2, 2)])
def test_batches_are_dealt_out_whole_and_gathered_in_order(monkeypatch, count, size, world):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    dealt = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        dealt.append(distributed.local_batches(count, size))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    monkeypatch.setattr(distributed, "gather_to_all", lambda results: dealt)
    batches = distributed.gather_in_turn(dealt[0])
    assert [index for batch in batches for index in batch] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
