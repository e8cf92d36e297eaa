"""The typed description of a run, read from strict YAML; all mistakes are reported at once, each with its line."""

import re
import string
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vl_mtl_lora.errors import UserError, did_you_mean


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BackboneConfig(_Strict):
    """The frozen model. `options` go to the library's loader: see the `load` function in backbones/<library>.py."""

    library: str = "open_clip"
    name: str = Field(min_length=1)
    pretrained: str | None = None  # tag or checkpoint file
    options: dict[str, Any] = {}


class AdapterSection(_Strict):
    """Hyperparameters of the MTL-LoRA layers; see `lora.MTLLoRALinear` and `lora.AdapterConfig`."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    num_up: int = Field(3, ge=1)
    temperature: float = Field(0.5, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    transform: Literal["full", "diagonal"] = "full"
    targets: list[str] = Field(["*"], min_length=1)


class _TaskSection(_Strict):
    """What every task has. Shards are paths, globs, brace ranges or URLs; relative paths are relative to the config."""

    least_rows: ClassVar[int] = 1  # of every batch, whatever the mixing
    images: ClassVar[int] = 1  # of each sample
    rows: int = Field(16, ge=1)  # of every batch
    weight: float = Field(1.0, ge=0)  # of this task's loss in the sum
    train: list[str] = Field(min_length=1)
    valid: list[str] = []  # for periodic evaluation and the choice of the best checkpoint
    test: list[str] = []  # for `evaluate` and `compare`
    format: Literal["tagged", "img2dataset", "clip_benchmark"] = "tagged"
    augment: bool | dict[str, Any] = False  # the library's training augmentation, or that with options of its own

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, data):
        if isinstance(data, dict):
            data = {k: [v] if k in ("train", "valid", "test") and isinstance(v, str) else v for k, v in data.items()}
        return data


class RetrievalSection(_TaskSection):
    kind: Literal["retrieval"] = "retrieval"
    least_rows: ClassVar[int] = 2  # one has no negative
    rows: int = Field(32, ge=2)
    augment: bool | dict[str, Any] = True
    loss: Literal["softmax", "sigmoid"] | None = None  # CLIP's or SigLIP's; default: the base's
    scale: float | None = Field(None, gt=0, le=100)  # of similarities at start, then learned; default: the base's


class VQASection(_TaskSection):
    kind: Literal["vqa"] = "vqa"
    answers: list[str] = []  # the closed answer list, if there is one
    answer_by: Literal["ranking", "generation", "classification"] | None = None  # default: ranking if `answers`
    prompt: str | None = None  # default: the backbone's
    zero_shot_prompt: str = "{question} {answer}"
    max_new_tokens: int = Field(10, ge=1)
    metric: Literal["official", "lenient"] = "official"

    @model_validator(mode="after")
    def _needs_answers(self):
        if self.answer_by in ("ranking", "classification") and not self.answers:
            raise ValueError(f"answer_by: {self.answer_by} needs the list `answers`")
        if self.prompt is not None:
            _check_template("prompt", self.prompt, "question")
        _check_template("zero_shot_prompt", self.zero_shot_prompt, "question", "answer")
        if len(set(self.answers)) < len(self.answers) or not all(answer.strip() for answer in self.answers):
            raise ValueError("answers must be distinct and not empty")
        return self


def _check_template(name: str, template: str, *fields: str) -> None:
    used = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    if used != set(fields):
        raise ValueError(f"{name} must contain {' and '.join('{' + f + '}' for f in fields)} and no other field")


class CaptioningSection(_TaskSection):
    kind: Literal["captioning"] = "captioning"
    prompt: str | None = None  # default: the backbone's
    max_new_tokens: int = Field(20, ge=1)
    num_beams: int = Field(3, ge=1)


_KINDS = {"retrieval": RetrievalSection, "vqa": VQASection, "captioning": CaptioningSection}
TaskSection = Annotated[RetrievalSection | VQASection | CaptioningSection, Field(discriminator="kind")]


class MixingSection(_Strict):
    """How many rows of a batch each task gets; see `data.mixing.expected_rows`."""

    by: Literal["quotas", "proportional", "temperature", "weights"] = "quotas"  # quotas: tasks.NAME.rows
    rows: int | None = Field(None, ge=1)  # of a batch, unless by quotas; default: the sum of the quotas
    temperature: float | None = Field(None, ge=1)
    cap: int | None = Field(None, ge=1)  # larger tasks count as if they had so many samples
    weights: dict[str, Annotated[float, Field(gt=0)]] = {}  # by task

    @model_validator(mode="after")
    def _fits(self):
        of = {"rows": ("proportional", "temperature", "weights"), "temperature": ("temperature",),
              "cap": ("temperature",), "weights": ("weights",)}
        for name, kinds in of.items():
            if getattr(self, name) and self.by not in kinds:
                raise ValueError(f"{name} belongs to by: {' or '.join(kinds)}, not to by: {self.by}")
        for name in ("temperature", "weights"):
            if self.by == name and not getattr(self, name):
                raise ValueError(f"by: {name} needs {name}")
        return self


class DataSection(_Strict):
    workers: int = Field(0, ge=0)  # loader processes; the order of samples does not depend on it
    mixing: MixingSection = MixingSection()
    shuffle: int = Field(100_000, ge=1)  # samples of each window in which a task's order is shuffled
    cache: str = "~/.cache/vl_mtl_lora"  # folder for copies of remote and of compressed shards
    allow_pipe: bool = False  # run the shell commands of "pipe:COMMAND" shards
    max_fault_share: float = Field(0.01, ge=0, le=1)  # of a task's samples; more broken ones end the run
    ignore_tasks: list[str] = []  # tags that may occur in the shards and are passed over
    eval_batch: int = Field(64, ge=1)  # rows


class TrainSection(_Strict):
    steps: int = Field(1000, ge=1)  # optimizer steps
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # of A and B; Lambda, mix and heads take none
    warmup: int = Field(50, ge=0)  # steps of linear warm-up, then cosine to zero
    clip: float = Field(1.0, gt=0)  # largest gradient norm
    accumulate: int = Field(1, ge=1)  # batches per optimizer step
    precision: Literal["float32", "bf16"] = "float32"
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)  # steps between evaluations on the valid shards; 0: only at the end
    eval_samples: int = Field(500, ge=1)  # of each task
    save_every: int = Field(500, ge=1)  # steps between saves of the last checkpoint


class RunConfig(_Strict):
    """One experiment."""

    out: str  # the run's folder
    backbone: BackboneConfig
    adapter: AdapterSection = AdapterSection()
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], TaskSection] = Field(min_length=1)
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()

    @model_validator(mode="before")
    @classmethod
    def _kind_from_name(cls, data):
        tasks = data.get("tasks") if isinstance(data, dict) else None
        if isinstance(tasks, dict):  # a task called vqa is of kind vqa
            tasks = {name: {"kind": name, **task} if isinstance(task, dict) and name in _KINDS else task
                     for name, task in tasks.items()}
            data = {**data, "tasks": tasks}
        return data

    @model_validator(mode="after")
    def _weights_fit(self):
        weights = self.data.mixing.weights
        if weights and weights.keys() != self.tasks.keys():
            raise ValueError(f"data.mixing.weights names the tasks {', '.join(weights)}; expected each of "
                             f"{', '.join(self.tasks)}")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 3e-4 for a text, since it has no point; this takes it for the number that it is."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


def load_config(path: str | Path, overrides: list[str] = ()) -> RunConfig:
    """Reads a run's YAML file, with `key.key=value` overrides whose values are YAML.

    Raises:
        UserError: one message that lists every mistake with file, line, value, and the nearest valid name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    try:
        node = yaml.compose(text, _Loader)
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping with the keys {', '.join(RunConfig.model_fields)}")
    lines = _lines(node)
    for override in overrides:
        apply_override(data, override)
    return parse_config(data, where=lambda loc: f"{path}:{_nearest(lines, loc)}" if _nearest(lines, loc) else str(path),
                        root=path.parent)


