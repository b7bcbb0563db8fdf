"""How long units take side by side, by schedules drawn by hand."""

import pytest

from benchmarks.launch.units import Unit, wall_time


def unit(weight: float, gpus: int = 1, after: tuple[Unit, ...] = ()) -> Unit:
    return Unit([], gpus, list(after), weight)


def seconds(units: list[Unit], places: int) -> float:
    return wall_time(units, places, lambda one: one.gpus)


@pytest.mark.parametrize(
    ("weights", "places", "wanted"),
    [
        ([], 2, 0),
        ([3, 4, 5], 1, 12),
        ([3, 4, 5], 3, 5),
        ([3, 4, 5], 2, 7),  # 5 | 4 then 3 behind the 4, which ends first
        ([2, 2, 2, 3, 3], 2, 7),  # 3 and 2 and 2 | 3 and 2
    ],
)
def test_units_start_longest_first_where_there_is_room(weights, places, wanted):
    assert seconds([unit(weight) for weight in weights], places) == wanted


def test_a_unit_waits_for_what_it_takes_and_for_room():
    first = unit(4, gpus=2)
    units = [unit(1), first, unit(3, after=(first,)), unit(2, after=(first,))]
    # Both places for 4, then 3 | 2 and 1.
    assert seconds(units, 2) == 7
    # The short one is let past the one that needs all places.
    assert seconds([unit(5), unit(4, gpus=3), unit(1)], 3) == 9
