"""Compare the time of prepare.py with that of tiktoken alone, and measure its memory and disk use.

    python tests/tools/bench_prepare.py --rows=7400423           # a corpus made from the sample
    python tests/tools/bench_prepare.py --source=some.parquet    # a Parquet file, folder or glob

First calls tiktoken's `encode_ordinary` for each row, in --num_proc processes. Then runs
prepare.py with empty caches and compares the bytes with the oracle. Prints the time and the peak
memory of each stage (anonymous memory of all processes together, Linux only) and the disk space.
Other flags are passed to prepare.py. With --drop_repeated or --document_column, the bytes are not
compared.
"""
import argparse
import contextlib
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, SENTENCES, child_processes, gpt2, row_bytes  # noqa: E402

# stage: the text of its progress bar
STAGES = {"load": b"Reading", "split and tokenize": b"Tokenizing", "write": b"Writing"}


def make_corpus(path, n):
    """Write `n` rows: sentences of the sample, one word in eight replaced by an invented one."""
    rng, syllables = random.Random(0), [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    names = ["".join(rng.choices(syllables, k=3 + i % 3)) for i in range(min(n, 1_000_000))]
    sentences = [sentence.split() for sentence in SENTENCES]

    def make_row():
        return " ".join(names[int(len(names) * rng.random() ** 6)] if rng.random() < 1 / 8 else word
                        for word in rng.choice(sentences))

    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema) as file:
        for first in range(0, n, 100_000):
            rows = [make_row() for _ in range(min(100_000, n - first))]
            file.write_table(pa.table({"text": rows}, schema))


def encode(row_groups):
    """Seconds that encode_ordinary takes for the rows of `row_groups`, without reading them."""
    encode_ordinary, seconds = gpt2().encode_ordinary, 0.0
    for file, group in row_groups:
        for batch in pq.ParquetFile(file).iter_batches(row_groups=[group], columns=["text"]):
            rows = batch["text"].to_pylist()
            start = time.perf_counter()
            for row in rows:
                encode_ordinary(row)
            seconds += time.perf_counter() - start
    return seconds


def time_tiktoken(files, num_proc):
    """Seconds that tiktoken takes for `files` with its work divided evenly among `num_proc`."""
    row_groups = [(file, group) for file in files
                  for group in range(pq.ParquetFile(file).num_row_groups)]
    with multiprocessing.get_context("spawn").Pool(num_proc) as pool:
        return sum(pool.map(encode, [row_groups[i::num_proc] for i in range(num_proc)],
                            chunksize=1)) / num_proc


def private_memory(pid):
    """Bytes of anonymous memory of `pid` and its descendants; pages that they share count once."""
    with contextlib.suppress(OSError, TypeError):  # the process has ended
        text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = 1024 * int(re.search(r"Pss_Anon: *(\d+)", text)[1])
        return own + sum(map(private_memory, child_processes(pid)))
    return 0


