"""What it costs to shuffle sentences: a small GPT, trained on the same books shuffled and in order.

    python tests/order.py --source=NOVELS.parquet        # two CPU cores: under an hour
    python tests/order.py --source=NOVELS.parquet --vocabulary=50256 --n_layer=12 --n_head=12 \\
        --n_embd=768 --iters=5000                        # larger, for a GPU

prepare.py tokenizes --source with --shuffle=False: train.bin is its head, val.bin the books at its
tail. For each of --seeds train.py then trains twice, with the same flags and for the same number
of tokens: on that train.bin, and on one with the same rows permuted as train_test_split does it.
Both models read the tail, in order in windows of several lengths and each sentence alone, and
every token of it counts once each time. Prints the losses as Markdown and draws the curves to
--picture. Flags that this program does not know go to train.py.

The head of a small GPT costs most of its time, so ids from --vocabulary on are spelled with the
ids below it, as BPE does when it stops at that merge; with 50256 nothing changes.
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
import tiktoken
import torch
from conftest import ROOT, SCRIPT, TRAIN, gpt2
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from train import GPT, GPTConfig, load_checkpoint, read_log

ORDERS = ("shuffled", "in order")
CUDA = torch.cuda.is_available()
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 96, "block_size": 512, "batch_size": 32,
         "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "min_lr": 3e-4,
         "warmup_iters": 50, "eval_iters": 4, "log_interval": 10}


@functools.cache
def spelling(size):
    """For each of GPT-2's ids, the list of ids below `size` that spell it; `size` ends a row."""
    ranks = {token: id for token, id in gpt2()._mergeable_ranks.items() if id < size}
    small = tiktoken.Encoding("small", pat_str=gpt2()._pat_str, special_tokens={},
                              mergeable_ranks=ranks)
    return [small._encode_single_piece(gpt2().decode_single_token_bytes(id))
            for id in range(50256)] + [[size]]


def spelled(ids, size):
    """`ids`, uint16, with those from `size` on spelled, as uint16."""
    lengths = np.array([len(word) for word in spelling(size)])
    letters, firsts = np.concatenate(spelling(size)).astype("<u2"), np.cumsum(lengths) - lengths
    lengths, firsts = lengths[ids], firsts[ids]
    shifts = np.repeat(firsts - np.cumsum(lengths) + lengths, lengths)
    return letters[shifts + np.arange(lengths.sum())]


def shuffled(ids, end, seed):
    """The rows of `ids`, each closed by the id `end`, permuted as by train_test_split."""
    rows = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    return np.concatenate([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])


@torch.no_grad()
def losses(model, sequences, device):
    """For each of `sequences`, int arrays, the loss of its tokens but the first, float32, nats."""
    found, width = [None] * len(sequences), model.config.block_size
    # sorted by length: little padding
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    while len(order):
        longest = min(len(sequences[order[min(len(order), 256) - 1]]) - 1, width)
        batch, order = np.split(order, [max(1, 8 * width // longest)])
        longest = max(len(sequences[i]) for i in batch)
        ids = torch.full((len(batch), longest), -1)
        for row, i in enumerate(batch):
            ids[row, :len(sequences[i])] = torch.from_numpy(sequences[i].astype(np.int64))
        logits, _ = model(ids[:, :-1].clamp(min=0).to(device))
        every = F.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten().to(device), ignore_index=-1,
            reduction="none").view(len(batch), -1).cpu().numpy()
        for row, i in enumerate(batch):
            found[i] = every[row, :len(sequences[i]) - 1]
    return found


def untrained(shape, vocab_size, seed):
    """A checkpoint before the first iteration, of a model with fewer tokens than GPT-2's."""
    args = {name: int(shape[name]) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    args |= {"vocab_size": vocab_size, "bias": False, "dropout": 0.0}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**args))
    optimizers = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), "cpu")
    return {"model": model.state_dict(), "optimizer": optimizers["optimizer"].state_dict(),
            "model_args": args, "iter_num": 0, "best_val_loss": float("inf"), "config": {}}


def windows(ids, width):
    """`ids` in parts of `width` predicted tokens, each with the token before its first in front."""
    return [ids[first:first + width + 1] for first in range(0, len(ids) - 1, width)]


def measure(checkpoint, held_out, end, lengths):
    """(mean loss by reading, loss by place in the longest windows) of a model on `held_out`."""
    device = "cuda" if CUDA else "cpu"
    model = load_checkpoint(checkpoint)[0].to(device).eval()
    rows = np.split(held_out, np.flatnonzero(held_out[:-1] == end) + 1)
    rows = [np.append(np.uint16(end), row) for row in rows]
    width = model.config.block_size
    readings = {f"in order, {length} tokens of context":
                losses(model, windows(held_out, length), device) for length in lengths}
    longest = readings[f"in order, {width} tokens of context"]
    places = np.mean([every for every in longest if len(every) == width], axis=0)
    alone = losses(model, [window for row in rows for window in windows(row, width)], device)
    alone[0] = alone[0][1:]  # the very first token has nothing before it in the other readings
    readings["alone, a sentence at a time"] = alone
    return {name: float(np.concatenate(found).mean()) for name, found in readings.items()}, places


def spread(values):
    """The mean of `values`, one of each seed, and how far the farthest is from it."""
    return f"{np.mean(values):.3f} ± {np.abs(values - np.mean(values)).max():.3f}"


