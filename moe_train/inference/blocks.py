"""Blocks of a paged KV cache: reference counts, block tables and prefix sharing. No torch import.

As in PagedAttention (arXiv 2309.06180): a sequence has a block table, blocks have a reference count, and a shared block
is copied before a sequence writes to it. Full blocks are found by their content (vLLM's automatic prefix caching), also
after the last sequence that used them has ended, until their memory is needed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

ROOT_KEY = b""
"""Key of the prefix without tokens."""


class OutOfBlocks(Exception):
    """All blocks are in use. The caller has to release some, for example by evicting a sequence."""


class BlockError(RuntimeError):
    """A block was used without a reference to it: an error in the program."""


@dataclass(frozen=True)
class BlockCopy:
    """The contents of block `source` have to be copied to `target` before the next forward pass."""

    source: int
    target: int


def prefix_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Content hash of a full block: of its tokens, and of all tokens before it through the key of its predecessor."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each.

    A block is in one of three states: free, in use (with a reference count), or cached: nobody uses it, but it can be
    found by its content. Cached blocks are taken when no block is free, the least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} are to be at least 1")
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def in_use(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.available

    def references(self, block: int) -> int:
        """Sequences that use a block."""
        return self._references[block]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens of one sequence."""
        return -(-tokens // self.block_size)

    def allocate(self) -> int:
        """A block with one reference and without known content.

        Raises:
            OutOfBlocks: all are in use.
        """
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block that is in use."""
        self._check(block)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Give one reference back. Without references a block stays cached if its content is known, else it is free."""
        self._check(block)
        self._references[block] -= 1
        if self._references[block]:
            return
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Have a full block found by `key`. If another block has that content already, that one stays the one found."""
        self._check(block)
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def find(self, key: bytes) -> int | None:
        """A block with this content, with a reference added; None if there is none."""
        block = self._block_of.get(key)
        if block is None:
            return None
        self._cached.pop(block, None)
        self._references[block] += 1
        return block

    def is_writable(self, block: int) -> bool:
        """Whether its only user may write to it: it is neither shared nor found by its content."""
        self._check(block)
        return self._references[block] == 1 and block not in self._key_of

    def forget_contents(self) -> None:
        """Let no block be found by its content, for example because the weights have changed."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]

    def _check(self, block: int) -> None:
        if not 0 <= block < self.num_blocks or not self._references[block]:
            raise BlockError(f"block {block} is not in use")


class BlockTable:
    """The blocks of one sequence, and how many tokens of it they hold."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: list[int] = []
        self._keys: list[bytes] = []  # of the full blocks, in order
        self.num_tokens = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        """Block numbers in the order of the sequence."""
        return tuple(self._blocks)

    @classmethod
    def with_prefix(cls, pool: BlockPool, tokens: Sequence[int]) -> BlockTable:
        """A table that shares the longest known prefix of `tokens` in full blocks.

        At least one token is left out: its forward pass gives the logits of the next.
        """
        table, size = cls(pool), pool.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            key = prefix_key(table._last_key, tokens[start : start + size])
            block = pool.find(key)
            if block is None:
                break
            table._blocks.append(block)
            table._keys.append(key)
            table.num_tokens += size
        return table

    def fork(self, num_tokens: int) -> BlockTable:
        """A table of another sequence that shares the blocks of the first `num_tokens` tokens, of which this holds all.

        Raises:
            BlockError: this table holds fewer tokens.
        """
        if num_tokens > self.num_tokens:
            raise BlockError(f"a table of {self.num_tokens} tokens cannot share {num_tokens}")
        table, size = BlockTable(self._pool), self._pool.block_size
        table._blocks = self._blocks[: self._pool.blocks_for(num_tokens)]
        table._keys = self._keys[: num_tokens // size]
        table.num_tokens = num_tokens
        for block in table._blocks:
            self._pool.share(block)
        return table

    def blocks_to_reserve(self, count: int) -> int:
        """Blocks that `reserve(count)` allocates."""
        new = max(self._pool.blocks_for(self.num_tokens + count) - len(self._blocks), 0)
        return new + sum(not self._pool.is_writable(block) for block in self._written())

    def reserve(self, count: int) -> list[BlockCopy]:
        """Make room for `count` more tokens, and return the copies that are needed before they are written.

        Raises:
            OutOfBlocks: there are not enough blocks; the table is unchanged.
        """
        if self.blocks_to_reserve(count) > self._pool.available:
            raise OutOfBlocks
        copies = []
        for shared in [block for block in self._written() if not self._pool.is_writable(block)]:
            own = self._pool.allocate()
            self._blocks[self._blocks.index(shared)] = own
            copies.append(BlockCopy(shared, own))
            self._pool.release(shared)
        while len(self._blocks) < self._pool.blocks_for(self.num_tokens + count):
            self._blocks.append(self._pool.allocate())
        return copies

    def append(self, tokens: Sequence[int], start: int, end: int) -> None:
        """Note that the forward pass has written `tokens[start:end]`, where `start` tokens were held before.

        Blocks that are full now can be found by their content.
        """
        if start != self.num_tokens or self._pool.blocks_for(end) > len(self._blocks):
            raise BlockError(f"{end} tokens from {start} do not follow {self.num_tokens}, or have no blocks")
        self.num_tokens, size = end, self._pool.block_size
        for index in range(len(self._keys), end // size):
            key = prefix_key(self._last_key, tokens[index * size : (index + 1) * size])
            self._keys.append(key)
            self._pool.register(self._blocks[index], key)

    def release(self) -> None:
        """Give all blocks back. The end of the sequence is the first to lose its content when memory is needed."""
        for block in reversed(self._blocks):
            self._pool.release(block)
        self._blocks, self._keys, self.num_tokens = [], [], 0

    @property
    def _last_key(self) -> bytes:
        return self._keys[-1] if self._keys else ROOT_KEY

    def _written(self) -> list[int]:
        """Blocks that hold tokens of the sequence and get the next ones too: the one that is partly full."""
        return self._blocks[self.num_tokens // self._pool.block_size :]
