"""Measure the training speed of train.py in tokens per second, and compare it with nanoGPT's.

    python tests/tools/bench_train.py                        # CPU: 4 layers of 128; GPU: GPT-2 124M
    python tests/tools/bench_train.py --nanogpt=../nanoGPT   # compare with a clone of nanoGPT

Both scripts train on the same tokens with the same flags, alternately, --repeats times each. On a
GPU nanoGPT also runs with bfloat16 and torch.compile; on a CPU with the flags in its README:
float32, not compiled. For each run, prints the tokens per second (from the median time per
iteration, without the first ten iterations or, in a short run, the first half), the mean loss of
the last 20 iterations, and the last log line.
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

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import SENTENCES, TRAIN, row_bytes  # noqa: E402

CUDA = torch.cuda.is_available()
SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12,
             gradient_accumulation_steps=5) if CUDA else dict(
    n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8, gradient_accumulation_steps=1)


def measure(script, flags, folder):
    """Run `script`. Returns (median seconds per iteration, mean loss, last log line)."""
    ended = subprocess.run([sys.executable, script, *flags], cwd=folder, capture_output=True,
                           text=True)
    if ended.returncode:
        sys.exit(f"{script} failed with exit status {ended.returncode}: {ended.stderr}")
    found = re.findall(r"^(iter \d+: loss ([\d.]+), time ([\d.]+)ms.*)", ended.stdout, re.M)
    skipped = min(10, len(found) // 2)
    seconds = statistics.median(float(time) / 1000 for _, _, time in found[skipped:])
    loss = statistics.mean(float(loss) for _, loss, _ in found[-20:])
    return seconds, loss, found[-1][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=pathlib.Path, help="folder of a clone of nanoGPT")
    parser.add_argument("--iters", type=int, default=200, help="iterations per run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each script")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "data", "bench")
        data.mkdir(parents=True)
        for name in "train", "val":
            (data / f"{name}.bin").write_bytes(b"".join(map(row_bytes, SENTENCES)) * 20)
        common = [f"--{key}={value}" for key, value in SHAPE.items()] + [
            f"--max_iters={flags.iters}", "--eval_interval=100000", "--eval_iters=1",
            "--learning_rate=1e-3", "--warmup_iters=20", f"--lr_decay_iters={flags.iters}",
            "--min_lr=1e-4"]
        scripts = {"train.py": (TRAIN, [*common, f"--dataset={data}", "--out_dir=out"])}
        if flags.nanogpt:
            for name in "train.py", "model.py", "configurator.py":
                shutil.copy(flags.nanogpt / name, folder)
            system = ["--device=cuda", "--compile=True"] if CUDA else [
                "--device=cpu", "--compile=False", "--dtype=float32"]
            scripts["nanoGPT"] = (pathlib.Path(folder, "train.py"), [
                *common, *system, "--dataset=bench", "--wandb_log=False"])
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
            print(f"train.py processes {ours / theirs:.2f} times as many tokens per second as"
                  " nanoGPT")


if __name__ == "__main__":
    main()
