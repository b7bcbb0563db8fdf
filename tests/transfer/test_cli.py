"""The command line of the task families: exit codes, one sentence for a wrong call, one record for each task."""

from functools import partial
from pathlib import Path

import pytest

from benchmarks import ablations, run_all
from benchmarks.suite import TASKS
from mae_core import reconstruct
from mae_core.checkpoint import save_weights
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH, raising, small_checkpoint, write_imagenet
from transfer.cli import main
from transfer.miniature import __main__ as miniature
from transfer.run import read_record
from transfer.task import RECORD_FILE, Record


@pytest.fixture
def call(tmp_path, capsys):
    """call(task, *flags) -> (exit code, output, errors) of the mini recipe with random weights."""

    def run(task: str, *flags: str, data: Path | str = tmp_path) -> tuple[int, str, str]:
        places = ["--data", str(data), "--out", str(tmp_path / "out")]
        first = ["--task", task, "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--device", "cpu", *places]
        code = main(TASKS, [*first, *flags])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path) -> Path:
    return write_imagenet(tmp_path / "data", train=2, val=1)


def the_record(tmp_path: Path) -> Record:
    (path,) = (tmp_path / "out").rglob(RECORD_FILE)
    return read_record(path)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (["--task", "imagenet_finetine"], "did you mean imagenet_finetune?"),
        (["--set", "epoch=3"], "did you mean epochs?"),
        (["--set", "epochs=many"], "epochs takes a whole number"),
        (["--set", "epochs"], "write knob=value"),
        (["--set", "optimizer=sgd"], "unknown optimizer 'sgd'"),
        (["--set", "momentum=0.9"], "momentum does nothing"),
        (["--ckpt", "random:vit_bas_patch16"], "did you mean vit_base_patch16?"),
        (["--ckpt", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--micro-batch", "-1"], "--micro-batch -1"),
        (["--save-minutes", "nan"], "--save-minutes nan"),
    ],
)
def test_a_wrong_call_is_answered_by_one_sentence_and_exit_code_2(tmp_path, call, change, wrong):
    code, _, err = call("imagenet_finetune", *change)
    assert code == 2
    assert wrong in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").rglob(RECORD_FILE))


@pytest.mark.parametrize("flag", ["--recipe", "--bogus"])
def test_an_unknown_flag_or_choice_ends_with_exit_code_2(call, flag):
    with pytest.raises(SystemExit, match="2"):
        call("imagenet_finetune", flag, "x")


def test_absent_data_is_skipped_and_named(tmp_path, call):
    code, out, _ = call("imagenet_linprobe")
    assert code == 1
    assert "imagenet_linprobe: skipped: no data" in out
    record = the_record(tmp_path)
    assert record.status == "skipped"
    assert "imagenet/train/WNID" in record.reason


def test_incomplete_data_is_a_failure(tmp_path, call):
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    assert call("imagenet_linprobe")[0] == 1
    record = the_record(tmp_path)
    assert record.status == "failed"
    assert "lacks train" in record.reason


@pytest.mark.parametrize(("task", "fitted"), [("imagenet_knn", "k: 20 -> 2"), ("imagenet_finetune", "batch: 32 -> 2")])
def test_a_limit_makes_a_run_of_its_own_on_so_few_images(tmp_path, call, task, fitted):
    data = write_imagenet(tmp_path / "data", train=16, val=2)
    more = [] if task == "imagenet_knn" else ["--set", "epochs=1", "warmup_epochs=0", "train_fraction=1"]
    assert call(task, "--limit", "2", *more, data=data)[0] == 0
    record = the_record(tmp_path)
    assert (record.n_eval, record.resolved["train_images"], record.chance) == (2, 2, 50.0)
    assert record.recipe_label.endswith(", limit 2")
    assert record.data["counts"] == {"classes": 2, "train": 2, "val": 2}
    assert record.data["findings"][-2:] == [
        "a quick look: at most 2 images of each split",
        f"{task}, fitted to so few images: {fitted}",
    ]
    assert call(task, "--limit", "2", *more, data=data)[0] == 0
    assert the_record(tmp_path) == record  # it was done already
    full = [*more, "batch=32"] if more else ["--set", "k=20"]
    assert call(task, *full, data=data)[0] == 0
    records = [read_record(path) for path in (tmp_path / "out").rglob(RECORD_FILE)]
    assert sorted(r.n_eval for r in records) == [2, 8]


