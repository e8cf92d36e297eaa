"""A JSON-lines file of samples and the images it names -> shards. Start here with your own data.

Each line is one sample: "image" (a path, absolute or relative to the file), "task" (the tag), "image_id", and
    retrieval, captioning:  "captions": ["a dog", ...]
    vqa:                    "question": "...", "answers": ["..."], "question_id": ...

    python data_scripts/jsonl_to_shards.py samples.jsonl shards/ --name train
"""

import argparse
import sys

from tqdm import tqdm

from vl_mtl_lora.data.shards import read_jsonl, write_shards
from vl_mtl_lora.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", help="the JSON-lines file")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--name", default="shard", help="shards are called NAME-000000.tar and so on")
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    parser.add_argument("--source", default="", help="where the data comes from, for the manifest")
    parser.add_argument("--licence", default="", help="the data's licence, for the manifest")
    parser.add_argument("--max-side", type=int, help="scale larger pictures down to so many pixels")
    parser.add_argument("--skip-broken", action="store_true", help="leave out bad samples; the manifest names them")
    parser.add_argument("--resume", action="store_true", help="go on with a write of the same samples that broke off")
    args = parser.parse_args()
    try:
        manifest = write_shards(tqdm(read_jsonl(args.samples), unit="sample"), args.out, name=args.name,
                                samples_per_shard=args.samples_per_shard, source=args.source, licence=args.licence,
                                max_side=args.max_side, skip_broken=args.skip_broken, resume=args.resume)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command with --resume goes on")
    print(f"{manifest['samples']} samples in {len(manifest['shards'])} shards: {manifest['tasks']}")
    if manifest["skipped"]:
        print(f"{len(manifest['skipped'])} samples left out; {args.name}.manifest.json names them")


if __name__ == "__main__":
    main()
