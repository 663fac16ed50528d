"""Small disks that can be full: ext4 in a file, mounted where nobody else sees it, under the data of two members and of
Valkey.

Needs root and a kernel that allows the mount; otherwise there are none, and the rows F-M6 and F-R9 are not run.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_CLONE_NEWNS: Final = 0x00020000
SIZE_BYTES: Final = 8 << 30
"""Sparse. Two million messages with their indexes and an oplog of 512 MB take half of it."""
LEFT_BYTES: Final = 64 << 10
BALLAST: Final = "ballast"


class Disk:
    """A mounted one. `fill` leaves next to nothing, `free` gives it back."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._ballast = place / BALLAST

    def fill(self) -> None:
        """Take all blocks but a few."""
        with self._ballast.open("wb") as file:
            free = os.fstatvfs(file.fileno())
            size = free.f_bavail * free.f_frsize
            while size > LEFT_BYTES:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError:  # what the file system needs for itself, or the server was faster
                    size -= 1 << 20
                else:
                    return

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """For good; what lies on it goes with it."""
        _run("umount", str(self._place))


def own_mounts() -> bool:
    """Give this process a view of mounts of its own, which ends with it and its children. False where it may not."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        return False
    return _run("mount", "--make-rprivate", "/")


def make_disk(image: Path, place: Path) -> Disk | None:
    """A new, empty disk at `place`; None where that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    made = _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)) and _run(
        "mount", "-o", "loop,noatime", str(image), str(place)
    )
    return Disk(place) if made else None


def _run(*words: str) -> bool:
    try:
        return subprocess.run(words, check=False, capture_output=True).returncode == 0
    except OSError:
        return False
