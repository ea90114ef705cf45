"""train.py, run as a user runs it, and its model held against other implementations."""
import io
import json
import math
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, TRAIN, wait_for
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))
import train as module  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--learning_rate=1e-2",
         "--gradient_accumulation_steps=2", "--warmup_iters=2", "--lr_decay_iters=30", "--min_lr=1e-3",
         "--eval_iters=3", "--device=cpu"]
MODEL_ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=len(LETTERS), dropout=0.0)


def write_letters(folder, text):
    """A data set of nanoGPT's character-level form."""
    folder.mkdir(parents=True)
    ids = np.array([LETTERS.index(sign) for sign in text if sign in LETTERS], "<u2")
    cut = len(ids) // 10
    ids[cut:].tofile(folder / "train.bin")
    ids[:cut].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({
        "vocab_size": len(LETTERS), "stoi": {sign: i for i, sign in enumerate(LETTERS)},
        "itos": dict(enumerate(LETTERS))}))
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("data") / "letters", SAMPLE.read_text(encoding="utf-8"))


@pytest.fixture
def train(prepare, letters, tmp_path):
    """train(*flags) trains a very small GPT on letters into tmp_path/out and returns the CompletedProcess."""
    def run(*flags, **options):
        return prepare(f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, *flags, script=TRAIN, **options)
    return run


