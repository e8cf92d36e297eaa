"""What each process runs that test_ranks starts: a training in float64, in which one of them may come to grief.

Usage: rank_run.py CONFIG.json [STEP RANK SIGNAL], the last three of the first life alone.
"""

import json
import os
import signal
import sys

from vl_mtl_lora import cli, trainer
from vl_mtl_lora.config import parse_config
from vl_mtl_lora.model import build_model


def main() -> None:
    trainer.build_model = lambda config: build_model(config).double()
    with open(sys.argv[1]) as stream:
        config = parse_config(json.load(stream))
    fault = [int(word) for word in sys.argv[2:]] if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else []

    def on_step(step, losses):
        if fault and (step, int(os.environ.get("RANK", "0"))) == (fault[0], fault[1]):
            signal.raise_signal(fault[2])

    cli.app = lambda: trainer.train(config, on_step=on_step)
    cli.main()


if __name__ == "__main__":
    main()
