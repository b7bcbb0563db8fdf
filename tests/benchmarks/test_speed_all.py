"""`make speed`: what is measured, what is not measured again, and what a failure does to the rest."""

import json
import subprocess

import pytest

from benchmarks import speed, speed_all


@pytest.fixture
def calls(monkeypatch):
    """Replace speed.py's process: note its arguments, write what it would; `failing` kinds fail."""
    seen, failing = [], set()

    def process(command, check):
        what, out = command[2:-2], command[-1]
        seen.append(what)
        if what[0] not in failing:
            values = {"hardware": "1x card", "versions": {"torch": "2"}, "commit": speed_all.commit()}
            speed_all.write_text(speed_all.Path(out) / "x.json", json.dumps(values))
            speed_all.write_text(speed_all.Path(out) / "x.md", f"table of {what[0]}\n")
        return subprocess.CompletedProcess(command, int(what[0] in failing))

    monkeypatch.setattr(speed_all.subprocess, "run", process)
    monkeypatch.setattr(speed_all, "hardware", lambda machine: "1x card")
    monkeypatch.setattr(speed_all, "versions", lambda further: {"torch": "2"})
    monkeypatch.setattr(speed_all, "commit", lambda: "abc")
    return seen, failing


@pytest.mark.parametrize("gpu", [False, True])
def test_every_call_is_one_that_speed_takes(gpu, tmp_path):
    todo = speed_all.measurements(gpu, tmp_path, tmp_path)
    assert {what[0] for what in todo} == set(speed.KINDS)
    for what in todo:
        speed.parse(what)
    assert not any("--compare" in what or "--data" in what for what in speed_all.measurements(gpu, None, None))


def test_on_a_gpu_every_pass_is_timed_with_and_without_the_compiler():
    calls = [speed.parse(what) for what in speed_all.measurements(True, None, None)]
    passes = {(call.what, call.arch, call.compile) for call in calls if call.what in ("pretrain", "finetune", "eval")}
    assert len(passes) == 12
    assert {arch for _, arch, _ in passes} == {"vit_base_patch16", "vit_large_patch16"}


@pytest.mark.parametrize("able", [False, True])
def test_a_cpu_that_does_not_compute_in_bf16_is_not_asked_to(able, calls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_all.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert speed_all.main(["--out", str(tmp_path)]) == 0
    assert any("bf16" in what for what in calls[0]) == able
    assert ("bf16 is left out" in capsys.readouterr().out) != able


def test_a_failure_leaves_the_rest_and_is_made_up_for(calls, tmp_path, capsys):
    seen, failing = calls
    failing.add("eval")
    assert speed_all.main(["--out", str(tmp_path)]) == 1
    first = len(seen)
    assert first == len(speed_all.measurements(False, None, None))
    text = (tmp_path / "speed.md").read_text()
    assert "table of finetune" in text
    assert "table of eval" not in text
    assert "failed: eval" in capsys.readouterr().out
    failing.clear()
    assert speed_all.main(["--out", str(tmp_path)]) == 0
    assert [what[0] for what in seen[first:]] == ["eval"]
    assert "table of eval" in (tmp_path / "speed.md").read_text()


def test_another_commit_is_measured_anew(calls, tmp_path, monkeypatch):
    seen, _ = calls
    assert speed_all.main(["--out", str(tmp_path)]) == 0
    monkeypatch.setattr(speed_all, "commit", lambda: "def")
    speed_all.main(["--out", str(tmp_path)])
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


@pytest.mark.parametrize("name", ["", "abc-dirty"])
def test_code_without_a_name_of_its_own_is_measured_anew(name, calls, tmp_path, monkeypatch):
    seen, _ = calls
    monkeypatch.setattr(speed_all, "commit", lambda: name)
    for _ in range(2):
        assert speed_all.main(["--out", str(tmp_path)]) == 0
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert "table of eval" in (tmp_path / "speed.md").read_text()


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    assert speed_all.main(["--compare", str(tmp_path / "mae")]) == 2
    assert "is no folder" in capsys.readouterr().err
