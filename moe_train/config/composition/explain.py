"""Hydra's and OmegaConf's errors as one line that names the field and a value that works."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from moe_train.config import former
from moe_train.config.aliases import ABSENT, FIELDS, RENAMED
from moe_train.config.composition.command_line import field_of, is_list, is_text, old_spelling
from moe_train.config.roots import ROOTS, all_groups, commands_with
from moe_train.config.schema import Config
from moe_train.config.walk import FieldInfo, all_fields, group_names, plain
from parallel import errors
from parallel.errors import ConfigError, MoeTrainError
from parallel.suggest import override_value

CONF_DIR = Path(__file__).resolve().parents[3] / "conf"
_HYDRA_OPTIONS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info",
    "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--shell-completion", "--verbose",
)  # fmt: skip
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def explain(error: Exception, overrides: Sequence[str] = (), root: type = Config) -> MoeTrainError | None:
    """`error`, raised while composing a config from `overrides`, as a ConfigError; None where it is not the user's.

    Args:
        root: the dataclass that is composed.
    """
    if isinstance(error, MoeTrainError):
        return error
    if isinstance(error, MissingConfigException):
        return _missing_option(error, root)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, overrides, root)
    inner = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(inner, GrammarParseError) or isinstance(error, GrammarParseError):
        return _broken_reference(str(error), overrides)
    if isinstance(inner, OmegaConfBaseException):
        return _omegaconf(inner, str(error), overrides, root)
    if str(error).startswith("Ambiguous value for argument"):
        return _ambiguous(str(error), root)
    if str(error).startswith("Config group override must be"):
        return _not_an_option(overrides, root)
    if match := re.match(r"(?:In '([^']+)': )?Could not (?:override|delete from config\.) '([^']*)'", str(error)):
        return _unknown_in_file(match[2], None, match[1], root)
    if isinstance(error, yaml.YAMLError):
        return ConfigError(f"a config file is not YAML: {one_line(error)}", "correct the file at the line named")
    if isinstance(error, (HydraException, ValueError)):
        return ConfigError(one_line(error), "see moe-train --help and moe-train --cfg job")
    return None


def one_line(error: object) -> str:
    """The message of `error` without line breaks and terminal controls."""
    return errors.one_line(" ".join(str(error).split()))


def unknown_field(name: str, value: str | None = None, root: type = Config) -> ConfigError:
    """An error for a field that `root` does not have, with the fields that may have been meant."""
    shown = "VALUE" if value is None else value
    if name in group_names(root):  # such as plan=NAME of moe-submit
        field = next(full for full in all_fields(root) if full.startswith(f"{name}."))
        return ConfigError(f"{name}={shown}: this command has no options of {name} by name", f"use {name}.FIELD=VALUE, "
                           f"such as {_works(field, root)}")  # fmt: skip
    if name not in all_fields(root) and (commands := commands_with(name)):
        return _of_another_command(name, shown, commands, root)
    if current := RENAMED.get(name):
        return ConfigError(f"{name} was renamed", f"use {current}={shown}")
    if remedy := ABSENT.get(_leaf(name)):
        return ConfigError(f"{name} is not a field of the configuration", remedy)
    similar = similar_fields(name, root)
    near = [near for near in similar if near in all_fields(root) or value in (None, *group_options(near))]
    remedy = " or ".join(f"{field}={shown}" for field in near)
    return ConfigError(
        f"{name} is not a field of the configuration",
        f"use {remedy}" if remedy else f"see {ROOTS[root].commands[0]} --cfg job for all fields",
    )


def _unknown_in_file(name: str, value: str | None, file: str | None, root: type) -> ConfigError:
    """`unknown_field` for one in a YAML file. `file` is its path in `conf/` or --config-dir, without suffix."""
    if file is None:
        return unknown_field(name, value, root)
    # Of two files with the same name Hydra takes that of conf/.
    place = f"conf/{file}.yaml" if (CONF_DIR / f"{file}.yaml").is_file() else f"{file}.yaml"
    group = name.partition(".")[0]
    if group in group_names(root) or group not in all_groups() or name in ROOTS[root].moved:
        error = unknown_field(name, value, root)
        return ConfigError(f"{error.cause} (in {place})", error.remedy)
    whole = "a run" if root is Config else ROOTS[root].commands[0]
    user_file = "the defaults list or override that names it" if file.startswith(f"{group}/") else place
    return ConfigError(
        f"{name} (in {place}) is not part of the configuration of {whole}",
        f"remove it from {user_file}, and give {group}.FIELD=VALUE to {' or '.join(commands_with(group))} "
        "on the command line",
    )


def _of_another_command(name: str, value: str, commands: Sequence[str], root: type) -> ConfigError:
    """An error for a field, or a group, that the configs of other commands have."""
    here = ROOTS[root].commands[0]
    if current := ROOTS[root].moved.get(name):
        return ConfigError(f"{name} is not a field of {here}", f"use {current}={value}")
    owners = ", ".join(commands)
    return ConfigError(f"{name} is not in the configuration of this command, but in that of {owners}", "leave it out")


def similar_fields(name: str, root: type = Config) -> list[str]:
    """Up to three names of `root` like `name`, best first: same last part, then similar spelling."""
    known = [*all_fields(root), *(group for group in group_names(root) if group_options(group))]
    if (alias := FIELDS.get(_leaf(name))) and alias in all_fields(root):
        return [alias]
    group, _, leaf = name.rpartition(".")
    same_leaf = [full for full in known if full.rpartition(".")[2] == leaf]
    if group in group_names(root):  # what the group shares with each of its fields, its own name, says nothing
        ends = [full.rpartition(".")[2] for full in known if full.startswith(f"{group}.")]
        spelling = [f"{group}.{end}" for end in difflib.get_close_matches(leaf, ends, n=3, cutoff=0.7)]
    else:
        spelling = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    leaves = {full.rpartition(".")[2]: full for full in reversed(known)}
    near_leaf = [leaves[close] for close in difflib.get_close_matches(leaf, list(leaves), n=2, cutoff=0.75)]
    return list(dict.fromkeys([*same_leaf, *spelling, *near_leaf]))[:3]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("-", "_")


def unknown_option(option: str, words: Sequence[str] = (), flags: Sequence[str] = ()) -> ConfigError:
    """An error for an option such as --partition=gpu or --lr 1e-3 that a command does not have.

    Args:
        words: the command line, whose next word may be the value.
        flags: options of the command itself.
    """
    name, equals, value = option.partition("=")
    cause = f"command line: there is no option {name}"
    if near := difflib.get_close_matches(name, flags, n=1, cutoff=0.7):
        return ConfigError(cause, f"use {near[0]}")
    if name in ("--dryrun", "--dry-run", "--dry_run"):
        return ConfigError(
            cause, "use moe-submit --dry-run to see what a job needs, or --cfg job for the configuration"
        )
    fields = similar_fields(name.lstrip("-").replace("-", "_")) if name.startswith("--") else []
    if near := difflib.get_close_matches(name, _HYDRA_OPTIONS, n=1, cutoff=0.8):
        return ConfigError(cause, f"use {near[0]}")
    if fields:
        after = words[words.index(option) + 1 :][:1] if option in words and not equals else []
        following = after[0] if after and "=" not in after[0] and not after[0].startswith("-") else "VALUE"
        return ConfigError(cause, f"use {fields[0]}={value if equals else following}")
    return ConfigError(cause, "use KEY=VALUE overrides and the options of --help")


def group_options(group: str) -> list[str]:
    """Names of the YAML files of a group, such as tiny, deepseek_v3, ... for `model`."""
    folder = CONF_DIR / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _unreadable(override: str, overrides: Sequence[str], root: type) -> ConfigError:
    """An override that Hydra's grammar does not accept."""
    key = override.partition("=")[0]
    name = key.lstrip("+~")
    given = next((word for word in reversed(overrides) if word.partition("=")[0] == key), override)
    value = given.partition("=")[2]
    if "=" not in override or not re.fullmatch(r"[\w./@-]+", name):
        return ConfigError(f"cannot read the override {given!r}", "use KEY=VALUE, such as train.steps=100")
    if name in all_fields(root):
        info = all_fields(root)[name]
        expected = f"one of {', '.join(info.choices)}" if info.choices else _type_name(info.type)
        return ConfigError(f"{given} is not {expected}", f"use {_works(name, root)}")
    if name in group_names(root) or name == "experiment":
        return ConfigError(f"{given} is not the name of one option of {name}", f"use {_works(name, root)}")
    if name.startswith("hydra"):
        return ConfigError(f"cannot read the override {given!r}", f"quote its value: \"{key}='...'\"")
    return unknown_field(name, value, root)


