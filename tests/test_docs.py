"""Every command in the README's blocks runs: on small data, with a small model, and the Hub on loopback."""
import re
import shlex
import socket
import subprocess

import pytest
import torch
from conftest import ROOT
from hub import serve
from test_prepare import SENTENCES, parquet
from test_train import SMALL, letters  # noqa: F401
from train import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]
LITTLE = ["--max_iters=1", "--eval_interval=2", "--batch_size=1", "--gradient_accumulation_steps=2", "--eval_iters=1"]


def run(command, environment, folder, **options):
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, **options)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_readme_has_commands():
    assert len(COMMANDS) > 8
    assert all(line.startswith(("python", "torchrun", "pip")) for line in COMMANDS)


def test_the_first_three_are_what_ci_runs():
    """CI runs the first and the third as they stand; here is the preparing that is in the first, and the second."""
    assert [COMMANDS[0].split()[:3], COMMANDS[2].split()[0]] == [["python3", "-m", "venv"], "pip"]
    assert "block 1" in (ROOT / ".ci" / "run").read_text() and "block 3" in (ROOT / ".ci" / "run").read_text()


def test_preparing(command, tmp_path):
    first = shlex.split(COMMANDS[0].rpartition("&& python ")[2])
    assert first[1:3] == ["--source=data/bookcorpus/sample.txt", "--out_dir=data/sample"]
    real = shlex.split(COMMANDS[1])[1:]
    assert first[0] == real[0] == "data/bookcorpus/prepare.py"
    arguments, environment = command(*first[1:], f"--out_dir={tmp_path / 'sample'}")
    assert "train.py --dataset=" in run(arguments, environment, ROOT)
    body = parquet(tmp_path / "rows.parquet", SENTENCES).read_bytes()
    with serve("SamuelYang/bookcorpus", {"data/train-00000-of-00001.parquet": body}) as hub:
        arguments, environment = command(*real[1:], f"--out_dir={tmp_path / 'real'}", HF_ENDPOINT=hub.url,
                                         HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        run(arguments, environment, ROOT)
    assert (tmp_path / "real" / "train.bin").exists()


def small(words, dataset, out, more=()):
    """The flags of a command of train.py, of the same kind but on small data and a small model."""
    resumed = any(word == "--init_from=resume" for word in words)
    flags = [word for word in words if not word.startswith(("--dataset", "--out_dir", "--n_", "--block_size"))]
    return [*flags, f"--dataset={dataset}", f"--out_dir={out}", "--device=cpu",
            *(SMALL[:4] if not more else more), *LITTLE, *(["--max_iters=3"] if resumed else []), "--max_new_tokens=3"]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python train.py")])
def test_training(line, command, letters, tmp_path):  # noqa: F811
    words = shlex.split(line)[2:]
    more = ()
    if "--init_from=gpt2" in words:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
        words[words.index("--init_from=gpt2")] = f"--init_from={tmp_path / 'gpt2'}"
        more = ["--block_size=16"]
    exported = [word.partition("=")[2] for word in words if word.startswith("--export=")]
    if "--sample=True" in words or "--init_from=resume" in words or exported:
        arguments, environment = command(*small([], letters, tmp_path / "out"),
                                         script=ROOT / "train.py")
        run(arguments, environment, tmp_path)
    (tmp_path / "prompt.txt").write_text("the ")
    arguments, environment = command(*small(words, letters, tmp_path / "out", more),
                                     script=ROOT / "train.py")
    printed = run(arguments, environment, tmp_path)
    if exported:
        assert (tmp_path / exported[0] / "model.safetensors").exists()
    else:
        assert "---------------" in printed if "--sample=True" in words else "step " in printed


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("torchrun")])
def test_torchrun(line, command, letters, tmp_path):  # noqa: F811
    """Two processes in place of eight; two machines are two launchers on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = int(re.search(r"--nnodes=(\d+)|$", line)[1] or 1)
    steps = re.search(r"--gradient_accumulation_steps=(\d+)", line)
    steps = int(steps[1]) if steps else Config.gradient_accumulation_steps
    assert steps % (nodes * int(re.search(r"--nproc_per_node=(\d+)", line)[1])) == 0, "refused"
    line = re.sub(r"--nproc_per_node=\d+", f"--nproc_per_node={2 // nodes}", line)
    line = re.sub(r"10\.0\.0\.1:\d+", f"127.0.0.1:{port}", line)
    launch, _, flags = line.partition("train.py")
    arguments, environment = command(*small(shlex.split(flags), letters, tmp_path / "out"),
                                     script=ROOT / "train.py")
    arguments[1:1] = ["-m", "torch.distributed.run", *shlex.split(launch)[1:]]
    started = [subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for _ in range(nodes)]
    ended = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), ended
    assert sum(output.count("step 0:") for output, _ in ended) == 1
    assert (tmp_path / "out" / "ckpt.pt").exists()
