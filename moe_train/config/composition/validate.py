"""Everything that must hold before a process starts. No torch import: login nodes run it.

Each rule raises the fixes it can think of. Here they are tried: a message names only values with which the whole
configuration passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_train.config.resolve import ResolvedConfig, resolve
from moe_train.config.rules import checkpoint as checkpoint_rules
from moe_train.config.rules import fallbacks as fallback_rules
from moe_train.config.rules import model as model_rules
from moe_train.config.rules import optimizer as optimizer_rules
from moe_train.config.rules import parallel as parallel_rules
from moe_train.config.rules import precision as precision_rules
from moe_train.config.rules import recompute as recompute_rules
from moe_train.config.rules import resilience as resilience_rules
from moe_train.config.rules import run as run_rules
from moe_train.config.rules import schedule as schedule_rules
from moe_train.config.rules import unused as unused_rules
from moe_train.config.rules.values import check_values
from moe_train.config.schema import Config
from moe_train.config.walk import with_values
from parallel.layout import ParallelLayout
from parallel.suggest import Fix, Impossible

_RULES = (
    *model_rules.RULES, *parallel_rules.RULES, *precision_rules.RULES, *recompute_rules.RULES, *optimizer_rules.RULES,
    *run_rules.RULES, *schedule_rules.RULES, *checkpoint_rules.RULES, *resilience_rules.RULES, *fallback_rules.RULES,
    *unused_rules.RULES,
)  # fmt: skip
_MOST_TRIALS = 64
_DEEPEST, _WIDEST, _MOST_COMBINED = 5, 12, 400  # fields of a combined fix; fixes of each; checks in all


def validate(cfg: Config, world_size: int | None = None, *, trains: bool = True) -> ParallelLayout:
    """The layout of `cfg`, once every field and every rule between fields has been checked.

    Args:
        world_size: ranks that there are; None takes the fewest that the layout needs.
        trains: False where no run follows (moe-memory), so that what cannot be trained here can still be planned.

    Raises:
        ConfigError: with the field's full name, the arithmetic, and the nearest values that work.
    """
    problem, stage, layout = _check(cfg, world_size, trains)
    if problem is None and layout is not None:
        return layout
    if problem is None:  # not reached: _check returns one or the other
        raise Impossible("the configuration has no layout")
    raise Impossible(problem.cause, _working(cfg, world_size, trains, problem.fixes, stage), problem.remedy)


def fit(cfg: Config, world_size: int) -> ParallelLayout | None:
    """The layout of `cfg` on `world_size` ranks, or None where there is none: `validate` without reasons, but quick."""
    return _check(cfg, world_size, True)[2]


def _check(cfg: Config, world_size: int | None, trains: bool) -> tuple[Impossible | None, int, ParallelLayout | None]:
    """The first problem and how far the checks came, or the layout."""
    try:
        check_values(cfg)
    except Impossible as problem:
        return problem, 0, None
    degrees = {name: getattr(cfg.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    try:
        layout = ParallelLayout.resolve(**degrees, world_size=world_size)
        facts: ResolvedConfig = resolve(cfg, layout, trains)
    except Impossible as problem:
        return problem, 1, None
    for stage, rule in enumerate(_RULES, 2):
        try:
            rule(facts)
        except Impossible as problem:
            return problem, stage, None
    return None, 0, layout


def _working(cfg: Config, world_size: int | None, trains: bool, fixes: list[Fix], stage: int) -> list[Fix]:
    """The first two fixes with which everything passes; failing that, one that also fixes what it then fails on;
    failing that, those that get past this problem."""
    passing: list[Fix] = []
    failing: list[_Attempt] = []
    for fix in fixes[:_MOST_TRIALS]:
        problem, reached, _ = _check(with_values(cfg, fix), world_size, trains)
        if problem is None:
            passing.append(fix)
        else:
            failing.append(_Attempt(fix, problem, reached))
        if len(passing) == 2:
            break
    if passing:
        return passing
    if combined := _combined(cfg, world_size, trains, failing):
        return [combined]
    return [attempt.fix for attempt in failing if attempt.reached > stage][:2] or fixes[:2]


@dataclass(frozen=True)
class _Attempt:
    """A fix that does not suffice: the problem that is left with it, and how far the checks came."""

    fix: Fix
    problem: Impossible
    reached: int


def _combined(cfg: Config, world_size: int | None, trains: bool, failing: list[_Attempt]) -> Fix | None:
    """The smallest set of values with which everything passes, found by fixing what is left after each attempt.

    A value once chosen is kept, so that two rules cannot undo each other's remedies.
    """
    level, trials = failing, 0
    for _ in range(_DEEPEST - 1):
        deeper: list[_Attempt] = []
        # Those that get furthest are closest to passing; the order of a rule's fixes decides between equals.
        for attempt in sorted(level, key=lambda attempt: -attempt.reached)[:_WIDEST]:
            for fix in attempt.problem.fixes[:_WIDEST]:
                if fix.keys() & attempt.fix.keys():
                    continue
                both = attempt.fix | fix
                problem, reached, _ = _check(with_values(cfg, both), world_size, trains)
                trials += 1
                if problem is None:
                    return both
                deeper.append(_Attempt(both, problem, reached))
                if trials == _MOST_COMBINED:
                    return None
        level = deeper
    return None
