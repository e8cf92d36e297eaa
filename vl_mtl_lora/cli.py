"""The command line: each command is a plain function; user errors are one line and exit code 2."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vl_mtl_lora import cli_data, cli_tasks
from vl_mtl_lora.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Adapts frozen vision-language models to many tasks at once with MTL-LoRA.")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_tasks.app, name="tasks")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="folder of a run or of a checkpoint, or hf://USER/NAME")]
Overrides = Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="config values to replace, e.g. "
                                                "train.steps=1000")]
Split = Annotated[str, typer.Option(help="which shards of the config: test or valid")]
Embeddings = Annotated[Path | None, typer.Option(help="folder where the embeddings of retrieval tasks are kept for "
                                                 "the next time")]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="run the shell commands that a run's config has as "
                                         "shards")]
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
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        print(f"checkpoints: {out}; next: vl-mtl-lora compare {out}")


@app.command()
def evaluate(target: Annotated[list[str], typer.Argument(metavar="RUN | CONFIG [KEY=VALUE]... | IMAGES TEXTS", help=(
                 "a run or checkpoint; a config, whose base alone is evaluated; or two files of embeddings"))],
             split: Split = "test", limit: Limit = None,
             zero_shot: Annotated[bool, typer.Option("--zero-shot", help="adapters off")] = False,
             embeddings: Embeddings = None,
             trec: Annotated[Path | None, typer.Option(help="folder for TREC runs of retrieval tasks")] = None,
             out: Annotated[Path | None, typer.Option(help="JSON file of the result")] = None,
             allow_pipe: AllowPipe = False,
             faiss_from: Annotated[int | None, typer.Option(help="of embeddings: from so many items on search by "
                                                            "faiss", min=1)] = None):
    """Prints the metrics of a run, of a base or merged model alone, or of two files of embeddings.

    Into a pipe or a file go lines of task, metric, value, both ends of the 95 % interval and n, with tabs between.
    """
    from vl_mtl_lora.evaluation import check_writable, evaluate_embeddings, evaluate_model, write_json
    from vl_mtl_lora.report import arm_lines, arm_table

    _check_split(split)
    if out:
        check_writable(out)
    if len(target) == 2 and all(Path(word).suffix in (".safetensors", ".npy") for word in target):
        results = evaluate_embeddings(*target, faiss_from=faiss_from)
    elif faiss_from:
        raise UserError("--faiss-from is for files of embeddings; a run has it in its config: tasks.NAME.faiss_from")
    else:
        results = evaluate_model(target[0], target[1:], split=split, limit=limit, zero_shot=zero_shot,
                                 embeddings=embeddings, trec=trec, allow_pipe=allow_pipe)
    print(arm_table(results) if sys.stdout.isatty() else arm_lines(results))
    for note in [note for values in results["tasks"].values() for note in values["notes"]]:
        print(note, file=sys.stderr)
    if out:
        write_json(results, out)
        print(f"result: {out}", file=sys.stderr)


@app.command()
def compare(runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="folders of runs or checkpoints, or "
                                                      "hf://USER/NAME")],
            split: Split = "test", limit: Limit = None, embeddings: Embeddings = None, allow_pipe: AllowPipe = False,
            out: Annotated[Path, typer.Option(help="of several runs, or of one on the hub: folder of the "
                                              "comparison")] = Path("comparison"),
            again: Annotated[bool, typer.Option("--again", help="of several runs: evaluate those too that have "
                                                "results.json")] = False):
    """Evaluates a run zero-shot and adapted, with a report; several runs also side by side."""
    from vl_mtl_lora.compare import compare as both
    from vl_mtl_lora.compare import known_results, report_folder
    from vl_mtl_lora.report import text_table
    from vl_mtl_lora.side_by_side import side_by_side
    from vl_mtl_lora.side_by_side import text_table as table_of_runs

    _check_split(split)
    if len(runs) == 1:
        print(text_table(both(runs[0], split, limit, embeddings=embeddings, out=out, allow_pipe=allow_pipe)))
        print(f"\nreport: {report_folder(runs[0], out) / 'report.html'}")
        return
    if len(set(map(Path, runs))) < len(runs):
        raise UserError("a run is named twice")
    results = {}
    for run in runs:
        known = None if again else known_results(run, split, limit, out)
        results[run] = known or both(run, split, limit, embeddings=embeddings, out=out, allow_pipe=allow_pipe)
    print(table_of_runs(side_by_side(results, out)))
    print(f"\nreport: {out / 'comparison.html'}")


@app.command()
def export(run: Run, task: Annotated[str, typer.Option(help="the task to export")],
           out: Annotated[Path | None, typer.Option(help=(
               "a new folder, else RUN/FORMAT-TASK, of a run on the hub ./FORMAT-TASK; of merged weights alone "
               "FILE.safetensors"))] = None,
           format: Annotated[str, typer.Option(help="merged, into the base, or peft, a plain LoRA")] = "merged"):
    """Writes one task as the model's own library saves models, the adapters folded in, or as a LoRA of PEFT."""
    from vl_mtl_lora.export import export as write
    from vl_mtl_lora.hub import hub_address

    out = out or Path("." if hub_address(run) else run) / f"{format}-{task}"
    told = write(run, task, out, format)
    print("\n".join([*told, f"{format}: {out}"]))


