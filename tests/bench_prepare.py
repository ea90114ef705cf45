"""How long prepare.py takes, next to tiktoken alone on the same rows, and how much memory and disk.

    python tests/bench_prepare.py --rows=7400423           # rows made up from the sample
    python tests/bench_prepare.py --source=some.parquet    # a file, folder or glob of Parquet of your own

Runs `encode_ordinary`, a call a row, in as many processes as prepare.py gets, and then prepare.py with empty
caches; prints the time of each stage, the ratio of the two, the highest private memory of all processes together
(Linux only: the sum of Pss_Anon) and the disk taken, and holds the bytes against the oracle.
"""
import argparse
import glob
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import SAMPLE, SCRIPT, gpt2, row_bytes

STAGES = {"start": "", "load": "Generating", "split and tokenize": "Tokenizing", "write": "Writing"}


def make_corpus(path, rows):
    """Write `rows` rows to `path`, sentences of the sample with every eighth word one of a million made-up ones."""
    pick, syllables = random.Random(0), [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = ["".join(pick.choices(syllables, k=3 + i % 3)) for i in range(1_000_000)]
    sentences = [line.split() for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema) as file:
        for first in range(0, rows, 100_000):
            batch = [" ".join(names[int(len(names) * pick.random() ** 6)] if pick.random() < 1 / 8 else word
                              for word in pick.choice(sentences)) for _ in range(min(100_000, rows - first))]
            file.write_table(pa.table({"text": batch}, schema))


def row_groups(files):
    return [(file, group) for file in files for group in range(pq.ParquetFile(file).num_row_groups)]


def encode_alone(groups):
    """Seconds that encode_ordinary takes for the rows of `groups`, reading them not counted."""
    encode, seconds = gpt2().encode_ordinary, 0.0
    for file, group in groups:
        for batch in pq.ParquetFile(file).iter_batches(row_groups=[group], columns=["text"]):
            rows = batch["text"].to_pylist()
            started = time.perf_counter()
            for row in rows:
                encode(row)
            seconds += time.perf_counter() - started
    return seconds


def tiktoken_alone(files, num_proc):
    groups = row_groups(files)
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        shares = pool.map(encode_alone, [groups[i::num_proc] for i in range(num_proc)], chunksize=1)
    return sum(shares) / num_proc  # as if the rows were shared out evenly


def private_memory(pid):
    """Bytes of private memory of the process `pid` and its children, what forked ones share counted once."""
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += 1024 * int(re.search(r"Pss_Anon: *(\d+)", file.read())[1])
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                total += sum(map(private_memory, file.read().split()))
    except (OSError, TypeError):
        pass  # gone in the meantime
    return total


def disk(folder):
    """Bytes of disk that the files below `folder` take."""
    total = 0
    for path in pathlib.Path(folder).rglob("*"):
        try:
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
        except OSError:
            pass
    return total


def whole_job(flags, work):
    """Run prepare.py into work/out. Returns {stage: (seconds, peak bytes of private memory)} and its peak disk."""
    process = subprocess.Popen([sys.executable, SCRIPT, f"--out_dir={work / 'out'}", *flags], stderr=subprocess.PIPE,
                               env=os.environ | {"HF_HOME": str(work / "hf")})
    stages, peaks, peak_disk = ["start"], {}, 0
    starts = {"start": time.perf_counter()}

    def follow():
        seen = b""
        while piece := process.stderr.read1(4096):
            sys.stderr.buffer.write(piece)
            seen = seen[-100:] + piece
            for stage, sign in STAGES.items():
                if sign and sign.encode() in seen and stage not in starts:
                    starts[stage] = time.perf_counter()
                    stages.append(stage)

    reader = threading.Thread(target=follow)
    reader.start()
    while process.poll() is None:
        stage, began = stages[-1], time.perf_counter()
        peaks[stage] = max(peaks.get(stage, 0), private_memory(process.pid))
        peak_disk = max(peak_disk, disk(work / "out"))
        # looking takes the kernel long where gigabytes are mapped: no more than a thirtieth of a core for it
        time.sleep(max(0.1, 30 * (time.perf_counter() - began)))
    ends = [*list(starts.values())[1:], time.perf_counter()]
    reader.join()
    if process.returncode:
        sys.exit(f"prepare.py ended with {process.returncode}")
    return {stage: (end - starts[stage], peaks.get(stage, 0)) for stage, end in zip(stages, ends)}, peak_disk


def check(files, out, origin, limit):
    """Hold up to `limit` rows of each split against the oracle, and the number of rows of each against what it is."""
    n = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    n_val = math.ceil(origin["test_size"] * n)
    order = np.random.default_rng(origin["seed"]).permutation(n) if origin["shuffle"] else np.roll(np.arange(n), n_val)
    wanted = {}  # corpus row -> its bytes in the files
    for name, rows in ("val", order[:n_val]), ("train", order[n_val:]):
        ids = np.memmap(out / f"{name}.bin", "<u2", "r")
        places = np.sort(np.random.default_rng(1).choice(len(rows), min(limit, len(rows)), replace=False))
        row, start, step = 0, 0, 1 << 24  # the next row, where it starts, and ids to look through at a time
        for first in range(0, len(ids), step):
            ends = first + 1 + np.flatnonzero(ids[first:first + step] == 50256)
            edges = np.append(start, ends)
            for place in places[np.searchsorted(places, row):np.searchsorted(places, row + len(ends))]:
                wanted[int(rows[place])] = ids[edges[place - row]:edges[place - row + 1]].tobytes()
            row, start = row + len(ends), int(edges[-1])
        assert row == len(rows) and start == len(ids), f"{name}.bin has {row:,} rows, not {len(rows):,}"
    first = checked = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            picked = [i for i in range(first, first + len(batch)) if i in wanted]
            texts = batch["text"].take(pa.array([i - first for i in picked], pa.int64())).to_pylist()
            for i, text in zip(picked, texts):
                assert wanted[i] == row_bytes(text), f"row {i:,} differs: {text!r}"
            first, checked = first + len(batch), checked + len(picked)
    assert checked == len(wanted)
    return checked


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="Parquet file, folder or glob")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows to make up where there is no --source")
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--shuffle", default="True")
    parser.add_argument("--tmp", help="folder for temporary files: about twice the text and 2.5 times the two bins")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.tmp) as folder:
        work = pathlib.Path(folder)
        if not flags.source:
            make_corpus(work / "corpus.parquet", flags.rows)
        source = flags.source or str(work / "corpus.parquet")
        files = sorted(glob.glob(os.path.join(source, "*.parquet")) if os.path.isdir(source) else glob.glob(source))
        alone = tiktoken_alone(files, flags.num_proc)
        arguments = [f"--source={source}", f"--num_proc={flags.num_proc}", f"--shuffle={flags.shuffle}"]
        stages, peak_disk = whole_job(arguments, work)
        stats = json.loads((work / "out" / "stats.json").read_text())
        seconds = sum(stage[0] for stage in stages.values())
        size = stats["train"]["bytes"] + stats["val"]["bytes"]
        rows = stats["train"]["rows"] + stats["val"]["rows"]
        print(f"\n{rows:,} rows, {flags.num_proc} processes\n")
        print("| stage | seconds | peak private memory, GB |\n| --- | --- | --- |")
        for stage, (time_taken, peak) in stages.items():
            print(f"| {stage} | {time_taken:.1f} | {peak / 1e9:.2f} |")
        print(f"| whole job | {seconds:.1f} | {max(peak for _, peak in stages.values()) / 1e9:.2f} |")
        print(f"| tiktoken alone | {alone:.1f} | |\n")
        print(f"ratio {seconds / alone:.2f}; disk {peak_disk / size:.2f} times the two files at the peak,"
              f" {disk(work / 'out') / size:.2f} after; {disk(work / 'hf') / 1e9:.2f} GB in the cache of datasets")
        checked = check(files, work / "out", stats["origin"], rows if rows <= 10_000_000 else 500_000)
        print(f"{checked:,} rows equal the oracle's, byte for byte")


if __name__ == "__main__":
    main()
