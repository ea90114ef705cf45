"""Inject faults into prepare.py and train.py, and check the files and the next run.

    python tests/tools/faults.py --seed=1 --count=75 --minutes=25

- Sends SIGKILL, SIGINT or SIGTERM to prepare.py --count times: to its process group or to one of
  its processes, at a random time in each stage in turn. The moves at the end are slowed down.
- Fills the disk of prepare.py, a fifth as often. This needs permission to mount a tmpfs.
- Kills train.py, a third as often, every other time while it saves a checkpoint.
- Compares the tokens of adversarial rows, and of one row of 100 MB, with the oracle.

After a signal, checks that no file is partial, old and new files are not mixed, no process is
still running, and the next run succeeds. After a full disk, checks that existing files are
unchanged. After a kill of train.py, checks that the resumed run ends with the same weights. Prints
the number of faults of each kind and of failed checks. The exit status is 1 if a check failed.
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

import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import (  # noqa: E402
    PREPARE, SENTENCES, TRAIN, adversarial_rows, bins, child_processes, finish, gpt2,
    group_has_ended, oracle, row_bytes, stage_of, start_script, wait_for)

# code for `before` that leaves time for a signal between two moves or while a checkpoint is saved
SLOW_MOVES = """
import os, time
replace = os.replace
def slow_replace(*names):
    time.sleep(0.3)
    replace(*names)
    time.sleep(0.3)