def _broken_reference(message: str, overrides: Sequence[str]) -> ConfigError:
    """`${` in a value that is not followed by a name and `}`."""
    for word in overrides:
        info = field_of(word)
        if info is not None and is_text(info) and "${" in word:
            return ConfigError(f"{word} has a reference that cannot be read", "write \\${ where ${ is text")
    return ConfigError(
        f"a reference cannot be read: {one_line(message)}", "write ${NAME} with the full name of a field"
    )


def _missing_option(error: MissingConfigException, root: type) -> ConfigError:
    missing = str(error.missing_cfg_file or "")
    group, _, option = missing.rpartition("/")
    top = missing.split("/")[0]
    if top in all_groups() or top == "experiment":
        group, option = top, missing.removeprefix(top + "/")
    own = group_options(group) if group else sorted(path.stem for path in CONF_DIR.glob("*.yaml"))
    options = own or [str(option) for option in error.options or ()]  # Hydra's own groups are not under conf/
    near = difflib.get_close_matches(option, options, n=2, cutoff=0.5) or options[:2]
    remedy = " or ".join(f"{group}={name}" if group else f"--config-name {name}" for name in near)
    return ConfigError(f"{group or 'config'}={option} does not exist among {', '.join(options) or 'no options'}",
                       f"use {remedy}" if remedy else "see moe-train --help")  # fmt: skip


