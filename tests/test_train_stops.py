"""train.py when its output ends: it saves a whole checkpoint and can be resumed."""
import errno
import functools
import os
import shlex
import signal
import subprocess
from functools import partial

import pytest
import torch
import train_faults as faults
from common import (ROOT, TINY, TORCHRUN, TRAIN, discard, finish, free_port, group_has_ended,
                    output_of, start_script, wait_for)

# evaluations at 0, 2, 4 and 6, checkpoints at 2, 4 and 6
FLAGS = [*TINY, "--dropout=0.1", "--eval_interval=2", "--max_iters=5"]
# for wait_at_call
MOMENTS = {
    "before the first iteration": ("torch.nn.Module.eval", 1),
    "evaluation": ("torch.nn.functional.scaled_dot_product_attention", 31),  # two per batch
    "update": ("torch.optim.AdamW.step", 3),
    "save": ("torch.save", 1),
    "log": ("json.dumps", 5),
}
# runs the script argv[1], as a process of torchrun
WRAPPER = f"""
import runpy, sys
sys.path.append({str(ROOT / "tests")!r})
import train_faults
train_faults.wait_at_call(*%r, ".")
del sys.argv[0]
runpy.run_path(sys.argv[0], None, "__main__")
"""


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
           "MASTER_PORT": str(free_port())}  # the variables of torchrun; forking saves 10 s
    started = [start_script(TRAIN, *flags, f"--out_dir={out}", *resume,
                            before=partial(faults.variables, job | {"RANK": str(rank)}))
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


@pytest.mark.parametrize("reader, moment", [
    *(("tee", moment) for moment in MOMENTS), ("head", "before the first iteration"),
    ("head", "evaluation")])
def test_output_that_nobody_reads(start, whole, dataset, tmp_path, reader, moment):
    """Ctrl-C with `| tee`, which it ends, too, and `| head`, which ends after some lines."""
    pipe, out, flags = tmp_path / "pipe", tmp_path / "out", [f"--dataset={dataset}", *FLAGS]
    os.mkfifo(pipe)
    reading_end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = start(TRAIN, *flags, f"--out_dir={out}", before=partial(
        faults.pipe_output, pipe, *MOMENTS[moment], tmp_path))
    assert wait_for((tmp_path / "reached").exists, process), output_of(process, "stderr")
    os.close(reading_end)  # the reader ends, then train.py goes on
    if reader == "tee":
        process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    assert process.wait(120) == 128 + (signal.SIGINT if reader == "tee" else signal.SIGHUP)
    assert output_of(process, "stderr") == ""
    assert (out / "ckpt.pt").exists() == (moment != "before the first iteration")
    assert_resumed(1, flags, out, whole(1))


@pytest.mark.parametrize("reader, moment", [("tee", "save"), ("head", "evaluation")])
def test_output_of_a_job_that_nobody_reads(whole, dataset, tmp_path, reader, moment):
    """The same with torchrun, in a shell."""
    (tmp_path / "wrapper.py").write_text(WRAPPER % (MOMENTS[moment],))
    out, flags = tmp_path / "out", [f"--dataset={dataset}", *FLAGS]
    line = shlex.join(map(str, [TORCHRUN, "--standalone", "--nproc_per_node=2", "wrapper.py",
                                TRAIN, *flags, f"--out_dir={out}"]))
    # the reader ends, then train.py goes on
    read = "tee output" if reader == "tee" else "until [ -e closed ]; do sleep 0.01; done"
    process = subprocess.Popen(
        ["bash", "-c", f"trap : INT; {line} 2> errors |"
                       f" {{ trap : INT; {read}; exec <&-; touch go; }}"],
        cwd=tmp_path, start_new_session=True,
        stdout=subprocess.DEVNULL,  # that of tee
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        assert wait_for((tmp_path / "reached").exists, process)
        if reader == "tee":
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        else:
            (tmp_path / "closed").touch()
        process.wait(120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert group_has_ended(process.pid)
    errors = (tmp_path / "errors").read_text()
    assert f'{TRAIN}", line' not in errors, errors
    assert (out / "ckpt.pt").exists()
    assert_resumed(2, flags, out, whole(2))


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
