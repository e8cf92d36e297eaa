"""easy-VQA (the PyPI package easy-vqa, MIT licence) -> shards for VQA and captioning.

Writes easy-vqa-{vqa,captioning}-{train,valid,test}-*.tar with a manifest each. "valid" holds out the last 200 training
pictures; "test" is the official test split. Captions are derived from the questions and answers.

    python data_scripts/easy_vqa_to_shards.py shards/
"""

import argparse
import sys

from vl_mtl_lora.data.examples import write_easy_vqa
from vl_mtl_lora.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--samples-per-shard", type=int, default=2000)
    args = parser.parse_args()
    try:
        write_easy_vqa(args.out, samples_per_shard=args.samples_per_shard)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
