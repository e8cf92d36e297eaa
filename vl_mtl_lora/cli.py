"""The command line: each command is a plain function; user errors are one line and exit code 2."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from vl_mtl_lora.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Adapts frozen vision-language models to many tasks at once with MTL-LoRA.")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run or of a checkpoint")]
Overrides = Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="config values to replace, e.g. "
                                                "train.steps=1000")]
Split = Annotated[str, typer.Option(help="which shards of the config: test or valid")]
Limit = Annotated[int | None, typer.Option(help="the most samples of each task", min=1)]


@app.command()
def quickstart(overrides: Overrides = None,
               out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/quickstart"),
               long: Annotated[bool, typer.Option("--long", help="the longer training, under half an hour")] = False,
               kinds: Annotated[bool, typer.Option("--kinds", help="instead classification, multiple choice and "
                                                   "matching")] = False):
    """Runs the whole job on embedded and packaged data: shards, training, zero-shot against adapted."""
    from vl_mtl_lora.quickstart import quickstart as run
    from vl_mtl_lora.report import text_table

    if long and kinds:
        raise UserError("--long and --kinds exclude each other; for longer training set train.steps=N")
    results = run(out, "long" if long else "kinds" if kinds else "short", overrides or [])
    print(text_table(results))
    print(f"\n{sum(results['seconds'].values()):.0f} seconds: "
          + ", ".join(f"{stage} {value:.0f}" for stage, value in results["seconds"].items()))
    print(f"report: {out / 'report.html'}")


@app.command()
def train(config: Config, overrides: Overrides = None,
          resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False):
    """Trains adapters for the tasks of a config."""
    from vl_mtl_lora.config import load_config
    from vl_mtl_lora.trainer import train as run

    out = run(load_config(config, overrides or []), resume=resume)
    print(f"checkpoints: {out}; next: vl-mtl-lora compare {out}")


@app.command()
def evaluate(run: Run, split: Split = "test", limit: Limit = None,
             zero_shot: Annotated[bool, typer.Option("--zero-shot", help="adapters off")] = False):
    """Prints the metrics of a run, with adapters on or off."""
    from vl_mtl_lora.checkpoint import load_run
    from vl_mtl_lora.data.faults import FaultLog
    from vl_mtl_lora.evaluate import evaluate_tasks, evaluation_indices

    _check_split(split)
    model, config = load_run(run)
    faults = FaultLog(config.data.max_fault_share)
    metrics_of = evaluate_tasks(model, evaluation_indices(config, split, faults), zero_shot=zero_shot, limit=limit,
                                rows=config.data.eval_batch, faults=faults)
    for task, metrics in metrics_of.items():
        for name, value in metrics.items():
            print(f"{task}\t{name}\t{value:.2f}")


@app.command()
def compare(run: Run, split: Split = "test", limit: Limit = None):
    """Evaluates a run zero-shot and adapted; writes results.json, report.md and report.html."""
    from vl_mtl_lora.checkpoint import find_checkpoint
    from vl_mtl_lora.compare import compare as both
    from vl_mtl_lora.report import text_table

    _check_split(split)
    print(text_table(both(run, split, limit)))
    print(f"\nreport: {find_checkpoint(run).parent / 'report.html'}")


@app.command()
def export(run: Run, task: Annotated[str, typer.Option(help="the task to fold into the base")],
           out: Annotated[Path | None, typer.Option(help="file, else RUN/merged-TASK.safetensors")] = None,
           format: Annotated[str, typer.Option(help="merged")] = "merged"):
    """Writes the base with one task's adapters folded in, under the library's own names."""
    from vl_mtl_lora.export import export_merged

    if format != "merged":
        raise UserError(f"--format {format} is not possible; weights are written merged")
    out = out or run / f"merged-{task}.safetensors"
    export_merged(run, task, out)
    print(f"merged weights: {out}")


@app.command()
def inspect(config: Config, overrides: Overrides = None):
    """Shows what a config adapts, and fails where an adapter would never learn. Needs no weights and no shards."""
    from vl_mtl_lora.config import load_config
    from vl_mtl_lora.inspection import inspect as run

    for line in run(load_config(config, overrides or [])):
        print(line, flush=True)


@app.command()
def bench(config: Config, overrides: Overrides = None,
          rounds: Annotated[int, typer.Option(help="measurements of each arm", min=1)] = 7,
          growth: Annotated[bool, typer.Option(help="also other numbers of tasks, ranks, up-projections")] = True,
          out: Annotated[Path, typer.Option(help="file of the result")] = Path("bench.json")):
    """Measures what adapters cost here, against the frozen model and PEFT. Needs no weights and no shards."""
    from vl_mtl_lora.bench import bench as run
    from vl_mtl_lora.bench import table, write
    from vl_mtl_lora.config import load_config

    result = run(load_config(config, overrides or []), rounds, growth)
    write(result, out)
    print(f"{table(result)}\n\nresult: {out}")


data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Looks into shards.")
app.add_typer(data, name="data")

Shards = Annotated[list[str], typer.Argument(metavar="SHARDS...", help="paths, globs, brace ranges or URLs of shards")]
Format = Annotated[str, typer.Option(help="what is in them: tagged, img2dataset or clip_benchmark")]


@data.command("inspect")
def inspect_data(shards: Shards, format: Format = "tagged",
                 samples: Annotated[int, typer.Option(help="shown of each task", min=1)] = 15,
                 out: Annotated[Path, typer.Option(help="file of the contact sheet")] = Path("contact_sheet.png")):
    """Prints tasks, counts and statistics of the fields; draws a contact sheet of samples with their texts."""
    from vl_mtl_lora.data.contact_sheet import contact_sheet
    from vl_mtl_lora.data.survey import read_sample, survey

    if out.suffix.lower() != ".png" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: expected a .png file in a folder that exists")
    tasks, faults = survey(_shard_files(shards, format), format)
    for tag, found in tasks.items():
        print("\n  ".join([f"{tag}: {next(lines := found.lines())}", *lines]))
    for fault in faults[:20]:
        print(f"fault: {fault}")
    if faults:
        print(f"{len(faults):,} faults; `data validate` lists all, those of pictures too")
    if not tasks:
        raise UserError("there is no good sample in these shards")
    shown = [found.shown[i * len(found.shown) // count] for found in tasks.values()
             for count in [min(samples, len(found.shown))] for i in range(count)]
    contact_sheet([read_sample(shard, entry) for shard, entry in shown]).save(out)
    print(f"contact sheet: {out}")


@data.command("validate")
def validate_data(shards: Shards, format: Format = "tagged",
                  processes: Annotated[int, typer.Option(help="how many read at once", min=1)] = 1):
    """Reads everything, pictures and checksums too, and lists every fault; exit code 1 where there is one."""
    from vl_mtl_lora.data.survey import validate

    counts, faults = validate(_shard_files(shards, format), format, processes, tell=lambda fault: print(fault))
    listed = ", ".join(f"{tag} {count:,}" for tag, count in sorted(counts.items()))
    print(f"{counts.total():,} good samples ({listed or 'none'}), {len(faults):,} faults")
    if faults:
        raise typer.Exit(1)


def _shard_files(patterns: list[str], format: str) -> tuple[str, ...]:
    from vl_mtl_lora.data.files import shard_files
    from vl_mtl_lora.sections import DataSection

    formats = ("tagged", "img2dataset", "clip_benchmark")
    if format not in formats:
        raise UserError(f"--format: unknown format {format!r}", near=(format, formats))
    return shard_files(patterns, DataSection().cache)


def _check_split(split: str) -> None:
    if split not in ("test", "valid"):  # never a report on what was trained on
        raise UserError(f"--split: unknown split {split!r}", near=(split, ("test", "valid")))


def main() -> None:
    """Entry point of `vl-mtl-lora` and `python -m vl_mtl_lora`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("vl_mtl_lora").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
