"""Blocks of the KV cache against a simple model: who holds which, what is shared, what can be found by its content."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from moe_train.inference.blocks import BlockCopy, BlockError, BlockPool, BlockTable, OutOfBlocks, prefix_key

SIZE = 4


def filled(pool: BlockPool, tokens: list[int]) -> BlockTable:
    """A table whose tokens were computed, as far as they were not known."""
    table = BlockTable.with_prefix(pool, tokens)
    table.reserve(len(tokens) - table.num_tokens)
    table.append(tokens, table.num_tokens, len(tokens))
    return table


def test_a_block_is_allocated_once_and_released_once() -> None:
    pool = BlockPool(2, SIZE)
    assert {pool.allocate(), pool.allocate()} == {0, 1}
    with pytest.raises(OutOfBlocks):
        pool.allocate()
    pool.release(1)
    with pytest.raises(BlockError, match="block 1 is not in use"):
        pool.release(1)
    assert (pool.available, pool.in_use) == (1, 1)


def test_a_prefix_is_shared_in_full_blocks_and_leaves_a_token_to_compute() -> None:
    pool = BlockPool(8, SIZE)
    first = filled(pool, list(range(9)))
    same = BlockTable.with_prefix(pool, list(range(8)))
    other = BlockTable.with_prefix(pool, [0, 1, 2, 3, 9, 9, 9, 9, 9])
    assert same.blocks == first.blocks[:1]  # the second block would leave nothing to compute
    assert BlockTable.with_prefix(pool, list(range(20))).blocks == first.blocks[:2]
    assert other.blocks == first.blocks[:1]
    assert BlockTable.with_prefix(pool, [7, *range(1, 9)]).blocks == ()


def test_equal_tokens_after_another_prefix_are_other_content() -> None:
    assert prefix_key(prefix_key(b"", [1]), [2]) != prefix_key(prefix_key(b"", [3]), [2])


def test_content_is_found_after_its_last_user_until_memory_is_needed() -> None:
    pool = BlockPool(3, SIZE)
    table = filled(pool, list(range(12)))
    blocks = table.blocks
    table.release()
    assert pool.in_use == 0
    assert pool.allocate() == blocks[2]  # the end goes first
    found = BlockTable.with_prefix(pool, list(range(12)))
    assert found.blocks == blocks[:2]
    found.release()
    pool.forget_contents()
    assert BlockTable.with_prefix(pool, list(range(12))).blocks == ()
    assert pool.available == 2


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    pool = BlockPool(4, SIZE)
    parent = filled(pool, [1, 2, 3, 4, 5, 6])
    child = parent.fork(5)
    assert child.blocks == parent.blocks
    (copy,) = child.reserve(1)
    assert copy == BlockCopy(parent.blocks[1], child.blocks[1])
    assert child.blocks[0] == parent.blocks[0]
    assert parent.reserve(1) == []  # the parent alone has its block now


def test_a_full_block_whose_content_is_known_is_copied_before_its_last_token_is_written_again() -> None:
    pool = BlockPool(4, SIZE)
    parent = filled(pool, [1, 2, 3, 4])
    child = parent.fork(3)
    parent.release()
    (copy,) = child.reserve(1)
    assert copy.source != copy.target == child.blocks[0]
    assert BlockTable.with_prefix(pool, [1, 2, 3, 4, 5]).blocks == (copy.source,)


def test_a_table_that_finds_no_room_is_unchanged() -> None:
    pool = BlockPool(2, SIZE)
    table = filled(pool, [1, 2, 3, 4, 5])
    blocks = table.blocks
    with pytest.raises(OutOfBlocks):
        table.reserve(4)
    assert table.blocks == blocks
    table.reserve(3)


def _check(pool: BlockPool, tables: list[tuple[BlockTable, list[int]]], contents: dict[int, tuple[int, ...]]) -> None:
    """References are those of the tables, and a block has the tokens of every table that has it."""
    held = Counter(block for table, _ in tables for block in table.blocks)
    assert {block: pool.references(block) for block in range(pool.num_blocks)} == {
        block: held.get(block, 0) for block in range(pool.num_blocks)
    }
    assert pool.in_use == len(held)
    for table, tokens in tables:
        for index, block in enumerate(table.blocks):
            own = tokens[: table.num_tokens][index * SIZE : (index + 1) * SIZE]
            assert contents[block][: len(own)] == tuple(own)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_walk_leaks_nothing_and_shares_only_equal_content(seed: int) -> None:
    """`contents` is the memory: what the last write to a block left there, under the tokens before it."""
    draw = random.Random(seed)
    pool, contents = BlockPool(12, SIZE), dict.fromkeys(range(12), ())
    tables: list[tuple[BlockTable, list[int]]] = []
    shared = copied = refused = 0

    def grow(table: BlockTable, tokens: list[int]) -> bool:
        nonlocal copied
        start = table.num_tokens
        for copy in table.reserve(len(tokens) - start):
            contents[copy.target] = contents[copy.source]
            copied += 1
        for position in range(start, len(tokens)):
            block = table.blocks[position // SIZE]
            contents[block] = (*contents[block][: position % SIZE], tokens[position])
        table.append(tokens, start, len(tokens))
        return True

    for _ in range(400):
        action = draw.choice(["new", "grow", "grow", "fork", "release"])
        index = draw.randrange(len(tables)) if tables else None
        try:
            if action == "new":
                tokens = [draw.randrange(2) for _ in range(draw.randint(1, 14))]
                table = BlockTable.with_prefix(pool, tokens)
                shared += len(table.blocks)
                tables.append((table, tokens))
                grow(table, tokens)
            elif index is not None and action == "grow":
                table, tokens = tables[index]
                longer = tokens + [draw.randrange(2) for _ in range(draw.randint(1, 3))]
                grow(table, longer)
                tables[index] = (table, longer)
            elif index is not None and action == "fork":
                table, tokens = tables[index]
                kept = draw.randint(0, table.num_tokens)
                tables.append((table.fork(kept), tokens[:kept]))
            elif index is not None:
                tables.pop(index)[0].release()
        except OutOfBlocks:
            refused += 1
            tables.pop(draw.randrange(len(tables)))[0].release()
        _check(pool, tables, contents)
    assert min(shared, copied, refused) > 0
    for table, _ in tables:
        table.release()
    assert pool.available == pool.num_blocks
