"""Reading a run's description from strict YAML; all mistakes are reported at once, each with its line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError

from vl_mtl_lora.errors import UserError, did_you_mean
from vl_mtl_lora.sections import TASK_SECTIONS, CommonTaskSection, RunConfig, Strict, TaskSection

_DEEPEST, _MOST = 50, 1_000_000  # levels and entries of a config; aliases can make more of a few lines
_TASKS = ("tasks", "held_out")  # sections of task sections
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
StrictT = TypeVar("StrictT", bound=Strict)


class _Loader(yaml.SafeLoader):
    """Texts, numbers, lists and mappings, as JSON has them: a date stays the text that it is.

    YAML 1.1 takes 3e-4 for a text, since it has no point; this takes it for the number that it is.
    """

    yaml_constructors = {tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items()
                         if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN}
    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
                               for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` takes for a number, and escapes what PyYAML would write as it is and read as a space."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'))
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"),
                                list("-+0123456789"))


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Reads a run's YAML file, with `key.key=value` overrides whose values are YAML.

    Raises:
        UserError: one message that lists every mistake with file, line, value, and the nearest valid name.
    """
    data, where = _read(path, RunConfig, overrides)
    return parse_config(data, where, root=Path(path).parent)


def load_strict(path: str | Path, model: type[StrictT], overrides: list[str] = ()) -> StrictT:
    """As `load_config`, a file of another kind. Raises UserError."""
    data, where = _read(path, model, overrides)
    return _validated(data, model, where)


def parse_config(data: dict, where=lambda loc: "config", root: Path = Path(".")) -> RunConfig:
    """A plain dict -> RunConfig; `where` names the place of a key, `root` is what relative shard paths start from."""
    config = _validated(data, RunConfig, where)
    start = config.start if config.start.run is None else config.start.model_copy(update={
        "run": str((root / Path(config.start.run).expanduser()).resolve())})
    return config.model_copy(update={"start": start} | {key: {
        name: task.model_copy(update=_shards(task, where, (key, name), root) | _lists(task, where, (key, name), root))
        for name, task in getattr(config, key).items()} for key in _TASKS})


def _read(path: str | Path, model: type[Strict], overrides: list[str]) -> tuple[dict, Callable[[tuple], str]]:
    """(what the file holds, with the overrides; where in it a key stands)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    data, lines = _parse(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping with the keys {', '.join(model.model_fields)}")
    for override in overrides:
        apply_override(data, override)
    return data, lambda loc: f"{path}:{_nearest(lines, loc)}" if _nearest(lines, loc) else str(path)


def _validated(data: dict, model: type[StrictT], where: Callable[[tuple], str]) -> StrictT:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        mistakes = [_describe(mistake, model, where, data) for mistake in error.errors()]
        raise UserError("\n".join(dict.fromkeys(mistakes))) from error


def _shards(task: TaskSection, where, at: tuple[str, str], root: Path) -> dict[str, list[str]]:
    """The shards of a task, relative paths from `root`. Raises UserError for what is no path."""
    found = {}
    for split in ("train", "valid", "test"):
        try:
            found[split] = [_rooted(url, root) for url in getattr(task, split)]
        except (ValueError, RuntimeError) as error:  # a NUL; the home folder of a user that is not there
            raise UserError(f"{where((*at, split))}: {'.'.join(at)}.{split}: {error}") from error
    return found


def _lists(task: TaskSection, where, at: tuple[str, str], root: Path) -> dict[str, list[str]]:
    """The closed lists of a task, those in files read. Raises UserError for an entry that is empty or comes twice."""
    found = {}
    for key, least in (("answers", 0), ("labels", 2)):
        entries = getattr(task, key, None)
        place = f"{where((*at, key))}: {'.'.join(at)}.{key}"
        if isinstance(entries, str):
            try:
                entries = (root / Path(entries).expanduser()).read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{place}: cannot read the list: {error}") from error
        if entries is not None:
            if len(set(entries)) < max(least, len(entries)) or not all(entry.strip() for entry in entries):
                raise UserError(f"{place}: entries must be distinct and not empty"
                                + f", and at least {least}" * (least > 0))
            found[key] = list(entries)
    return found


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults written out, as YAML that `load_config` reads back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _rooted(url: str, root: Path) -> str:
    return url if "://" in url or url.startswith("pipe:") else str((root / Path(url).expanduser()).resolve())


def apply_override(data: dict, override: str) -> None:
    """Sets one `key.key=value` in a plain dict; `tasks.NAME=null` takes a task out. Raises UserError where it is not of
    that form."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key.key=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        section = data.get(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {parent} is not a section")
        data[parent] = section = dict(section)  # of its own: by an alias it may be another section too
        data = section
    known = list(data)
    data[last], _ = _parse(value, f"override {override!r}: the value")
    if data[last] is None and parents in ([key] for key in _TASKS):
        del data[last]
        if last not in known:
            raise UserError(f"override {override!r}: there is no task {last!r}", near=(last, known))


