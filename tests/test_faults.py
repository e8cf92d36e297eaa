"""A short run of the script that kills trainings (README has a hundred rounds), and that it would tell of a loss."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests import faults
from tests.conftest import tiny_samples
from vl_mtl_lora import build_model, trainer, write_shards


def test_no_checkpoint_is_lost_when_processes_die_and_disks_fill(tmp_path):
    command = [sys.executable, faults.__file__, "--rounds", str(len(faults.FAULTS)), "--seed", "1", "--out",
               tmp_path / "counts.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert [counts[kind] for kind in faults.FAULTS] == [1] * len(faults.FAULTS)
    assert counts["checkpoints read"] >= len(faults.FAULTS)
    assert counts["lost"] == counts["unreadable"] == counts["hung"] == 0


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run's config, and the file of the steps that were reported as saved."""
    write_shards(tiny_samples(), tmp_path / "shards", name="mixed", samples_per_shard=20)
    config = faults.settings(tmp_path, "run", steps=12)
    monkeypatch.setattr(trainer, "build_model", lambda config: build_model(config).double())
    trainer.train(config)
    (tmp_path / "saved").write_text("3\n6\n9\n12\n")
    return config, tmp_path / "saved", tmp_path / "run"


def found(trained):
    counts = Counter()
    step = faults.checked(*trained[:2], counts)
    return step, counts["checkpoints read"], counts["unreadable"], counts["lost"]


def test_the_script_counts_what_is_lost_and_what_cannot_be_read(trained):
    run = trained[2]
    assert found(trained) == (12, 4, 0, 0)  # last, best, step-6 and step-9
    with open(run / "step-6" / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert found(trained) == (12, 3, 1, 1)  # one of two is no longer there
    shutil.rmtree(run / "last")
    (run / "step-9").rename(run / "last")
    assert found(trained)[0] == 9 and found(trained)[3] > 1


def test_a_run_killed_between_two_renames_is_found_where_its_checkpoint_was(trained):
    """Without resuming, as `evaluate` looks for it; resuming puts it back."""
    config, _, run = trained
    shutil.rmtree(run / "best")
    (run / "last").rename(run / "last.old")
    shutil.copytree(run / "step-9", run / "last.part")
    shutil.copytree(run / "step-9", run / "step-3.gone")
    assert faults.find_checkpoint(run) == faults.find_checkpoint(run / "last") == run / "last.old"
    faults.recover_checkpoint(run / "last")
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["last", "step-6", "step-9", "tensorboard"]
