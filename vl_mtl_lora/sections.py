"""What each section of a config may hold: names, types, defaults and limits."""

import string
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A section of a file, of which every key and value is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BackboneConfig(Strict):
    """The frozen model. `options` go to the library's loader: see the `load` function in backbones/<library>.py."""

    library: str = "open_clip"
    name: str = Field(min_length=1)
    pretrained: str | None = None  # tag or checkpoint file
    options: dict[str, Any] = {}


class AdapterSection(Strict):
    """Hyperparameters of the adapters; see `layer.MTLLoRALinear`, `variants` and `lora.AdapterConfig`."""

    method: Literal["mtl_lora", "multi_lora", "moe_lora", "dora", "full", "heads"] = "mtl_lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    num_up: int = Field(3, ge=1)
    temperature: float = Field(0.5, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    transform: Literal["full", "diagonal", "none", "own"] = "full"  # of mtl_lora
    targets: list[str] = Field(["*"], min_length=1)

    @model_validator(mode="after")
    def _transform_fits(self):
        if self.method != "mtl_lora" and "transform" in self.model_fields_set and self.transform != "full":
            raise ValueError(f"transform: {self.transform} belongs to method: mtl_lora, not to {self.method}")
        return self


class CommonTaskSection(Strict):
    """What every task has. Shards are paths, globs, brace ranges or URLs; relative paths are relative to the config."""

    tag: str | None = Field(None, min_length=1)  # of the task's samples in the shards; default: the task's name
    least_rows: ClassVar[int] = 1  # of every batch, whatever the mixing
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


    @model_validator(mode="after")
    def _format_fits(self):
        kinds = {"img2dataset": ("retrieval", "captioning"),
                 "clip_benchmark": ("retrieval", "captioning", "classification")}.get(self.format)
        if kinds and (self.kind not in kinds or self.images != 1):
            raise ValueError(f"format: {self.format} holds samples of {', '.join(kinds)}, with one image each")
        return self


class RetrievalSection(CommonTaskSection):
    kind: Literal["retrieval"] = "retrieval"
    images: ClassVar[int] = 1  # of each sample
    least_rows: ClassVar[int] = 2  # one has no negative
    rows: int = Field(32, ge=2)
    augment: bool | dict[str, Any] = True
    loss: Literal["softmax", "sigmoid"] | None = None  # CLIP's or SigLIP's; default: the base's
    scale: float | None = Field(None, gt=0, le=100)  # of similarities at start, then learned; default: the base's
    faiss_from: int | None = Field(None, ge=1)  # from so many items on evaluate recall alone, by faiss


class VQASection(CommonTaskSection):
    kind: Literal["vqa"] = "vqa"
    images: ClassVar[int] = 1  # of each sample
    answers: list[str] | str = []  # the closed answer list, if there is one, or a text file with one a line
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
        _check_template("zero_shot_prompt", self.zero_shot_prompt, "answer", optional=("question",))
        return self


def _check_template(name: str, template: str, *fields: str, optional: tuple[str, ...] = ()) -> None:
    used = {field + ":" * bool(form or conversion)  # {answer:9} and {answer!x} are no plain fields
            for _, field, form, conversion in string.Formatter().parse(template) if field is not None}
    if not set(fields) <= used <= {*fields, *optional}:
        may = "".join(f", may contain {{{field}}}," for field in optional)
        needed = " and ".join(f"{{{field}}}" for field in fields)
        raise ValueError(f"{name} must contain {needed}{may} and no other field")


class CaptioningSection(CommonTaskSection):
    kind: Literal["captioning"] = "captioning"
    images: ClassVar[int] = 1  # of each sample
    prompt: str | None = None  # default: the backbone's
    max_new_tokens: int = Field(20, ge=1)
    num_beams: int = Field(3, ge=1)


class ClassificationSection(CommonTaskSection):
    kind: Literal["classification"] = "classification"
    images: Literal[0, 1] = 1
    labels: list[str] | str = Field(min_length=1)  # the classes' names, or a text file with one a line
    templates: list[str] = Field(["a photo of a {label}."], min_length=1)
    negatives: int = Field(64, ge=2)  # classes that a sample is trained to choose among

    @model_validator(mode="after")
    def _templates_fit(self):
        for template in self.templates:
            _check_template("templates", template, "label")
        return self


class MultipleChoiceSection(CommonTaskSection):
    kind: Literal["multiple_choice"] = "multiple_choice"
    images: Literal[0, 1] = 1
    answer_by: Literal["ranking", "similarity"] | None = None  # default: see `tasks.multiple_choice`
    prompt: str | None = None  # default: the backbone's
    zero_shot_prompt: str = "{question} {answer}"
    metric: Literal["accuracy", "F1", "Matthews"] = "accuracy"  # that stands for the task

    @model_validator(mode="after")
    def _fits(self):
        if self.prompt is not None:
            _check_template("prompt", self.prompt, "question")
        _check_template("zero_shot_prompt", self.zero_shot_prompt, "answer", optional=("question",))
        return self


class MatchingSection(CommonTaskSection):
    kind: Literal["matching"] = "matching"
    images: Literal[0, 1, 2] = 1  # 0: text is held against text_pair
    metric: Literal["accuracy", "AUC", "Spearman"] = "accuracy"  # that stands for the task
    labels: list[str] | str = Field(min_length=1)  # from the least to the best match; or a text file with one a line


TASK_SECTIONS = {"retrieval": RetrievalSection, "vqa": VQASection, "captioning": CaptioningSection,
          "classification": ClassificationSection, "multiple_choice": MultipleChoiceSection,
          "matching": MatchingSection}
TaskSection = Annotated[RetrievalSection | VQASection | CaptioningSection | ClassificationSection
                        | MultipleChoiceSection | MatchingSection, Field(discriminator="kind")]


class MixingSection(Strict):
    """How many rows of a batch each task gets; see `data.mixing.expected_rows`."""

    by: Literal["quotas", "proportional", "temperature", "weights"] = "quotas"  # quotas: tasks.NAME.rows
    turns: bool = False  # the batches of a step are of one task; else each is of all
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


class DataSection(Strict):
    workers: int = Field(0, ge=0)  # loader processes; the order of samples does not depend on it
    mixing: MixingSection = MixingSection()
    shuffle: int = Field(100_000, ge=1)  # samples of each window in which a task's order is shuffled
    cache: str = "~/.cache/vl_mtl_lora"  # folder for copies of remote and of compressed shards
    allow_pipe: bool = False  # run the shell commands of "pipe:COMMAND" shards
    max_fault_share: float = Field(0.01, ge=0, le=1)  # of a task's samples; more broken ones end the run
    ignore_tasks: list[str] = []  # tags that may occur in the shards and are passed over
    eval_batch: int = Field(64, ge=1)  # rows


class TrainSection(Strict):
    steps: int = Field(1000, ge=1)  # optimizer steps
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)  # of A and B; Lambda, mix and heads take none
    warmup: int = Field(50, ge=0)  # steps of linear warm-up, then cosine to zero
    clip: float = Field(1.0, gt=0)  # largest gradient norm
    accumulate: int = Field(1, ge=1)  # batches per optimizer step
    precision: Literal["float32", "bf16"] = "float32"
    checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    seed: int = Field(0, ge=0, lt=2**32)
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(0, ge=0)  # steps between evaluations on the valid shards; 0: only at the end
    eval_samples: int = Field(500, ge=1)  # of each task
    save_every: int = Field(500, ge=1)  # steps between saves of the last checkpoint
    keep: int = Field(0, ge=0)  # earlier ones that stay, as step-N/
    shard: bool = False  # with several processes, spread the weights over them (FSDP2) instead of copying them (DDP)


