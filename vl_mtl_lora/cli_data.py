"""Commands that look into shards."""

from pathlib import Path
from typing import Annotated

import typer

from vl_mtl_lora.errors import UserError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Looks into shards.")
Shards = Annotated[list[str], typer.Argument(metavar="SHARDS...", help="paths, globs, brace ranges or URLs of shards")]
Format = Annotated[str, typer.Option(help="what is in them: tagged, img2dataset or clip_benchmark")]


@app.command("inspect")
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


@app.command("validate")
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