os.replace = slow_replace
"""
# stage, signal, target
SIGNALS = [
    ("start", "SIGKILL", "the process group"), ("loading", "SIGKILL", "a child process"),
    ("moving", "SIGKILL", "the process group"), ("tokenizing", "SIGINT", "the process group"),
    ("tokenizing", "SIGKILL", "the process group"), ("writing", "SIGKILL", "a child process"),
    ("loading", "SIGTERM", "the process group"), ("tokenizing", "SIGKILL", "a child process"),
    ("writing", "SIGKILL", "the process group"), ("tokenizing", "SIGKILL", "the main process"),
    ("loading", "SIGKILL", "the process group"), ("writing", "SIGINT", "the process group"),
    ("moving", "SIGKILL", "the process group"), ("tokenizing", "SIGTERM", "the process group"),
    ("tokenizing", "SIGKILL", "a child process")]


class Faults:
    """The state of this program: counts of the faults, messages of failed checks, the deadline."""

    def __init__(self, folder, seed):
        self.folder, self.rng, self.deadline = folder, random.Random(seed), 0.0
        self.counts, self.failures = collections.Counter(), []

    def check(self, condition, message):
        if not condition:
            self.failures.append(message)
            print(f"FAILED: {message}", flush=True)

    def attempts(self, count):
        """Yield the numbers below `count` until the deadline."""
        for i in range(count):
            if time.monotonic() > self.deadline:
                print(f"no time left: {count - i} of {count} attempts skipped", flush=True)
                break
            yield i

    def finish(self, process, seconds=60):
        """finish() of a process, which must end within `seconds`."""
        try:
            return finish(process, seconds)
        except subprocess.TimeoutExpired:
            self.check(False, f"{process.args} did not end within {seconds} s")
            os.killpg(process.pid, signal.SIGKILL)
            return finish(process)

    def run(self, script, *flags):
        """Run `script`, which must succeed. Returns the seconds that it took."""
        start = time.monotonic()
        ended = self.finish(start_script(script, *flags), 300)
        self.check(ended.returncode == 0,
                   f"{flags}: exit status {ended.returncode}: {ended.stderr[-500:]}")
        return time.monotonic() - start

    def check_error_line(self, errors, when):
        """Check that `errors`, the stderr of prepare.py, ends with its one-line error message."""
        line = errors.replace("\r", "\n").strip().splitlines()[-1]
        self.check(line.startswith("prepare.py: ") and "Traceback" not in errors,
                   f"{when}: {errors[-800:]}")


def descendants(pid):
    """The ids of the child processes of `pid`, and of their child processes."""
    return [found for child in child_processes(pid) for found in (child, *descendants(child))]


def measure_stages(process, work):
    """The seconds that prepare.py, the running `process`, spends in each stage."""
    seconds, last = collections.Counter(), time.monotonic()
    while process.poll() is None:
        time.sleep(0.001)
        now = time.monotonic()
        seconds[stage_of(work)] += now - last
        last = now
    finish(process)
    seconds["start"], seconds["moving"] = 0.3, 3.6  # six moves, each slowed down by 0.6 s
    return seconds


def signal_prepare(faults, count, n_rows):
    """Send a signal to prepare.py, in each stage in turn, while it replaces existing files."""
    rows = adversarial_rows(min(n_rows, 200_000), seed=2)
    # the first half is encoded faster, so that one of the two workers finishes before the other
    fast_rows = ["row " * 10] * (sum(map(len, rows)) // 40)
    corpora = {"old": adversarial_rows(3000, seed=1), "new": fast_rows + rows}
    expected = {name: oracle(rows, test_size=0.1) for name, rows in corpora.items()}
    out, existing = faults.folder / "out", faults.folder / "existing"
    work, flags = out / ".prepare" / "work", {}
    for name, rows in corpora.items():
        source = faults.folder / f"{name}.parquet"
        pq.write_table(pa.table({"text": rows}), source)
        flags[name] = (f"--source={source}", f"--out_dir={out}", "--num_proc=2",
                       "--overwrite=True", "--test_size=0.1")
    faults.run(PREPARE, *flags["old"])
    shutil.copytree(out, existing)
    seconds = measure_stages(start_script(PREPARE, *flags["new"]), work)
    for i in faults.attempts(count):
        aim, name, target = SIGNALS[i % len(SIGNALS)]
        shutil.rmtree(out)
        shutil.copytree(existing, out)
        process = start_script(PREPARE, *flags["new"],
                               before=SLOW_MOVES if aim == "moving" else "")
        wait_for(lambda: stage_of(work) == aim, process)
        time.sleep(faults.rng.uniform(0, seconds[aim]))
        stage, children, number = stage_of(work), descendants(process.pid), getattr(signal, name)
        if not children:
            target = "the process group"
        when = f"prepare.py, {stage}: {name} to {target}"
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if target == "the process group":
                os.killpg(process.pid, number)
            else:
                main = target == "the main process"
                os.kill(process.pid if main else faults.rng.choice(children), number)
        start = time.monotonic()
        ended = faults.finish(process, 30)
        faults.check(ended.returncode == 0 or time.monotonic() - start < 20,
                     f"{when}: took more than 20 s to end")
        if number != signal.SIGKILL:
            faults.check(ended.returncode in (0, 128 + number),
                         f"{when}: exit status {ended.returncode}")
            faults.check("Traceback" not in ended.stderr and "prepare.py:" not in ended.stderr,
                         f"{when}: {ended.stderr[-800:]}")
        elif target == "a child process" and ended.returncode:
            faults.check_error_line(ended.stderr, when)
        faults.check(group_has_ended(process.pid), f"{when}: a process is still running")
        if ended.returncode != -signal.SIGKILL:
            faults.check(not (out / ".prepare").exists(), f"{when}: .prepare was not removed")
        found = [path.read_bytes() if path.exists() else None
                 for path in (out / "train.bin", out / "val.bin")]
        faults.check(any(all(ours in (None, theirs) for ours, theirs in zip(found, files))
                         for files in expected.values()), f"{when}: partial or mixed files")
        faults.check(None not in found or stage == "moving", f"{when}: a file is missing")
        faults.run(PREPARE, *flags["new"])
        faults.check(bins(out) == expected["new"], f"{when}: the next run wrote other bytes")
        names = sorted(path.name for path in out.iterdir())
        faults.check(names == ["stats.json", "train.bin", "val.bin"], f"{when}: {names} in out_dir")
        faults.counts[when] += 1
    shutil.rmtree(out)


@contextlib.contextmanager
def small_disk(folder, size):
    """Mount a tmpfs of `size` bytes at `folder`. Yields False if that is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                             capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def fill_disk(faults, count):
    """Run prepare.py on a disk that is too small, or that this program fills during the run."""
    expected = oracle(adversarial_rows(3000, seed=1), test_size=0.1)
    disk = faults.folder / "disk"
    for i in faults.attempts(count):
        size = faults.rng.choice([4 << 20, 8 << 20]) if i % 2 else 32 << 20
        with small_disk(disk, size) as mounted:
            if not mounted:
                faults.counts["prepare.py, full disk: skipped, no permission to mount a tmpfs"] += 1
                return
            out = disk / "out"
            flags = f"--out_dir={out}", "--num_proc=2", "--overwrite=True", "--test_size=0.1"
            faults.run(PREPARE, f"--source={faults.folder / 'old.parquet'}", *flags)
            process = start_script(PREPARE, f"--source={faults.folder / 'new.parquet'}", *flags)
            stage = "start"
            if i % 2 == 0:
                time.sleep(faults.rng.uniform(1, 3))
                stage = stage_of(out / ".prepare" / "work")
                with contextlib.suppress(OSError), open(disk / "ballast", "wb", 0) as ballast:
                    while True:
                        ballast.write(bytes(1 << 16))
            ended = faults.finish(process)
            when = f"prepare.py, {stage}: full disk of out_dir"
            if ended.returncode:
                faults.check_error_line(ended.stderr, when)
                faults.check(ended.returncode == 1, f"{when}: exit status {ended.returncode}")
                faults.check(bins(out) == expected, f"{when}: existing files changed")
            faults.check(not (out / ".prepare").exists(), f"{when}: .prepare was not removed")
            shutil.rmtree(out, ignore_errors=True)
            faults.counts[when] += 1


