"""train.py, run as a user runs it, and its model compared with other implementations."""
import importlib.util
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, TRAIN, gpt2, row_bytes, wait_for
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))
import train as module  # noqa: E402

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
         "--learning_rate=1e-2", "--gradient_accumulation_steps=2", "--warmup_iters=2",
         "--lr_decay_iters=30", "--min_lr=1e-3", "--eval_iters=3", "--device=cpu"]
MODEL_ARGS = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=50304,
                  dropout=0.0)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The sample's token ids, a tenth of its sentences in val.bin."""
    folder = tmp_path_factory.mktemp("letters")
    rows = SAMPLE.read_text(encoding="utf-8").splitlines()
    for name, part in ("val", rows[:45]), ("train", rows[45:]):
        (folder / f"{name}.bin").write_bytes(b"".join(map(row_bytes, part)))
    return folder


@pytest.fixture
def train(prepare, letters, tmp_path):
    """train(*flags) trains a very small GPT into tmp_path/out; returns the CompletedProcess."""
    def run(*flags, **options):
        return prepare(f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, *flags,
                       script=TRAIN, **options)
    return run


@pytest.fixture
def start(command, letters, tmp_path):
    """start(*flags) starts such a run and returns its Popen; start.job(*flags) with torchrun."""
    started = []

    def run(*flags, launcher=(), out="out", **environment):
        arguments, environment = command(f"--dataset={letters}", f"--out_dir={tmp_path / out}",
                                         *SMALL, *flags, script=TRAIN, **environment)
        arguments[1:1] = launcher
        started.append(subprocess.Popen(
            arguments, env=environment | {"PYTHONUNBUFFERED": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    run.job = lambda *flags, **options: run(
        *flags, out="two", **options,
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    yield run
    for process in started:
        process.kill()
        process.communicate()


def checkpoint_in(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same_state(one, other):
    """Whether two checkpoints have the same weights and optimizer state, bit for bit."""
    states = [[checkpoint["model"], *checkpoint["optimizer"]["state"].values(),
               *checkpoint.get("muon", {"state": {}})["state"].values()]
              for checkpoint in (one, other)]
    return len(states[0]) == len(states[1]) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(*states))


def losses(text):
    """{iteration: loss} of the log lines in `text`."""
    return {int(n): float(loss) for n, loss in
            re.findall(r"^iter (\d+): loss ([\d.]+),", text, re.M)}


def steps(text):
    """{iteration: val loss} of the evaluations in `text`."""
    return {int(n): float(loss) for n, loss in
            re.findall(r"^step (\d+): train loss [\d.]+, val loss ([\d.]+)$", text, re.M)}


# model ---------------------------------------------------------------------


def reference_logits(state, idx, n_head, activation="gelu"):
    """GPT-2's forward pass, attention as a matrix, from a state dict with the interface's names."""
    def norm(x, name):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return ((x - mean) / (variance + 1e-5).sqrt() * state[f"{name}.weight"]
                + state.get(f"{name}.bias", 0))

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    B, T = idx.shape
    x = state["transformer.wte.weight"][idx] + state["transformer.wpe.weight"][:T]
    for i in range(sum(key.endswith("ln_1.weight") for key in state)):
        name = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.arange(T)[:, None] < torch.arange(T), -torch.inf)
        y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(B, T, -1)
        x = x + linear(y, f"{name}.attn.c_proj")
        h = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = h / 2 * (1 + (torch.erf(h / math.sqrt(2)) if activation == "gelu" else
                          torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))))
        x = x + linear(h, f"{name}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def loud(model):
    """`model` with weights large enough that every part of it matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


KINDS = pytest.mark.parametrize("bias, activation", [
    (True, "gelu"), (True, "gelu_new"), (False, "gelu"), (False, "gelu_new")])


@KINDS
def test_model_against_an_independent_forward_pass(bias, activation):
    model = loud(module.GPT(module.GPTConfig(
        block_size=12, vocab_size=1100, n_layer=3, n_head=4, n_embd=32, bias=bias,
        activation_function=activation)))
    idx, targets = torch.randint(1100, (2, 2, 12))
    wanted = reference_logits(model.state_dict(), idx, 4, activation)
    logits, nothing = model(idx)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    no_logits, loss = model(idx, targets)
    assert nothing is None and no_logits is None
    reference = F.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=1e-4)
    loss.backward()
    chunked = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_parameters_have_the_names_shapes_and_initial_values_of_the_interface():
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4,
                                        n_embd=128, bias=True))
    shapes = {"transformer.wte.weight": (512, 128), "transformer.wpe.weight": (64, 128),
              "lm_head.weight": (512, 128), "transformer.ln_f.weight": (128,),
              "transformer.ln_f.bias": (128,)}
    for i in range(8):
        for name, out, width in (("attn.c_attn", 384, 128), ("attn.c_proj", 128, 128),
                                 ("mlp.c_fc", 512, 128), ("mlp.c_proj", 128, 512)):
            shapes |= {f"transformer.h.{i}.{name}.weight": (out, width),
                       f"transformer.h.{i}.{name}.bias": (out,)}
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

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [name for name in names.values() if ".h." in name and len(shapes[name]) == 2]
    for muon in False, True:
        optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu", muon)
        decayed, others = optimizers["optimizer"].param_groups
        assert [names[id(p)] for p in decayed["params"]] == [
            name for name in names.values()
            if len(shapes[name]) == 2 and not (muon and name in blocks)]
        assert [names[id(p)] for p in others["params"]] == [
            name for name in names.values() if len(shapes[name]) == 1]
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        assert decayed["betas"] == others["betas"] == (0.9, 0.95)
        assert set(optimizers) == ({"optimizer", "muon"} if muon else {"optimizer"})
    group, = optimizers["muon"].param_groups
    assert [names[id(p)] for p in group["params"]] == blocks
    assert group["adjust_lr_fn"] == "match_rms_adamw" and group["weight_decay"] == 0.1


def test_schedule():
    config = module.Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [module.get_lr(i, config) for i in range(200)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    assert all(rate == 0.1 for rate in rates[110:])
    config.decay_lr = False
    assert module.get_lr(0, config) == module.get_lr(500, config) == 1.0


def test_dtype_without_native_bfloat16(monkeypatch):
    """An older GPU has bfloat16 by emulation only, which is slow: the default is float16."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    for native in False, True:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native)
        config = module.Config(device="cuda:0")
        module.init_device(config)
        assert config.dtype == ("bfloat16" if native else "float16")


def test_gpt2_weights_give_the_logits_of_transformers(tmp_path):
    """In the form of OpenAI's file on the Hub: no prefix, the masks included."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    theirs = loud(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=4)))
    theirs.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = module.GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(50257, (2, 32))
    wanted = theirs(idx).logits.detach()
    close = dict(atol=1e-4 * wanted.abs().max().item(), rtol=0)
    torch.testing.assert_close(ours(idx)[0], wanted, **close)
    ours.crop_block_size(16)
    torch.testing.assert_close(ours(idx[:, :16])[0], theirs(idx[:, :16]).logits.detach(), **close)


@KINDS
def test_export(prepare, refused, tmp_path, bias, activation):
    transformers = pytest.importorskip("transformers")
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, bias=bias, vocab_size=50304,
                dropout=0.0)
    model = loud(module.GPT(module.GPTConfig(**args, activation_function=activation)))
    torch.save({"model": model.state_dict(), "model_args": args,
                "activation_function": activation}, tmp_path / "ckpt.pt")
    flags, folder = (f"--out_dir={tmp_path}", f"--export={tmp_path / 'gpt'}"), tmp_path / "gpt"
    ended = prepare(*flags, script=TRAIN, before=(
        "import os, shutil\nshutil.copy = lambda *arguments: os._exit(9)"))
    assert ended.returncode == 9 and not folder.exists(), "all or nothing"
    ended = prepare(*flags, script=TRAIN)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "gpt"}

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.randint(50257, (2, 16))
    wanted = model(idx)[0][..., :50257].detach()
    torch.testing.assert_close(theirs(idx).logits.detach(), wanted,
                               atol=1e-4 * wanted.abs().max().item(), rtol=0)
    text = " it's a lamp ,\n\n and\tthe 11 stairs \u00e9\u4e2d<|endoftext|>"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == gpt2().encode(text, allowed_special="all") and tokenizer.decode(ids) == text

    again = module.GPT.from_pretrained(str(folder)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor[:len(again[name])])
    assert all((again[name] == 0).all() for name in again.keys() - model.state_dict().keys())
    assert again["lm_head.weight"].shape == (50257, 32)
    assert "Directory not empty" in refused(*flags, script=TRAIN)
    ended = prepare("--sample=True", f"--init_from={folder}", "--block_size=8", "--num_samples=1",
                    "--max_new_tokens=12", "--device=cpu", script=TRAIN)
    assert ended.returncode == 0 and ended.stdout.endswith("---------------\n"), ended.stderr


# training ------------------------------------------------------------------

WANDB = """
import json, pathlib
def init(**settings): pathlib.Path("{path}").write_text(json.dumps(settings["project"]) + "\\n")
def log(record): open("{path}", "a").write(json.dumps(record) + "\\n")
"""


def test_training(train, letters, tmp_path):
    (tmp_path / "wandb.py").write_text(WANDB.format(path=tmp_path / "wandb.jsonl"))
    ended = train("--max_iters=20", "--eval_interval=10", "--log_interval=2", "--wandb_log=True",
                  PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    seen = losses(ended.stdout)
    assert list(seen) == list(range(0, 21, 2)) and seen[20] < seen[0] - 0.5
    assert list(steps(ended.stdout)) == [0, 10, 20, 21]
    lines = re.findall(r"^iter (\d+): loss [\d.]+, time ([\d.]+)ms, mfu [\d.]+%, [\d,]+ tokens/s"
                       r"(?:, (\d+):(\d\d):(\d\d) left)?$", ended.stdout, re.M)
    assert len(lines) == len(seen) and lines[0][2] == ""  # the first iteration may compile
    for n, ms, *left in lines[1:]:
        hours, minutes, seconds = map(int, left)
        wanted = float(ms) / 1000 * (20 - int(n))
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(wanted, abs=0.51)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "log.jsonl", "loss.png"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = module.read_log(out / "log.jsonl")
    assert {r["iter"]: round(r["loss"], 4) for r in records if "loss" in r} == seen
    project, *logged = map(json.loads, (tmp_path / "wandb.jsonl").read_text().splitlines())
    assert project == "owt" and [record["iter"] for record in logged] == [0, 10, 20, 21]
    assert all(record.keys() == {"iter", "train/loss", "val/loss", "lr", "mfu"}
               for record in logged)
    assert [round(record["val/loss"], 4) for record in logged] == list(steps(ended.stdout).values())

    checkpoint = checkpoint_in(out)
    assert checkpoint["iter_num"] == 21 and checkpoint["model_args"] == MODEL_ARGS
    assert checkpoint["config"]["dataset"] == str(letters) and "muon" not in checkpoint
    assert f"{out / 'ckpt.pt'} has iteration 21" in ended.stdout.splitlines()[-1]
    # the loss on all full blocks of val.bin by the independent forward pass
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    ended = train("--init_from=resume", "--eval_only=True", "--eval_iters=0")
    ids = torch.from_numpy(np.fromfile(letters / "val.bin", "<u2").astype(np.int64))
    n = (len(ids) - 1) // 16 * 16
    logits = reference_logits(checkpoint["model"], ids[:n].view(-1, 16), 2)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[1:n + 1]).item()
    assert steps(ended.stdout) == {21: pytest.approx(loss, abs=1e-4)}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("flags", [["--dropout=0.2"], ["--optimizer=muon", "--dropout=0.1"]])
def test_resumed_to_the_bit(train, start, refused, letters, tmp_path, flags):
    flags = *flags, "--max_iters=16", "--eval_interval=7"
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    resume = []
    for number in signal.SIGTERM, signal.SIGINT, None:
        process = start(*flags, *resume)
        if number:
            next(line for line in process.stdout if line.startswith("iter "))
            process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == (128 + number if number else 0) and errors == "", errors
        if number:
            reached = checkpoint_in(tmp_path / "out")["iter_num"]
            assert f"has iteration {reached}" in rest and "--init_from=resume" in rest
            with open(tmp_path / "out" / "log.jsonl", "a") as log:
                log.write('{"iter": 3, "lo')  # as a kill may leave it
        resume = ["--init_from=resume"]
    whole, parts = checkpoint_in(tmp_path / "whole"), checkpoint_in(tmp_path / "out")
    assert whole["iter_num"] == parts["iter_num"] == 17 and same_state(whole, parts)
    assert ("muon" in whole) == ("--optimizer=muon" in flags)
    logs = [{(record["iter"], key): record[key] for record in module.read_log(
        tmp_path / name / "log.jsonl") for key in ("loss", "val/loss") if key in record}
        for name in ("whole", "out")]
    assert logs[0] == logs[1] and len(logs[0]) == 17 + 4
    other = "adamw" if "muon" in whole else "muon"
    assert f"--optimizer={other}" in refused(
        f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, "--init_from=resume",
        f"--optimizer={other}", script=TRAIN)


def test_log_of_several_runs(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"iter": 0, "config": {}}, {"iter": 0, "loss": 5.0}, {"iter": 1, "loss": 4.0},
               {"iter": 2, "loss": 3.0}, {"iter": 2, "config": {}}, {"iter": 2, "loss": 2.0}]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([*lines[:4], '{"iter": 3', *lines[4:]]) + "\n")
    assert module.read_log(path) == [*records[:3], *records[4:]]
    path.write_text(path.read_text() + '\n{"iter": 0, "config": {}}\n{"iter"')
    assert module.read_log(path) == records[:1]


def test_a_run_from_scratch_keeps_the_old_log(train, tmp_path):
    for _ in range(2):
        assert train("--max_iters=1", "--eval_interval=5").returncode == 0
    text = (tmp_path / "out" / "log.jsonl").read_text()
    assert text.count('"config"') == 2 and text.count('"loss"') == 4
    records = module.read_log(tmp_path / "out" / "log.jsonl")
    assert [record["iter"] for record in records if "loss" in record] == [0, 1]


def test_stopped_during_an_evaluation(train, start, tmp_path):
    """The first signal ends it early, and the progress until then is saved."""
    assert train("--max_iters=2", "--eval_interval=3").returncode == 0
    process = start("--init_from=resume", "--eval_interval=5", "--eval_iters=10000")
    next(line for line in process.stdout if line.startswith("iter 4"))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "step" not in rest and errors == ""
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 5


def test_second_signal(start, tmp_path):
    """It ends a process that is still busy with the first one."""
    process = start("--gradient_accumulation_steps=100000")
    next(line for line in process.stdout if line.startswith("step 0"))
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT and process.stderr.read() == ""


def test_sigterm_twice(start, tmp_path):
    """As torchrun passes it on to processes that have it already: the checkpoint is written."""
    process = start("--eval_interval=1000000", "--gradient_accumulation_steps=100")  # about 1 s
    next(line for line in process.stdout if line.startswith("iter 0"))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)  # or the two would be one
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors == ""
    assert f"has iteration {checkpoint_in(tmp_path / 'out')['iter_num']}" in output


def test_evaluation_batches_are_no_training_batches(letters):
    config = module.Config(block_size=16, batch_size=4)
    with open(letters / "train.bin", "rb") as file:
        held_out = {tuple(starts) for starts in module.eval_starts(file, config, 20)}
        trained = {tuple(module.random_starts(file, config, i, step))
                   for i in range(20) for step in range(4)}
    assert len(held_out) == 20 and len(trained) == 80 and not held_out & trained


def test_killed_while_saving(train, start, tmp_path):
    flags = "--eval_interval=1", "--n_embd=64", "--eval_iters=1", "--dropout=0.1"
    process = start(*flags, "--max_iters=400")
    new, saved = tmp_path / "out" / "ckpt.pt.new", tmp_path / "out" / "ckpt.pt"
    wait_for(lambda: new.exists() and saved.exists(), process)
    process.kill()
    process.wait()
    last = checkpoint_in(tmp_path / "out")["iter_num"] + 2
    flags = *flags, f"--max_iters={last}"
    assert train(*flags, "--init_from=resume").returncode == 0
    parts = checkpoint_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert train(*flags).returncode == 0
    assert same_state(checkpoint_in(tmp_path / "out"), parts)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_are_one(start, train, tmp_path, optimizer):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, glob, os\n"
        "def names():\n"
        "    return [open(path).read() for path in glob.glob('/proc/self/task/*/comm')]\n"
        "if 'RANK' in os.environ:\n"
        "    atexit.register(lambda: os.write(2, f'threads: {names()}'.encode()))\n")
    flags = ("--max_iters=8", "--eval_interval=4", "--eval_iters=0", "--dropout=0.1",
             "--gradient_accumulation_steps=4", f"--optimizer={optimizer}")
    job, one = start.job(*flags, PYTHONPATH=str(tmp_path)), train(*flags).stdout
    two, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert errors.count("threads:") >= 2
    assert "gloo" not in errors, "a thread of gloo's that outlives Python may end it with SIGABRT"
    assert one.count("\nstep ") == two.count("\nstep ") == 4, "only one process prints"
    for found in losses, steps:
        assert found(two) == pytest.approx(found(one), abs=1e-3) and len(found(one)) > 3


def test_job_that_is_stopped_and_job_with_a_process_that_dies(start, tmp_path):
    """All processes stop together; the others end with the one that dies. Both can be resumed."""
    flags = "--eval_interval=10", "--eval_iters=1", "--log_interval=10"
    job = start.job(*flags)
    next(line for line in job.stdout if line.startswith("iter 10:"))
    job.send_signal(signal.SIGTERM)
    output, errors = job.communicate(timeout=60)
    reached = checkpoint_in(tmp_path / "two")["iter_num"]
    assert f"has iteration {reached}" in output and f"{TRAIN}\", line" not in errors, errors

    job = start.job(*flags, "--init_from=resume")
    next(line for line in job.stdout if line.startswith("step "))
    next(line for line in job.stdout if line.startswith("iter "))
    children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text()
    workers = [pathlib.Path(f"/proc/{pid}") for pid in children.split()]
    victim, = (path for path in workers if b"\0RANK=1\0" in (path / "environ").read_bytes())
    os.kill(int(victim.name), signal.SIGKILL)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 1 and "train.py: lost another process of the job" in errors, errors
    assert f"{TRAIN}\", line" not in errors and not any(path.exists() for path in workers)
    reached = checkpoint_in(tmp_path / "two")["iter_num"]
    job = start.job(*flags, f"--max_iters={reached}", "--init_from=resume")
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 0 and f"iter {reached}: " in output, errors


def test_data_that_is_replaced_while_training(train, start, letters, tmp_path):
    """By another file moved into its place, as prepare.py does it: the run reads the old one."""
    flags = "--max_iters=60", "--eval_interval=30"
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


def test_nanogpt_checkpoint_is_resumed(train, tmp_path):
    """One with the interface's keys only, compiled, with the masks of old versions."""
    assert train("--max_iters=4", "--eval_interval=5").returncode == 0
    ours = checkpoint_in(tmp_path / "out")
    assert train("--max_iters=8", "--eval_interval=5", "--init_from=resume").returncode == 0
    wanted = checkpoint_in(tmp_path / "out")
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num", "config")}
    theirs["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    theirs["model"] = {f"_orig_mod.{name}": tensor for name, tensor in ours["model"].items()}
    theirs["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    for group in theirs["optimizer"]["param_groups"]:
        group["fused"] = None
    for flags, same in ((), True), (("--dtype=float16",), False):
        torch.save(theirs, tmp_path / "out" / "ckpt.pt")
        ended = train("--max_iters=8", "--eval_interval=5", "--init_from=resume", *flags)
        assert ended.returncode == 0, ended.stderr
        found = checkpoint_in(tmp_path / "out")
        assert same_state(found, wanted) == same and found["iter_num"] == 9
    assert found["scaler"]["_growth_tracker"] == 4 or found["scaler"]["scale"] < 65536.0


def test_float16_is_resumed(train, tmp_path):
    """With the scaler's state."""
    flags = "--dtype=float16", "--eval_interval=4"
    assert train(*flags, "--max_iters=7").returncode == 0
    whole = checkpoint_in(tmp_path / "out")
    assert train(*flags, "--max_iters=3").returncode == 0
    assert train(*flags, "--max_iters=7", "--init_from=resume").returncode == 0
    parts = checkpoint_in(tmp_path / "out")
    assert same_state(whole, parts) and whole["scaler"] == parts["scaler"] != {}


def test_best_checkpoint_alone(train, start, tmp_path):
    """A stop does not overwrite it either."""
    flags = "--always_save_checkpoint=False", "--eval_interval=2", "--decay_lr=False"
    assert train(*flags, "--max_iters=3").returncode == 0
    best = (tmp_path / "out" / "ckpt.pt").read_bytes()
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 4
    flags = *flags, "--init_from=resume", "--learning_rate=3"
    ended = train(*flags, "--max_iters=8")  # which makes it worse
    assert list(steps(ended.stdout)) == [4, 6, 8, 9] and ended.returncode == 0
    assert min(steps(ended.stdout).values()) == steps(ended.stdout)[4]
    process = start(*flags)
    next(line for line in process.stdout if line.startswith("iter 5"))
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "ckpt.pt has iteration 4" in rest
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == best


def test_config_file(prepare, refused, letters, tmp_path):
    path, out = tmp_path / "config.py", f"--out_dir={tmp_path / 'out'}"
    path.write_text("import time\nhelper = 'x' + str(time.time())\nmax_iters = 2 * 2\n"
                    "if helper:\n    min_lr = learning_rate / 10\nn_layer = 1\ndropout = 0\n"
                    "eval_iters = 1\nn_head = 2\nn_embd, block_size = 16, 16\nbatch_size = 1\n"
                    "compile = False\ndevice = 'cpu'\n")
    ended = prepare(str(path), "--n_layer=3", f"--dataset={letters}", out, script=TRAIN)
    assert ended.returncode == 0, ended.stderr
    saved = checkpoint_in(tmp_path / "out")
    assert (saved["iter_num"], saved["model_args"]["n_layer"]) == (5, 3)
    assert saved["config"]["min_lr"] == 6e-4 / 10
    path.write_text("n_layer = 12\n")  # the default, but the file asks for it
    assert "--n_layer=12: --init_from=resume has 3" in refused(
        str(path), "--init_from=resume", f"--dataset={letters}", out, "--device=cpu", script=TRAIN)


@pytest.mark.parametrize("text, status, message", [
    ("n_layer = 'two'", 2, "--n_layer: invalid int value: 'two'"),
    ("n_layer = = 2", 1, "SyntaxError"), (None, 1, "No such file")])
def test_bad_config_files(refused, tmp_path, text, status, message):
    if text:
        (tmp_path / "config.py").write_text(text)
    assert message in refused(str(tmp_path / "config.py"), status=status, script=TRAIN)


def test_dataset_is_a_name_or_a_path(command, letters, tmp_path):
    shutil.copytree(letters, tmp_path / "data" / "mine")
    for name in "data/mine", "./data/mine", str(tmp_path / "data" / "mine"):
        arguments, environment = command(*SMALL, f"--dataset={name}", "--eval_only=True",
                                         script=TRAIN)
        ended = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True,
                               text=True)
        assert ended.returncode == 0 and "step 0" in ended.stdout, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    config = module.Config(dataset="bookcorpus")  # a folder under data/, whatever the current one
    with pytest.raises(module.UserError, match=re.escape(str(ROOT / "data" / "bookcorpus"))):
        module.open_data(config)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Random reads from 1 GiB; a map that is kept would keep all pages read, some 800 MB."""
    code = ("import resource, sys, torch; sys.path.insert(0, sys.argv[1]); import train\n"
            "config, cpu = train.Config(block_size=16, batch_size=64), torch.device('cpu')\n"
            "with open(sys.argv[2], 'rb') as file:\n"
            "    for i in range(200):\n"
            "        starts = train.random_starts(file, config, i)\n"
            "        train.get_batch(file, starts, train.GPTConfig(block_size=16), cpu)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = []
    for size in 1 << 20, 1 << 30:
        (tmp_path / "train.bin").write_bytes(b"")
        os.truncate(tmp_path / "train.bin", size)
        ended = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "train.bin"],
                               capture_output=True, text=True, check=True)
        peaks.append(int(ended.stdout) / 1024)
    assert peaks[1] < peaks[0] + 100, "MiB resident"


# sampling ------------------------------------------------------------------


def test_sampling(train, tmp_path):
    assert train("--max_iters=20").returncode == 0
    flags = "--sample=True", "--num_samples=2", "--max_new_tokens=20", "--start= the cat"
    first = train(*flags).stdout
    assert first == train(*flags).stdout and first != train(*flags, "--seed=1").stdout
    texts = first.split("\n---------------\n")
    assert len(texts) == 3 and all(text.startswith(" the cat") for text in texts[:2])
    (tmp_path / "prompt.txt").write_text(" the cat")
    assert train(*flags[:3], f"--start=FILE:{tmp_path / 'prompt.txt'}").stdout == first
    # greedy, with the cache up to block_size = 16 tokens and without it from there on
    greedy = train(*flags, "--num_samples=1", "--temperature=0").stdout
    state, ids = checkpoint_in(tmp_path / "out")["model"], gpt2().encode(" the cat")
    for _ in range(20):
        logits = reference_logits(state, torch.tensor([ids[-16:]]), 2)[0, -1]
        ids.append(logits[:50257].argmax().item())
    text = gpt2().decode(ids).replace("<|endoftext|>", "\n")
    assert greedy == text + "\n---------------\n"


def test_ids_without_text_are_never_sampled():
    model = module.GPT(module.GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    with torch.no_grad():
        model.lm_head.weight[50257:] = 100 * model.hidden(torch.tensor([[0]]))[0, -1]
    assert model(torch.tensor([[0]]))[0].argmax() >= 50257
    for top_k in None, 1, 50304:
        assert model.generate(torch.zeros(8, 1, dtype=torch.int64), 6, top_k=top_k).max() < 50257


# bad input -----------------------------------------------------------------

@pytest.mark.parametrize("flag, message", [
    ("--n_heads=2", "unrecognized arguments: --n_heads=2"), ("stray", "stray"),
    ("--batch_size=many", "--batch_size: invalid int value: 'many'"),
    ("--learning_rate=fast", "--learning_rate: invalid float value: 'fast'"),
    ("--compile=yes", "--compile: invalid boolean value: 'yes'"),
    ("--batch_size=1.5", "--batch_size: invalid int value: '1.5'"),
    ("--n_head=3", "not a multiple of --n_head=3"), ("--batch_size=0", "--batch_size: 0"),
    ("--block_size=-1", "--block_size: -1"), ("--dropout=1.5", "--dropout: 1.5"),
    ("--learning_rate=nan", "--learning_rate: nan"), ("--temperature=-1", "--temperature: -1.0"),
    ("--dtype=int8", "--dtype: invalid choice: 'int8'"),
    ("--optimizer=sgd", "--optimizer: invalid choice: 'sgd'")])
def test_bad_flags(capsys, flag, message):
    with pytest.raises(SystemExit) as ended:
        module.parse_flags([*SMALL, flag])
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("train.py: ") and message in errors


def test_values_at_the_edge_are_accepted():
    flags = ["--eval_iters=0", "--seed=0", "--grad_clip=0", "--dropout=0", "--temperature=0",
             "--batch_size=1", "--min_lr=0", "--decay_lr=False", "--start="]
    config, given = module.parse_flags(flags)
    assert given == {flag[2:].split("=")[0] for flag in flags}
    assert (config.batch_size, config.decay_lr, config.start, config.bias) == (1, False, "", False)


@pytest.mark.parametrize("flag, status, message", [
    ("--n_heads=2", 2, "--n_heads=2"), ("--device=tpu9", 1, "--device=tpu9"),
    ("--device=cuda", 1, "--device=cuda"), ("--init_from=gpt5", 1, "--init_from=gpt5"),
    ("--init_from=resume", 1, "no checkpoint"), ("--block_size=100000", 1, "too few for --block_size"),
    ("--dataset=nothing/here", 1, "prepare.py"), ("--sample=True", 1, "no checkpoint"),
    ("--export=folder", 1, "no checkpoint"),
    ("--optimizer=muon --dtype=float16", 1, "--optimizer=muon: not with --dtype=float16")])
def test_refusals(refused, letters, tmp_path, flag, status, message):
    if flag == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    line = refused(f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, *flag.split(),
                   status=status, script=TRAIN)
    assert message in line and not (tmp_path / "out").exists()


BAD_DATA = {
    "odd": (lambda folder: os.truncate(folder / "train.bin", 1001), "1,001 bytes"),
    "short": (lambda folder: os.truncate(folder / "val.bin", 32), "too few for --block_size"),
    "gone": (lambda folder: (folder / "val.bin").unlink(), "val.bin"),
    "letters": (lambda folder: (folder / "meta.pkl").write_bytes(b""), "meta.pkl"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(refused, letters, tmp_path, kind):
    change, message = BAD_DATA[kind]
    shutil.copytree(letters, tmp_path / "data")
    change(tmp_path / "data")
    line = refused(f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", *SMALL,
                   script=TRAIN)
    assert message in line and str(tmp_path / "data") in line and not (tmp_path / "out").exists()


def test_token_outside_the_vocabulary(train, letters, tmp_path):
    data = shutil.copytree(letters, tmp_path / "data")
    np.full(1000, 50304, "<u2").tofile(data / "val.bin")
    ended = train(f"--dataset={data}")
    assert ended.returncode == 1 and ended.stderr == (
        f"train.py: {data / 'val.bin'}: token 50304 is not below 50304\n")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_bad_checkpoints(refused, train, letters, tmp_path):
    assert train("--max_iters=1").returncode == 0
    path = tmp_path / "out" / "ckpt.pt"
    body = path.read_bytes()
    flags = f"--dataset={letters}", f"--out_dir={tmp_path / 'out'}", *SMALL, "--init_from=resume"
    assert "--n_layer=3: --init_from=resume has 2" in refused(*flags, "--n_layer=3", script=TRAIN)
    broken = [body[:cut] for cut in (*range(0, len(body), len(body) // 20), len(body) - 1)]
    saved = torch.load(io.BytesIO(body), weights_only=True)
    for change in {"model_args": MODEL_ARGS | {"n_layer": 5}}, {"model": {}}, {"model": Bomb()}:
        file = io.BytesIO()
        torch.save(saved | change, file)
        broken.append(file.getvalue())
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(module.UserError, match="ckpt.pt: no checkpoint, or a damaged one"):
            module.load_checkpoint(path)
    assert "damaged" in refused(*flags, script=TRAIN) and not pathlib.Path("bomb").exists()
    assert path.read_bytes() == content
    torch.save(saved | {"optimizer": {}}, path)
    assert "ckpt.pt: can't resume" in refused(*flags, script=TRAIN)


def test_loss_that_grows_without_bound(train, tmp_path):
    """A large loss is no error. One that is not finite is, and the checkpoint stays."""
    ended = train("--max_iters=1", "--eval_interval=1", "--learning_rate=10", "--decay_lr=False")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert max(steps(ended.stdout).values()) > 709
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for flags, message in (
            (["--max_iters=9", "--eval_interval=100"], "loss (nan|inf) at iter"),
            (["--max_iters=3", "--eval_interval=3", "--log_interval=9"], "the loss or a weight")):
        ended = train("--init_from=resume", "--learning_rate=1e39", "--decay_lr=False", *flags)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
        assert re.match(f"train.py: {message}", ended.stderr), ended.stderr
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_full_disk_while_saving(train, tmp_path):
    assert train("--max_iters=3").returncode == 0
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    ended = train("--init_from=resume", "--max_iters=6", "--eval_interval=3", before=(
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"))
    assert ended.returncode == 1 and ended.stderr.startswith("train.py: "), ended.stderr
    assert "ckpt.pt: not written" in ended.stderr and ended.stderr.count("\n") == 1
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    assert not (tmp_path / "out" / "ckpt.pt.new").exists()
