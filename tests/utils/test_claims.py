"""Work that one of several processes does, and another one if it dies."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from lavit_hf.utils.claims import Claims


def take(claims: Claims, name: str = "work") -> bool:
    with claims.claim(name) as is_claimed:
        return is_claimed


def test_one_has_it_at_a_time(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.claim("a") as is_claimed:
        assert is_claimed and not take(second, "a") and not take(first, "a") and take(second, "b")
    assert take(second, "a")
    assert list(tmp_path.iterdir()) == []


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    try:
        with Claims(tmp_path).claim("work"):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert take(Claims(tmp_path))


def test_a_claim_of_a_killed_process_is_free_at_once(python: str, tmp_path: Path) -> None:
    code = f"""
import os, pathlib, signal
from lavit_hf.utils.claims import Claims
with Claims(pathlib.Path({str(tmp_path)!r})).claim("work"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([python, "-c", code]).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["work.0"]
    claims = Claims(tmp_path)
    with claims.claim("work") as is_claimed:
        assert is_claimed and [path.name for path in tmp_path.iterdir()] == ["work.1"]
    assert list(tmp_path.iterdir()) == []


def test_one_of_another_machine_is_watched_for_a_while(tmp_path: Path) -> None:
    claim = tmp_path / "work.4"
    claim.write_text("elsewhere")
    os.utime(claim, (0, 0))  # its clock may be wrong
    claims = Claims(tmp_path, lease=0.2)
    assert not take(claims)
    time.sleep(0.3)
    os.utime(claim)
    assert not take(claims), "it is alive"
    assert not take(claims)
    time.sleep(0.3)
    assert take(claims)


def test_whoever_works_shows_it(tmp_path: Path) -> None:
    with Claims(tmp_path, lease=0.12).claim("work"):
        before = (tmp_path / "work.0").stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while (tmp_path / "work.0").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_of_many_takes_over(tmp_path: Path) -> None:
    (tmp_path / "work.0").write_text("elsewhere")
    rivals = [Claims(tmp_path, lease=0.05) for _ in range(8)]
    for claims in rivals:
        assert not take(claims)
    time.sleep(0.1)
    start, end, found = threading.Barrier(8), threading.Barrier(8), []

    def compete(claims: Claims) -> None:
        start.wait()
        with claims.claim("work") as is_claimed:
            found.append(is_claimed)
            end.wait()

    threads = [threading.Thread(target=compete, args=(claims,)) for claims in rivals]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True]


def test_nothing_is_claimed_where_all_is_done(tmp_path: Path) -> None:
    assert not take(Claims(tmp_path / "gone"))
