"""Measure train.py on a GPU, beside nanoGPT: speed, memory, losses, graphs, resume, sampling.

    python tests/tools/bench_train.py --nanogpt=../nanoGPT --json=bench.json   # at most 8 minutes
    python tests/tools/bench_train.py --device=cpu --nanogpt=../nanoGPT --repeats=2

Needs PyTorch 2.5 or later and NumPy, nothing else. On a GPU, trains GPT-2 124M with
block_size=1024, compiled, in bfloat16 (float16 where the GPU lacks it); on a CPU 4 layers of 128 in
float32, not compiled. Prints a Markdown table with a row for each run:

    adamw, nanoGPT, muon   --iters iterations with the same flags; with --repeats, the first two
                           run alternately
    sampling               new tokens per second of 1 and of 16 samples
    repeated, resumed      a quarter of adamw's iterations, then resumed for another quarter.
                           "repeated" shows how far the losses of equal runs differ on this GPU
    torchrun               a quarter, in one process under torchrun, compiled (on a CPU: only
                           traced, without a C++ compiler)
    adamw, other dtypes    a quarter

Tokens/s are from the median time per iteration, without the first ten iterations or, in a short
run, the first half. Peak memory is that of PyTorch's allocator; on a CPU, that of the process. MFU
is what train.py prints; nanoGPT's follows from its speed, since nanoGPT assumes an A100. Graphs are
those of torch.compile per forward pass of the training, late graphs those compiled after iteration
0; train.py evaluates all of val.bin, whose last batch is smaller. Loss is the mean of the last ten
iterations, val loss that of the last evaluation. Difference is the largest one between a loss and
adamw's at the same iteration. A run that fails or takes too long is a row with the reason. Other
flags, for example --batch_size=4, are passed to train.py and nanoGPT.

The text is the Python code of PyTorch itself, since each machine that runs this has it, and it has
the long-range structure that synthetic text lacks. A token is a pair of bytes. Its id is its rank
by frequency: small ids are frequent, as with GPT-2's tokens, and about 7,000 ids occur.
"""
import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import torch

TRAIN = pathlib.Path(__file__).resolve().parents[2] / "train.py"
RUN_SECONDS = 150  # time limit of a run
GPU_SHAPE = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12,
                 gradient_accumulation_steps=5, learning_rate=6e-4, min_lr=6e-5)
CPU_SHAPE = dict(n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=8,
                 gradient_accumulation_steps=1, learning_rate=1e-3, min_lr=1e-4)
COLUMNS = {"tokens_per_second": "{:,.0f}", "peak_gib": "{:.2f}", "mfu": "{:.1f}%",
           "graphs": "{:.2f}", "late_graphs": "{}", "loss": "{:.4f}", "val_loss": "{:.4f}",
           "difference": "{:.4f}"}

# Runs a training script and counts what train.py and nanoGPT do not. Arguments: a backend of
# torch.compile, the script, its flags.
LAUNCHER = """
import resource, runpy, sys
import torch, torch._dynamo

compile_model, compile_graph = torch.compile, torch._dynamo.lookup_backend(sys.argv[1])
calls = {"graphs": 0, "forward passes": 0}

def counting_backend(graph, inputs):
    print("graph compiled", flush=True)
    compiled = compile_graph(graph, inputs)
    def call(*args):
        calls["graphs"] += torch.is_grad_enabled()  # not in an evaluation
        return compiled(*args)
    return call

def counting_compile(model, **options):
    compiled = compile_model(model, backend=counting_backend, **options)
    forward = getattr(compiled, "forward", compiled)
    def call(*args):
        calls["forward passes"] += torch.is_grad_enabled()
        return forward(*args)
    if forward is compiled:  # train.py compiles a function, nanoGPT a module
        return call
    compiled.forward = call
    return compiled

def report():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_initialized():
        peak = torch.cuda.max_memory_allocated()
    print("peak", peak, "calls", *calls.values(), flush=True)

torch.compile = counting_compile
del sys.argv[:2]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    report()
"""
SAMPLE = """
import sys, time
import torch
root, checkpoint, device, dtype, n_tokens = sys.argv[1:]
sys.path.insert(0, root)
from train import load_checkpoint
model = load_checkpoint(checkpoint)[0].to(device).eval()
with torch.autocast(torch.device(device).type, getattr(torch, dtype), dtype != "float32"):
    for n_samples in 1, 16:
        start = torch.zeros(n_samples, 1, dtype=torch.int64, device=device)
        model.generate(start, 2).tolist()
        t0 = time.perf_counter()
        model.generate(start, int(n_tokens)).tolist()  # waits for the GPU
        print("sampled", n_samples * int(n_tokens) / (time.perf_counter() - t0))
"""