def _parse(text: str, what: str) -> tuple[Any, dict[tuple, int]]:
    """YAML -> (its value, the line of each key path, counted from 1). Raises UserError."""
    lines: dict[tuple, int] = {}
    try:
        _note_lines(yaml.compose(text, _Loader), (), lines)
        data = yaml.load(text, _Loader)
        json.dumps(data, ensure_ascii=False).encode()  # as a checkpoint holds it; refuses what is no Unicode
        return data, lines
    except Exception as error:  # PyYAML raises many types on a value that does not fit its tag
        reason = error if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{what} is not valid YAML: {reason}") from error


def _note_lines(node, prefix: tuple, lines: dict[tuple, int]) -> None:
    if len(prefix) > _DEEPEST or len(lines) > _MOST:
        raise yaml.YAMLError("it is too large, or an alias is part of what it stands for")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line, kind = key.start_mark.line + 1, key.tag.removeprefix("tag:yaml.org,2002:")
            if not isinstance(key, yaml.ScalarNode) or kind not in ("str", "merge"):
                raise yaml.YAMLError(f"line {line}: a key is no text: quote it")
            if (*prefix, key.value) in lines and kind != "merge":
                raise yaml.YAMLError(f"line {line}: {'.'.join(map(str, (*prefix, key.value)))} occurs twice")
            lines[(*prefix, key.value)] = line
            _note_lines(value, (*prefix, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*prefix, i)] = value.start_mark.line + 1
            _note_lines(value, (*prefix, i), lines)


def _nearest(lines: dict[tuple, int], loc: tuple) -> int | None:
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc)


def _describe(mistake: dict, model: type[Strict], where: Callable[[tuple], str], data: dict) -> str:
    # Tags of the task union are no keys of the file.
    raw = mistake["loc"] or ("config",)
    loc = (*raw[:2], *raw[3:]) if raw[0] in _TASKS and len(raw) > 2 and raw[2] in TASK_SECTIONS else raw
    key, value = ".".join(map(str, loc)), mistake.get("input")
    place = where(loc)
    if mistake["type"] == "extra_forbidden":
        return f"{place}: {key}: unknown key{did_you_mean(str(loc[-1]), _valid_keys(model, loc[:-1], data))}"
    if mistake["type"] == "missing":
        return f"{place}: {key}: missing"
    if mistake["type"].startswith("union_tag"):
        got = value.get("kind") if isinstance(value, dict) else value
        return f"{place}: {key}.kind: got {got!r}, expected the task's kind{did_you_mean(str(got), TASK_SECTIONS)}"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "literal_error":
        return f"{place}: {key}: got {value!r}, {message[0].lower()}{message[1:]}" \
               f"{did_you_mean(str(value), _choices(message))}"
    return f"{place}: {key}: got {value!r}; {message[0].lower()}{message[1:]}" if not isinstance(value, dict) \
        else f"{place}: {key}: {message}"


def _choices(message: str) -> list[str]:
    return [part for part in message.split("'")[1::2]]


def _valid_keys(model: type[Strict], loc: tuple, data: Any) -> list[str]:
    at: Any = model
    for part in loc:
        at = get_args(at)[1] if get_origin(at) is dict else at.model_fields[part].annotation
        data = data[part]
        if get_origin(at) is Annotated:  # the union of task sections
            at = TASK_SECTIONS.get(data.get("kind", part), CommonTaskSection)
    return list(at.model_fields)
