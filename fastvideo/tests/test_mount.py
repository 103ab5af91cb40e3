"""The trial of an output folder, on file systems that lack something: a library that fails their calls stands in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvideo.errors import UserError
from fastvideo.mount import TRIALS, check_folder, try_folder

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

static int lacks(const char *what) { const char *set = getenv("LACKS"); return set && strcmp(set, what) == 0; }
#define FAIL(error) do { errno = error; return -1; } while (0)
#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))

int rename(const char *from, const char *to) {
    struct stat found;
    if (lacks("rename") && stat(from, &found) == 0 && S_ISDIR(found.st_mode)) FAIL(ENOTSUP);
    return REAL(int (*)(const char *, const char *), "rename")(from, to);
}
int flock(int file, int operation) {
    if (lacks("lock")) FAIL(ENOSYS);
    if (lacks("exclusion")) return 0;
    return REAL(int (*)(int, int), "flock")(file, operation);
}
int fsync(int file) {
    struct stat found;
    if (lacks("flush") && fstat(file, &found) == 0 && S_ISDIR(found.st_mode)) FAIL(EINVAL);
    return REAL(int (*)(int), "fsync")(file);
}
int open64(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);
    if (lacks("append") && (flags & O_APPEND)) FAIL(EPERM);
    if (lacks("kept") && (flags & O_APPEND)) flags |= O_TRUNC;
    if (lacks("once")) flags &= ~O_EXCL;
    return REAL(int (*)(const char *, int, ...), "open64")(path, flags, mode);
}
"""
"""Fails calls as bucket mounts and network disks do; ``LACKS`` says which."""

RUN = """
import sys
from pathlib import Path
from fastvideo.errors import UserError
from fastvideo.training.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("held")
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to build the stand-in for a file system")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    built = folder / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, folder / "shim.c", "-ldl"], check=True)
    return built


def refusal(folder: Path, shim: Path, lacks: str) -> str:
    """What a run says that is to write to ``folder``, on one line."""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "LACKS": lacks}
    command = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("append", "append to a file (Operation not permitted), for metrics"),
        ("kept", "append to a file (what was there before is lost), for metrics"),
        ("rename", "rename a folder (Operation not supported), for the result"),
        ("lock", "lock a file (Function not implemented), for keeping a second run out"),
        ("exclusion", "lock a file (two can hold it at a time), for keeping a second run out"),
        ("flush", "flush to the disk (Invalid argument), for checkpoints that survive a power cut"),
        ("once", "create a file once (a file can be created twice), for checkpoints"),
    ],
)
def test_a_run_names_what_its_folder_cannot_do(tmp_path: Path, shim: Path, lacks: str, said: str) -> None:
    message = refusal(tmp_path / "run", shim, lacks)
    assert f"output folder {tmp_path}/run: its file system cannot do what a run needs: {said} Give a folder" in message
    assert "MOUNT_CACHED" in message
    assert not (tmp_path / "run").exists()


def test_a_disk_is_taken_and_left_as_it_was(tmp_path: Path, shim: Path) -> None:
    assert refusal(tmp_path / "run", shim, "nothing") == "held"
    assert try_folder(tmp_path / "not" / "there") == {}
    assert list(tmp_path.iterdir()) == []


def test_several_lacks_are_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError) as refused:
        check_folder(tmp_path)
    names = [trial.name for trial in TRIALS if f"\n  {trial.name} (" in str(refused.value)]
    assert names == ["replace a file", "flush to the disk"]
