"""Commands for trained adapters: what becomes of them after training."""

from pathlib import Path
from typing import Annotated

import typer

from vl_mtl_lora.arguments import Run
from vl_mtl_lora.errors import UserError


def add_to(app: typer.Typer) -> None:
    """Adds the commands of this file, under their functions' names."""
    for command in (export,):
        app.command()(command)


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
