"""What prepare.py and train.py do when they are killed, run out of disk or get hostile rows: many tries, by chance.

    python tests/faults.py --seed=1 --count=75 --minutes=25

Kills prepare.py `count` times, its whole process group or one process, or stops it with Ctrl-C or SIGTERM, each stage in
turn, at a moment drawn within it; the moves at the end are slowed down, so as to be hit. Kills train.py a third as often,
half of these while it saves. Fills the disk under prepare.py a fifth as often (needs the right to mount a tmpfs). Then a
million rows made to break a tokenizer, and one of a hundred megabytes, against the oracle. After each try: nothing that
stood before is harmed, no file under its final name is partial, no new one stands beside an old one, no process is left,
and the next run ends as if nothing had been. Prints what was tried, how often, and what was lost; exit status 1 if
anything was.
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
from conftest import SAMPLE, SCRIPT, TRAIN, bins, gpt2, group_is_gone, nasty_rows, oracle, row_bytes, wait_for

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
        self.pick, self.end = random.Random(flags.seed), 0.0
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

    def tries(self, count):
        """Yield the numbers below `count`, as long as there is time."""
        for i in range(count):
            if time.monotonic() > self.end:
                print(f"{count - i} of {count} tries left out for want of time", flush=True)
                break
            yield i

    def run(self, script, *flags):
        began = time.monotonic()
        process = self.start(script, *flags)
        output, errors = self.finish(process, 300)
        self.expect(process.returncode == 0, f"{flags} ended with {process.returncode}: {errors[-500:]}")
        return time.monotonic() - began

    def last_line(self, errors, when):
        """The last line of `errors`, which has to be the one in which prepare.py says why it failed."""
        line = errors.replace("\r", "\n").strip().splitlines()[-1]
        self.expect(line.startswith("prepare.py: ") and "Traceback" not in errors, f"{when}: {errors[-800:]}")
        return line


def children(pid):
    """The processes that `pid` has started, and theirs."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, pathlib.Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
                found += [child, *children(child)]
    return found


def stage_of(work):
    """How far a run of prepare.py in two processes has come, by what is in its folder `work`."""
    with contextlib.suppress(OSError):
        names = [path.name for path in work.iterdir()]
        if "old" in names:
            return "moving"
        if "val.bin" in names:
            return "writing"
        return "tokenizing" if any(name.startswith(("tmp", "tokens")) for name in names) else "loading"
    return "start"


# a stage, what is sent within it, and to which processes: the first, one that it has started, or all
MOMENTS = [("start", "SIGKILL", "all"), ("loading", "SIGKILL", "one"), ("moving", "SIGKILL", "all"),
           ("tokenizing", "SIGINT", "all"), ("tokenizing", "SIGKILL", "all"), ("writing", "SIGKILL", "one"),
           ("loading", "SIGTERM", "all"), ("tokenizing", "SIGKILL", "one"), ("writing", "SIGKILL", "all"),
           ("tokenizing", "SIGKILL", "first"), ("loading", "SIGKILL", "all"), ("writing", "SIGINT", "all"),
           ("moving", "SIGKILL", "all"), ("tokenizing", "SIGTERM", "all"), ("tokenizing", "SIGKILL", "one")]


def seconds_of(process, work):
    """How many seconds the running `process` spends in each stage."""
    seconds, last = collections.Counter(), time.monotonic()
    while process.poll() is None:
        time.sleep(0.001)
        now = time.monotonic()
        seconds[stage_of(work)] += now - last
        last = now
    return seconds


