"""train.py: paths, files, seeds, processes and the settings for one GPU."""
import re
import shutil
import signal
from functools import partial

import pytest
import train_faults as faults
from common import ROOT, TINY, TRAIN, output_of, run_script, wait_for
from test_train import checkpoint_in
from train import parse_flags


def test_home_folder_in_paths(dataset, tmp_path):
    """bash leaves --out_dir=~/x as it is."""
    shutil.copytree(dataset, tmp_path / "data")
    ended = run_script(TRAIN, "--dataset=~/data", "--out_dir=~/out", *TINY, "--max_iters=1",
                       HOME=str(tmp_path))
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
    ended = train("--max_iters=1", before=faults.no_memory_maps)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_two_runs_in_one_folder(train, start, dataset, tmp_path):
    """One saves while the other does. Neither ends the other, and no checkpoint is lost."""
    first = start(TRAIN, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY,
                  "--max_iters=3", "--eval_interval=2",
                  before=partial(faults.wait_at_call, "os.fsync", 1, tmp_path))
    assert wait_for((tmp_path / "reached").exists, first)
    second = train("--max_iters=1")
    assert (second.returncode, second.stderr) == (0, "")
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 2
    (tmp_path / "go").touch()
    assert (first.wait(), output_of(first, "stderr")) == (0, "")
    assert checkpoint_in(tmp_path / "out")["iter_num"] == 4
    assert checkpoint_in(tmp_path / "out", "ckpt.pt.old")["config"]["max_iters"] == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"ckpt.pt", "ckpt.pt.old", "log.jsonl", "loss.png"}


def test_forgotten_resume(train, tmp_path):
    """A new run, stopped in its first iterations, keeps the checkpoint of an earlier one."""
    out, stop = tmp_path / "out", partial(faults.signal_after_updates, 1, signal.SIGINT)
    assert "ckpt.pt.old" not in train("--max_iters=2").stdout
    earlier = (out / "ckpt.pt").read_bytes()
    ended = train("--eval_only=True")
    assert "ckpt.pt.old" not in ended.stdout and not (out / "ckpt.pt.old").exists()
    ended = train(before=stop)
    assert ended.returncode == 130 and "the first save renames it to ckpt.pt.old" in ended.stdout
    assert (out / "ckpt.pt.old").read_bytes() == earlier
    ended = train("--init_from=resume", before=stop)  # no other run, so nothing is renamed
    assert ended.returncode == 130 and "ckpt.pt.old" not in ended.stdout
    assert checkpoint_in(out)["iter_num"] == 2
    assert (out / "ckpt.pt.old").read_bytes() == earlier


def test_checkpoint_that_another_program_reads(train):
    """Wait until it is closed. After 100 attempts, give up."""
    ended = train("--max_iters=1", before=partial(faults.checkpoint_in_use, 50))
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = train("--max_iters=1", before=partial(faults.checkpoint_in_use, 10**6))
    assert ended.returncode == 1 and "ckpt.pt: not written (PermissionError" in ended.stderr


def test_no_clipping(train):
    """With --grad_clip=0, no norm is computed: an infinite one would make all gradients nan."""
    ended = train("--max_iters=1", "--grad_clip=0", before=faults.no_norm)
    assert ended.returncode == 0 and "grad norm" not in ended.stdout, ended.stderr


def test_when_processes_communicate(train):
    """Gradients and signals once per iteration, losses when they are printed."""
    ended = train("--max_iters=3", "--log_interval=100", "--eval_interval=100",
                  before=faults.print_communication)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines()
             if line == "gradient" or line.endswith(" numbers")]
    n_parameters = 2 + 2 * 6 + 1
    evaluation, step = ["3 numbers"] * 2, ["gradient"] * n_parameters
    assert lines == [*evaluation, *step, "1 numbers", "1 numbers",  # the loss of iteration 0
                     *(step + ["1 numbers"]) * 3, *evaluation, "1 numbers"]


def test_peer_that_cannot_be_reached(train):
    """The message does not blame the device."""
    ended = train(before=faults.unreachable_peer)
    assert ended.returncode == 1 and "--device" not in ended.stderr
    assert ended.stderr == ("train.py: --backend=gloo: cannot connect to the other processes"
                            " (RuntimeError: Gloo connectFullMesh failed)\n")


def test_epochs_and_time_left_of_a_run_without_an_end(train, dataset):
    ended = train("--max_iters=1e18", before=partial(faults.signal_after_updates, 3, signal.SIGINT))
    assert (ended.returncode, ended.stderr) == (130, "")
    epochs = 32 * (10**18 + 1) / ((dataset / "train.bin").stat().st_size // 2)
    assert ended.stdout.startswith(
        f"0.40M parameters on cpu, float32, 32 tokens per iteration, {epochs:,.1f} epochs\n")
    ms, hours = re.search(r"^iter 1: .*, time ([\d.]+)ms, .*, (\d+):\d\d:\d\d left",
                          ended.stdout, re.MULTILINE).groups()
    assert int(hours) == pytest.approx(float(ms) / 1000 * 1e18 / 3600, rel=1e-3)


def test_settings_for_one_gpu():
    """Four epochs without repeated books, 480 sequences per iteration, for up to eight GPUs."""
    path = ROOT / "data" / "bookcorpus" / "train_gpt2.py"
    config, _ = parse_flags([str(path)])
    sequences = config.batch_size * config.gradient_accumulation_steps
    assert sequences == 480 and config.gradient_accumulation_steps % 8 == 0
    assert config.max_iters * sequences * config.block_size == pytest.approx(4 * 0.8e9, rel=0.02)
    assert config.lr_decay_iters == config.max_iters and config.warmup_iters < 1000
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
