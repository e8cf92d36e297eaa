"""README.md of a checkpoint: a page for people, under front matter that the hub reads."""

import glob
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import braceexpand
import yaml

from vl_mtl_lora.sections import RunConfig

_DOES = {"retrieval": "finds the texts of a picture, and the pictures of a text",
         "vqa": "answers a question about a picture", "captioning": "describes a picture",
         "classification": "names the class of a sample", "multiple_choice": "chooses among the answers given",
         "matching": "tells how well the parts of a sample match"}
_PIPELINE = {"vqa": "visual-question-answering", "captioning": "image-to-text",
             "classification": "zero-shot-image-classification"}  # the hub's names; it has none for the others
_SPLITS = ("train", "valid", "test")
_MOST_NAMED = 20  # answers or labels


def model_card(description: Mapping, results: Mapping, repo: str | None = None, licence: str | None = None) -> str:
    """The text of the card.

    Args:
        description: the content of adapter_config.json.
        results: {"tasks": {task: {metric: x}}} of one evaluation, or the results.json of `compare`.
        repo: USER/NAME on the hub. licence: of the adapters, by the hub's name for it, e.g. "mit".
    """
    config, adapter = description["config"], description["config"]["adapter"]
    base, towers = config["backbone"], description["trainable_parameters"]
    trained = f"trained for {description['step']:,} steps on {len(config['tasks'])} tasks at once"
    weights = f" ({_code(base['pretrained'])})" if base["pretrained"] else ""
    lines = ["---", yaml.safe_dump(front_matter(description, results, repo, licence), sort_keys=False,
                                   allow_unicode=True).rstrip(), "---", "",
             "# " + (repo.partition("/")[2] if repo else "MTL-LoRA adapters"), "",
             f"Adapters ([MTL-LoRA](https://arxiv.org/abs/2410.09437)) for {_code(base['name'])}{weights} from "
             f"{base['library']}, {description.get('origin') or trained}. "
             "The frozen base is not among the files; it is loaded from where it comes from.", "",
             f"Trainable parameters: {sum(towers.values()):,} "
             f"({', '.join(f'{tower} {count:,}' for tower, count in towers.items())}); "
             f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, {adapter['num_up']} up-projections, "
             f"temperature {adapter['temperature']:g}.", "",
             "## Tasks", "", "| task | kind | what it does |", "|---|---|---|"]
    lines += [f"| {name} | {task['kind'].replace('_', ' ')} | {_DOES[task['kind']]}{_closed(task)} |"
              for name, task in config["tasks"].items()]
    lines += [*_results(results), *_data(description.get("data", []))]
    lines += ["", "## Use", "", "```python", "from vl_mtl_lora import load_run",
              f'model, config = load_run("{f"hf://{repo}" if repo else "THIS_FOLDER"}")',
              f'with model.router.use("{next(iter(config["tasks"]))}"):  # or another task; router.off(): the base',
              "    ...", "```", "", "## Licence", "",
              (f"The adapters: {_cell(licence)}. " if licence else "No licence of the adapters is stated. ")
              + f"The licence of the base, {_code(base['name'])}, holds for the two together."]
    return "\n".join(lines) + "\n"


def front_matter(description: Mapping, results: Mapping, repo: str | None, licence: str | None) -> dict:
    """What the hub reads (https://huggingface.co/docs/hub/model-cards); a key with nothing to say is absent."""
    config = description["config"]
    kinds = list(dict.fromkeys(task["kind"] for task in config["tasks"].values()))
    pipelines = {_PIPELINE.get(kind) for kind in kinds}
    base = base_on_hub(config["backbone"]["name"])
    datasets = sorted({found for about in description.get("data", ())
                       for found in re.findall(r"huggingface\.co/datasets/([\w.-]+/[\w.-]*\w)", about["source"])})
    entries = {"library_name": "vl_mtl_lora", "license": licence, "base_model": base,
               "base_model_relation": "adapter" if base else None,
               "pipeline_tag": pipelines.pop() if len(pipelines) == 1 else None,
               "tags": ["mtl-lora", "lora", "multi-task", "vision-language",
                        *(kind.replace("_", "-") for kind in kinds)],
               "datasets": datasets,
               "model-index": _model_index(description, results, repo)}
    return {name: value for name, value in entries.items() if value}


def base_on_hub(name: str) -> str | None:
    """ORG/NAME, where a base is one of the hub and no local folder."""
    name = name.removeprefix("hf-hub:")
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) and not Path(name).exists() else None