def parse_config(data: dict, where=lambda loc: "config", root: Path = Path(".")) -> RunConfig:
    """A plain dict -> RunConfig; `where` names the place of a key, `root` is what relative shard paths start from."""
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        mistakes = [_describe(mistake, where, data) for mistake in error.errors()]
        raise UserError("\n".join(dict.fromkeys(mistakes))) from error
    tasks = {name: task.model_copy(update={split: [_rooted(url, root) for url in getattr(task, split)]
                                           for split in ("train", "valid", "test")})
             for name, task in config.tasks.items()}
    return config.model_copy(update={"tasks": tasks})


def dump_config(config: RunConfig) -> str:
    """The whole configuration, defaults written out, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _rooted(url: str, root: Path) -> str:
    return url if "://" in url or url.startswith("pipe:") else str((root / Path(url).expanduser()).resolve())


def apply_override(data: dict, override: str) -> None:
    """Sets one `key.key=value` in a plain dict. Raises UserError where it is not of that form."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key.key=value")
    *parents, last = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: {parent} is not a section")
    try:
        data[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _lines(node, prefix=()) -> dict[tuple, int]:
    """Key path -> line number, counted from 1."""
    lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*prefix, key.value)] = key.start_mark.line + 1
            lines |= _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*prefix, i)] = value.start_mark.line + 1
            lines |= _lines(value, (*prefix, i))
    return lines


def _nearest(lines: dict[tuple, int], loc: tuple) -> int | None:
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc)


def _describe(mistake: dict, where, data: dict) -> str:
    # Tags of the task union are no keys of the file.
    raw = mistake["loc"] or ("config",)
    loc = (*raw[:2], *raw[3:]) if raw[0] == "tasks" and len(raw) > 2 and raw[2] in _KINDS else raw
    key, value = ".".join(map(str, loc)), mistake.get("input")
    place = where(loc)
    if mistake["type"] == "extra_forbidden":
        return f"{place}: {key}: unknown key{did_you_mean(str(loc[-1]), _valid_keys(loc[:-1], data))}"
    if mistake["type"] == "missing":
        return f"{place}: {key}: missing"
    if mistake["type"].startswith("union_tag"):
        got = value.get("kind") if isinstance(value, dict) else value
        return f"{place}: {key}.kind: got {got!r}, expected the task's kind{did_you_mean(str(got), _KINDS)}"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "literal_error":
        return f"{place}: {key}: got {value!r}, {message[0].lower()}{message[1:]}" \
               f"{did_you_mean(str(value), _choices(message))}"
    return f"{place}: {key}: got {value!r}; {message[0].lower()}{message[1:]}" if not isinstance(value, dict) \
        else f"{place}: {key}: {message}"


def _choices(message: str) -> list[str]:
    return [part for part in message.split("'")[1::2]]


def _valid_keys(loc: tuple, data: dict) -> list[str]:
    model: Any = RunConfig
    for i, part in enumerate(loc):
        if i == 1 and loc[0] == "tasks":
            task = data["tasks"][part]
            model = _KINDS.get(task.get("kind", part), _TaskSection)
        elif i != 0 or part != "tasks":
            model = model.model_fields[part].annotation
    return list(model.model_fields)
