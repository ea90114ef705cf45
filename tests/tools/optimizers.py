"""Compare AdamW and Muon: validation loss by training tokens and by seconds of training.

    python tests/tools/optimizers.py --source=NOVELS.parquet   # two CPU cores: about 25 minutes
    python tests/tools/optimizers.py --source=NOVELS.parquet --n_layer=12 --n_head=12 \\
        --n_embd=768 --block_size=1024 --batch_size=12 --gradient_accumulation_steps=40 \\
        --iters=2000 --rates 6e-4 1.2e-3 2.4e-3                # GPT-2 124M on a GPU

prepare.py tokenizes --source. train.py then trains with each optimizer and each of --rates, with
the first of --seeds. The best rate of each optimizer is also run with the other seeds. All other
flags are the same. Runs with the same seed have the same initial weights and the same batches.
Prints Markdown tables and plots the best runs to --picture. The seconds do not include
evaluations. Unknown flags are passed to train.py.
"""
import argparse
import pathlib
import re
import sys
import tempfile

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, ROOT, TRAIN, run_script  # noqa: E402

sys.path.insert(0, str(ROOT))
from train import read_log  # noqa: E402

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "batch_size": 8,
         "gradient_accumulation_steps": 1, "eval_iters": 5}


def run(folder, shape, optimizer, rate, seed):
    """Train. Returns three arrays: the iterations of the evaluations, the validation losses, and
    the seconds of training before each."""
    out = folder / f"{optimizer} {rate} {seed}"
    shape = shape | {"optimizer": optimizer, "learning_rate": rate, "min_lr": rate / 10}
    ended = run_script(
        TRAIN, f"--dataset={folder / 'data'}", f"--out_dir={out}", f"--seed={seed}",
        *(f"--{name}={value}" for name, value in shape.items()), timeout=None)
    if ended.returncode:
        sys.exit(ended.stderr)
    times = re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", ended.stdout, re.MULTILINE)
    seconds = np.cumsum([0, *map(float, times)]) / 1000
    iters, losses = map(np.array, zip(*(
        (record["iter"], record["val/loss"]) for record in read_log(out / "log.jsonl")
        if "val/loss" in record)))
    print(f"{optimizer}, learning rate {rate:g}, seed {seed}: val loss {losses[-1]:.3f},"
          f" {seconds[-1] / len(times):.3f} s per iteration", file=sys.stderr, flush=True)
    return iters, losses, seconds[iters]


def print_table(header, rows):
    print("\n| " + " | ".join(header) + " |\n| ---" + " | ---:" * (len(header) - 1) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def plot(path, best, tokens_per_iter):
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    for color, (optimizer, (rate, runs)) in zip(("C0", "C1"), best.items()):
        for i, (iters, losses, seconds) in enumerate(runs):
            label = f"{optimizer}, {rate:g}" if i == 0 else None
            left.plot(iters[1:] * tokens_per_iter, losses[1:], color=color, label=label)
            right.plot(seconds[1:], losses[1:], color=color)
    left.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    right.set(xlabel="seconds of training")
    left.legend(title="optimizer, learning rate")
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the corpus, for --source of prepare.py")
    parser.add_argument("--test_size", default=0.01, help="fraction of the rows for validation")
    parser.add_argument("--iters", type=int, default=220, help="iterations per run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3],
                        help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds of the runs")
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("optimizers.png"),
                        help="output file of the plot")
    flags, others = parser.parse_known_args()
    shape = SHAPE | {"max_iters": flags.iters - 1, "lr_decay_iters": flags.iters,
                     "warmup_iters": flags.iters // 10, "eval_interval": max(1, flags.iters // 8)}
    shape |= dict(flag.removeprefix("--").split("=", 1) for flag in others)
    tokens_per_iter = int(shape["batch_size"]) * int(shape["block_size"]) * int(
        shape["gradient_accumulation_steps"])

    results, best = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        ended = run_script(
            PREPARE, f"--source={flags.source}", f"--out_dir={folder / 'data'}",
            f"--test_size={flags.test_size}", timeout=None)
        if ended.returncode:
            sys.exit(ended.stderr)
        first, *other_seeds = flags.seeds
        for optimizer in "adamw", "muon":
            for rate in flags.rates:
                results[optimizer, rate] = run(folder, shape, optimizer, rate, first)
            rate = min(flags.rates, key=lambda rate: results[optimizer, rate][1][-1])
            best[optimizer] = rate, [results[optimizer, rate]] + [
                run(folder, shape, optimizer, rate, seed) for seed in other_seeds]

    print_table(["optimizer", "learning rate", "final val loss", "seconds per iteration"],
                [[optimizer, f"{rate:g}", f"{losses[-1]:.3f}", f"{seconds[-1] / iters[-1]:.3f}"]
                 for (optimizer, rate), (iters, losses, seconds) in results.items()])
    iters = results["adamw", flags.rates[0]][0]
    header, columns = ["training tokens"], [[f"{n * tokens_per_iter:,}" for n in iters]]
    for optimizer, (rate, runs) in best.items():
        header += [f"{optimizer} at {rate:g}, val loss", "seconds"]
        _, losses, seconds = np.mean(runs, axis=0)
        columns += [[f"{loss:.3f}" for loss in losses], [f"{second:.1f}" for second in seconds]]
    print_table(header, zip(*columns))
    print(f"\n{len(flags.seeds)} seeds, {flags.iters * tokens_per_iter:,} tokens in each run")
    plot(flags.picture, best, tokens_per_iter)


if __name__ == "__main__":
    main()
