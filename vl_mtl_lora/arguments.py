"""What the arguments of several commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run or of a checkpoint")]
Overrides = Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]...", help="config values to replace, e.g. "
                                                "train.steps=1000")]
Split = Annotated[str, typer.Option(help="which shards of the config: test or valid")]
Embeddings = Annotated[Path | None, typer.Option(help="folder where the embeddings of retrieval tasks are kept for "
                                                 "the next time")]
Limit = Annotated[int | None, typer.Option(help="the most samples of each task", min=1)]