class StartSection(Strict):
    """A trained adapter that the run starts from, in place of a fresh one; see `task_sets`."""

    run: str | None = None  # folder of a run or of a checkpoint
    train: list[str] = []  # tasks that are trained; default: those that it does not have, all if rehearse
    rehearse: bool = False  # train what the tasks share too; else only what each of them has of its own

    @model_validator(mode="after")
    def _has_a_run(self):
        if self.run is None and (self.train or self.rehearse):
            raise ValueError("train and rehearse belong to a run to start from: set start.run")
        return self


class RunConfig(Strict):
    """One experiment."""

    out: str  # the run's folder
    backbone: BackboneConfig
    adapter: AdapterSection = AdapterSection()
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], TaskSection] = Field(min_length=1)
    held_out: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], TaskSection] = {}  # never trained on; `compare`
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    start: StartSection = StartSection()

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, of all tasks."""
        return self.data.mixing.rows or sum(task.rows for task in self.tasks.values())

    @model_validator(mode="before")
    @classmethod
    def _kind_from_name(cls, data):
        for key in ("tasks", "held_out"):
            tasks = data.get(key) if isinstance(data, dict) else None
            if isinstance(tasks, dict):
                # A task called vqa is of kind vqa; one held out has test shards alone, which nobody trains on.
                tasks = {name: {**({"kind": name} if name in TASK_SECTIONS else {}),
                                **({"train": task.get("test") or "-"} if key == "held_out" else {}),
                                **task} if isinstance(task, dict) else task for name, task in tasks.items()}
                data = {**data, key: tasks}
        return data

    @model_validator(mode="after")
    def _held_out_is_tested(self):
        if untested := [name for name, task in self.held_out.items() if not task.test]:
            raise ValueError(f"held_out.{untested[0]}.test: missing; a held-out task is there to be tested")
        return self

    @model_validator(mode="after")
    def _weights_fit(self):
        weights, trained = self.data.mixing.weights, self.start.train or list(self.tasks)
        unknown_yet = self.start.run and not self.start.train  # what the run to start from has
        if weights and not unknown_yet and weights.keys() != set(trained):
            raise ValueError(f"data.mixing.weights names the tasks {', '.join(weights)}; expected each of "
                             f"{', '.join(trained)}")
        return self
