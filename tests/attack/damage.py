"""Ways to spoil a file. Each takes the file's path and leaves something else in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def last_byte_lost(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip()[:-1])


def first_bit_flipped(path: Path) -> None:
    flip(path, 0)


def middle_bit_flipped(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def last_bit_flipped(path: Path) -> None:
    flip(path, path.stat().st_size - 1)


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def a_list(path: Path) -> None:
    path.write_bytes(b"[1, 2]")


def null(path: Path) -> None:
    path.write_bytes(b"null")


def a_bomb(path: Path) -> None:
    path.write_bytes(b'{"a":' * 50_000 + b"1" + b"}" * 50_000)


def a_page(path: Path) -> None:
    """What a portal gives in place of a download."""
    path.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")


def an_lfs_pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "gone")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(bytes(content))


def copy(source: Path, target: Path) -> Path:
    """A fresh copy of a folder, whatever lay at the target."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


ALL: tuple[Damage, ...] = (
    removed, emptied, cut_in_half, last_byte_lost, first_bit_flipped, middle_bit_flipped, last_bit_flipped,
    noise, zeros, a_list, null, a_bomb, a_page, an_lfs_pointer, a_folder, a_dead_link,
)  # fmt: skip