def kill_prepare(faults, count):
    """A signal to all of prepare.py, or to one of its processes, in each stage in turn."""
    # by length, so that one worker is done long before the other
    rows = {"old": nasty_rows(3000, seed=1), "new": sorted(nasty_rows(200_000, seed=2), key=len)}
    wanted = {name: oracle(texts, test_size=0.1) for name, texts in rows.items()}
    for name, texts in rows.items():
        pq.write_table(pa.table({"text": texts}), faults.folder / f"{name}.parquet")
    out = faults.folder / "out"
    flags = {name: (f"--source={faults.folder / name}.parquet", f"--out_dir={out}", "--num_proc=2", "--overwrite=True",
                    "--test_size=0.1") for name in rows}
    faults.run(SCRIPT, *flags["old"])
    shutil.copytree(out, faults.folder / "standing")
    shutil.rmtree(faults.folder / "hf")
    seconds = seconds_of(faults.start(SCRIPT, *flags["new"]), out / ".prepare" / "work") | {"start": 1, "moving": 3.6}
    shutil.rmtree(out)
    for i in faults.tries(count):
        aim, name, whom = MOMENTS[i % len(MOMENTS)]
        shutil.copytree(faults.folder / "standing", out)
        shutil.rmtree(faults.folder / "hf", ignore_errors=True)  # so that loading takes its time too
        process = faults.start(SCRIPT, *flags["new"], slow=aim == "moving")
        wait_for(lambda: stage_of(out / ".prepare" / "work") == aim, process)
        time.sleep(faults.pick.uniform(0, seconds[aim]))
        below, stage, number = children(process.pid), stage_of(out / ".prepare" / "work"), getattr(signal, name)
        whom = "all" if not below else whom
        when = f"{name} to {whom} of its processes, {stage}"
        with contextlib.suppress(ProcessLookupError):
            if whom == "all":
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid if whom == "first" else faults.pick.choice(below), number)
        began = time.monotonic()
        _, errors = faults.finish(process, 30)
        if number != signal.SIGKILL:
            faults.expect(process.returncode in (0, 128 + number), f"{when}: ended with {process.returncode}")
            faults.expect("Traceback" not in errors and "prepare.py:" not in errors, f"{when}: {errors[-800:]}")
        elif whom == "one" and process.returncode:
            faults.last_line(errors, when)
        faults.expect(process.returncode == 0 or time.monotonic() - began < 20, f"{when}: took long to end")
        faults.expect(group_is_gone(process.pid), f"{when}: a process is left")
        if process.returncode != -signal.SIGKILL:
            faults.expect(not (out / ".prepare").exists(), f"{when}: .prepare is left")
        faults.tried[f"prepare.py, {when}"] += 1
        found = {split: (out / f"{split}.bin").read_bytes() for split in ("train", "val")
                 if (out / f"{split}.bin").exists()}
        whole = [name for name in wanted if all(found[split] == wanted[name][split == "val"] for split in found)]
        faults.expect(whole, f"{when}: files are partial or of two runs")
        faults.expect(len(found) == 2 or stage == "moving", f"{when}: {sorted(found)} stand alone")
        faults.run(SCRIPT, *flags["new"])
        faults.expect(bins(out) == wanted["new"], f"{when}: the next run differs")
        faults.expect({path.name for path in out.iterdir()} == {"train.bin", "val.bin", "stats.json"},
                      f"{when}: {sorted(path.name for path in out.iterdir())} are left")
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
    for i in faults.tries(count):
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
                stage = stage_of(out / ".prepare" / "work")
                with contextlib.suppress(OSError), open(disk / "ballast", "wb") as ballast:
                    while True:
                        ballast.write(bytes(1 << 16))
                        ballast.flush()
            else:
                stage = "start"
            _, errors = faults.finish(process)
            faults.environment = environment
            faults.tried[f"prepare.py, a full disk of {'the cache' if cache else 'out_dir'}, {stage}"] += 1
            if process.returncode:
                faults.last_line(errors, f"disk full at {stage}")
                faults.expect(process.returncode == 1, f"disk full at {stage}: ended with {process.returncode}")
                faults.expect(cache or bins(out) == wanted, f"disk full at {stage}: what stood before is harmed")
            faults.expect(not (out / ".prepare").exists(), f"disk full at {stage}: .prepare is left")
            shutil.rmtree(out, ignore_errors=True)


