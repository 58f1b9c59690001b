"""What files and command lines of earlier versions mean. No torch.

The config.yaml of an old run is translated without a word, so that the run continues. An old spelling on a command line
or in a YAML file of the user is an error that shows the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import yaml

from moe_train.config.aliases import with_current_names
from moe_train.config.launcher import FallbackLayout
from moe_train.config.numbers import as_integer
from moe_train.config.plan import TrainingStage
from moe_train.config.resilience import Fault
from moe_train.config.schema import BlendEntry, RecomputeStage
from moe_train.config.walk import all_fields, plain

DEFAULTS: dict[str, Any] = {"data.deduplicate": "normalized", "data.follow_links": False, "data.shuffle": "run"}
"""Full name -> value of a field in a file that lacks it, where that is not today's default. A run of that version
continues with it (`current`), and its datasets were made with it (`moe_train/data/prepare.py`)."""

_GROUPS_OF_TOOLS = ("convert", "inspect", "plan")
"""Groups that the config of a run had."""


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config of a run of any earlier version, as this version writes it. What cannot be read stays."""
    result = with_current_names(config)
    for group in _GROUPS_OF_TOOLS:
        result.pop(group, None)
    for name, value in DEFAULTS.items():
        group, _, leaf = name.partition(".")
        fields = result.get(group) or {}  # a version may lack all of a group
        if isinstance(fields, Mapping):
            result[group] = {leaf: value, **fields}
    for name in ENTRIES:
        group, _, leaf = name.partition(".")
        fields = result.get(group)
        if isinstance(fields, Mapping) and isinstance(fields.get(leaf), list):
            result[group] = {**fields, leaf: [_translated(name, item) for item in fields[leaf]]}
    return result


def _translated(name: str, item: Any) -> Any:
    parsed = entry(name, item) if isinstance(item, str) else None
    return asdict(parsed) if is_dataclass(parsed) and not isinstance(parsed, type) else item


def entry(name: str, text: str) -> Any | None:
    """The entry of the list field `name` that was written as `text`; None where it cannot be read."""
    try:
        return ENTRIES[name](text)
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _blend(text: str) -> BlendEntry:
    """'WEIGHT PREFIX' or 'PREFIX'. A prefix may have spaces."""
    first, _, rest = text.strip().partition(" ")
    try:
        return BlendEntry(path=rest.strip(), weight=float(first))
    except ValueError:
        return BlendEntry(path=text.strip())


def _recompute(text: str) -> RecomputeStage:
    """'none', 'full', or modules joined by +."""
    if text in ("none", "full"):
        return RecomputeStage(mode=text)
    return RecomputeStage(modules=text.split("+"))


def _fallback(text: str) -> FallbackLayout:
    """'parallel.dp=2 parallel.ep=2'."""
    groups: dict[str, dict[str, Any]] = {"parallel": {}, "recompute": {}, "batch": {}}
    for word in text.split():
        name, value = _pair(word)
        group, _, leaf = name.partition(".")
        read = yaml.safe_load(value)
        if name == "recompute.stages":
            if not isinstance(read, list):
                raise ValueError(f"{value} is not a list")
            read = [_translated(name, item) for item in read]
        groups[group][leaf] = read
    return FallbackLayout(**groups)


def _fault(text: str) -> Fault:
    """'kill:rank=1:step=7'."""
    kind, *pairs = text.split(":")
    return Fault(kind, **_values(Fault, dict(_pair(pair) for pair in pairs)))


_STAGE = {"seq": "seq_length", "batch": "global_batch_size"}


def _stage(text: str) -> TrainingStage:
    """'NAME tokens=14.8T' and the like."""
    name = " ".join(word for word in text.split() if "=" not in word)
    values = {_STAGE.get(key, key): value for key, value in map(_pair, (w for w in text.split() if "=" in w))}
    failures = bool(as_integer(values.pop("failures", "0")))
    return TrainingStage(name or TrainingStage.name, failures=failures, **_values(TrainingStage, values))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text} is not NAME=VALUE")
    return name, value


def _values(kind: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """Values of fields of `kind`. Raises KeyError or ValueError where there is no such field or value."""
    fields, values = all_fields(kind), {}
    for name, text in texts.items():
        of = plain(fields[name].type)
        values[name] = of(text) if of in (str, float) else as_integer(text, 1024 if name == "seq_length" else 1000)
    return values


ENTRIES: Mapping[str, Callable[[str], Any]] = {
    "data.blend": _blend,
    "recompute.stages": _recompute,
    "launcher.fallbacks": _fallback,
    "resilience.inject": _fault,
    "plan.recipe": _stage,
}
"""List field -> what reads an entry as text, as earlier versions had it."""
