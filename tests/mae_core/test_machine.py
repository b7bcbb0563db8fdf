"""What a record says of the code that made it."""

import subprocess

from mae_core import machine


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(tmp_path, monkeypatch):
    """A wheel inside another project's checkout (its .venv, say) must not report that project's commit."""

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    path = tmp_path / "lib" / "machine.py"
    path.parent.mkdir()
    path.write_text("as installed\n")
    monkeypatch.setattr(machine, "__file__", str(path))
    assert machine.commit() == ""  # in no checkout

    git("init", "--quiet")
    (tmp_path / "theirs.txt").write_text("another project\n")
    git("add", "theirs.txt")
    git("commit", "--quiet", "-m", "theirs")
    assert machine.commit() == ""  # in a checkout that does not track it

    git("add", "lib")
    git("commit", "--quiet", "-m", "ours")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40
    assert machine.commit() == head

    (tmp_path / "theirs.txt").write_text("changed, in another folder\n")
    assert machine.commit() == f"{head}-dirty"