@pytest.mark.parametrize("number", ["0", "1", "-3", "many", "1e3"])
def test_a_limit_is_a_number_of_images(call, number, capsys):
    with pytest.raises(SystemExit, match="2"):
        call("imagenet_knn", "--limit", number)
    assert "is not a number of images from 2 on" in capsys.readouterr().err


def write_classifier(path: Path, **metadata: str) -> Path:
    save_weights(path, build_vit(ARCH, num_classes=1000, pool="avg").state_dict(), metadata)
    return path


def test_the_evaluation_of_a_released_file_wants_a_fine_tuned_file(tmp_path, data, call):
    assert call("imagenet_eval", data=data)[0] == 1
    assert the_record(tmp_path).status == "skipped"
    assert "fine-tuned" in the_record(tmp_path).reason


def test_fine_tuning_a_fine_tuned_file_is_skipped_and_named(tmp_path, data, call):
    file = write_classifier(tmp_path / "tuned.safetensors")
    assert call("imagenet_finetune", "--ckpt", str(file), data=data)[0] == 1
    assert the_record(tmp_path).reason == "tuned is a fine-tuned classifier, not a pre-trained encoder"


@pytest.fixture
def imagenet_a(data) -> Path:
    (data / "imagenet" / "val").rename(data / "imagenet-a")
    return data


def test_robustness_without_a_classifier_names_what_it_waits_for(tmp_path, imagenet_a, call):
    assert call("imagenet_a", data=imagenet_a)[0] == 1
    record = the_record(tmp_path)
    assert record.status == "skipped"
    assert record.reason.startswith("needs imagenet_finetune")
    # Once the classifier is there, that record is gone: tables would show both.
    metadata = {"encoder_sha256": small_checkpoint().sha256, "recipe": "mini", "seed": "0"}
    file = write_classifier(tmp_path / "c.safetensors", **metadata)
    assert call("imagenet_a", "--classifier", str(file), data=imagenet_a)[0] == 0
    assert the_record(tmp_path).status == "ok"


@pytest.mark.parametrize("wrong", ["encoder_sha256", "recipe", "seed", None])
def test_the_classifier_of_another_checkpoint_recipe_or_seed_is_refused(tmp_path, imagenet_a, call, wrong):
    metadata = {"encoder_sha256": small_checkpoint().sha256, "recipe": "mini", "seed": "0"}
    metadata |= {wrong: "other"} if wrong else {}
    file = write_classifier(tmp_path / "c.safetensors", **metadata)
    code, _, err = call("imagenet_a", "--classifier", str(file), data=imagenet_a)
    if wrong:
        assert code == 2
        assert f"{wrong}: other -> " in err
    else:
        assert code == 0
        assert the_record(tmp_path).identity["parent"]


def test_a_second_call_finds_its_number_and_runs_nothing(tmp_path, data, call, monkeypatch):
    knobs = ("--set", "batch=8", "epochs=1", "warmup_epochs=0")
    code, first, _ = call("imagenet_linprobe", *knobs, "--estimated-seconds", "12.5", data=data)
    assert code == 0
    before = the_record(tmp_path)
    assert before.estimated_seconds == 12.5
    assert before.wall_seconds >= before.seconds  # with the evaluation; both may round to 0.0
    monkeypatch.setattr("transfer.cli.run_job", raising(AssertionError("ran again")))
    code, second, _ = call("imagenet_linprobe", *knobs, data=data)
    assert code == 0
    assert the_record(tmp_path) == before
    assert first.splitlines()[-1] == second.splitlines()[-1]
    with pytest.raises(AssertionError, match="ran again"):
        call("imagenet_linprobe", *knobs, "--seed", "1", data=data)


HUGE = "9" * 30


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (run_all.main, ["--seeds", HUGE]),
        (run_all.main, ["--seeds", "-1"]),
        (ablations.main, ["--table", "1a", "--seed", HUGE]),
        (partial(main, TASKS), ["--task", "imagenet_knn", "--ckpt", "x", "--seed", HUGE]),
        (miniature.main, ["--out", "x", "--seed", HUGE]),
        (miniature.main, ["--out", "x", "--unlabelled", "-1"]),
        (miniature.main, ["--out", "x", "--unlabelled", HUGE]),
        (reconstruct.main, ["--ckpt", "x", "--images", "x", "--out", "x.png", "--seed", HUGE]),
    ],
)
def test_a_number_out_of_range_ends_every_command_with_exit_code_2(command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert "is not a whole number" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_negative_number_of_workers_is_refused(call):
    code, _, error = call("imagenet_knn", "--workers", "-5")
    assert (code, error) == (2, "error: --workers -5: give 0 or more processes, or leave it out\n")
