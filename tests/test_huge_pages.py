"""Memory on huge pages has the content that it had."""

from __future__ import annotations

import mmap
import platform

import pytest

from tests import huge_pages

PAGES = 8


def on_huge_pages(memory: mmap.mmap) -> int:
    """Bytes of this process's memory on huge pages, with `memory` alive."""
    assert len(memory)
    with open("/proc/self/smaps_rollup", encoding="utf-8") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))


def test_memory_moves_to_huge_pages_and_keeps_its_content() -> None:
    release = tuple(int(part) for part in platform.release().split(".")[:2]) if platform.system() == "Linux" else (0,)
    if release < (6, 1):
        pytest.skip("MADV_COLLAPSE is of Linux 6.1")
    memory = mmap.mmap(-1, PAGES * huge_pages.SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    content = bytes(range(256)) * (len(memory) // 256)
    memory.write(content)
    before = on_huge_pages(memory)
    collapsed = huge_pages.collapse()
    assert memory[:] == content
    if not collapsed:
        pytest.skip("this kernel has no huge page to give")
    assert on_huge_pages(memory) > before
