"""Kills a training of two processes again and again, and looks what has become of its checkpoints.

Usage: python tests/faults.py [--rounds 100] [--seed 0] [--out FILE.json]

Each round goes on with the run as it lies on the disk, and one thing happens to it at a random moment: a process, the
one that launched them, or all are killed, SIGTERM comes, the disk is full, or the power goes within a write. Then every
checkpoint there must load, whole, and none be older than the last that was said to be saved. A run that has come to its
end must be what it would have been without all that, and another begins. Most rounds fork from this process, which has
imported everything; every tenth is torchrun's own.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))

from tests.conftest import tiny_samples  # noqa: E402
from vl_mtl_lora import checkpoint, parse_config, trainer, write_shards  # noqa: E402
from vl_mtl_lora.checkpoint import load_checkpoint, recover_checkpoint  # noqa: E402
from vl_mtl_lora.checkpoint_files import find_checkpoint  # noqa: E402
from vl_mtl_lora.config import dump_config  # noqa: E402
from vl_mtl_lora.errors import UserError  # noqa: E402
from vl_mtl_lora.model import build_model  # noqa: E402

FAULTS = ("a process killed", "the launcher killed", "all killed", "SIGTERM", "killed within a write", "disk full")
STEPS, SAVE_EVERY = 60, 3
WRITES = 14  # about as many as a checkpoint takes
LONGEST = 60  # seconds that processes may take to end


def settings(folder, name, steps=STEPS):
    shards = str(folder / "shards" / "*.tar")
    tasks = {"retrieval": {"rows": 4}, "captioning": {"rows": 2, "max_new_tokens": 3}}
    return parse_config({
        "out": str(folder / name), "backbone": {"name": "micro-clip"},
        "adapter": {"rank": 2, "targets": ["text.0.*", "image.0.attn"]},
        "tasks": {task: {**section, "augment": False, "train": shards, "valid": shards}
                  for task, section in tasks.items()},
        "data": {"ignore_tasks": ["vqa"], "shuffle": 10, "eval_batch": 10},
        "train": {"steps": steps, "lr": 0.01, "log_every": 1, "save_every": SAVE_EVERY, "eval_every": 5, "keep": 2,
                  "eval_samples": 4}})


# -- in the processes -------------------------------------------------------------------------------------------------


def work(config, saved, write, kind):
    """One process's training. saved: gets a line for each checkpoint that is said to be saved. write: the number of
    the write at which `kind` happens."""
    torch.set_num_threads(1)
    trainer.build_model = lambda config: build_model(config).double()
    left = [write]
    for owner, name in ((checkpoint, "save_file"), (checkpoint, "_write"), (Path, "rename"), (shutil, "rmtree")):
        setattr(owner, name, failing(getattr(owner, name), left, kind))
    save = trainer.save_checkpoint

    def noted(folder, *args, step, **options):
        save(folder, *args, step=step, **options)
        if os.environ["RANK"] == "0" and Path(folder).name == "last":
            with open(saved, "a") as lines:
                lines.write(f"{step}\n")

    trainer.save_checkpoint = noted
    resume = any((Path(config.out) / name).exists() for name in ("last", "last.old"))
    try:
        trainer.train(config, resume=resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def failing(call, left, kind):
    """`call`, but the write whose number is up fails or is the process's last; a file is then half written."""
    def wrapped(*args, **options):
        if os.environ.get("RANK") == "0" and kind in ("killed within a write", "disk full"):
            left[0] -= 1
            if left[0] == 0:
                path = next((Path(a) for a in args[::-1] if isinstance(a, Path) and a.suffix), None)
                if call.__name__ in ("save_file", "_write") and path is not None:
                    call(*args, **options)
                    os.truncate(path, random.randrange(path.stat().st_size))
                if kind == "disk full":
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    wrapped.__name__ = call.__name__
    return wrapped


