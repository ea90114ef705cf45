"""train.py when its output ends: it saves a whole checkpoint and can be resumed."""
import errno
import functools
import os
import signal
from functools import partial

import pytest
import torch
import train_faults as faults
from common import (TINY, TORCHRUN, TRAIN, discard, finish, free_port, output_of, start_script,
                    wait_for)

# evaluations at 0, 2, 4 and 6, checkpoints at 2, 4 and 6
FLAGS = [*TINY, "--dropout=0.1", "--eval_interval=2", "--eval_iters=3", "--max_iters=5"]
# for wait_at_call
MOMENTS = {
    "before the first iteration": ("torch.nn.Module.eval", 1),
    "evaluation": ("torch.nn.functional.scaled_dot_product_attention", 31),  # two per batch
    "update": ("torch.optim.AdamW.step", 3),
    "save": ("torch.save", 1),
    "log": ("json.dumps", 5),
}


def state(folder):
    """{name: tensor} of the weights and moments in the checkpoint, and its iteration."""
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    moments = {(i, name): tensor for i, values in checkpoint["optimizer"]["state"].items()
               for name, tensor in values.items()}
    return checkpoint["model"] | moments, checkpoint["iter_num"]


def run_all(processes, flags, out):
    """Train to the end, from the checkpoint in `out` if there is one. Returns the final state."""
    resume = ["--init_from=resume"] if (out / "ckpt.pt").exists() else []
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost",
           "MASTER_PORT": str(free_port())}  # the variables of torchrun
    started = [start_script(TRAIN, *flags, f"--out_dir={out}", *resume,
                            RANK=str(rank), **job)
               for rank in range(processes)]
    try:
        for process in started:
            ended = finish(process)
            assert ended.returncode == 0, ended.stderr
    finally:
        for process in started:
            discard(process)
    return state(out)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """whole(n) is the final state of a run of n processes that nothing stopped."""
    flags = [f"--dataset={dataset}", *FLAGS]
    return functools.cache(lambda n: run_all(n, flags, tmp_path_factory.mktemp("whole")))


def assert_resumed(processes, flags, out, expected):
    """The checkpoint in `out` is whole; the run that resumes it ends as the one without a stop."""
    assert not any(out.glob("ckpt.pt.new-*"))
    tensors, reached = run_all(processes, flags, out)
    expected, last = expected
    assert reached == last and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize("reader, moment, processes", [
    *(("tee", moment, 1) for moment in MOMENTS), ("tee", "save", 2), ("head", "evaluation", 2),
    ("head", "before the first iteration", 1), ("head", "evaluation", 1)])
def test_output_that_nobody_reads(start, whole, dataset, tmp_path, reader, moment, processes):
    """Ctrl-C ends train.py and `| tee`. `| head` ends after some lines. Two processes are those of
    torchrun."""
    pipe, out, flags = tmp_path / "pipe", tmp_path / "out", [f"--dataset={dataset}", *FLAGS]
    os.mkfifo(pipe)
    reading_end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command, wait = [TRAIN], partial(faults.wait_at_call, *MOMENTS[moment], tmp_path)
    if processes > 1:
        command = [TORCHRUN, "--standalone", f"--nproc_per_node={processes}", TRAIN]
        wait = partial(faults.fork_workers, tmp_path, wait)
    process = start(*command, *flags, f"--out_dir={out}",
                    before=partial(faults.pipe_output, pipe, wait))
    assert wait_for((tmp_path / "reached").exists, process), output_of(process, "stderr")
    os.close(reading_end)  # the reader ends, then train.py goes on
    if reader == "tee":
        process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    status, errors = process.wait(120), output_of(process, "stderr")
    if processes == 1:
        assert status == 128 + (signal.SIGINT if reader == "tee" else signal.SIGHUP)
        assert errors == ""
    else:  # torchrun reports the signal or the status of the processes
        assert status != 0 and f'{TRAIN}", line' not in errors, errors
        workers = (tmp_path / "workers").read_text().split()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    assert (out / "ckpt.pt").exists() == (moment != "before the first iteration")
    assert_resumed(processes, flags, out, whole(processes))


@pytest.mark.parametrize("name, stops", [
    ("EPIPE", True), ("EIO", True), ("ENOSPC", False), ("EDQUOT", False), ("EAGAIN", False)])
def test_output_that_fails(train, tmp_path, name, stops):
    """A run stops if nobody can read its output. A full disk or quota costs only lines."""
    ended = train("--max_iters=3", before=partial(faults.failing_output, getattr(errno, name)))
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGHUP if stops else 0, "")
    assert ended.stdout.count("\n") == 3
    assert state(tmp_path / "out")[1] == (2 if stops else 4)


def test_full_disk_under_the_output(train, tmp_path):
    ended = train("--max_iters=3", before=faults.full_disk_under_output)
    assert (ended.returncode, ended.stderr) == (0, "") and state(tmp_path / "out")[1] == 4


def test_notebook(train):
    """Its streams need nothing but write(); streams and signal handlers are put back."""
    ended = train("--max_iters=1", before=faults.notebook)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "iter 1: " in ended.stdout and ended.stdout.endswith("\nthe same state\n")


def test_full_disk_under_the_log(train, tmp_path):
    """It costs lines of the log, neither the run nor the weights."""
    ended = train("--max_iters=3", before=faults.full_disk_under_log)
    assert ended.returncode == 0 and "iter 3: " in ended.stdout, ended.stderr
    path = tmp_path / "out" / "log.jsonl"
    assert ended.stderr == (f"train.py: warning: {path}: [Errno 28] No space left on device\n")
    assert state(tmp_path / "out")[1] == 4 and path.read_text().count('{"iter"') == 3


@pytest.mark.parametrize("encoding, name", [
    ("utf-8", os.fsdecode(b"mod\xe8le")), ("cp1252", "\u4e2d\u6587"), ("ascii", "mod\xe8le")])
def test_output_that_cannot_be_encoded(train, dataset, tmp_path, encoding, name):
    """For example the name of a folder from a system with Latin-1."""
    ended = train(f"--out_dir={tmp_path / name}", "--max_iters=1",
                  before=partial(faults.output_encoding, encoding))
    assert (ended.returncode, ended.stderr) == (0, "")
    escaped = name.encode(encoding, "backslashreplace").decode(encoding)
    assert escaped in ended.stdout.splitlines()[-1] and (tmp_path / name / "ckpt.pt").exists()
