"""Measure the effect of shuffling sentences: train a small GPT on shuffled and on ordered rows.

    python tests/tools/order.py --source=NOVELS.parquet        # two CPU cores: under an hour
    python tests/tools/order.py --source=NOVELS.parquet --vocabulary=50256 --n_layer=12 \\
        --n_head=12 --n_embd=768 --iters=5000                  # larger, for a GPU

prepare.py tokenizes --source with --shuffle=False, so the validation split is the end of the
corpus. For each seed, train.py trains two models with the same flags and the same number of
tokens: on the ordered training split, and on the same rows shuffled as prepare.py shuffles them.
Both are evaluated on the validation split: in order, in windows of several lengths, and on single
sentences. Each evaluation predicts every token but the first. Prints Markdown tables of the losses
and plots them to --picture. Unknown flags are passed to train.py.

A small GPT spends most of its time in the output layer. So the tokens are re-encoded with the
first --vocabulary ids of GPT-2, as if BPE training had stopped there. With 50256 they stay the
same.
"""
import argparse
import concurrent.futures
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import tiktoken
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, ROOT, TRAIN, gpt2  # noqa: E402

sys.path.insert(0, str(ROOT))
from train import GPT, GPTConfig, load_checkpoint, read_log  # noqa: E402

ORDERS = ("shuffled", "ordered")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 96, "block_size": 512, "batch_size": 32,
         "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "min_lr": 3e-4,
         "warmup_iters": 50, "eval_iters": 4, "log_interval": 10}


@functools.cache
def smaller_ids(vocab_size):
    """pa.ListArray: for each of GPT-2's ids, the ids below `vocab_size` that encode its bytes.
    The id 50256 becomes `vocab_size`."""
    ranks = {token: id for token, id in gpt2()._mergeable_ranks.items() if id < vocab_size}
    small = tiktoken.Encoding("small", pat_str=gpt2()._pat_str, special_tokens={},
                              mergeable_ranks=ranks)
    lists = [small._encode_single_piece(gpt2().decode_single_token_bytes(id))
             for id in range(50256)]
    return pa.array([*lists, [vocab_size]], pa.list_(pa.uint16()))


def reencode(ids, vocab_size):
    """Re-encode the uint16 array `ids` with ids below `vocab_size`. `vocab_size` ends a row."""
    return smaller_ids(vocab_size).take(pa.array(ids)).flatten().to_numpy()


def shuffle(ids, end, seed):
    """Shuffle the rows of `ids`, each of which ends with the id `end`, as prepare.py does."""
    rows = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    return np.concatenate([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])


def windows(ids, width):
    """Split `ids` into windows that predict up to `width` tokens. Each begins with the last token
    of the one before it."""
    return [ids[first:first + width + 1] for first in range(0, len(ids) - 1, width)]


@torch.no_grad()
def token_losses(model, sequences):
    """For each array of ids in `sequences`: the loss of each token but the first, in nats."""
    losses, lengths = [None] * len(sequences), np.array(list(map(len, sequences)))
    for length in np.unique(lengths):  # batches without padding
        same = np.flatnonzero(lengths == length)
        n_batches = -(-len(same) * length // (8 * model.config.block_size))
        for batch in np.array_split(same, n_batches):
            ids = torch.from_numpy(np.stack([sequences[i] for i in batch]).astype(np.int64))
            ids = ids.to(next(model.parameters()).device)
            logits = model(ids[:, :-1])[0].flatten(0, 1).float()
            found = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            for i, row in zip(batch, found.view(len(batch), -1).cpu().numpy()):
                losses[i] = row
    return losses


def evaluate(checkpoint, val, end):
    """Returns {evaluation: mean loss} on the tokens `val`, and the mean loss at each position."""
    model = load_checkpoint(checkpoint)[0].to(DEVICE).eval()
    block_size, losses = model.config.block_size, {}
    for length in (block_size >> shift for shift in (6, 4, 2, 0)):
        losses[f"windows of {length} tokens"] = longest = token_losses(model, windows(val, length))
    positions = np.mean([loss for loss in longest if len(loss) == block_size], axis=0)
    rows = np.split(val, np.flatnonzero(val[:-1] == end) + 1)
    single = token_losses(model, [window for row in rows for window in windows(
        np.append(np.uint16(end), row), block_size)])
    single[0] = single[0][1:]  # the first token, which the windows do not predict
    losses["single sentences"] = single
    return {name: float(np.concatenate(found).mean()) for name, found in losses.items()}, positions


def initial_checkpoint(shape, vocab_size, seed):
    """A checkpoint of iteration 0. It sets the vocabulary size, for which train.py has no flag."""
    args = {name: int(shape[name]) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    args |= {"vocab_size": vocab_size, "bias": False, "dropout": 0.0}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**args))
    optimizers = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), "cpu")
    return {"model": model.state_dict(), "optimizer": optimizers["optimizer"].state_dict(),
            "model_args": args, "iter_num": 0, "best_val_loss": float("inf"), "config": {}}


def spread(values):
    """The mean of the array `values`, one per seed, and the largest distance from it."""
    return f"{values.mean():.3f} ± {np.abs(values - values.mean()).max():.3f}"