def launch(config, saved, write, kind):
    """As torchrun does, for two processes that are forked: when one fails, the others are stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            os.environ |= {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ended_with(lambda: work(config, saved, write, kind))
        ranks.append(pid)
    print(*ranks, flush=True)
    codes = {}
    while len(codes) < 2:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(ranks) - codes.keys():
                os.kill(other, signal.SIGTERM)
                stop_after(other, 15)
    sys.exit(max(map(abs, codes.values())))


def stop_after(pid, seconds):
    """SIGKILL for a process that SIGTERM does not end, as torchrun does."""
    if os.fork() == 0:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def ended_with(call):
    """The end of a forked process: its exit code is what `call` leaves."""
    code = 1
    try:
        call()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


# -- around them ------------------------------------------------------------------------------------------------------


def forked(config, saved, write, kind, errors):
    """Starts a launcher with its two processes, in a group of their own; returns the three process ids."""
    reading, writing = os.pipe()
    if (launcher := os.fork()) == 0:
        os.setsid()
        os.dup2(writing, 1)
        os.dup2(errors.fileno(), 2)
        ended_with(lambda: launch(config, saved, write, kind))
    os.close(writing)
    with os.fdopen(reading) as lines:
        ranks = [int(word) for word in lines.readline().split()]
    return launcher, ranks


def torchrun(config, saved, write, kind, errors):
    """The same by torchrun."""
    file = Path(config.out).with_suffix(".yaml")
    file.write_text(dump_config(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--work", file,
         saved, str(write), kind], stdout=errors, stderr=errors, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = []
    while len(ranks) < 2 and process.poll() is None:
        time.sleep(0.05)
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = [int(pid) for pid in found.read_text().split()] if found.exists() else []
    return process.pid, ranks


def happen(kind, launcher, ranks, draw):
    """What comes from outside."""
    victims = {"a process killed": [draw.choice(ranks)], "the launcher killed": [launcher], "SIGTERM": ranks,
               "all killed": [launcher, *ranks]}.get(kind, [])
    for pid in victims:
        with suppress(ProcessLookupError):  # it may have ended just now
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(launcher, ranks):
    """Waits for all to end; returns the launcher's exit code, or raises TimeoutError."""
    late, code = time.monotonic() + LONGEST, None
    while time.monotonic() < late:
        if code is None:
            pid, status = os.waitpid(launcher, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else None
        if code is not None and not any(map(alive, ranks)):
            return code
        time.sleep(0.02)
    for pid in (launcher, *ranks):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    raise TimeoutError(f"processes {[launcher, *ranks]} had not ended {LONGEST} s after")


def checked(config, saved, counts):
    """Every checkpoint of the run loads, as it lies there, and none that was reported is missing."""
    out = Path(config.out)
    reported = [int(line) for line in saved.read_text().split()] if saved.exists() else []
    model = build_model(config).double()
    if reported:
        load_checkpoint(find_checkpoint(out), model)  # as it lies there
    for name in ("last", "best"):
        recover_checkpoint(out / name)
    steps = {}
    for folder in out.glob("*"):
        if folder.name in ("last", "best") or folder.name.startswith("step-"):
            try:
                steps[folder.name] = load_checkpoint(folder, model)["step"]
                counts["checkpoints read"] += 1
            except UserError as error:
                counts["unreadable"] += 1
                print(f"UNREADABLE {folder}: {error}")
    if reported and steps.get("last", 0) < max(reported):
        counts["lost"] += 1
        print(f"LOST: {steps} after {max(reported)} was saved")
    kept = sorted(int(name[5:]) for name in steps if name.startswith("step-"))
    if len(set(reported)) > 3 and len(kept) < config.train.keep:
        counts["lost"] += 1
        print(f"LOST: kept are {kept}, reported {sorted(set(reported))}")
    return steps.get("last", 0)


def compared(config, straight, counts):
    """The end of a run with faults against one without."""
    from safetensors.torch import load_file

    for name in ("adapter_model", "heads"):
        got, expected = (load_file(f"{run.out}/last/{name}.safetensors") for run in (config, straight))
        for key in expected:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-9, atol=1e-12)
    counts["runs that ended as one without faults"] += 1


def rounds(folder, number, seed, real_every=10):
    """Returns counts: of each fault, of what was checked, and of what went wrong."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    counts = Counter(dict.fromkeys(("checkpoints read", "unreadable", "lost", "hung",
                                    "runs that ended as one without faults"), 0))
    write_shards(tiny_samples(), folder / "shards", name="mixed", samples_per_shard=20)
    straight = settings(folder, "straight")
    with open(folder / "errors.txt", "a") as errors:
        if ended(*forked(straight, folder / "straight.saved", 0, "", errors)):
            raise SystemExit(f"the run without faults failed: {(folder / 'errors.txt').read_text()[-3000:]}")
        config, saved, done, span = settings(folder, "run"), folder / "run.saved", 0, 3.0
        while done < number:
            kind = FAULTS[done % len(FAULTS)]
            real = real_every and done % real_every == real_every - 1
            began = time.monotonic()
            launcher, ranks = (torchrun if real else forked)(config, saved, draw.randint(1, 3 * WRITES), kind, errors)
            moment = time.monotonic() + draw.uniform(0, span + (6 if real else 0))
            if "write" not in kind and "disk" not in kind:
                while time.monotonic() < moment and any(map(alive, ranks)):
                    time.sleep(0.005)
            in_time = any(map(alive, ranks))
            happen(kind, launcher, ranks, draw)
            try:
                code = ended(launcher, ranks)
            except TimeoutError as error:
                counts["hung"] += 1
                print(f"HUNG after {kind}: {error}")
                code = 1
            step = checked(config, saved, counts)
            finished = step == STEPS
            if in_time and not (finished and code == 0):
                counts[kind] += 1
                counts["by torchrun"] += bool(real)
                done += 1
                print(f"{done:4} {kind}{' (torchrun)' if real else ''}: step {step}, exit code {code}, "
                      f"{time.monotonic() - began:.1f} s", flush=True)
            if finished:
                compared(config, straight, counts)
                shutil.rmtree(config.out)
                saved.unlink()
    return dict(counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)  # what torchrun starts
    arguments = parser.parse_args()
    if arguments.work:
        from vl_mtl_lora import load_config

        file, saved, write, kind = arguments.work
        work(load_config(file), saved, int(write), kind)
        return
    with tempfile.TemporaryDirectory() as folder:
        counts = rounds(Path(folder), arguments.rounds, arguments.seed)
    print("\n".join(f"{name:45} {count}" for name, count in counts.items()))
    if arguments.out:
        arguments.out.write_text(json.dumps(counts, indent=2) + "\n")
    sys.exit(bool(counts["unreadable"] or counts["lost"] or counts["hung"]))


if __name__ == "__main__":
    main()