def kill_train(faults, count):
    """SIGKILL to train.py at moments drawn over a run, and while a checkpoint is moved into place."""
    data = faults.folder / "tokens"
    data.mkdir()
    rows = SAMPLE.read_text(encoding="utf-8").splitlines()
    for name in "train", "val":
        (data / f"{name}.bin").write_bytes(b"".join(map(row_bytes, rows)))
    flags = (f"--dataset={data}", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
             "--batch_size=2", "--gradient_accumulation_steps=1", "--warmup_iters=2",
             "--eval_iters=1", "--eval_interval=2", "--log_interval=5", "--dropout=0.1",
             "--optimizer=muon", "--device=cpu", "--max_iters=12")
    length = faults.run(TRAIN, *flags, f"--out_dir={faults.folder / 'whole'}")
    wanted = torch.load(faults.folder / "whole" / "ckpt.pt", weights_only=True)["model"]
    for i in faults.tries(count):
        out, resume = faults.folder / "train", []
        saving = i % 2 == 0
        process = faults.start(TRAIN, *flags, f"--out_dir={out}", slow=saving)
        if saving:
            wait_for((out / "ckpt.pt.new").exists, process)
            time.sleep(faults.pick.uniform(0, 0.3))
        else:
            time.sleep(faults.pick.uniform(1.5, length))
        saving = (out / "ckpt.pt.new").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        faults.tried[f"train.py, SIGKILL {'while it saves' if saving else 'otherwise'}"] += 1
        if (out / "ckpt.pt").exists():
            resume = ["--init_from=resume"]
        faults.run(TRAIN, *flags, f"--out_dir={out}", *resume)
        found = torch.load(out / "ckpt.pt", weights_only=True)["model"]
        faults.expect(all(torch.equal(found[name], wanted[name]) for name in wanted),
                      f"train.py resumed with {resume}: other weights")
        shutil.rmtree(out)


def fuzz(faults, count, seed):
    """`count` rows made to break a tokenizer, against the oracle, byte for byte; then one of 100 * count bytes."""
    long = "".join(nasty_rows(40_000, seed))
    long *= 100 * count // len(long.encode()) + 1
    ids = gpt2().encode_to_numpy(long, disallowed_special=()).astype("<u2")  # a list of them would take 2 GB
    for name, rows, options, wanted in (
            ("rows made to break a tokenizer", nasty_rows(count, seed), {"test_size": 0.2, "seed": seed}, None),
            (f"a row of {100 * count / 1e6:g} MB", ["first", long, "last"], {"test_size": 0.3, "shuffle": False},
             (row_bytes("first") + np.append(ids, np.uint16(50256)).tobytes(), row_bytes("last")))):
        pq.write_table(pa.table({"text": rows}), faults.folder / "fuzz.parquet")
        faults.run(SCRIPT, f"--source={faults.folder / 'fuzz.parquet'}", f"--out_dir={faults.folder / 'fuzz'}",
                   "--overwrite=True", *(f"--{key}={value}" for key, value in options.items()))
        faults.expect(bins(faults.folder / "fuzz") == (wanted or oracle(rows, **options)), f"{name}: bytes differ")
        faults.tried[f"{name}, against the oracle"] += count if not wanted else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--count", type=int, default=75, help="kills and stops of prepare.py")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the fuzz run")
    parser.add_argument("--minutes", type=float, default=25, help="that the tries may take, the rows at the end not counted")
    flags = parser.parse_args()
    print(f"seed {flags.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        faults, began = Faults(flags, pathlib.Path(folder)), time.monotonic()
        for share, attempt, count in (0.6, kill_prepare, flags.count), (0.7, fill_disk, flags.count // 5), \
                (0.95, kill_train, flags.count // 3):
            faults.end = began + 60 * flags.minutes * share
            if count:
                attempt(faults, count)
        fuzz(faults, flags.rows, flags.seed)
    print(f"\n| tried (seed {flags.seed}) | times |\n| --- | ---: |")
    for what, times in sorted(faults.tried.items()):
        print(f"| {what} | {times:,} |")
    print(f"| lost | {len(faults.lost)} |")
    sys.exit(bool(faults.lost))


if __name__ == "__main__":
    main()
