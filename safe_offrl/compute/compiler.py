"""Whether the C++ compiler of this machine works: it is tried before a run relies on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safe_offrl.files import cache_folder, write_atomic

TRIAL_SECONDS = 20.0  # a sound compiler takes a third of a second, and one may wait for ever
# torch compiles its own kernels with these headers, this standard and these flags.
SOURCE = """\
#include <Python.h>
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <vector>
extern "C" double safe_offrl_trial(double x) {
  std::vector<double> values(4, std::sqrt(x));
  double sum = 0.0;
#pragma omp parallel for reduction(+ : sum)
  for (int i = 0; i < 4; i++) sum += std::max(values[i], 0.0);
  return sum;
}
"""
FLAGS = ("-shared", "-fPIC", "-std=c++20", "-O1")
OPENMP = ("-Xclang", "-fopenmp", "-lomp") if sys.platform == "darwin" else ("-fopenmp",)
# It runs in a process of its own, because a broken library might take this one with it.
CALL = """\
import ctypes, sys
trial = ctypes.CDLL(sys.argv[1]).safe_offrl_trial
trial.restype, trial.argtypes = ctypes.c_double, [ctypes.c_double]
sys.exit(f"error: 4 times the root of 9 is 12, not {trial(9.0):g}" if trial(9.0) != 12.0 else 0)
"""


class CompilerFault(NamedTuple):
    """Why nothing can be compiled, as a clause, and what to do: the beginning of a sentence."""

    what: str
    remedy: str


def compiler_fault() -> CompilerFault | None:
    """Compile, load and call a small function; None if that works.

    That it did is remembered in the cache folder for this compiler and these headers, so it is
    tried once. A fault is not: it may be repaired by the next time.
    """
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(compiler)
    if path is None:
        return CompilerFault(f'there is no C++ compiler "{compiler}"', "Install it")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return CompilerFault("there is no Python.h (a package like python3-dev)", "Install it")
    try:
        path = str(Path(path).absolute())
        known = cache_folder() / "compilers" / _compiler_identity(path, headers)
        if not known.is_file():
            _try(path, headers)
            with contextlib.suppress(OSError):  # then it is tried again
                known.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(known, f"{path}\n".encode())
    except (_Failed, OSError) as error:
        return CompilerFault(f'the C++ compiler "{compiler}" does not work: {error}', "Repair it")
    return None


class _Failed(Exception):
    """A step of the trial failed; the message says how."""


def _compiler_identity(compiler: str, headers: Path) -> str:
    """A hash of what the outcome of a trial depends on."""
    real = Path(compiler).resolve()
    stat = real.stat()
    content = [
        str(real),
        stat.st_size,
        stat.st_mtime_ns,
        _run([compiler, "--version"]),  # a script may call another one from today on
        str(headers),
        sys.version,
        SOURCE,
        *FLAGS,
        *OPENMP,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _try(compiler: str, headers: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="safe-offrl-") as folder:
        (Path(folder) / "trial.cpp").write_text(SOURCE)
        files = ["trial.cpp", f"-I{headers}", "-o", "trial.so"]
        _run([compiler, *FLAGS, *files, *OPENMP], folder)
        if not (Path(folder) / "trial.so").is_file():
            raise _Failed("it wrote no library")
        _run([sys.executable, "-I", "-c", CALL, "./trial.so"], folder)


def _run(command: Sequence[str], folder: str | None = None) -> str:
    """What a command prints; :class:`_Failed` if it fails, cannot begin or takes too long."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that whatever it started ends with it
        )
    except OSError as error:
        raise _Failed(f"it cannot be run ({error.strerror})") from error
    try:
        said, _ = process.communicate(timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _Failed(f"it took more than {TRIAL_SECONDS:g} seconds") from error
    finally:
        if process.poll() is None:
            _kill(process)
    if process.returncode:
        raise _Failed(f"exit code {process.returncode}{_reason(said)}")
    return said


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command, and what it started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()


def _reason(said: str) -> str:
    """The first line of a command's complaints that says what went wrong, after a comma."""
    lines = (" ".join(line.split()) for line in said.splitlines())
    errors = [line for line in lines if re.search("error|cannot find|not found", line, re.I)]
    return f", {errors[0][:160]}" if errors else ""
