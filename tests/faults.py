"""What prepare.py and train.py do when they are killed, run out of disk or get hostile rows: many tries, by chance.

    python tests/faults.py --seed=1 --count=60 --minutes=15

Kills prepare.py `count` times and train.py a third as often, the whole process group or one process of it, at moments
drawn over the length of a run and, by slowing them down, in the midst of moving the final files and of saving a
checkpoint. Fills the disk under it at moments drawn likewise (needs the right to mount a tmpfs, else a limit on
the size of files). Then a million rows made to break a tokenizer, against the oracle. After each try: nothing that stood
before is harmed, no file under its final name is partial, no new one stands beside an old one, and the next run
ends as if nothing had been. Prints what was tried, how often, and what was lost; exit status 1 if anything was.
"""
import argparse
import collections
import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import SAMPLE, SCRIPT, TRAIN, bins, nasty_rows, oracle, row_bytes

# makes the moments between two renames, and those of a checkpoint half written, long enough to be hit
SLOW = """
import os, runpy, sys, time
replace = os.replace
def slow(*names):
    time.sleep(0.3)
    replace(*names)
    time.sleep(0.3)
os.replace = slow
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Faults:
    def __init__(self, flags, folder):
        self.pick, self.end = random.Random(flags.seed), time.monotonic() + 60 * flags.minutes
        self.folder, self.tried, self.lost = folder, collections.Counter(), []
        self.environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                                         "MPLCONFIGDIR": str(folder / "mpl"), "PYTHONUNBUFFERED": "1"}

    def expect(self, holds, what):
        if not holds:
            self.lost.append(what)
            print(f"LOST: {what}", flush=True)

    def start(self, script, *flags, slow=False):
        command = [sys.executable, *(["-c", SLOW] if slow else []), str(script), *map(str, flags)]
        return subprocess.Popen(command, env=self.environment, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, process, seconds=60):
        """(output, errors) of `process`, which has to end by itself within `seconds`."""
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.expect(False, f"{process.args} hangs")
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()

    def run(self, script, *flags):
        began = time.monotonic()
        process = self.start(script, *flags)
        output, errors = self.finish(process, 300)
        self.expect(process.returncode == 0, f"{flags} ended with {process.returncode}: {errors[-500:]}")
        return time.monotonic() - began


def children(pid):
    """The processes that `pid` has started, and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                found += [child, *children(child)]
    return found


def stage_of(work):
    """How far a run of prepare.py had come, by what it left in its folder `work`."""
    if not work.exists():
        return "start or end"
    names = {path.name for path in work.iterdir()}
    return next((stage for name, stage in (("whole", "moving"), ("unfinished", "writing"), ("train.arrow", "splitting"))
                 if name in names), "tokenizing" if any(n.startswith(("tmp", "tokens")) for n in names) else "loading")