def print_table(label, results, rows):
    """Print a Markdown table. `rows` are pairs (name, function from a result to a loss)."""
    print(f"\n| {label} | trained on shuffled rows | trained on ordered rows | difference |\n"
          "| --- | ---: | ---: | ---: |")
    for name, loss in rows:
        shuffled, ordered = (np.array([loss(result) for result in results[order]])
                             for order in ORDERS)
        print(f"| {name} | {spread(shuffled)} | {spread(ordered)} | {spread(shuffled - ordered)} |")


def plot(path, results):
    """Plot the validation loss by training tokens and by position in the context."""
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for order, color in zip(ORDERS, ("C1", "C0")):
        for i, result in enumerate(results[order]):
            style = {"color": color, "label": order if i == 0 else None, "alpha": 0.8}
            left.plot(*zip(*result["curve"][1:]), **style)
            positions = result["positions"]
            edges = np.unique(np.geomspace(1, len(positions) + 1, 17).astype(int))
            means = [positions[low - 1:high - 1].mean() for low, high in zip(edges, edges[1:])]
            right.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, **style)
    left.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    right.set(xlabel="position in the context, tokens", xscale="log")
    left.legend(title="training data")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="books in order, one sentence per row")
    parser.add_argument("--test_size", default=0.02, help="fraction of the rows for validation")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--iters", type=int, default=500, help="iterations per run")
    parser.add_argument("--vocabulary", type=int, default=4096, help="number of GPT-2 ids to use")
    parser.add_argument("--jobs", type=int, default=1 if DEVICE == "cuda" else 2,
                        help="number of runs at the same time")
    parser.add_argument("--picture", type=pathlib.Path, default=PREPARE.with_name("order.png"),
                        help="output file of the plot")
    flags, others = parser.parse_known_args()
    shape = {**SHAPE, "max_iters": flags.iters, "lr_decay_iters": flags.iters,
             "eval_interval": max(1, flags.iters // 10)}
    shape |= dict(flag.removeprefix("--").split("=", 1) for flag in others)
    block_size, end, start = int(shape["block_size"]), flags.vocabulary, time.monotonic()
    tokens_per_iter = int(shape["batch_size"]) * block_size * int(
        shape["gradient_accumulation_steps"])
    threads = max(1, os.cpu_count() // flags.jobs)
    torch.set_num_threads(threads)

    def run(order, seed):
        """Train and evaluate. Returns a dict with the losses."""
        data, out = work / f"{order} {seed}", work / f"out {order} {seed}"
        data.mkdir()
        (shuffle(train, end, seed) if order == "shuffled" else train).tofile(data / "train.bin")
        val.tofile(data / "val.bin")
        out.mkdir()
        torch.save(initial[seed], out / "ckpt.pt")
        command = [sys.executable, TRAIN, f"--dataset={data}", f"--out_dir={out}",
                   f"--seed={seed}", "--init_from=resume",
                   *(f"--{name}={value}" for name, value in shape.items())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, env=environment, text=True,
                              stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                bar.update(int(shape["log_interval"]) * line.startswith("iter "))
        if process.returncode:
            sys.exit(f"train.py failed with exit status {process.returncode}")
        curve = [(record["iter"] * tokens_per_iter, record["val/loss"])
                 for record in read_log(out / "log.jsonl") if "val/loss" in record]
        means, positions = evaluate(out / "ckpt.pt", val, end)
        return {"means": means, "positions": positions, "curve": curve}

    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        subprocess.run([sys.executable, PREPARE, f"--source={flags.source}", f"--out_dir={work}",
                        "--shuffle=False", f"--test_size={flags.test_size}"],
                       check=True, stdout=subprocess.DEVNULL)
        train, val = (reencode(np.fromfile(work / f"{name}.bin", "<u2"), end)
                      for name in ("train", "val"))
        seeds = range(1, flags.seeds + 1)
        vocab_size = -(-(end + 1) // 64) * 64  # a multiple of 64, which is faster
        # not in the threads, which share torch's random number generator
        initial = {seed: initial_checkpoint(shape, vocab_size, seed) for seed in seeds}
        jobs = [(order, seed) for seed in seeds for order in ORDERS]
        with tqdm(total=len(jobs) * (flags.iters + 1), unit="iter", desc="Training") as bar, \
                concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
            runs = list(pool.map(run, *zip(*jobs)))
    results = {order: runs[i::len(ORDERS)] for i, order in enumerate(ORDERS)}
    plot(flags.picture, results)
    print(f"{flags.seeds} seeds, {(flags.iters + 1) * tokens_per_iter:,} tokens per run,"
          f" {len(train):,} in the training split, {len(val):,} in the validation split;"
          f" {shape['n_layer']} layers"
          f" of {shape['n_embd']}, {end:,} of GPT-2's ids;"
          f" {(time.monotonic() - start) / 60:.0f} min")
    print("Validation loss in nats per token: mean ± largest distance of a seed from it."
          " A positive difference means that ordered rows are better.")
    print_table("evaluated on", results, [
        (name, lambda result, name=name: result["means"][name]) for name in runs[0]["means"]])
    print_table("training tokens", results, [
        (f"{tokens:,}", lambda result, i=i: result["curve"][i][1])
        for i, (tokens, _) in enumerate(runs[0]["curve"]) if i])
    edges = np.unique([0] + [block_size >> shift for shift in range(7)])
    print_table("position in the context", results, [
        (f"{low + 1} to {high}",
         lambda result, part=slice(low, high): result["positions"][part].mean())
        for low, high in zip(edges, edges[1:])])


if __name__ == "__main__":
    main()
