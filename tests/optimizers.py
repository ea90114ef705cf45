"""AdamW and Muon compared: validation loss over tokens and over seconds.

    python tests/optimizers.py --source=NOVELS.parquet   # two CPU cores: about 25 minutes
    python tests/optimizers.py --source=NOVELS.parquet --n_layer=12 --n_head=12 --n_embd=768 \\
        --block_size=1024 --batch_size=12 --gradient_accumulation_steps=40 --iters=2000 \\
        --rates 6e-4 1.2e-3 2.4e-3                       # GPT-2 124M on a GPU

prepare.py tokenizes the rows of --source. train.py then trains with each optimizer at each of
--rates with the first of --seeds, and at the best rate of each optimizer with the other seeds.
All runs have the same flags otherwise, and runs with the same seed start from the same weights
and see the same batches. Prints Markdown tables and draws the best runs to --picture. Seconds
are those of the training iterations, without evaluations. Other flags go to train.py.
"""
import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from conftest import ROOT, SCRIPT, TRAIN
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))
from train import read_log

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "batch_size": 8,
         "gradient_accumulation_steps": 1, "eval_iters": 5}


def run(data, out, shape, optimizer, rate, seed):
    """(iterations, validation losses, seconds of training until then) of a run, three arrays."""
    shape = shape | {"optimizer": optimizer, "learning_rate": rate, "min_lr": rate / 10}
    ended = subprocess.run(
        [sys.executable, TRAIN, f"--dataset={data}", f"--out_dir={out}", f"--seed={seed}",
         *(f"--{name}={value}" for name, value in shape.items())], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    times = re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", ended.stdout, re.MULTILINE)
    seconds = np.cumsum([0, *map(float, times)]) / 1000
    points = [(record["iter"], record["val/loss"]) for record in read_log(out / "log.jsonl")
              if "val/loss" in record]
    iters, losses = map(np.array, zip(*points))
    print(f"{optimizer}, learning rate {rate:g}, seed {seed}: val loss {losses[-1]:.3f},"
          f" {seconds[-1] / len(times):.3f} s per iteration", file=sys.stderr, flush=True)
    return iters, losses, seconds[iters]


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n| ---" + " | ---:" * (len(header) - 1) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def draw(path, best, tokens_per_iter):
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2, sharey=True)
    for (optimizer, (rate, curves)), colour in zip(best.items(), ("C0", "C1")):
        for i, (iters, losses, seconds) in enumerate(curves):
            label = f"{optimizer}, {rate:g}" if i == 0 else None
            left.plot(iters[1:] * tokens_per_iter, losses[1:], color=colour, label=label)
            right.plot(seconds[1:], losses[1:], color=colour)
    left.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    right.set(xlabel="seconds of training")
    left.legend(title="optimizer, learning rate")
    figure.savefig(path, dpi=80, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="Parquet of sentences, as for prepare.py")
    parser.add_argument("--test_size", default=0.01, help="share of the rows for validation")
    parser.add_argument("--iters", type=int, default=220, help="iterations of each run")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("optimizers.png"))
    flags, others = parser.parse_known_args()
    shape = SHAPE | {"max_iters": flags.iters - 1, "lr_decay_iters": flags.iters,
                     "warmup_iters": flags.iters // 10, "eval_interval": max(1, flags.iters // 8)}
    shape |= dict(word.removeprefix("--").split("=", 1) for word in others)
    tokens_per_iter = int(shape["batch_size"]) * int(shape["block_size"]) * int(
        shape["gradient_accumulation_steps"])

    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data")
        subprocess.run([sys.executable, SCRIPT, f"--source={flags.source}", f"--out_dir={data}",
                        f"--test_size={flags.test_size}"], check=True, stdout=subprocess.DEVNULL)
        sweep, best = {}, {}
        for optimizer in "adamw", "muon":
            def trained(rate, seed):
                out = pathlib.Path(folder, f"{optimizer} {rate} {seed}")
                return run(data, out, shape, optimizer, rate, seed)

            for rate in flags.rates:
                sweep[optimizer, rate] = trained(rate, flags.seeds[0])
            rate = min(flags.rates, key=lambda rate: sweep[optimizer, rate][1][-1])
            best[optimizer] = rate, [sweep[optimizer, rate],
                                     *(trained(rate, seed) for seed in flags.seeds[1:])]

    table(["optimizer", "learning rate", "final val loss", "seconds per iteration"],
          [[optimizer, f"{rate:g}", f"{losses[-1]:.3f}", f"{seconds[-1] / iters[-1]:.3f}"]
           for (optimizer, rate), (iters, losses, seconds) in sweep.items()])
    header, columns = ["training tokens"], []
    for optimizer, (rate, curves) in best.items():
        header += [f"{optimizer} at {rate:g}, val loss", "seconds"]
        columns += [np.mean([losses for _, losses, _ in curves], axis=0),
                    np.mean([seconds for _, _, seconds in curves], axis=0)]
    iters = best["adamw"][1][0][0]
    table(header, [[f"{n * tokens_per_iter:,}", *(f"{column[i]:.{1 if j % 2 else 3}f}"
                                                 for j, column in enumerate(columns))]
                   for i, n in enumerate(iters)])
    print(f"\n{len(flags.seeds)} seeds, {flags.iters * tokens_per_iter:,} tokens in each run")
    draw(flags.picture, best, tokens_per_iter)


if __name__ == "__main__":
    main()