def kill_train(faults, count):
    """Kill train.py at random times, or while it saves a checkpoint, in turn; then resume it."""
    data, out = faults.folder / "tokens", faults.folder / "train"
    data.mkdir()
    for name in "train", "val":
        (data / f"{name}.bin").write_bytes(b"".join(map(row_bytes, SENTENCES)))
    flags = [f"--dataset={data}", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
             "--batch_size=2", "--gradient_accumulation_steps=1", "--warmup_iters=2",
             "--eval_iters=1", "--eval_interval=2", "--log_interval=5", "--dropout=0.1",
             "--optimizer=muon", "--device=cpu", "--max_iters=12", f"--out_dir={out}"]

    def weights():
        return torch.load(out / "ckpt.pt", weights_only=True)["model"]

    seconds = faults.run(TRAIN, *flags)
    expected = weights()
    for i in faults.attempts(count):
        shutil.rmtree(out)
        if i % 2 == 0:
            process = start_script(TRAIN, *flags, before=SLOW_MOVES)
            wait_for(lambda: any(out.glob("ckpt.pt.new-*")), process)
            time.sleep(faults.rng.uniform(0, 0.3))
        else:
            process = start_script(TRAIN, *flags)
            time.sleep(faults.rng.uniform(0, seconds))
        saving = any(out.glob("ckpt.pt.new-*"))
        process.kill()
        finish(process)
        when = f"train.py, SIGKILL {'while it saves a checkpoint' if saving else 'at another time'}"
        resume = ["--init_from=resume"] * (out / "ckpt.pt").exists()
        faults.run(TRAIN, *flags, *resume)
        found = weights()
        faults.check(all(torch.equal(found[name], expected[name]) for name in expected),
                     f"{when}: other weights after {resume or 'a new start'}")
        faults.counts[when] += 1


def compare_adversarial_rows(faults, n_rows, seed):
    """Compare the tokens of `n_rows` adversarial rows, and of one row of 100 * n_rows bytes."""
    source, out = faults.folder / "rows.parquet", faults.folder / "rows"

    def compare(name, count, rows, expected, *flags):
        pq.write_table(pa.table({"text": rows}), source)
        faults.run(PREPARE, f"--source={source}", f"--out_dir={out}", "--overwrite=True", *flags)
        faults.check(bins(out) == expected, f"{name}: bytes differ")
        faults.counts[f"{name} compared with the oracle"] += count

    rows = adversarial_rows(n_rows, seed)
    compare("adversarial rows", n_rows, rows, oracle(rows, test_size=0.2, seed=seed),
            "--test_size=0.2", f"--seed={seed}")
    row = "".join(rows[:40_000])
    row *= 100 * n_rows // len(row.encode()) + 1
    # encode_ordinary would return a list of 2 GB
    ids = gpt2().encode_to_numpy(row, disallowed_special=()).astype("<u2")
    train = row_bytes("first") + ids.tobytes() + row_bytes("")
    compare(f"row of {100 * n_rows / 1e6:g} MB", 1, ["first", row, "last"],
            (train, row_bytes("last")), "--test_size=0.3", "--shuffle=False")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="random seed")
    parser.add_argument("--count", type=int, default=75, help="signals to prepare.py")
    parser.add_argument("--rows", type=int, default=1_000_000,
                        help="adversarial rows; the corpus for the signals has 200,000 at most")
    parser.add_argument("--minutes", type=float, default=25,
                        help="time limit, without the comparison with the oracle at the end")
    flags = parser.parse_args()
    print(f"seed {flags.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, start = pathlib.Path(name), time.monotonic()
        os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                       "MPLCONFIGDIR": str(folder / "matplotlib"), "PYTHONUNBUFFERED": "1"}
        faults = Faults(folder, flags.seed)
        for fraction, count, inject in (
                (0.6, flags.count, lambda count: signal_prepare(faults, count, flags.rows)),
                (0.7, flags.count // 5, lambda count: fill_disk(faults, count)),
                (0.95, flags.count // 3, lambda count: kill_train(faults, count))):
            faults.deadline = start + 60 * flags.minutes * fraction
            if count:
                inject(count)
        compare_adversarial_rows(faults, flags.rows, flags.seed)
    print(f"\n| fault (seed {flags.seed}) | count |\n| --- | ---: |")
    for fault, count in sorted(faults.counts.items()):
        print(f"| {fault} | {count:,} |")
    print(f"| failed checks | {len(faults.failures)} |")
    sys.exit(bool(faults.failures))


if __name__ == "__main__":
    main()
