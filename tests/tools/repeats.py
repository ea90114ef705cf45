"""Measure what --drop_repeated of prepare.py is worth on a corpus with repeated books.

    python tests/tools/repeats.py --source=NOVELS.parquet      # two CPU cores: about 20 minutes

--source is cut into 100 parts of equal numbers of rows; a book is the first --rows_per_book rows of
a part. The last ten books are held out. The corpus consists of copies of the others, as many of
each as COPIES says, in random order. So 35% of its rows are repeated, as in BookCorpus, where 7,185
of 11,038 books are distinct (Bandy and Vincent, 2021).

For each seed, prepare.py prepares this corpus with and without --drop_repeated, and train.py trains
a model on each of the two datasets: with the same flags, the same initial weights and the same
number of iterations, so both see the same number of tokens. The seed also decides which books are
repeated, and it is the seed of prepare.py's shuffle and split.

Both models are evaluated on the rows of the held-out books, which are shuffled like those of the
datasets, and on the validation split of their own dataset. The losses of all tokens count, those of
end-of-text tokens too. Their sum in bits is divided by the number of UTF-8 bytes of the rows.

Prints each result to stderr and a Markdown table. Unknown flags are passed to train.py. The model
and the tokenizer are those of order.py.
"""
import argparse
import concurrent.futures
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from order import (DEVICE, PREPARE, SHAPE, gpt2, initial_checkpoint, run_script, shuffle, spread,
                   text_bytes, token_losses, tokenize, tokenizer, train_model, windows)
from tqdm import tqdm

COPIES = {1: 54, 2: 26, 3: 8, 4: 1, 5: 1}  # {number of copies: number of books}
HELD_OUT = 10  # books


def make_corpus(rows, rows_per_book, seed):
    """Two lists: the rows of the corpus, and those of the held-out books."""
    n_books = sum(COPIES.values()) + HELD_OUT
    starts = range(0, len(rows), len(rows) // n_books)
    books = [rows[start:start + rows_per_book] for start in starts[:n_books]]
    copies = shuffle(np.repeat(list(COPIES), list(COPIES.values())), seed)
    order = shuffle(np.repeat(np.arange(len(copies)), copies), seed)
    return sum((books[i] for i in order), []), sum(books[-HELD_OUT:], [])


def read_rows(path):
    """A list of the rows, as strings, in a file that prepare.py has written."""
    ids = np.fromfile(path, "<u2")
    ends = np.flatnonzero(ids == gpt2().eot_token)
    starts = np.append(0, ends[:-1] + 1)
    return [gpt2().decode(ids[start:end]) for start, end in zip(starts, ends)]


def prepare(folder, corpus, drop_repeated, seed):
    """Run prepare.py on the rows `corpus` in the new folder `folder`. Returns two lists: the rows
    of train.bin and those of val.bin."""
    folder.mkdir()
    source = folder / "corpus.parquet"
    pq.write_table(pa.table({"text": corpus}), source)
    ended = run_script(
        PREPARE, f"--source={source}", f"--out_dir={folder}", "--test_size=0.05", f"--seed={seed}",
        f"--drop_repeated={drop_repeated}", "--num_proc=1", timeout=None)
    if ended.returncode:
        sys.exit(ended.stderr)
    return read_rows(folder / "train.bin"), read_rows(folder / "val.bin")


def bits_per_byte(model, rows, documents):
    """Of `rows`, whose tokens are `documents`, in windows of the length of the context."""
    losses = np.concatenate(token_losses(model, windows(documents, model.config.block_size)))
    return losses.sum(dtype=np.float64) / np.log(2) / text_bytes(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True,
                        help="Parquet file: books in order, one sentence per row of `text`")
    parser.add_argument("--rows_per_book", type=int, default=100)
    parser.add_argument("--drop_repeated", type=int, default=16, help="flag of prepare.py")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--iters", type=int, default=300, help="iterations per run")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--jobs", type=int, default=1 if DEVICE == "cuda" else 2,
                        help="number of runs at the same time")
    flags, others = parser.parse_known_args()
    shape = SHAPE | {"max_iters": flags.iters - 1, "lr_decay_iters": flags.iters,
                     "eval_interval": flags.iters, "eval_iters": 8}
    shape |= dict(flag.removeprefix("--").split("=", 1) for flag in others)
    n_tokens = flags.iters * int(shape["batch_size"]) * int(shape["block_size"]) * int(
        shape["gradient_accumulation_steps"])
    start, threads = time.monotonic(), max(1, os.cpu_count() // flags.jobs)
    torch.set_num_threads(threads)

    rows = pq.read_table(flags.source, columns=["text"])["text"].to_pylist()
    encoding, seeds = tokenizer(flags.vocabulary), range(1, flags.seeds + 1)
    # not in the threads, which share torch's random number generator
    initial = {seed: initial_checkpoint(shape, flags.vocabulary, seed) for seed in seeds}

    def run(seed, drop_repeated):
        """Prepare, train and evaluate. Returns {figure: number}."""
        corpus, held_out = make_corpus(rows, flags.rows_per_book, seed)
        name = f"seed {seed}, --drop_repeated={drop_repeated}"
        train, val = prepare(work / name, corpus, drop_repeated, seed)
        held_out = shuffle(held_out, seed)
        documents = [tokenize(part, encoding) for part in (train, val, held_out)]
        log, model = train_model(work / f"{name}, model", *documents[:2], initial[seed],
                                 shape | {"seed": seed}, threads, bar)
        train_tokens = sum(map(len, documents[0]))
        distinct = set(train)
        result = {
            "rows, in thousands": (len(train) + len(val)) / 1e3,
            "tokens of the training split, in thousands": train_tokens / 1e3,
            "passes over the training split": n_tokens / train_tokens,
            "validation rows that also occur in the training split, percent":
                100 * np.mean([row in distinct for row in val]),
            "held-out books, bits per byte": bits_per_byte(model, held_out, documents[2]),
            "own validation split, bits per byte": bits_per_byte(model, val, documents[1]),
            "own validation split, val loss of train.py in nats per token": log[-1]["val/loss"]}
        bar.write(f"{name}; " + "; ".join(f"{key}: {value:.4f}" for key, value in result.items()),
                  file=sys.stderr)
        return result

    jobs = [(seed, drop_repeated) for seed in seeds for drop_repeated in (0, flags.drop_repeated)]
    with tempfile.TemporaryDirectory() as folder, \
            tqdm(total=len(jobs) * flags.iters, unit="iter", desc="Training") as bar, \
            concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        work = pathlib.Path(folder)
        results = list(pool.map(run, *zip(*jobs)))

    print(f"{flags.seeds} seeds; {shape['n_layer']} layers of {shape['n_embd']}, context of"
          f" {shape['block_size']} tokens, vocabulary of {flags.vocabulary:,}; {n_tokens:,} tokens"
          f" per run; {(time.monotonic() - start) / 60:.0f} min\n\n"
          "Mean over the seeds ± largest distance of a seed from it\n\n"
          f"| | with repeats | --drop_repeated={flags.drop_repeated} | difference |\n"
          "| --- | ---: | ---: | ---: |")
    for key in results[0]:
        repeated, dropped = (np.array([result[key] for result in half])
                             for half in (results[::2], results[1::2]))
        print(f"| {key} | " + " | ".join(map(spread, (repeated, dropped, dropped - repeated)))
              + " |")


if __name__ == "__main__":
    main()
