"""A compiler is tried before a run relies on it: every way in which one fails to be one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from safe_offrl.compute import compiler, descent
from safe_offrl.compute.compiler import compiler_fault
from safe_offrl.errors import ConfigError
from tests.compute.test_descent import compiles

REAL = shutil.which(os.environ.get("CXX") or "g++") or "no-compiler"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, so that nothing is known yet."""
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def script(folder: Path, text: str, name: str = "compiler") -> str:
    """A compiler that is a script of the shell."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


VERSION = '[ "$1" = --version ] && { echo "compiler 1.0"; exit 0; }\n'
# Makes $2 what the compiler is told to write.
OUTPUT = 'while [ "$1" != -o ]; do shift; done\n'
BROKEN = {
    "says no": ("exit 1", "exit code 1"),
    "no version": ("echo broken >&2; exit 3", "exit code 3"),
    "fails to compile": (
        VERSION + 'echo "trial.cpp:3:10: fatal error: algorithm: No such file" >&2; exit 1',
        "exit code 1, trial.cpp:3:10: fatal error: algorithm: No such file",
    ),
    "cannot link": (
        VERSION + "echo 'ld: cannot find -lgomp'; echo 'collect2: error: ld'; exit 1",
        "exit code 1, ld: cannot find -lgomp",
    ),
    "does nothing": ("exit 0", "it wrote no library"),
    "prints garbage": ("head -c 3000 /dev/urandom; exit 0", "it wrote no library"),
    "writes garbage": (
        VERSION + OUTPUT + 'head -c 3000 /dev/urandom > "$2"',
        "exit code 1, OSError: ",
    ),
    "writes another library": (
        VERSION + f'echo "void f(void) {{}}" > t.c && {REAL} -x c++ -shared -fPIC t.c -o $PWD/o.so'
        f" && {OUTPUT} cp $PWD/o.so $2",
        "undefined symbol: safe_offrl_trial",
    ),
    "computes something else": (
        VERSION + "sed -i 's/double sum = 0.0/double sum = 1.0/' \"$5\"\n" + f'exec {REAL} "$@"',
        "4 times the root of 9 is 12, not 13",
    ),
    "dies": (VERSION + "kill -9 $$", "exit code -9"),
}


@compiles
@pytest.mark.parametrize("kind", BROKEN)
def test_a_compiler_that_is_none_is_found_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, kind: str
) -> None:
    text, said = BROKEN[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", script(tmp_path, text))
    fault = compiler_fault()
    assert fault is not None
    assert fault.what.startswith(f'the C++ compiler "{tmp_path}/compiler" does not work: ')
    assert said in fault.what
    assert len(fault.what.splitlines()) == 1
    assert not list(cache.glob("compilers/*"))  # it may be repaired by the next time
    compute, why = descent.choose_compute("auto", "fp32", 10**6)
    assert (compute, why) == (descent.EAGER, f"not compiled: {fault.what}")
    with pytest.raises(ConfigError, match=r"compile is on, but the C.* does not work: "):
        descent.choose_compute("on", "fp32", 1)


def test_a_compiler_that_hangs_is_given_up_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "TRIAL_SECONDS", 0.3)
    pid = tmp_path / "pid"
    text = f"{VERSION}sleep 600 & echo $! > {pid}; wait"
    monkeypatch.setenv("CXX", script(tmp_path, text))
    begun = time.monotonic()
    fault = compiler_fault()
    assert fault is not None
    assert fault.what.endswith("it took more than 0.3 seconds")
    assert time.monotonic() - begun < 5.0
    for _ in range(100):  # the system takes a moment to end it
        try:
            os.kill(int(pid.read_text()), 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{pid.read_text().strip()}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the compiler started is left")


def test_no_compiler_and_no_file_that_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert descent.choose_compute("auto", "fp32", 10**6) == (
        descent.EAGER,
        'not compiled: there is no C++ compiler "no-such-compiler"',
    )
    with pytest.raises(ConfigError, match=r'no C\+\+ compiler "no-such-compiler". Install it'):
        descent.choose_compute("on", "fp32", 10**6)
    empty = tmp_path / "empty"
    empty.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(empty))
    fault = compiler_fault()
    assert fault is not None
    assert fault.what.endswith("does not work: it cannot be run (Exec format error)")


def test_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "exit 0"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert descent.choose_compute("auto", "fp32", 10**6)[1] == (
        "not compiled: there is no Python.h (a package like python3-dev)"
    )
    (tmp_path / "Python.h").write_text("#error this is no Python\n")
    monkeypatch.setenv("CXX", REAL)
    fault = compiler_fault()
    assert fault is not None
    assert "this is no Python" in fault.what


@compiles
def test_a_compiler_that_works_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    calls = tmp_path / "calls"

    def working(name: str, text: str = "") -> str:
        return script(tmp_path, f'echo "$1" >> {calls}\n{text}exec {REAL} "$@"', name)

    def compiled() -> int:
        """How often something was compiled since the last time."""
        count = sum(line != "--version" for line in calls.read_text().splitlines())
        calls.unlink()
        return count

    monkeypatch.setenv("CXX", working("one"))
    assert compiler_fault() is None
    assert compiled() == 1
    assert compiler_fault() is None
    assert compiled() == 0
    monkeypatch.setenv("CXX", working("two"))  # another one
    assert compiler_fault() is None
    assert compiled() == 1
    working("two", "# changed\n")
    assert compiler_fault() is None
    assert compiled() == 1
    working("two", '[ "$1" = --version ] && { echo changed; exit 0; }\n')  # behind it
    assert compiler_fault() is None
    assert compiled() == 1
    assert len(list(cache.glob("compilers/*"))) == 4


@compiles
def test_where_nothing_can_be_remembered_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    for _ in range(2):
        assert descent.choose_compute("auto", "fp32", 10**6)[0].compiled
    # torch takes its own folder then, in which something can be written.
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


SMALL = ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16]"]


def pretrain(folder: Path, dataset: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "safe-offrl"), "pretrain", "--name", "a"]
    return subprocess.run(
        [*command, "--dataset", str(dataset), *SMALL, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CXX": script(folder, "exit 1")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_default_run_goes_on_without_and_one_that_asks_for_it_does_not_begin(
    tmp_path: Path, tiny_dataset: Path
) -> None:
    run = pretrain(tmp_path, tiny_dataset, "--steps", "10k", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert 'not compiled: the C++ compiler "' in run.stdout
    refused = pretrain(tmp_path, tiny_dataset, "--steps", "10", "compile=on")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: compile is on, but the C++ compiler ")
    assert not (tmp_path / "runs").exists()