@app.command("import")
def import_(source: Annotated[Path, typer.Argument(metavar="FILE | FOLDER", help=(
                "a PEFT LoRA, adapters of the adapters library, or a checkpoint of the paper's code"))],
            config: Config, overrides: Overrides = None):
    """Makes adapters that others trained into a checkpoint, to evaluate, export or train on."""
    from vl_mtl_lora.config import load_config
    from vl_mtl_lora.importing import import_adapters

    run = load_config(config, overrides or [])
    print("\n".join(import_adapters(source, run)))
    print(f"checkpoint: {Path(run.out) / 'last'}; next: vl-mtl-lora evaluate {run.out}, or train CONFIG --resume")


@app.command()
def push(run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run or of a checkpoint")],
         repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="repository on the hub, made if needed")],
         private: Annotated[bool, typer.Option("--private", help="seen by nobody else")] = False,
         message: Annotated[str | None, typer.Option(help="of the commit")] = None,
         revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="else main")] = None,
         license: Annotated[str | None, typer.Option(help="of the adapters, by the hub's name for it: mit, cc-by-4.0")
                            ] = None):
    """Uploads a checkpoint with its model card, in one commit."""
    from vl_mtl_lora.push import push as upload

    url = upload(run, repo, private=private, message=message, revision=revision, licence=license)
    print(f"pushed: {url}")


