"""What the guard lets pass and what not; its runs are in the nightly command."""

import json

import pytest

from tests.guard.__main__ import EXPECTED, compare
from tests.guard.faults import FAULTS
from tests.guard.runs import RUNS, maps

EXPECTATION = {"loss of epoch 1": 4.0, "top1": 50.0, "detection, value 0": 0.5}


def test_numbers_within_their_tolerances_pass():
    assert compare(EXPECTATION, {"loss of epoch 1": 4.07, "top1": 46.0, "detection, value 0": 0.5001}) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"loss of epoch 1": 4.1}, "loss of epoch 1: 4.1, expected 4 within 0.08"),
        ({"top1": 56.0}, "top1: 56, expected 50 within 5"),
        ({"detection, value 0": 0.501}, "detection, value 0: 0.501, expected 0.5 within 0.0002"),
        ({"top1": float("nan")}, "top1: nan, expected 50 within 5"),
        ({"aacc": 3.0}, "aacc: nothing is expected"),
    ],
)
def test_any_other_is_named(changed, says):
    assert compare(EXPECTATION, EXPECTATION | changed) == [says]


def test_a_number_that_is_gone_is_named():
    assert compare(EXPECTATION, {"top1": 50.0, "detection, value 0": 0.5}) == ["loss of epoch 1: absent"]


def test_every_fault_names_runs_that_have_expectations():
    expected = json.loads(EXPECTED.read_text())
    assert expected.keys() == RUNS.keys()
    assert all(set(runs) <= RUNS.keys() for runs, _ in FAULTS.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_can_still_be_planted(fault, monkeypatch):
    FAULTS[fault][1](monkeypatch)


def test_the_maps_are_the_expected_ones_and_a_bias_in_bf16_is_seen(tmp_path, monkeypatch):
    expected = json.loads(EXPECTED.read_text())["maps"]
    assert compare(expected, maps(tmp_path)) == []
    FAULTS["bias-in-bf16"][1](monkeypatch)
    assert compare(expected, maps(tmp_path))
