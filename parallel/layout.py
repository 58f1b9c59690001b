"""How ranks are laid out over the parallel dimensions: degrees and coordinates. No torch import.

The same ranks are counted twice, as in Megatron-Core (megatron/core/parallel_state.py): attention and dense layers see
tp x cp x dp x pp ranks, expert layers see etp x ep x edp x pp. In both, the first dimension changes fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from parallel.suggest import Impossible, divisors, fixes_of, multiples, nearest


@dataclass(frozen=True)
class Coordinates:
    """Index of one rank along each dimension, from 0. `ep`, `etp`, `edp` count the same rank for expert layers."""

    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    edp: int


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of every parallel dimension, known to fit together. Make it with `resolve`.

    `vpp` is the number of model chunks on each pipeline rank; it takes no ranks.
    """

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Data-parallel degree of the expert layers."""
        return self.world_size // (self.etp * self.ep * self.pp)

    @property
    def label(self) -> str:
        """The degrees in one line."""
        return " ".join(f"{name}{getattr(self, name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"))

    @classmethod
    def resolve(
        cls, *, tp: int, pp: int, vpp: int, cp: int, ep: int, etp: int,
        dp: int | None = None, world_size: int | None = None,
    ) -> ParallelLayout:  # fmt: skip
        """The layout of these degrees. `dp` follows from `world_size`; without either it is the smallest that fits.

        Raises:
            Impossible: (a ConfigError) where the degrees do not fit together or do not fill `world_size` ranks, with
                the full name of the field, the arithmetic and the nearest values that work.
        """
        for name, value in {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "etp": etp, "dp": dp}.items():
            if value is not None and value < 1:
                raise Impossible(f"parallel.{name}={value} is less than 1", [{f"parallel.{name}": 1}])
        if dp is None and world_size is None:
            dp = lcm(tp * cp, etp * ep) // (tp * cp)
        elif dp is None and world_size is not None:
            dp = _dp_of_world(tp, pp, cp, world_size)
        elif dp is not None and world_size is not None and tp * pp * cp * dp != world_size:
            each = tp * pp * cp
            fits = [world_size // each] if world_size % each == 0 else []
            raise Impossible(
                f"parallel.dp={dp} does not fill the ranks: parallel.tp x pp x cp x dp = {tp} x {pp} x {cp} x {dp} = "
                f"{each * dp}, but there are {world_size} ranks",
                [*fixes_of("parallel.dp", fits)],
                f"start {each * dp} ranks, or set parallel.dp=null and start a multiple of {each} ranks",
            )
        if dp is None:  # not reached: every case above has set it
            raise Impossible("parallel.dp is not known")
        layout = cls(tp, pp, vpp, cp, ep, etp, dp)
        _check_experts(layout, dp_is_free=world_size is None)
        return layout

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of `rank`. Raises ValueError outside 0 .. world_size - 1."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of the {self.world_size} ranks 0 .. {self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        rest, etp = divmod(rank, self.etp)
        rest, ep = divmod(rest, self.ep)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, edp=rest % self.edp)

    def rank_of(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates. Raises ValueError where one of them is outside its degree."""
        given = {"tp": (tp, self.tp), "cp": (cp, self.cp), "dp": (dp, self.dp), "pp": (pp, self.pp)}
        for name, (value, degree) in given.items():
            if not 0 <= value < degree:
                raise ValueError(f"{name} coordinate {value} is outside 0 .. {degree - 1}")
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def expert_rank_of(self, *, etp: int = 0, ep: int = 0, edp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates of the expert layers. Raises ValueError where one is outside its degree."""
        given = {"etp": (etp, self.etp), "ep": (ep, self.ep), "edp": (edp, self.edp), "pp": (pp, self.pp)}
        for name, (value, degree) in given.items():
            if not 0 <= value < degree:
                raise ValueError(f"{name} coordinate {value} is outside 0 .. {degree - 1}")
        return ((pp * self.edp + edp) * self.ep + ep) * self.etp + etp


def _dp_of_world(tp: int, pp: int, cp: int, world_size: int) -> int:
    """Data-parallel degree that fills `world_size` ranks; raises Impossible where none does."""
    each = tp * pp * cp
    if world_size % each == 0:
        return world_size // each
    degrees = {"tp": tp, "pp": pp, "cp": cp}
    fixes = [
        {f"parallel.{name}": value}
        for name, degree in sorted(degrees.items(), key=lambda item: -item[1])
        for value in nearest(divisors(world_size), degree)
        if world_size % (each // degree * value) == 0
    ]
    # The first fix of each field before second ones, so that a message offers two different ways out.
    first = {next(iter(fix)): fix for fix in reversed(fixes)}
    raise Impossible(
        f"parallel.tp x pp x cp = {tp} x {pp} x {cp} = {each} does not divide the {world_size} ranks "
        f"({' or '.join(str(n) for n in multiples(each, world_size)[-2:])} ranks would do)",
        [*first.values(), *(fix for fix in fixes if fix not in first.values())],
    )


def _check_experts(layout: ParallelLayout, dp_is_free: bool) -> None:
    """The expert layers must fill the same ranks: etp x ep x pp divides the world size."""
    expert, per_stage = layout.etp * layout.ep, layout.world_size // layout.pp
    if per_stage % expert == 0:
        return
    eps = [d for d in divisors(per_stage) if per_stage % (layout.etp * d) == 0]
    etps = [d for d in divisors(per_stage) if per_stage % (layout.ep * d) == 0]
    smallest = lcm(layout.tp * layout.cp, expert) // (layout.tp * layout.cp)
    field = "ep" if layout.ep > 1 else "etp"
    raise Impossible(
        f"parallel.{field}={getattr(layout, field)} does not fit: parallel.etp x ep x pp = "
        f"{layout.etp} x {layout.ep} x {layout.pp} = {expert * layout.pp} does not divide "
        f"the {layout.world_size} ranks "
        f"(parallel.tp x pp x cp x dp = {layout.tp} x {layout.pp} x {layout.cp} x {layout.dp})",
        [
            *fixes_of("parallel.ep", nearest(eps, layout.ep)[:1]),
            *fixes_of("parallel.dp", nearest(multiples(smallest, layout.dp), layout.dp)[:1] if dp_is_free else ()),
            *fixes_of("parallel.ep", nearest(eps, layout.ep)[1:]),
            *fixes_of("parallel.etp", nearest(etps, layout.etp)),
        ],
    )
