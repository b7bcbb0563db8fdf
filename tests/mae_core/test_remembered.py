"""What is remembered from one process to the next, and when it is not."""

import json
from pathlib import Path

import pytest

from mae_core.remembered import memory_file, remembered, remembering


@pytest.fixture
def package(tmp_path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.py").write_text("width = 1")
    return tmp_path / "package"


def found(path: Path | None, package: Path, *numbers: int) -> tuple[list[list[int]], list[int]]:
    """What a function gives for these numbers within `remembering`, and with which it was called: as a new process
    would, without what it has called before."""
    calls = []

    @remembered
    def squares(number: int, both: bool = False) -> list[int]:
        calls.append(number)
        return [number**2, -number] if both else [number**2]

    with remembering(path, [package]):
        return [squares(number) for number in numbers] + [squares(numbers[0], both=True)], calls


def test_it_is_found_once(tmp_path, package):
    path = tmp_path / "remembered.json"
    assert found(path, package, 3, 4, 3) == ([[9], [16], [9], [9, -3]], [3, 4, 3])
    assert found(path, package, 3, 4) == ([[9], [16], [9, -3]], [])
    assert found(path, package, 4, 5) == ([[16], [25], [16, -4]], [5, 4])
    assert found(path, package, 3, 4, 5)[1] == []


def test_not_once_a_source_or_a_library_is_another(tmp_path, package, monkeypatch):
    path = tmp_path / "remembered.json"
    found(path, package, 3)
    (package / "model.py").write_text("width = 2")
    assert found(path, package, 3)[1] == [3, 3]
    (package / "inner").mkdir()
    (package / "inner" / "new.py").touch()
    assert found(path, package, 3)[1] == [3, 3]
    assert found(path, package, 3)[1] == []
    monkeypatch.setattr("mae_core.remembered.version", lambda library: "1.0" if library == "timm" else "0")
    assert found(path, package, 3)[1] == [3, 3]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"found": {}}', '{"of": "", "found": 1}'])
def test_a_damaged_file_is_written_anew(tmp_path, package, content):
    path = tmp_path / "remembered.json"
    path.write_text(content)
    assert found(path, package, 3) == ([[9], [9, -3]], [3, 3])
    assert len(json.loads(path.read_text())["found"]) == 2
    assert found(path, package, 3)[1] == []


def test_nothing_is_kept_where_there_is_no_place_or_after_an_error(tmp_path, package):
    (tmp_path / "file").touch()
    assert found(tmp_path / "file" / "remembered.json", package, 3) == ([[9], [9, -3]], [3, 3])
    assert found(None, package, 3) == ([[9], [9, -3]], [3, 3])
    path = tmp_path / "cache" / "remembered.json"

    def fails() -> None:
        with remembering(path, [package]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/mae-transfer/remembered.json"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/c"}, "/c/mae-transfer/remembered.json"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/c", "MAE_TRANSFER_CACHE": "/own"}, "/own/remembered.json"),
        ({"HOME": "/home/me", "MAE_TRANSFER_CACHE": "~/own"}, "/home/me/own/remembered.json"),
        ({"HOME": "/home/me", "MAE_TRANSFER_CACHE": "own"}, None),
        ({"HOME": "/home/me", "MAE_TRANSFER_CACHE": ""}, None),
        ({"HOME": "home", "XDG_CACHE_HOME": "c"}, None),
    ],
)
def test_it_is_kept_in_the_users_cache(monkeypatch, environment, path):
    for name in ("HOME", "XDG_CACHE_HOME", "MAE_TRANSFER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert memory_file() == (path and Path(path))


def test_outside_it_is_a_cache_of_this_process(tmp_path, package):
    calls = []

    @remembered
    def square(number: int) -> int:
        calls.append(number)
        return number**2

    assert [square(3), square(3)] == [9, 9]
    assert calls == [3]