def _omegaconf(inner: OmegaConfBaseException, outer: str, overrides: Sequence[str], root: type) -> ConfigError:
    """Unknown keys, wrong types, deletions and interpolations."""
    name = str(inner.full_key or "")
    given = _given(name, overrides) if name else None
    if given is None and name and name not in group_names(root):  # the first part alone is unknown
        longer = next((word.lstrip("+~") for word in overrides if word.lstrip("+~").startswith(f"{name}.")), None)
        if longer is not None:
            name, _, given = longer.partition("=")
    if (about_entry := _entry(inner, name, root)) is not None:
        return about_entry
    if isinstance(inner, InterpolationKeyError) or "nterpolation" in type(inner).__name__:
        field = name or "an interpolation"
        return ConfigError(f"{field} refers to something that does not exist: {one_line(inner).split(' full_key')[0]}",
                           "use the full name of a field, such as ${model.name}")  # fmt: skip
    if isinstance(inner, ConfigTypeError) and "deletion" in str(inner):
        return ConfigError(f"{name} cannot be deleted", f"use {_works(name, root)}")
    if isinstance(inner, (ConfigAttributeError, ConfigKeyError)):
        match = re.match(r"In '([^']+)'", outer)
        return _unknown_in_file(name, given, match[1] if match else None, root)
    if name in all_fields(root):
        value = f"={given}" if given is not None else ""
        info = all_fields(root)[name]
        kind = f"a list such as {info.example}" if info.entry else _type_name(info.type)
        return ConfigError(f"{name}{value} is not {kind}", f"use {_works(name, root, given)}")
    remedy = f"use {_works(name, root)}" if name in group_names(root) else ""
    return ConfigError(one_line(inner).split(" full_key")[0], remedy)


def _entry(inner: OmegaConfBaseException, name: str, root: type) -> ConfigError | None:
    """The error of an entry of a list; None where the error is about something else."""
    lists = {info.entry: info for info in all_fields(root).values() if info.entry}
    place = re.fullmatch(r"(.+)\[\d+\](?:\.(\w+))?", name)
    info = lists.get(inner.object_type) or (all_fields(root).get(place[1]) if place else None)
    if info is None or info.entry is None:
        return None
    fields, remedy = all_fields(info.entry), f"use '{info.name}={info.example}'"
    leaf = place[2] if place else name
    if isinstance(inner, MissingMandatoryValue):
        return ConfigError(f"{info.name} has an entry without {leaf}", remedy)
    if leaf in fields:
        return ConfigError(f"{info.name} has an entry whose {leaf} is not {_type_name(fields[leaf].type)}", remedy)
    if leaf is not None:
        return ConfigError(f"{info.name} has an entry with {leaf}, which is not one of {', '.join(fields)}", remedy)
    return _entry_as_text(inner, info)


