"""Elements of a JSON file piece by piece: what json reads at once, each where the file has it."""

import json
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from transfer.data import json_elements
from transfer.data.json_elements import Elements

TEXT = st.text(st.sampled_from('ab"\\{}[], é€\n'), max_size=12)
NUMBERS = st.integers(-(2**40), 2**40) | st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.recursive(
    NUMBERS | TEXT | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=3)
MANY = st.lists(OBJECTS, max_size=12) | st.lists(VALUES, max_size=12)
LAYOUTS = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])


def equal(a: object, b: object) -> bool:
    """As JSON values, where NaN equals itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def elements(content: bytes, **sizes: int) -> list[tuple]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(json_elements, name, size)
        return list(Elements(lambda start, length: content[start : start + length], len(content), {"a", "b"}))


# However slow this machine is, and with the same examples everywhere.
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(MANY, MANY, LAYOUTS, st.sampled_from([8, 40, 1 << 20]))
@example([{"x": [{}, {}]}, 5, {}], [], {}, 1 << 20)  # as many places between two objects as between two elements
@example([{"x": "}, {"}, {"x": 1}], [{"y": float("nan")}, {}, {}], {}, 1 << 20)
@example([None], [-100000000, [0, -10, -1000, 1.0000000000000002e16], 1.0000000000000002e16], {}, 8)
def test_every_element_is_read_as_by_json_and_lies_where_it_is_said_to(first, second, layout, together):
    content = json.dumps({"other": [{}, {}], "a": first, "b": second}, **layout).encode()
    found = elements(content, WINDOW=64, MARGIN=16, TOGETHER=together)
    for name, expected in (("a", first), ("b", second)):
        own = [one for one in found if one[0] == name]
        assert [number for _, number, *_ in own] == list(range(-1, len(expected)))
        assert equal([entry for _, _, entry, _, _ in own[1:]], expected)
        assert equal([json.loads(content[start:end]) for *_, start, end in own[1:]], expected)


@pytest.mark.parametrize("number", [2**63, -(2**70), 10**30])
def test_a_number_of_any_size_is_left_to_who_asks_for_it(number):
    content = json.dumps({"a": [{"id": 1}, {"id": number}, {"id": 2}]}).encode()
    found = [entry["id"] for _, place, entry, _, _ in elements(content) if place >= 0]
    assert found == [1, pytest.approx(number), 2]


@pytest.mark.parametrize(
    "broken", ['{"a": [{}, {]}', '{"a": [{} {}]}', '{"a": [{}, {}', '{"a": {}}', '{"a": [{},]}', "[]"]
)
def test_what_is_no_json_is_told_with_its_place(broken):
    with pytest.raises(ValueError, match="at byte"):
        elements(broken.encode())