def kill_prepare(faults, count):
    """SIGKILL to all of prepare.py, or to one of its processes, at moments drawn over a run."""
    rows = {"old": nasty_rows(3000, seed=1), "new": nasty_rows(200_000, seed=2)}
    wanted = {name: oracle(texts, test_size=0.1) for name, texts in rows.items()}
    for name, texts in rows.items():
        pq.write_table(pa.table({"text": texts}), faults.folder / f"{name}.parquet")
    out = faults.folder / "out"
    flags = {name: (f"--source={faults.folder / name}.parquet", f"--out_dir={out}", "--num_proc=2", "--overwrite=True",
                    "--test_size=0.1") for name in rows}
    faults.run(SCRIPT, *flags["old"])
    length = faults.run(SCRIPT, *flags["new"])
    for i in range(count):
        if time.monotonic() > faults.end:
            break
        faults.run(SCRIPT, *flags["old"])
        shutil.rmtree(faults.folder / "hf", ignore_errors=True)  # so that loading takes its time too
        slow, one = i % 5 == 0, i % 3 == 0
        process = faults.start(SCRIPT, *flags["new"], slow=slow)
        if slow:
            until = faults.pick.uniform(0, 1.8)
            deadline = time.monotonic() + 60
            while not (out / ".prepare" / "whole").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(until)
        else:
            time.sleep(faults.pick.uniform(0.5, length))
        below = children(process.pid)
        stage = stage_of(out / ".prepare")
        if one and not slow and below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(faults.pick.choice(below), signal.SIGKILL)
            began = time.monotonic()
            _, errors = faults.finish(process, 30)
            if process.returncode:
                line = errors.replace("\r", "\n").strip().splitlines()[-1]
                faults.expect(line.startswith("prepare.py: ") and "Traceback" not in errors,
                              f"a worker killed while {stage}: {errors[-800:]}")
                faults.expect(time.monotonic() - began < 20, f"a worker killed while {stage}: took long to end")
                faults.expect(not (out / ".prepare").exists(), f"a worker killed while {stage}: .prepare is left")
            kind = "one process"
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kind = "all processes"
        faults.tried[f"prepare.py, SIGKILL to {kind} while {stage}"] += 1
        found = {name: (out / f"{name}.bin").read_bytes() for name in ("train", "val") if (out / f"{name}.bin").exists()}
        whole = [name for name in wanted if all(
            found[split] == wanted[name][split == "val"] for split in found)]
        faults.expect(whole, f"killed while {stage}: files are partial or of two runs")
        faults.expect(len(found) == 2 or stage == "moving", f"killed while {stage}: {sorted(found)} stand alone")
        faults.run(SCRIPT, *flags["new"])
        faults.expect(bins(out) == wanted["new"], f"killed while {stage}: the next run differs")
        faults.expect({path.name for path in out.iterdir()} == {"train.bin", "val.bin", "stats.json"},
                      f"killed while {stage}: {sorted(path.name for path in out.iterdir())} are left")
        shutil.rmtree(out)


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`; yields False where it can't be had."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def fill_disk(faults, count):
    """A disk that is too small from the start, or that something else fills up while prepare.py runs."""
    source = faults.folder / "new.parquet"
    wanted = oracle(nasty_rows(3000, seed=1), test_size=0.1)
    for i in range(count):
        if time.monotonic() > faults.end:
            break
        disk, cache = faults.folder / "disk", i % 4 == 3  # every fourth time it is the cache's disk
        size = faults.pick.choice([1 << 20, 3 << 20]) if i % 2 else 32 << 20
        with small_disk(disk, size) as mounted:
            if not mounted:
                faults.tried["a disk that fills up: not tried, for want of the right to mount"] += 1
                return
            out = faults.folder / "out" if cache else disk / "out"
            environment = dict(faults.environment)
            faults.run(SCRIPT, f"--source={faults.folder / 'old.parquet'}", f"--out_dir={out}", "--test_size=0.1") \
                if not cache else None
            if cache:
                faults.environment["HF_HOME"] = str(disk / "hf")
            else:
                shutil.rmtree(faults.folder / "hf", ignore_errors=True)
            process = faults.start(SCRIPT, f"--source={source}", f"--out_dir={out}", "--num_proc=2", "--overwrite=True",
                                   "--test_size=0.1")
            if i % 2 == 0:
                time.sleep(faults.pick.uniform(1, 3))
                stage = stage_of(out / ".prepare")
                with contextlib.suppress(OSError), open(disk / "ballast", "wb") as ballast:
                    while True:
                        ballast.write(bytes(1 << 16))
                        ballast.flush()
            else:
                stage = "start"
            _, errors = faults.finish(process)
            faults.environment = environment
            faults.tried[f"prepare.py, the disk of {'the cache' if cache else 'out_dir'} full at: {stage}"] += 1
            line = errors.replace("\r", "\n").strip().splitlines()[-1]
            if process.returncode:
                faults.expect(process.returncode == 1 and line.startswith("prepare.py: ") and "Traceback" not in errors,
                              f"disk full at {stage}: ended with {process.returncode}: {errors[-800:]}")
                faults.expect(cache or bins(out) == wanted, f"disk full at {stage}: what stood before is harmed")
            faults.expect(not (out / ".prepare").exists(), f"disk full at {stage}: .prepare is left")
            shutil.rmtree(out, ignore_errors=True)


def kill_train(faults, count):
    """SIGKILL to train.py at moments drawn over a run, and while a checkpoint is moved into place."""
    data = faults.folder / "letters"
    data.mkdir()
    ids = np.frombuffer(b"".join(map(row_bytes, SAMPLE.read_text(encoding="utf-8").splitlines())), "<u2") % 256
    for name in "train", "val":
        ids.astype("<u2").tofile(data / f"{name}.bin")
    flags = (f"--dataset={data}", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4",
             "--gradient_accumulation_steps=1", "--warmup_iters=2", "--eval_iters=1", "--eval_interval=2",
             "--log_interval=5", "--dropout=0.1", "--device=cpu", "--max_iters=12")
    length = faults.run(TRAIN, *flags, f"--out_dir={faults.folder / 'whole'}")
    wanted = torch.load(faults.folder / "whole" / "ckpt.pt", weights_only=True)["model"]
    for i in range(count):
        if time.monotonic() > faults.end:
            break
        out, resume = faults.folder / "train", []
        slow = i % 3 == 0
        process = faults.start(TRAIN, *flags, f"--out_dir={out}", slow=slow)
        if slow:
            deadline = time.monotonic() + 60
            while not (out / "ckpt.pt.new").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(faults.pick.uniform(0, 1.5))
        else:
            time.sleep(faults.pick.uniform(1.5, length))
        saving = (out / "ckpt.pt.new").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        faults.tried[f"train.py, SIGKILL {'while saving' if saving else 'otherwise'}"] += 1
        if (out / "ckpt.pt").exists():
            resume = ["--init_from=resume"]
            reached = torch.load(out / "ckpt.pt", weights_only=True)["iter_num"]
            if reached > 12:
                resume += ["--eval_only=True"]
        faults.run(TRAIN, *flags, f"--out_dir={out}", *resume)
        found = torch.load(out / "ckpt.pt", weights_only=True)["model"]
        faults.expect(all(torch.equal(found[name], wanted[name]) for name in wanted),
                      f"train.py resumed with {resume}: other weights")
        shutil.rmtree(out)


def fuzz(faults, count, seed):
    """`count` rows made to break a tokenizer, against the oracle, byte for byte."""
    rows = nasty_rows(count, seed)
    pq.write_table(pa.table({"text": rows}), faults.folder / "fuzz.parquet")
    faults.run(SCRIPT, f"--source={faults.folder / 'fuzz.parquet'}", f"--out_dir={faults.folder / 'fuzz'}",
               "--test_size=0.2", f"--seed={seed}")
    faults.expect(bins(faults.folder / "fuzz") == oracle(rows, test_size=0.2, seed=seed), "fuzz: bytes differ")
    faults.tried["rows against the oracle"] += count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--count", type=int, default=60, help="kills of prepare.py")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the fuzz run")
    parser.add_argument("--minutes", type=float, default=20, help="start no new try after that")
    flags = parser.parse_args()
    print(f"seed {flags.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(flags, pathlib.Path(folder))
        kill_prepare(faults, flags.count)
        fill_disk(faults, flags.count // 5)
        kill_train(faults, flags.count // 3)
        fuzz(faults, flags.rows, flags.seed)
    print(f"\n| tried (seed {flags.seed}) | times |\n| --- | ---: |")
    for what, times in sorted(faults.tried.items()):
        print(f"| {what} | {times:,} |")
    print(f"| lost | {len(faults.lost)} |")
    sys.exit(bool(faults.lost))


if __name__ == "__main__":
    main()
