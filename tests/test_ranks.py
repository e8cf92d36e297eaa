"""Several processes train as one would; and what becomes of a run when one of them dies or the disk is full."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_training import changed, losses_of, with_steps
from vl_mtl_lora import UserError, build_model, checkpoint, trainer
from vl_mtl_lora.checkpoint import load_checkpoint

RUN = Path(__file__).with_name("rank_run.py")
FOLDER = RUN.parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def start(config, *fault, processes=2, options=()):
    """Starts processes under torchrun that train a config; see `rank_run`."""
    file = Path(config.out).with_suffix(".json")
    file.write_text(json.dumps(config.model_dump()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               *options, RUN, file, *map(str, fault)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def of_two(config, name, **train):
    """The run of two processes, without what hangs on a batch's number: augmentation."""
    config = changed(config, tasks={"retrieval": {"augment": False}}, train=train)
    return config.model_copy(update={"out": str(Path(config.out).with_name(name))})


def doubled(config, name):
    """The run of one process that has the rows of both."""
    config = changed(config, tasks={task: {"rows": 2 * section.rows} for task, section in config.tasks.items()})
    return config.model_copy(update={"out": str(Path(config.out).with_name(name))})


def in_one_process(config, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_model", lambda config: build_model(config).double())
        return losses_of(config, **options)


def entries(config, *keys):
    with open(f"{config.out}/log.jsonl") as log:
        return [{key: value for key, value in entry.items() if key.startswith(keys)} for entry in map(json.loads, log)]


def assert_alike(config, other, rtol=1e-7):
    """Two runs have the same adapters, heads, Adam's moments, losses and metrics."""
    for name in ("adapter_model", "heads", "resume"):
        got, expected = (load_file(f"{run.out}/last/{name}.safetensors") for run in (config, other))
        for key in expected:
            if not key.startswith("random"):
                torch.testing.assert_close(got[key], expected[key], rtol=rtol, atol=1e-9, msg=key)
    keys = ("step", "loss", "epoch", "lr", "grad_norm", "valid")
    for got, expected in zip(entries(config, *keys), entries(other, *keys), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name,train", [
    ("copied", {}), ("spread", {"shard": True, "checkpointing": True, "accumulate": 2})])
def test_two_processes_learn_what_one_learns_with_their_rows(tiny_config, name, train):
    config = of_two(tiny_config(steps=10, eval_every=5), name, **train)
    if train:
        config = changed(config, tasks={"retrieval": {"loss": "sigmoid"}, "vqa": {"answer_by": "classification"}})
    done = start(config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""  # cli's own line is the command's
    alone = doubled(config, "alone")
    in_one_process(alone)
    assert_alike(config, alone)
    if not train:
        check_death(config)


def check_death(whole):
    """Of the run of two, one dies: the message, the checkpoints, and how it goes on with another number of them; and
    torchrun's second life, which ends as the run in which none died."""
    config = of_two(whole, "dies", save_every=2, keep=1)
    done = start(config, 7, 1, int(signal.SIGKILL))
    assert done.returncode != 0
    assert "process 0 of 2 has lost another one" in done.stderr and "go on with --resume" in done.stderr
    folder = Path(config.out)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["best", "last", "step-4", "tensorboard"]
    model = build_model(config).double()
    assert load_checkpoint(folder / "last", model)["step"] == 6 and load_checkpoint(folder / "step-4", model)
    assert in_one_process(config, resume=True).keys() == {7, 8, 9, 10}
    config = of_two(whole, "again", save_every=2)
    done = start(config, 7, 1, int(signal.SIGKILL), options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_alike(config, whole, rtol=1e-12)


def test_sigterm_to_one_of_two_stops_both_with_all_saved(tiny_config):
    config = of_two(tiny_config(steps=50, log_every=3), "stopped")
    done = start(config, 4, 1, int(signal.SIGTERM))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped at step 6" in done.stderr
    assert load_checkpoint(f"{config.out}/last", build_model(config).double())["step"] == 6


def test_sigterm_saves_and_exits_with_zero(tiny_config):
    config = tiny_config(steps=6)
    with pytest.raises(SystemExit) as stop:
        trainer.train(config, on_step=lambda step, _: step == 2 and signal.raise_signal(signal.SIGTERM))
    assert stop.value.code == 0
    assert losses_of(config, resume=True).keys() == {4, 5, 6}


def test_earlier_checkpoints_are_kept_and_can_be_loaded(tiny_config):
    config = tiny_config(steps=9, save_every=2, keep=2)
    losses_of(config)
    steps = {path.name: load_checkpoint(path, build_model(config))["step"] for path in Path(config.out).glob("step-*")}
    assert steps == {"step-6": 6, "step-8": 8}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "resume.safetensors"])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tiny_config, monkeypatch, name):
    config = tiny_config(steps=6, save_every=2)
    save_file = checkpoint.save_file

    def full(tensors, path):
        if path.name == name and (path.parents[1] / "last").exists():
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match="cannot write the checkpoint .*last: .*No space left.*go on with --resume"):
            losses_of(with_steps(config, eval_every=0))
    assert load_checkpoint(f"{config.out}/last", build_model(config))["step"] == 2
    assert losses_of(config, resume=True).keys() == {3, 4, 5, 6}


def test_processes_whose_launcher_is_gone_do_not_wait_for_it(tiny_config, monkeypatch):
    config = tiny_config()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"torchrun does not answer at 127.0.0.1:{port}.*stopped"):
            trainer.train(config)
    assert not Path(config.out).exists()