def _entry_as_text(inner: OmegaConfBaseException, info: FieldInfo) -> ConfigError:
    """An entry of a YAML file that is not a mapping."""
    text = one_line(inner).partition(" value: ")[2].partition(" full_key")[0]
    parsed = former.entry(info.name, text)
    if parsed is None:
        return old_spelling(info, [text])
    return ConfigError(
        f"{info.name} is a list of mappings, not of text such as {text!r}", f"write {override_value(parsed)}"
    )


def _ambiguous(message: str, root: type) -> ConfigError:
    """Commas outside of quotes mean a sweep."""
    match = re.search(r"argument '(.*)'", message)
    name, _, value = (match.group(1) if match else message).partition("=")
    name = name.lstrip("+~")
    first = value.split(",")[0]
    info = all_fields(root).get(name)
    if info and plain(info.type) is int and re.fullmatch(r"\d{1,3}(,\d{3})+", value):
        return ConfigError(f"{name}={value} has several values", f"use {name}={value.replace(',', '')}")
    one_value = f"[{value}]" if info and is_list(info.type) else f"{first}, or -m to run each"
    return ConfigError(f"{name}={value} has several values", f"use {name}={one_value}")


def refuse_lost_groups(overrides: Sequence[str], root: type = Config) -> None:
    """`~model`, `model=null` and `model=[a,b]` are fine for Hydra, and would train defaults or a mixture unasked."""
    for override in overrides:
        key, _, value = override.partition("=")
        group = key.lstrip("+~")
        if group in group_names(root) and key.startswith("~"):
            raise ConfigError(f"{group} cannot be deleted", f"use {_works(group, root)}")
        if group in group_names(root) and (value == "null" or value.startswith("[")):
            raise ConfigError(f"{group}={value} is not the name of one option of {group}", f"use {_works(group, root)}")


def _not_an_option(overrides: Sequence[str], root: type) -> ConfigError:
    """`parallel=5`: a group wants the name of a file."""
    for override in overrides:
        name, _, value = override.partition("=")
        if (name in group_names(root) or name == "experiment") and value not in group_options(name):
            return ConfigError(f"{name}={value} is not the name of an option of {name}", f"use {_works(name, root)}")
        if not name:
            return ConfigError(f"the override {override!r} has no key", "use KEY=VALUE, such as train.steps=100")
    return ConfigError("a config group was given something else than the name of an option", "see moe-train --help")


def _given(name: str, overrides: Sequence[str]) -> str | None:
    """What the command line gave for `name`."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        if key.lstrip("+~") == name:
            return value
    return None


def _works(name: str, root: type, given: str | None = None) -> str:
    """The field with the nearest value of its type or its default, or the group with some of its options or fields."""
    known = all_fields(root)
    if name in group_names(root) or name == "experiment":
        fields = [full for full, info in known.items() if full.startswith(f"{name}.") and info.default is not None]
        options = [f"{name}={option}" for option in group_options(name)]
        return " or ".join((options or [_works(full, root) for full in fields])[:3])
    if name not in known:
        return f"{name}=VALUE"
    info = known[name]
    if info.entry:
        return f"'{name}={info.example}'"
    try:
        number = max(round(float(given or "")), round(info.minimum or 0))
    except (ValueError, OverflowError):
        number = None
    if number is not None and plain(info.type) is int:
        return f"{name}={number}"
    return f"{name}={override_value(info.default)}"


def _type_name(kind: Any) -> str:
    inner = plain(kind)
    if is_list(kind):
        return f"a list such as [{'0.1,0.2' if typing.get_args(inner)[0] is float else 'a,b'}]"
    text = _TYPE_NAMES.get(inner, str(inner))
    return text if inner is kind else f"{text} or null"