@pytest.fixture
def start(command, letters, tmp_path):
    """start(*flags) starts such a run and returns its Popen, its output a pipe."""
    started = []

    def run(*flags):
        arguments, environment = command(f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, *flags,
                                         script=TRAIN)
        started.append(subprocess.Popen(arguments, env=environment | {"PYTHONUNBUFFERED": "1"}, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def checkpoint_in(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same_state(one, other):
    """Whether two checkpoints hold the same weights and optimizer, to the bit."""
    states = [[checkpoint["model"], *checkpoint["optimizer"]["state"].values()] for checkpoint in (one, other)]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(*states))


def losses(text):
    """{iteration: loss} of the log lines in `text`."""
    return {int(line.split()[1][:-1]): float(line.split()[3].strip(",")) for line in text.splitlines()
            if line.startswith("iter ")}


# -----------------------------------------------------------------------------
# the model


def reference_logits(state, idx, n_head, gelu="none"):
    """GPT-2's forward pass written out, attention as a table of weights, from a state dict in the interface's names."""
    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    B, T = idx.shape
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(sum(key.endswith("ln_1.weight") for key in state)):
        name = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.arange(T)[:, None] < torch.arange(T), -torch.inf)
        y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(B, T, -1)
        x = x + linear(y, f"{name}.attn.c_proj")
        h = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2))) if gelu == "none" else \
            0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        x = x + linear(h, f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def loud(model):
    """`model` with weights large enough that every part of it matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_model_against_an_independent_forward_pass(bias, gelu):
    config = module.GPTConfig(block_size=12, vocab_size=1100, n_layer=3, n_head=4, n_embd=32, bias=bias)
    model = loud(module.GPT(config, gelu))
    idx = torch.randint(1100, (2, 12))
    wanted = reference_logits(model.state_dict(), idx, 4, gelu)
    torch.testing.assert_close(model(idx), wanted, atol=1e-4, rtol=1e-4)
    targets = torch.randint(1100, (2, 12))
    loss = model(idx, targets)  # in chunks
    torch.testing.assert_close(loss, F.cross_entropy(wanted.flatten(0, 1), targets.flatten()), atol=1e-4, rtol=1e-4)
    loss.backward()
    by_chunks = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(by_chunks[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_parameters_are_named_shaped_and_set_as_the_interface_has_it():
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128, bias=True))
    shapes = {"transformer.wte.weight": (512, 128), "transformer.wpe.weight": (64, 128), "lm_head.weight": (512, 128),
              "transformer.ln_f.weight": (128,), "transformer.ln_f.bias": (128,)}
    for i in range(8):
        for name, out, width in ("attn.c_attn", 384, 128), ("attn.c_proj", 128, 128), ("mlp.c_fc", 512, 128), \
                ("mlp.c_proj", 128, 512):
            shapes |= {f"transformer.h.{i}.{name}.weight": (out, width), f"transformer.h.{i}.{name}.bias": (out,)}
        for name in "ln_1", "ln_2":
            shapes |= {f"transformer.h.{i}.{name}.{kind}": (128,) for kind in ("weight", "bias")}
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, tensor in state.items():
        if tensor.dim() > 1:
            wanted = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(tensor.std() / wanted - 1) < 0.05 and abs(tensor.mean()) < wanted / 20, name
        else:
            assert (tensor == (0 if name.endswith("bias") else 1)).all(), name
    decayed, others = model.optimizer(module.Config(), torch.device("cpu")).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [name for name in names.values() if len(shapes[name]) == 2]
    assert [names[id(p)] for p in others["params"]] == [name for name in names.values() if len(shapes[name]) == 1]
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.1, 0.0, (0.9, 0.95))


def test_gpt2_weights_give_the_logits_of_transformers(tmp_path, prepare):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=4)))
    theirs.save_pretrained(tmp_path / "gpt2", safe_serialization=True)
    ours = module.read_gpt2(str(tmp_path / "gpt2"), module.Config(block_size=32)).eval()
    idx = torch.randint(50257, (2, 32))
    wanted = theirs(idx).logits.detach()
    torch.testing.assert_close(ours(idx), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
    ended = prepare("--sample=True", f"--init_from={tmp_path / 'gpt2'}", "--block_size=16", "--num_samples=1",
                    "--max_new_tokens=20", "--device=cpu", "--top_k=1", script=TRAIN)
    assert ended.returncode == 0 and ended.stdout.endswith("---------------\n"), ended.stderr
    ours = module.read_gpt2(str(tmp_path / "gpt2"), module.Config(block_size=16)).eval()
    torch.testing.assert_close(ours(idx[:, :16]), theirs(idx[:, :16]).logits.detach(),
                               atol=1e-4 * wanted.abs().max().item(), rtol=0)


def test_schedule():
    config = module.Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [module.learning_rate(config, i) for i in range(200)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and all(rate == 0.1 for rate in rates[110:])
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    config.decay_lr = False
    assert module.learning_rate(config, 0) == module.learning_rate(config, 500) == 1.0


# -----------------------------------------------------------------------------
# training


def test_training(train, letters, tmp_path):
    ended = train("--max_iters=60", "--eval_interval=30", "--log_interval=2")
    assert ended.returncode == 0, ended.stderr
    seen = losses(ended.stdout)
    assert list(seen) == list(range(0, 61, 2)) and seen[60] < seen[0] - 0.5
    steps = [line for line in ended.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 0", "step 30", "step 60", "step 61"]
    assert all("perplexity" in line for line in steps) and ended.stdout.count("sample: ") == 4
    assert "tokens/s" in ended.stdout and " left" in ended.stdout
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "log.jsonl", "loss.png"}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {record["iter"]: round(record["loss"], 4) for record in records if "loss" in record} == seen
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = checkpoint_in(out)
    assert checkpoint["iter_num"] == 61 and checkpoint["model_args"] == MODEL_ARGS
    assert checkpoint["config"]["dataset"] == str(letters)
    # the same evaluation once more, by another way: val loss of the independent forward pass on all of val
    ended = train("--init_from=resume", "--eval_only=True", "--eval_iters=0")
    ids = torch.from_numpy(np.fromfile(letters / "val.bin", "<u2").astype(np.int64))
    loss = 0.0
    for first in range(0, len(ids) - 1, 16):
        block = ids[first:first + 17]
        logits = reference_logits(checkpoint["model"], block[None, :-1], 2)[0]
        loss += F.cross_entropy(logits, block[1:], reduction="sum").item()
    assert f"val loss {loss / (len(ids) - 1):.4f}" in ended.stdout
    assert torch.equal(checkpoint_in(out)["model"]["lm_head.weight"], checkpoint["model"]["lm_head.weight"])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_to_the_bit(train, start, tmp_path, dropout):
    flags = f"--dropout={dropout}", "--max_iters=40", "--eval_interval=7"
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    resume, stops = [], 0
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGTERM, None:
        process = start(*flags, *resume)
        for line in process.stdout:
            if number and line.startswith("iter "):
                process.send_signal(number)
                break
        rest, errors = process.communicate(timeout=60)
        if number:
            assert process.returncode == 128 + number and "--init_from=resume" in rest, errors
            stops += 1
        resume = ["--init_from=resume"]
    assert process.returncode == 0 and stops == 3, errors
    whole, parts = checkpoint_in(tmp_path / "whole"), checkpoint_in(tmp_path / "out")
    assert whole["iter_num"] == parts["iter_num"] == 41 and same_state(whole, parts)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "out")]
    assert [[record.get("loss") for record in log if "loss" in record] for log in logs][0] == \
        [record.get("loss") for record in logs[1] if "loss" in record]


def test_killed_while_saving(train, start, tmp_path):
    flags = "--max_iters=400", "--eval_interval=1", "--n_embd=256", "--eval_iters=1", "--dropout=0.1"
    process = start(*flags)
    new, saved = tmp_path / "out" / "ckpt.pt.new", tmp_path / "out" / "ckpt.pt"
    wait_for(lambda: new.exists() and saved.exists(), process)
    process.kill()
    process.wait()
    assert checkpoint_in(tmp_path / "out")["iter_num"] > 0
    last = checkpoint_in(tmp_path / "out")["iter_num"] + 3
    flags = f"--max_iters={last}", *flags[1:]
    assert train(*flags, "--init_from=resume").returncode == 0
    parts = checkpoint_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert train(*flags).returncode == 0
    assert same_state(checkpoint_in(tmp_path / "out"), parts)


@pytest.fixture
def torchrun(command, letters, tmp_path):
    """torchrun(*flags) starts such a run in two processes and returns the Popen of torchrun."""
    started = []

    def run(*flags, **environment):
        arguments, environment = command(f"--dataset={letters}", f"--out_dir={tmp_path / 'two'}", *SMALL, *flags,
                                         script=TRAIN, **environment)
        arguments[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        started.append(subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_are_one(torchrun, train, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, glob, os\n"
        "atexit.register(lambda: 'RANK' in os.environ and print('threads at the end:', *sorted(\n"
        "    open(name).read().strip() for name in glob.glob('/proc/self/task/*/comm'))))\n")
    flags = "--max_iters=20", "--eval_interval=10", "--eval_iters=0", "--gradient_accumulation_steps=4", "--dropout=0.1"
    one, job = train(*flags).stdout, torchrun(*flags, PYTHONPATH=str(tmp_path))
    two, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert two.count("threads at the end:") == 2
    assert "gloo" not in two, "a thread of gloo's that outlives Python may end the process with SIGABRT"
    assert one.count("\nstep ") == two.count("\nstep ") == 4, "only one process writes"
    for kind in "iter", "step":
        numbers = [[float(word.strip(",")) for line in text.splitlines() if line.startswith(kind)
                    for before, word in zip(line.split(), line.split()[1:]) if before == "loss"] for text in (one, two)]
        assert len(numbers[0]) > 3
        np.testing.assert_allclose(*numbers, atol=1e-4)


def test_process_of_a_job_that_dies(torchrun, tmp_path):
    """The other one ends with a line, the last checkpoint stands, and the job goes on from it."""
    flags = "--eval_interval=10", "--eval_iters=1", "--log_interval=10"
    job = torchrun(*flags, "--max_iters=1000000")
    wait_for((tmp_path / "two" / "ckpt.pt").exists, job)
    workers = list(map(int, pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()))
    os.kill(next(pid for pid in workers if b"\0RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()),
            signal.SIGKILL)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and "train.py: another process of the job" in errors, errors
    assert f"{TRAIN}\", line" not in errors, "a traceback of ours"
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers)
    reached = checkpoint_in(tmp_path / "two")["iter_num"]
    job = torchrun(*flags, f"--max_iters={reached + 10}", "--init_from=resume")
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 0 and f"iter {reached}: " in output, errors
    assert checkpoint_in(tmp_path / "two")["iter_num"] == reached + 11


def test_data_that_is_replaced_while_training(train, start, letters, tmp_path):
    """Moved into its place, as prepare.py does it, another file is not noticed; written into it ends the run."""
    flags = "--max_iters=300", "--eval_interval=100"
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    data = shutil.copytree(letters, tmp_path / "data")
    process = start(f"--dataset={data}", *flags)
    wait_for((tmp_path / "out" / "log.jsonl").exists, process)
    for name in "train.bin", "val.bin":
        (tmp_path / name).write_bytes(b"\1\0" * 100)
        os.replace(tmp_path / name, data / name)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert same_state(checkpoint_in(tmp_path / "out"), checkpoint_in(tmp_path / "whole"))

    for change in shorter, same_size:
        shutil.rmtree(data)
        shutil.copytree(letters, data)
        process = start(f"--dataset={data}", "--max_iters=1000000", "--eval_interval=100")
        saved = (tmp_path / "out" / "ckpt.pt").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "out" / "ckpt.pt").stat().st_mtime_ns != saved, process)
        change(data / "train.bin")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and errors.count("\n") == 1 and "train.bin: was changed while training" in errors
        assert checkpoint_in(tmp_path / "out")["iter_num"] >= 100


def shorter(path):
    os.truncate(path, 100)


def same_size(path):
    path.write_bytes(bytes(path.stat().st_size))


def test_nanogpt_checkpoint_is_resumed(train, tmp_path):
    """One in the interface's form and no more, its keys as compiled models have them, and an optimizer of its own."""
    assert train("--max_iters=9", "--eval_interval=5").returncode == 0
    ours = checkpoint_in(tmp_path / "out")
    assert train("--max_iters=19", "--eval_interval=5", "--init_from=resume").returncode == 0
    wanted = checkpoint_in(tmp_path / "out")
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num", "best_val_loss", "config")}
    theirs["model"] = {f"_orig_mod.{name}": tensor for name, tensor in ours["model"].items()}
    for group in theirs["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(theirs, tmp_path / "out" / "ckpt.pt")
    assert train("--max_iters=19", "--eval_interval=5", "--init_from=resume").returncode == 0
    assert same_state(checkpoint_in(tmp_path / "out"), wanted)


def test_best_checkpoint_alone(train, tmp_path):
    flags = "--always_save_checkpoint=False", "--eval_interval=2", "--max_iters=8", "--learning_rate=3", "--min_lr=3"
    ended = train(*flags)
    assert ended.returncode == 0, ended.stderr
    found = {int(line.split()[1][:-1]): float(line.split()[7].strip(",")) for line in ended.stdout.splitlines()
             if line.startswith("step ")}
    best = min(found, key=found.get)
    if best:
        assert checkpoint_in(tmp_path / "out")["iter_num"] == best
    else:
        assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_config_file(prepare, letters, tmp_path):
    (tmp_path / "config.py").write_text("import time\nhelper = 'x' + str(time.time())\nmax_iters = 2 * 2\n"
                                        "min_lr = learning_rate / 10\nn_layer = 1\ndropout = 0\neval_iters=1\n")
    ended = prepare(str(tmp_path / "config.py"), "--n_layer=3", f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}",
                    "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=1", script=TRAIN)
    assert ended.returncode == 0, ended.stderr
    saved = checkpoint_in(tmp_path / "out")
    assert (saved["iter_num"], saved["model_args"]["n_layer"], saved["config"]["min_lr"]) == (5, 3, 6e-4 / 10)


@pytest.mark.parametrize("text, message", [
    ("n_layer = 'two'", "n_layer: a whole number is wanted, not 'two'"), ("n_layer = = 2", "SyntaxError"),
    ("n_layer = nothing", "NameError"), (None, "No such file")])
def test_bad_config_files(refused, tmp_path, text, message):
    if text:
        (tmp_path / "config.py").write_text(text)
    line = refused(str(tmp_path / "config.py"), status=2, script=TRAIN)
    assert message in line and "config.py" in line


def test_memory_does_not_grow_with_the_file(command, letters, tmp_path):
    peaks = []
    for size in 1 << 20, 1 << 30:
        folder = tmp_path / str(size)
        shutil.copytree(letters, folder)
        os.truncate(folder / "train.bin", size)
        arguments, environment = command(f"--dataset={folder}", f"--out_dir={tmp_path / 'out'}", *SMALL,
                                         "--batch_size=64", "--max_iters=50", script=TRAIN)
        code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
                " print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
        ended = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
        peaks.append(int(ended.stdout) / 1024)
    assert peaks[1] < peaks[0] + 150, "MiB resident"


# -----------------------------------------------------------------------------
# sampling


def test_sampling(train, tmp_path):
    assert train("--max_iters=30").returncode == 0
    flags = "--sample=True", "--num_samples=2", "--max_new_tokens=40", "--start=the "
    first = train(*flags).stdout
    assert first == train(*flags).stdout and first != train(*flags, "--seed=1").stdout
    texts = first.split("\n---------------\n")
    assert [len(text) for text in texts] == [44, 44, 0] and all(text.startswith("the ") for text in texts[:2])
    (tmp_path / "prompt.txt").write_text("the ")
    assert train(*flags[:3], f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout == first
    greedy = train("--sample=True", "--num_samples=1", "--max_new_tokens=40", "--start=the ", "--top_k=1").stdout
    state, ids = checkpoint_in(tmp_path / "out")["model"], [LETTERS.index(sign) for sign in "the "]
    for _ in range(40):
        ids.append(reference_logits(state, torch.tensor([ids[-16:]]), 2)[0, -1].argmax().item())
    assert greedy == "".join(LETTERS[i] for i in ids) + "\n---------------\n"


# -----------------------------------------------------------------------------
# refusals

BAD_FLAGS = [
    ("--n_heads=2", 2, "did you mean --n_head?"), ("--batch_size=many", 2, "a whole number is wanted, not 'many'"),
    ("--learning_rate=fast", 2, "a number is wanted"), ("--compile=yes", 2, "True or False is wanted"),
    ("--batch_size=1.5", 2, "a whole number is wanted"), ("stray", 2, "stray"),
    ("--n_head=3", 1, "do not divide --n_embd"), ("--batch_size=0", 1, "--batch_size=0"),
    ("--block_size=-1", 1, "--block_size=-1"), ("--dropout=1.5", 1, "--dropout=1.5"),
    ("--learning_rate=nan", 1, "--learning_rate=nan"), ("--dtype=int8", 1, "--dtype=int8"),
    ("--device=tpu9", 1, "--device=tpu9"), ("--device=cuda", 1, "--device=cuda"), ("--backend=mpi", 1, "--backend=mpi"),
    ("--init_from=gpt5", 1, "--init_from=gpt5"), ("--init_from=resume", 1, "no such checkpoint"),
    ("--block_size=100000", 1, "too few for --block_size"), ("--dataset=nothing/here", 1, "prepare.py"),
    ("--sample=True", 1, "no such checkpoint"), ("--init_from=gpt2", 1, "weights can't be had"),
]


@pytest.mark.parametrize("flag, status, message", BAD_FLAGS, ids=[flag for flag, *_ in BAD_FLAGS])
def test_bad_flags(refused, letters, tmp_path, flag, status, message):
    if flag == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, flag, status=status, script=TRAIN)
    assert message in line and not (tmp_path / "out").exists()


def spoil(name, change):
    def make(folder):
        body = bytearray((folder / name).read_bytes())
        (folder / name).write_bytes(change(body))
    return make


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


BAD_DATA = {
    "odd": (spoil("train.bin", lambda body: body[:-1]), "not a whole number of uint16"),
    "short": (spoil("val.bin", lambda body: body[:20]), "10 tokens are too few"),
    "id": (spoil("val.bin", lambda body: body[:100] + b"\xff\x00" + body[102:]), "token 50 is 255"),
    "stats": (lambda folder: (folder / "stats.json").write_text('{"train": {"bytes": 6}}'), "stats.json says 6"),
    "gone": (lambda folder: (folder / "val.bin").unlink(), "val.bin"),
    "stranger": (lambda folder: (folder / "meta.pkl").write_bytes(pickle.dumps(Bomb())), "more than plain data"),
    "garbage": (lambda folder: (folder / "meta.pkl").write_bytes(b"garbage"), "meta.pkl"),
    "nameless": (lambda folder: (folder / "meta.pkl").write_bytes(pickle.dumps({"x": 1})), "names no vocab_size"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(refused, letters, tmp_path, kind):
    make, message = BAD_DATA[kind]
    shutil.copytree(letters, tmp_path / "data")
    make(tmp_path / "data")
    line = refused(f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", *SMALL, script=TRAIN)
    assert message in line and str(tmp_path / "data") in line
    assert not (tmp_path / "out").exists() and not pathlib.Path("bomb").exists()


def test_bad_checkpoints(refused, train, letters, tmp_path):
    assert train("--max_iters=1").returncode == 0
    path = tmp_path / "out" / "ckpt.pt"
    body = path.read_bytes()
    flags = f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, "--init_from=resume"
    for cut in 0, len(body) // 2, len(body) - 1:
        path.write_bytes(body[:cut])
        assert "is broken, or no checkpoint" in refused(*flags, script=TRAIN)
        assert path.read_bytes() == body[:cut]
    for cut in {*range(0, len(body), 997), *range(len(body) - 200, len(body))}:
        path.write_bytes(body[:cut])
        with pytest.raises(module.Refused, match="is broken, or no checkpoint"):
            module.read_checkpoint(path, "cpu")
    path.write_bytes(body)
    assert "has 2" in refused(*flags, "--n_layer=3", script=TRAIN)
    assert "leaves nothing to do" in refused(*flags, "--max_iters=1", script=TRAIN)
    torch.save({"model": Bomb()}, path)
    assert "is broken, or no checkpoint" in refused(*flags, script=TRAIN) and not pathlib.Path("bomb").exists()
    for change in {"model_args": {"n_layer": 5}}, {"model": {}}, {"optimizer": {}}:
        checkpoint = torch.load(io.BytesIO(body), weights_only=True)
        if "model_args" in change:
            checkpoint["model_args"] |= change["model_args"]
        else:
            checkpoint |= change
        torch.save(checkpoint, path)
        arguments = [flag for flag in flags if not flag.startswith("--n_layer")]
        assert "ckpt.pt" in refused(*arguments, script=TRAIN)


def test_loss_that_is_no_longer_finite(train, tmp_path):
    assert train("--max_iters=5", "--eval_interval=5").returncode == 0
    before = checkpoint_in(tmp_path / "out")
    ended = train("--init_from=resume", "--max_iters=50", "--eval_interval=3", "--learning_rate=1e30", "--min_lr=1e30",
                  "--grad_clip=0.0")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("train.py: the loss") and "the last checkpoint stands" in ended.stderr
    assert same_state(checkpoint_in(tmp_path / "out"), before)


def test_full_disk_while_saving(train, tmp_path):
    assert train("--max_iters=3").returncode == 0
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    ended = train("--init_from=resume", "--max_iters=6", "--eval_interval=3", before=(
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"))
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert "can't be written" in ended.stderr and (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    assert not (tmp_path / "out" / "ckpt.pt.new").exists()