def disk_space(folder):
    """Bytes of disk space that the files in `folder` use."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the file was removed
            total += path.lstat().st_blocks * 512 if path.is_file() else 0
    return total


def run_prepare(flags, work):
    """Run prepare.py with --out_dir=work/out.

    Returns {stage: (seconds, peak bytes of private memory)} and the peak disk space of work/out."""
    process = subprocess.Popen([sys.executable, PREPARE, f"--out_dir={work / 'out'}", *flags],
                               stderr=subprocess.PIPE, env=os.environ | {"HF_HOME": work / "hf"})
    starts, peak_memory, peak_disk = {"start": time.perf_counter()}, {}, 0

    def read_stderr():
        recent = b""
        while output := process.stderr.read1():
            sys.stderr.buffer.write(output)
            recent = recent[-100:] + output
            for stage, bar in STAGES.items():
                if bar in recent:
                    starts.setdefault(stage, time.perf_counter())

    reader = threading.Thread(target=read_stderr)
    reader.start()
    while process.poll() is None:
        stage, start = list(starts)[-1], time.perf_counter()
        peak_memory[stage] = max(peak_memory.get(stage, 0), private_memory(process.pid))
        peak_disk = max(peak_disk, disk_space(work / "out"))
        # reading smaps_rollup is slow with gigabytes of mapped memory: use at most 1/30 of a core
        time.sleep(max(0.1, 30 * (time.perf_counter() - start)))
    times = [*starts.values(), time.perf_counter()]
    reader.join()
    if process.returncode:
        sys.exit(f"prepare.py failed with exit status {process.returncode}")
    return {stage: (end - start, peak_memory.get(stage, 0))
            for stage, start, end in zip(starts, times, times[1:])}, peak_disk


def compare_with_oracle(files, out, stats):
    """Compare the documents of each split with the oracle; of more than 200 million tokens, about
    5 million of each split. Returns the number of documents that were compared."""
    origin = stats["origin"]
    n_rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    rows_per_document = origin["rows_per_document"]
    n = math.ceil(n_rows / rows_per_document)
    n_val = math.ceil(origin["test_size"] * n)
    order = np.roll(np.arange(n), n_val)
    if origin["shuffle"]:
        order = np.random.default_rng(origin["seed"]).permutation(n)
    found = {}  # number of the document in the corpus: its bytes in train.bin or val.bin
    for name, numbers in ("val", order[:n_val]), ("train", order[n_val:]):
        ids = np.memmap(out / f"{name}.bin", "<u2", "r")
        bounds = np.append(0, np.flatnonzero(ids == 50256) + 1)
        assert len(bounds) - 1 == len(numbers), f"{name}.bin has {len(bounds) - 1:,} documents"
        assert bounds[-1] == len(ids), f"{name}.bin does not end with 50256"
        share = 1 if stats["train"]["tokens"] < 200e6 else 5e6 / len(ids)
        n_chosen = min(len(numbers), math.ceil(share * len(numbers)))
        chosen = np.random.default_rng(1).choice(len(numbers), n_chosen, False)
        for i in chosen:
            found[int(numbers[i])] = ids[bounds[i]:bounds[i + 1]].tobytes()
    texts, first = {number: [] for number in found}, 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            numbers = np.arange(first, first + len(batch)) // rows_per_document
            rows = [row for row, number in enumerate(numbers.tolist()) if number in found]
            for row, text in zip(rows, batch["text"].take(pa.array(rows, pa.int64())).to_pylist()):
                texts[int(numbers[row])].append(text)
            first += len(batch)
    for number, rows in texts.items():
        assert found[number] == row_bytes(" ".join(rows)), f"document {number:,} differs"
    return len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="Parquet file, folder or glob")
    parser.add_argument("--rows", type=int, default=1_000_000,
                        help="size of the corpus that is made if there is no --source")
    parser.add_argument("--num_proc", type=int, default=2, help="number of processes")
    parser.add_argument("--skip_tiktoken", action="store_true", help="do not time tiktoken alone")
    parser.add_argument("--tmp", help="folder for temporary files: needs twice the size of the text"
                                      " and 2.5 times that of train.bin and val.bin")
    flags, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=flags.tmp) as folder:
        work = pathlib.Path(folder)
        if not flags.source:
            make_corpus(work / "corpus.parquet", flags.rows)
        source = flags.source or str(work / "corpus.parquet")
        files = sorted(glob.glob(f"{source}/*.parquet" if os.path.isdir(source) else source))
        if not flags.skip_tiktoken:
            tiktoken_seconds = time_tiktoken(files, flags.num_proc)
        stages, peak_disk = run_prepare(
            [f"--source={source}", f"--num_proc={flags.num_proc}", *others], work)
        stats = json.loads((work / "out" / "stats.json").read_text())
        seconds, peaks = zip(*stages.values())
        size = stats["train"]["bytes"] + stats["val"]["bytes"]
        n_rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        print(f"\n{n_rows:,} rows, {flags.num_proc} processes\n")
        print("| stage | seconds | peak memory, GB |\n| --- | ---: | ---: |")
        for stage, (time_taken, peak) in stages.items():
            print(f"| {stage} | {time_taken:.1f} | {peak / 1e9:.2f} |")
        print(f"| total | {sum(seconds):.1f} | {max(peaks) / 1e9:.2f} |")
        if not flags.skip_tiktoken:
            print(f"| tiktoken alone | {tiktoken_seconds:.1f} | |\n")
            print(f"time: {sum(seconds) / tiktoken_seconds:.2f} times that of tiktoken alone")
        print(f"\ndisk space: {peak_disk / 1e9:.2f} GB at the peak, {peak_disk / size:.2f} times"
              f" the size of train.bin and val.bin, {disk_space(work / 'out') / size:.2f} times"
              f" after the run; {disk_space(work / 'hf') / 1e9:.2f} GB in the cache of datasets")
        if not {"--drop_repeated", "--document_column"} & {flag.split("=")[0] for flag in others}:
            compared = compare_with_oracle(files, work / "out", stats)
            print(f"{compared:,} rows or documents compared with the oracle: equal")


if __name__ == "__main__":
    main()
