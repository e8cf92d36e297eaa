"""Commands on the set of tasks of a trained adapter."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vl_mtl_lora.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Changes the tasks of a trained adapter.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run or of a checkpoint")]
Task = Annotated[str, typer.Argument(metavar="TASK", help="one of its tasks")]
Out = Annotated[Path, typer.Option(help="folder of the new run, not there yet")]


@app.command("list")
def list_tasks(run: Run):
    """Prints the tasks of a checkpoint: id, name, kind, and how many numbers each has of its own."""
    from vl_mtl_lora.task_sets import describe

    for line in describe(run):
        print("\t".join(map(str, line)))


@app.command("add")
def add_task(run: Run, config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the new run")],
             overrides: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="config values to replace")]
             = None,
             rehearse: Annotated[bool, typer.Option("--rehearse", help="train all tasks, and what they share")] = False,
             resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint")] = False):
    """Trains the new tasks of a config on a trained adapter; the old tasks stay as they are, bit for bit."""
    from vl_mtl_lora.config import load_config
    from vl_mtl_lora.trainer import train

    start = [f"start.run={json.dumps(str(run.absolute()))}", f"start.rehearse={str(rehearse).lower()}"]
    out = train(load_config(config, [*start, *(overrides or [])]), resume=resume)
    print(f"checkpoints: {out}; next: vl-mtl-lora compare {out}")


@app.command("remove")
def remove(run: Run, task: Task, out: Out):
    """Writes a run without one of the tasks."""
    from vl_mtl_lora.task_sets import remove_task

    remove_task(run, task, out)
    print(f"run: {out}")


@app.command("rename")
def rename(run: Run, task: Task, name: Annotated[str, typer.Argument(metavar="NAME", help="its new name")], out: Out):
    """Writes a run where one of the tasks has another name; its samples keep their tag."""
    from vl_mtl_lora.task_sets import rename_task

    rename_task(run, task, name, out)
    print(f"run: {out}")


@app.command("merge")
def merge(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="runs added to one adapter")], out: Out):
    """Writes a run with the tasks of several that share all but what each task has of its own."""
    from vl_mtl_lora.task_sets import merge_tasks

    if len(runs) < 2:
        raise UserError("merge takes at least two runs")
    merge_tasks(runs, out)
    print(f"run: {out}")
