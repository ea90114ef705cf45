"""How many tokens per second train.py trains on, on this machine, alone or next to nanoGPT.

    python tests/bench_train.py                        # a CPU: 4 layers of 128; a GPU: GPT-2 124M
    python tests/bench_train.py --nanogpt=../nanoGPT   # in turns with a clone of nanoGPT

Both run with the same flags on the same tokens, in turns, `--repeats` times each. On a GPU
nanoGPT gets bfloat16 and compile as ours does; on a CPU what its README says: float32, not
compiled. Prints the tokens per second by the median of the logged times, without the first ten,
the mean of the last losses, the last log line, and the ratio.
"""
import argparse
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import torch
from conftest import SAMPLE, TRAIN, row_bytes

CUDA = torch.cuda.is_available()
SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12,
             gradient_accumulation_steps=5) if CUDA else dict(
    n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1)


def measure(script, flags, folder):
    """(median seconds an iteration, mean loss of the last 20, the last log line) of a run."""
    ended = subprocess.run([sys.executable, script, *flags], cwd=folder, capture_output=True,
                           text=True)
    if ended.returncode:
        sys.exit(f"{script} ended with {ended.returncode}: {ended.stderr}")
    found = re.findall(r"^(iter \d+: loss ([\d.]+), time ([\d.]+)ms.*)", ended.stdout, re.M)
    seconds = statistics.median(float(time) / 1000 for _, _, time in found[10:])
    loss = statistics.mean(float(loss) for _, loss, _ in found[-20:])
    return seconds, loss, found[-1][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=pathlib.Path, help="folder of a clone of nanoGPT")
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data", "bench")
        data.mkdir(parents=True)
        story = b"".join(map(row_bytes, SAMPLE.read_text(encoding="utf-8").splitlines()))
        for name in "train", "val":
            (data / f"{name}.bin").write_bytes(story * 20)
        shape = [f"--{key}={value}" for key, value in SHAPE.items()] + [
            f"--max_iters={flags.iters}", "--eval_interval=100000", "--eval_iters=1",
            "--learning_rate=1e-3", "--warmup_iters=20", f"--lr_decay_iters={flags.iters}",
            "--min_lr=1e-4"]
        scripts = {"train.py": (TRAIN, [*shape, f"--dataset={data}", "--out_dir=out"])}
        if flags.nanogpt:
            for name in "train.py", "model.py", "configurator.py":
                shutil.copy(flags.nanogpt / name, folder)
            there = ["--device=cuda", "--compile=True"] if CUDA else [
                "--device=cpu", "--compile=False", "--dtype=float32"]
            scripts["nanoGPT"] = (pathlib.Path(folder, "train.py"), [
                *shape, *there, "--dataset=bench", "--wandb_log=False"])
        tokens = SHAPE["batch_size"] * SHAPE["block_size"] * SHAPE["gradient_accumulation_steps"]
        rates = {name: [] for name in scripts}
        for _ in range(flags.repeats):
            for name, (script, arguments) in scripts.items():
                seconds, loss, last = measure(script, arguments, folder)
                rates[name].append(tokens / seconds)
                print(f"{name:9} {tokens / seconds:10,.0f} tokens/s, final loss {loss:.4f}; {last}",
                      flush=True)
        if flags.nanogpt:
            ours, theirs = (statistics.median(rates[name]) for name in ("train.py", "nanoGPT"))
            print(f"train.py sees {ours / theirs:.2f} times as many tokens a second as nanoGPT")


if __name__ == "__main__":
    main()
