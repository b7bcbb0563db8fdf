import pytest

from benchmarks import timing
from benchmarks.timing import Timing, alternate


def test_median_and_spread():
    measured = Timing((1.0, 5.0, 2.0, 4.0, 3.0))
    assert measured.median == 3
    assert measured.spread == pytest.approx(100 / 3)  # quartiles 2 and 4: 1 of 3
    assert Timing((2.0,)).spread is None


def test_works_alternate_and_warm_up_untimed():
    clock, calls = [0.0], []

    def work(name, seconds):
        def run():
            calls.append(name)
            clock[0] += seconds * (10 if len(calls) <= 4 else 1)  # slow while warming up

        return run

    found = alternate({"a": work("a", 2), "b": work("b", 3)}, warmup=2, repeats=3, device="cpu", clock=lambda: clock[0])
    assert calls == ["a", "b"] * 5
    assert found == {"a": Timing((2.0, 2.0, 2.0)), "b": Timing((3.0, 3.0, 3.0))}


def test_matmul_rate_is_the_work_over_the_best_time(monkeypatch):
    # Every call of alternate is given the best second of 0.5: the larger product makes the rate.
    monkeypatch.setattr(timing, "alternate", lambda works, **options: {"product": Timing((0.7, 0.5))})
    assert timing.matmul_rate("cpu", "fp32") == 2 * 2048**3 / 0.5