def data_sources(config: RunConfig) -> list[dict[str, str]]:
    """What the manifests beside a run's local shards say: {"task", "split", "name", "source", "licence"} of each."""
    return [{"task": task, "split": split, **{key: str(manifest.get(key, "")) for key in ("name", "source", "licence")}}
            for task, section in config.tasks.items() for split in _SPLITS
            for manifest in _manifests(getattr(section, split))]


def _manifests(patterns: Sequence[str]) -> Iterator[dict]:
    """The manifests that name a shard of the patterns; none that cannot be read."""
    places: dict[str, list[str]] = {}  # folder -> patterns of names in it
    for pattern in patterns:
        if "://" not in pattern and not pattern.startswith("pipe:"):
            for path in map(Path, braceexpand.braceexpand(pattern)):
                places.setdefault(str(path.parent), []).append(path.name)
    for folder, names in places.items():
        for file in sorted(glob.glob(f"{folder}/*.manifest.json")):
            try:
                manifest = json.loads(Path(file).read_text("utf-8"))
                shards = [shard["file"] for shard in manifest["shards"]]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
            if any(fnmatch(shard, name) for shard in shards for name in names):
                yield manifest


def _figures(results: Mapping) -> Iterator[tuple[str, str, float | None, float, Sequence[float] | None]]:
    """(task, metric, zero-shot, adapted, 95 % interval of the change) of every metric; what is not known is None."""
    for task, values in results.get("tasks", {}).items():
        both = "adapted" in values
        for metric, value in (values["adapted"] if both else values).items():
            yield (task, metric, values["zero_shot"][metric] if both else None, value,
                   values.get("interval", {}).get("change", {}).get(metric) if both else None)


def _model_index(description: Mapping, results: Mapping, repo: str | None) -> list[dict]:
    tasks = description["config"]["tasks"]
    split = _split(results)
    found: dict[str, list[dict]] = {}
    for task, metric, _, value, _ in _figures(results):
        if math.isfinite(value):  # the hub takes no other
            found.setdefault(task, []).append({"type": metric, "name": metric.replace("_", " "),
                                               "value": round(float(value), 4)})
    entries = []
    for task, metrics in found.items():
        names = [about["name"] for about in description.get("data", ())
                 if (about["task"], about["split"]) == (task, split)]
        entries.append({"task": {"type": _PIPELINE.get(tasks[task]["kind"], tasks[task]["kind"].replace("_", "-"))},
                        "dataset": {"type": task, "name": ", ".join(names) or task, "split": split},
                        "metrics": metrics})
    return [{"name": repo or "MTL-LoRA adapters", "results": entries}] if entries else []


def _results(results: Mapping) -> list[str]:
    rows = list(_figures(results))
    if not rows:
        return []
    both = any(before is not None for _, _, before, _, _ in rows)
    head = "| task | metric | zero-shot | adapted | change, 95 % interval |\n|---|---|---:|---:|---|" if both else \
        "| task | metric | value |\n|---|---|---:|"
    lines = ["", "## Results", "", f"On the {_split(results)} split"
             + (f", at most {results['limit']:,} samples of each task" if results.get("limit") else "")
             + (". Zero-shot is the base alone." if both else "."), "", head]
    for task, metric, before, after, change in rows:
        cells = [task, metric.replace("_", " ")] + ([f"{before:.2f}"] if both else []) + [f"{after:.2f}"]
        if both:
            cells.append("{:+.2f} to {:+.2f}".format(*change) if change else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _data(sources: Sequence[Mapping[str, str]]) -> list[str]:
    if not sources:
        return ["", "## Data", "", "Where the data come from is not known: no manifest lay beside the shards."]
    lines = ["", "## Data", "", "| task | split | shards | source | licence |", "|---|---|---|---|---|"]
    return lines + [f"| {about['task']} | {about['split']} | {_cell(about['name'])} | "
                    f"{_cell(about['source']) or 'not stated'} | {_cell(about['licence']) or 'not stated'} |"
                    for about in sources]


def _split(results: Mapping) -> str:
    return results.get("split", "valid").removeprefix("the ").removesuffix(" split")  # the trainer says it in words


def _closed(task: Mapping) -> str:
    names = task.get("answers") or task.get("labels") or ()
    if not names:
        return ""
    return f", one of {len(names):,}" + (": " + ", ".join(map(_cell, names)) if len(names) <= _MOST_NAMED else "")


def _cell(text: str) -> str:
    """A text on one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"