def table(label, of, parts):
    """Print as Markdown, for each (name, pick) of `parts`, pick(result) over the seeds."""
    print(f"\n| {label} | trained shuffled | trained in order | gain from order |\n"
          "| --- | ---: | ---: | ---: |")
    for name, pick in parts:
        a, b = (np.array([pick(result) for result in of[order]]) for order in ORDERS)
        print(f"| {name} | {spread(a)} | {spread(b)} | {spread(a - b)} |")


def draw(path, of):
    """Draw the loss on the held-out books by tokens seen, and by place in the context."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for order, colour in zip(ORDERS, ("C1", "C0")):
        for i, result in enumerate(of[order]):
            style = {"color": colour, "label": order if i == 0 else None, "alpha": 0.8}
            left.plot(*zip(*result["curve"][1:]), **style)
            edges = np.unique(np.geomspace(1, len(result["places"]) + 1, 17).astype(int))
            means = [result["places"][low - 1:high - 1].mean()
                     for low, high in zip(edges, edges[1:])]
            right.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, **style)
    left.set(xlabel="tokens seen in training",
             ylabel="loss on held-out books in order (nats per token)")
    right.set(xlabel="place in the context, tokens", xscale="log")
    left.legend(title="trained")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="books in order, one sentence per row")
    parser.add_argument("--test_size", default=0.02, help="share of the rows held out at the tail")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--vocabulary", type=int, default=4096,
                        help="how many of GPT-2's ids to keep")
    parser.add_argument("--jobs", type=int, default=1 if CUDA else 2, help="runs side by side")
    parser.add_argument("--picture", type=pathlib.Path,
                        default=ROOT / "data" / "bookcorpus" / "order.png")
    flags, others = parser.parse_known_args()
    shape = {**SHAPE, "max_iters": flags.iters, "lr_decay_iters": flags.iters,
             "eval_interval": max(1, flags.iters // 10)}
    shape |= dict(word.removeprefix("--").split("=", 1) for word in others)
    width, end, began = int(shape["block_size"]), flags.vocabulary, time.monotonic()
    # tokens per iteration
    step = int(shape["batch_size"]) * int(shape["gradient_accumulation_steps"]) * width
    threads = max(1, os.cpu_count() // flags.jobs)
    torch.set_num_threads(threads)

    def run(order, seed):
        """Train and measure; a dict of mean losses, losses by place in the context, and curve."""
        data, out = work / f"{order} {seed}", work / f"out {order} {seed}"
        data.mkdir()
        (shuffled(head, end, seed) if order == "shuffled" else head).tofile(data / "train.bin")
        held_out.tofile(data / "val.bin")
        out.mkdir()
        torch.save(untrained(shape, vocab_size, seed), out / "ckpt.pt")
        command = [sys.executable, "-u", str(TRAIN), f"--dataset={data}", f"--out_dir={out}",
                   f"--seed={seed}", "--init_from=resume",
                   *(f"--{name}={value}" for name, value in shape.items())]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, env=environment, text=True,
                              stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                bar.update(int(shape["log_interval"]) * line.startswith("iter "))
        if process.returncode:
            raise SystemExit(f"train.py ended with {process.returncode}")
        curve = [(record["iter"] * step, record["val/loss"])
                 for record in read_log(out / "log.jsonl") if "val/loss" in record]
        means, places = measure(out / "ckpt.pt", held_out, end,
                                [width >> shift for shift in (6, 4, 2, 0)])
        return {"means": means, "places": places, "curve": curve}

    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        subprocess.run([sys.executable, SCRIPT, f"--source={flags.source}", f"--out_dir={work}",
                        "--shuffle=False", f"--test_size={flags.test_size}"],
                       check=True, stdout=subprocess.DEVNULL)
        head, held_out = (spelled(np.fromfile(work / f"{name}.bin", "<u2"), end)
                          for name in ("train", "val"))
        vocab_size = -(-(end + 1) // 64) * 64  # a multiple of 64 is faster
        jobs = [(order, seed) for seed in range(1, flags.seeds + 1) for order in ORDERS]
        with tqdm(total=len(jobs) * (flags.iters + 1), unit="iter", desc="Training") as bar, \
                concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
            results = list(pool.map(lambda job: run(*job), jobs))
    of = {order: results[i::len(ORDERS)] for i, order in enumerate(ORDERS)}
    draw(flags.picture, of)
    print(f"{flags.seeds} seeds, {flags.iters * step:,} tokens seen by each, {len(head):,} in the"
          f" head, {len(held_out):,} held out; {shape['n_layer']} layers of {shape['n_embd']},"
          f" {end:,} of GPT-2's ids;"
          f" {(time.monotonic() - began) / 60:.0f} min")
    table("held-out books, read", of, [(name, lambda result, name=name: result["means"][name])
                                       for name in results[0]["means"]])
    table("tokens seen", of, [(f"{seen:,}", lambda result, i=i: result["curve"][i][1])
                              for i, (seen, _) in enumerate(results[0]["curve"]) if i])
    edges = np.unique([0] + [width >> shift for shift in range(7)])
    table("place in the context", of, [
        (f"{low + 1} to {high}",
         lambda result, part=slice(low, high): result["places"][part].mean())
        for low, high in zip(edges, edges[1:])])


if __name__ == "__main__":
    main()