@app.command()
def predict(run: Run,
            path: Annotated[Path, typer.Argument(metavar="IMAGE|FOLDER|FILE.jsonl", help=(
                "a picture, a folder of pictures, or a file with a request a line"))],
            task: Annotated[list[str], typer.Option(help="a task to ask, may be given several times; default: all that "
                                                    "a picture and the texts are enough for")] = [],  # noqa: B006
            text: Annotated[list[str], typer.Option(help="question, or text to look for; several times for several "
                                                    "texts or choices")] = [],  # noqa: B006
            zero_shot: Annotated[bool, typer.Option("--zero-shot", help="adapters off")] = False,
            both: Annotated[bool, typer.Option("--both", help="adapters off, and on")] = False,
            out: Annotated[Path | None, typer.Option(help="JSON-lines file of the answers")] = None):
    """Answers about pictures: a caption, a question's answer, the class, what fits best.

    Into a pipe or a file go JSON lines. Pictures that cannot be used are named and passed over; exit code 1 then.
    """
    from tqdm import tqdm

    from vl_mtl_lora.checkpoint import load_run
    from vl_mtl_lora.evaluation import check_writable
    from vl_mtl_lora.predict import ARMS
    from vl_mtl_lora.predict_files import as_json, as_text, predict_files, write_lines

    if zero_shot and both:
        raise UserError("--zero-shot and --both exclude each other")
    if not path.exists():
        raise UserError(f"there is no file or folder {path}: expected a picture, a folder of pictures, or a .jsonl "
                        "file of requests")
    if out:
        check_writable(out)
    model, config = load_run(run)
    skipped = set()

    def skip(image: str, problem: Exception) -> None:
        if image not in skipped:  # of several tasks
            tqdm.write(f"skipped {image}: {problem}", file=sys.stderr)
        skipped.add(image)
    records = predict_files(model, path, task, text, rows=config.data.eval_batch, skip=skip,
                            arms=ARMS if both else ("zero_shot",) if zero_shot else ("adapted",))
    if out:
        print(f"{write_lines(map(as_json, records), out)} answers: {out}")
    else:
        for line in map(as_text if sys.stdout.isatty() else as_json, records):
            tqdm.write(line)  # past the bar of progress
    if skipped:
        print(f"{len(skipped)} picture{'s' * (len(skipped) > 1)} could not be used", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def page(run: Run, port: Annotated[int, typer.Option(help="of this machine", min=1, max=65535)] = 7860):
    """Shows a page in the browser: a picture and texts in, the answers of all tasks out. Only this machine sees it."""
    from vl_mtl_lora.page import serve

    serve(run, port)


@app.command()
def inspect(config: Config, overrides: Overrides = None,
            plan: Annotated[bool, typer.Option(help="memory and time on 1, 8 and 64 GPUs instead")] = False,
            gpu: Annotated[str, typer.Option(help="with --plan: A100-80GB, H100-80GB or H200")] = "H100-80GB"):
    """Shows what a config adapts, and fails where an adapter would never learn. Needs no weights and no shards."""
    from vl_mtl_lora.config import load_config
    from vl_mtl_lora.inspection import inspect as run
    from vl_mtl_lora.planning import table

    loaded = load_config(config, overrides or [])
    for line in table(loaded, gpu) if plan else run(loaded):
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


@app.command()
def sweep(config: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML file of the sweep")],
          overrides: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="values of that file to "
                                                         "replace, e.g. jobs=4")] = None):
    """Holds methods against each other: tunes, trains and tests each with every seed. Run again, it goes on."""
    from vl_mtl_lora.sweep import sweep as run
    from vl_mtl_lora.sweep_plan import load_sweep
    from vl_mtl_lora.sweep_report import plotting, write_report

    plan = load_sweep(config, overrides or [])
    plotting()  # before the work, not after it
    print(write_report(plan, run(plan), plan.out))
    print(f"report: {Path(plan.out) / 'report.md'}, {Path(plan.out) / 'parameters.svg'}")


@app.command("bench-retrieval")
def bench_retrieval(images: Annotated[int, typer.Option(help="the most of them, each with five texts", min=8)] = 5000,
                    dim: Annotated[int, typer.Option(help="of the embeddings", min=1)] = 512,
                    out: Annotated[Path, typer.Option(help="file of the result")] = Path("bench-retrieval.json")):
    """Measures time and memory of the retrieval metrics, on random embeddings of growing number."""
    from vl_mtl_lora.bench_retrieval import retrieval_growth, table
    from vl_mtl_lora.evaluation import check_writable, write_json

    check_writable(out)
    results = list(retrieval_growth(images, dim=dim))
    write_json({"sizes": results}, out)
    print(f"{table(results)}\n\nresult: {out}")


def _check_split(split: str) -> None:
    if split not in ("test", "valid"):  # never a report on what was trained on
        raise UserError(f"--split: unknown split {split!r}", near=(split, ("test", "valid")))


def main() -> None:
    """Entry point of `vl-mtl-lora` and `python -m vl_mtl_lora`."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("vl_mtl_lora").setLevel(logging.INFO)
    try:
        app()
    except (UserError, OSError) as error:  # an OSError names its file
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