class Failure(Exception):
    """A run failed. The message becomes the note of its row."""


def write_data(folder, n_train, n_val):
    """Write train.bin, with up to n_train tokens, and val.bin, with n_val tokens."""
    texts, size = [], 0
    for path in sorted(pathlib.Path(torch.__file__).parent.rglob("*.py")):
        texts.append(path.read_bytes())
        size += len(texts[-1])
        if size > 2 * (n_train + n_val):
            break
    pairs = np.frombuffer(b"".join(texts)[:size // 2 * 2], "<u2")
    by_frequency = np.argsort(-np.bincount(pairs, minlength=1 << 16), kind="stable")
    ids = np.empty(1 << 16, "<u2")
    ids[by_frequency] = np.minimum(np.arange(1 << 16), 50256)
    folder.mkdir(parents=True)
    ids[pairs[:n_val]].tofile(folder / "val.bin")
    ids[pairs[n_val:]].tofile(folder / "train.bin")


def losses(output):
    """{iteration: training loss} from the log lines in `output`."""
    return {int(i): float(loss)
            for i, loss in re.findall(r"^iter (\d+): loss ([-+.\w]+)", output, re.M)}


def run_program(arguments, folder, seconds):
    """Run a Python program in `folder`. Returns its exit status, or None if it was stopped after
    `seconds`, its stdout and its stderr."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": str(folder),
                                "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    stdout, stderr, status = folder / "stdout", folder / "stderr", None
    with open(stdout, "w") as out, open(stderr, "w") as err, subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=folder, env=environment,
            stdout=out, stderr=err, start_new_session=True) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # torchrun's and Inductor's, too
                os.killpg(process.pid, signal.SIGKILL)
    return status, stdout.read_text(), stderr.read_text()


class Bench:
    """The runs. Their methods return a dict with COLUMNS and "note", or raise Failure."""

    def __init__(self, flags, shape, folder):
        self.flags, self.folder, self.data = flags, folder, folder / "data" / "bench"
        self.deadline = time.monotonic() + 60 * flags.minutes - 10
        self.on_gpu = flags.device.startswith("cuda")
        self.dtypes = ["float32"]
        if self.on_gpu:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtypes = ["bfloat16"] * bf16 + ["float16", "float32"]
        self.short = max(2, flags.iters // 4)
        batch_size, block_size, n_micro = (int(shape[name]) for name in (
            "batch_size", "block_size", "gradient_accumulation_steps"))
        self.tokens_per_iter = batch_size * block_size * n_micro
        self.settings = {
            "device": flags.device, "dtype": self.dtypes[0], "compile": self.on_gpu,
            "max_iters": flags.iters - 1, "lr_decay_iters": flags.iters,
            "warmup_iters": flags.iters // 10, "eval_interval": 10**6, **shape}
        self.adamw_rows, self.nanogpt_rates, self.adamw_losses = [], [], {}
        # val.bin has four full batches and a smaller one
        write_data(self.data, self.tokens_per_iter * flags.iters,
                   (4 * batch_size + max(1, batch_size // 2)) * block_size + 1)
        (folder / "launcher.py").write_text(LAUNCHER)
        (folder / "sample.py").write_text(SAMPLE)
        if flags.nanogpt:
            for name in "train.py", "model.py", "configurator.py":
                shutil.copy(flags.nanogpt / name, folder)

    def run(self, *arguments):
        """Run a Python program within the time that is left. Returns its stdout and, if it did not
        succeed, the reason, else ""."""
        seconds = min(RUN_SECONDS, self.deadline - time.monotonic())
        if seconds < 5:
            raise Failure(f"not run: --minutes={self.flags.minutes:g} are over")
        status, stdout, stderr = run_program(arguments, self.folder, seconds)
        if status is None:
            return stdout, f"stopped after {seconds:.0f} s"
        if status == 0:
            return stdout, ""
        text = stderr.strip() or f"exit status {status}"
        errors = re.findall(r"train\.py: .*|[\w.]*(?<!ChildFailed)Error: .*", text)
        return stdout, textwrap.shorten([text.splitlines()[-1], *errors][-1], 200)

    def train(self, script=TRAIN, prefix=(), **settings):
        """Run a training script with `settings`. Returns what run() returns."""
        settings = self.settings | settings
        if script == TRAIN:
            settings = {"dataset": self.data, "eval_iters": 0} | settings
        return self.run(*prefix, "launcher.py", "inductor" if self.on_gpu else "eager", script,
                        *(f"--{name}={value}" for name, value in settings.items()))

    def measured(self, output, reason):
        """The columns of the table from the output of a training run."""
        times = [float(ms) for ms in re.findall(r"^iter \d+: .*?time ([\d.]+)ms", output, re.M)]
        if len(times) < 2:
            raise Failure(reason or "no log lines")
        seconds = statistics.median(times[min(10, len(times) // 2):]) / 1000
        row = {"tokens_per_second": self.tokens_per_iter / seconds,
               "loss": statistics.mean(list(losses(output).values())[-10:]), "note": reason}
        if mfu := re.findall(r"^iter \d+: .*mfu ([\d.]+)%", output, re.M):
            row["mfu"] = float(mfu[-1])
        if val_loss := re.findall(r"^step (?!0:)\d+: .*val loss ([-+.\w]+)", output, re.M):
            row["val_loss"] = float(val_loss[-1])
        if report := re.search(r"^peak (\d+) calls (\d+) (\d+)", output, re.M):
            peak, graphs, passes = map(int, report.groups())
            row["peak_gib"] = peak / 2**30
            if passes:
                later = output.partition("\niter 0:")[2]
                row |= {"graphs": graphs / passes, "late_graphs": later.count("graph compiled")}
        return row

    def adamw(self):
        output, reason = self.train()
        self.adamw_losses = losses(output)
        row = self.measured(output, reason)
        self.adamw_rows.append(row)
        return row

    def nanogpt(self):
        row = self.measured(*self.train(self.folder / "train.py", dataset="bench", eval_iters=1,
                                        wandb_log=False, out_dir="nanogpt"))
        row.pop("mfu", None)
        self.nanogpt_rates.append(row["tokens_per_second"])
        if self.adamw_rows:
            ours, mfu = self.adamw_rows[-1]["tokens_per_second"], self.adamw_rows[-1].get("mfu")
            if mfu:  # with the same number of FLOPs per token
                row["mfu"] = mfu * row["tokens_per_second"] / ours
            ours = statistics.median(row["tokens_per_second"] for row in self.adamw_rows)
            ratio = ours / statistics.median(self.nanogpt_rates)
            faster = f"train.py processes {ratio:.2f} times as many tokens per second"
            row["note"] = "; ".join(filter(None, [row["note"], faster]))
        return row

    def muon(self):
        if not hasattr(torch.optim, "Muon"):
            raise Failure("not run: torch.optim.Muon needs PyTorch 2.9 or later")
        return self.measured(*self.train(optimizer="muon", out_dir="muon"))

    def sampling(self):
        n_tokens = min(256, int(self.settings["block_size"]))
        output, reason = self.run("sample.py", TRAIN.parent, self.folder / "out" / "ckpt.pt",
                                  self.flags.device, self.dtypes[0], n_tokens)
        rates = re.findall(r"^sampled ([\d.]+)", output, re.M)
        if len(rates) < 2:
            raise Failure(reason)
        return {"tokens_per_second": float(rates[0]), "tokens_per_second_16": float(rates[1]),
                "note": f"{n_tokens} tokens; 16 samples: {float(rates[1]):,.0f} tokens/s"}

    def compared(self, **settings):
        """A run that should have the losses of the run "adamw"."""
        output, reason = self.train(**settings)
        row, found = self.measured(output, reason), losses(output)
        if common := found.keys() & self.adamw_losses.keys():
            row["difference"] = max(abs(found[i] - self.adamw_losses[i]) for i in common)
        return row

    def runs(self):
        """Triples (title, method, arguments). The most important runs are first."""
        short = {"max_iters": self.short - 1}
        for _ in range(self.flags.repeats):
            yield f"adamw, {self.dtypes[0]}", self.adamw, {}
            if self.flags.nanogpt:
                yield f"nanoGPT, {self.dtypes[0]}", self.nanogpt, {}
        yield f"muon, {self.dtypes[0]}", self.muon, {}
        yield f"sampling, {self.dtypes[0]}", self.sampling, {}
        yield "repeated", self.compared, short | {"out_dir": "repeated"}
        yield "resumed", self.compared, {
            "init_from": "resume", "out_dir": "repeated", "max_iters": 2 * self.short - 1}
        launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"
        yield "torchrun", self.compared, short | {
            "prefix": launcher, "compile": True, "out_dir": "torchrun"}
        for dtype in self.dtypes[1:]:
            yield f"adamw, {dtype}", self.compared, short | {"dtype": dtype, "out_dir": dtype}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=pathlib.Path, help="folder of a clone of nanoGPT")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--iters", type=int, help="default: 60 on a GPU, 200 on a CPU")
    parser.add_argument("--repeats", type=int, default=1, help="runs of adamw and of nanoGPT")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of the program")
    parser.add_argument("--json", type=pathlib.Path, help="also write the results to this file")
    flags, others = parser.parse_known_args()
    on_gpu = flags.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("no GPU here; --device=cpu measures the CPU")
        return
    if flags.nanogpt and not (flags.nanogpt / "model.py").is_file():
        parser.error(f"--nanogpt={flags.nanogpt}: no clone of nanoGPT")
    flags.iters = flags.iters or (60 if on_gpu else 200)
    shape = dict(GPU_SHAPE if on_gpu else CPU_SHAPE)
    for word in others:
        name, _, value = word.removeprefix("--").partition("=")
        shape[name] = value
    results = {"device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
               "torch": torch.__version__, "python": platform.python_version(),
               "iters": flags.iters, **shape}
    print(", ".join(f"{name} {value}" for name, value in results.items()) + "\n\n"
          "| run | tokens/s | peak GiB | MFU | graphs | late graphs | loss | val loss | difference"
          " | note |\n| ---" + " | ---:" * len(COLUMNS) + " | --- |", flush=True)
    results["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(flags, shape, pathlib.Path(folder))
        for title, method, arguments in bench.runs():
            start = time.monotonic()
            try:
                row = method(**arguments)
            except Failure as error:
                row = {"failed": True, "note": str(error)}
            results["rows"].append({"run": title, "seconds": time.monotonic() - start, **row})
            cells = [layout.format(row[name]) if name in row else ""
                     for name, layout in COLUMNS.items()]
            print("| " + " | ".join([title, *cells, row["note"]]) + " |", flush=True)
            if flags.json:
                flags.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
