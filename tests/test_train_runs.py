"""train.py: paths, files, seeds, processes and the settings for one GPU."""
import json
import os
import shutil
import sys

import pytest
import torch
from common import ROOT, TINY, TRAIN, limit_file_size, run_script

sys.path.insert(0, str(ROOT))
import train as module  # noqa: E402

# process 0 of a job of two, the other of which computes the same
FAKE_JOB = """
import os, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
init = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda *arguments, **options: init(
    "fake", store=FakeStore(), rank=0, world_size=2)
"""


def test_home_folder_in_paths(dataset, tmp_path):
    """bash leaves --out_dir=~/x as it is."""
    shutil.copytree(dataset, tmp_path / "data")
    ended = run_script(TRAIN, "--dataset=~/data", "--out_dir=~/out", *TINY, "--max_iters=1",
                       before=f"import os; os.environ['HOME'] = {str(tmp_path)!r}")
    assert ended.returncode == 0 and (tmp_path / "out" / "ckpt.pt").exists(), ended.stderr


@pytest.mark.parametrize("flag", ["out_dir", "dataset", "init_from", "export"])
def test_url_instead_of_a_path(refused, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    assert f"--{flag}: invalid path value: 's3://bucket/x'" in refused(
        f"--{flag}=s3://bucket/x", status=2, script=TRAIN)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [2**64 - 1, 2**64, 10**30])
def test_large_seed(train, seed):
    ended = train(f"--seed={seed}", "--dropout=0.1", "--max_iters=1")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_file_system_without_memory_maps(train):
    ended = train("--max_iters=1", before="import mmap; mmap.mmap = None")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_two_runs_in_one_folder(train, dataset, tmp_path):
    """One saves while the other does. Neither ends the other, and ckpt.pt is always whole."""
    ended = train("--max_iters=3", "--eval_interval=2", before=f"""
import os, subprocess, sys, torch
save = torch.save
def save_twice(checkpoint, file):
    save(checkpoint, file)
    torch.save = save
    subprocess.run([sys.executable, {str(TRAIN)!r}, "--dataset={dataset}", "--max_iters=1",
                    "--out_dir={tmp_path / 'out'}", *{TINY!r}], check=True,
                   stdout=subprocess.DEVNULL)
    assert torch.load({str(tmp_path / 'out' / 'ckpt.pt')!r}, weights_only=True)["iter_num"] == 2
torch.save = save_twice
""")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["iter_num"] == 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ckpt.pt", "log.jsonl", "loss.png"}


def test_checkpoint_that_another_program_reads(train, tmp_path):
    """Windows does not replace a file that is open: wait until it is closed."""
    before = """
import os, time
replace, calls = os.replace, []
def replace_later(source, target):
    calls.append(source)
    if len(calls) < {count}:
        raise PermissionError(13, "Permission denied", target)
    replace(source, target)
os.replace, time.sleep = replace_later, lambda seconds: None
"""
    ended = train("--max_iters=1", before=before.format(count=50))
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = train("--max_iters=1", before=before.format(count=10**6))
    assert ended.returncode == 1 and "ckpt.pt: not written (PermissionError" in ended.stderr


def test_no_clipping(train, tmp_path):
    """With --grad_clip=0, no norm is computed: an infinite one would make all gradients nan."""
    ended = train("--max_iters=1", "--grad_clip=0", before=(
        "import torch; torch.nn.utils.clip_grad_norm_ = None"))
    assert ended.returncode == 0 and "grad norm" not in ended.stdout, ended.stderr


def test_when_processes_communicate(train):
    """Gradients and signals once per iteration, losses when they are printed."""
    ended = train("--max_iters=3", "--log_interval=100", "--eval_interval=100", before=FAKE_JOB + """
all_reduce = torch.distributed.all_reduce
def count(values, async_op=False):
    print("gradient" if async_op else f"{len(values)} numbers", flush=True)
    return all_reduce(values, async_op=async_op)
torch.distributed.all_reduce = count
""")
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines()
             if line == "gradient" or line.endswith(" numbers")]
    n_parameters = 2 + 2 * 6 + 1
    evaluation, step = ["3 numbers"] * 2, ["gradient"] * n_parameters
    assert lines == [*evaluation, *step, "1 numbers", "1 numbers",  # the loss of iteration 0
                     *(step + ["1 numbers"]) * 3, *evaluation, "1 numbers"]


def test_peer_that_cannot_be_reached(train):
    """The message does not blame the device."""
    ended = train(before=FAKE_JOB + """
def fail(*arguments, **options):
    raise RuntimeError("Gloo connectFullMesh failed")
torch.distributed.init_process_group = fail
""")
    assert ended.returncode == 1 and "--device" not in ended.stderr
    assert ended.stderr == ("train.py: --backend=gloo: cannot connect to the other processes"
                            " (RuntimeError: Gloo connectFullMesh failed)\n")


def test_settings_for_one_gpu(dataset, tmp_path):
    """Four epochs, 480 sequences per iteration, for up to eight GPUs."""
    path = ROOT / "data" / "bookcorpus" / "train_gpt2.py"
    config, _ = module.parse_flags([str(path)])
    sequences = config.batch_size * config.gradient_accumulation_steps
    assert sequences == 480 and config.gradient_accumulation_steps % 8 == 0
    assert config.max_iters * sequences * config.block_size == pytest.approx(4 * 1.24e9, rel=0.02)
    assert config.lr_decay_iters == config.max_iters and config.warmup_iters < 1000
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
    ended = run_script(TRAIN, path, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY,
                       "--max_iters=2")
    assert ended.returncode == 0 and "step 3: " in ended.stdout, ended.stderr
