"""Faults that are quick to try: a Hub that fails, a disk that is full, a system that lacks things. See also faults.py."""
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import filelock
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (ROOT, SAMPLE, SCRIPT, TRAIN, bins, group_is_gone, nasty_rows, oracle, wait_for,
                      write_jsonl)
from hub import serve
from test_prepare import SENTENCES, parquet
from test_train import SMALL

NAME = "SamuelYang/bookcorpus"
FILE = "data/train-00000-of-00001.parquet"


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    path, rows = tmp_path_factory.mktemp("body") / "rows.parquet", SENTENCES * 20
    # larger than the pieces of 10 MB that huggingface_hub writes
    pad = pa.array([os.urandom(24 << 20)] + [b""] * (len(rows) - 1))
    pq.write_table(pa.table({"text": rows, "pad": pad}), path)
    return path.read_bytes()


@pytest.fixture
def from_hub(prepare, tmp_path):
    """from_hub(hub) runs prepare.py on it and returns the CompletedProcess; its output goes to tmp_path/out."""
    def run(hub, **options):
        return prepare(f"--out_dir={tmp_path / 'out'}", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
                       HF_HOME=str(tmp_path / "hf"), **options)
    return run


def error_line(ended):
    lines = [line for line in ended.stderr.replace("\r", "\n").splitlines() if line.startswith("prepare.py: ")]
    assert ended.returncode == 1 and len(lines) == 1 and "Traceback" not in ended.stderr, ended.stderr
    return lines[0]


@pytest.mark.parametrize("status", [503, 429])
def test_hub_that_is_busy_for_a_while(from_hub, body, tmp_path, status):
    left = {"GET": 2, "HEAD": 1}
    times = []

    def fault(method, path, handler):
        if path.endswith(FILE) and left.get(method, 0):
            left[method] -= 1
            times.append(time.monotonic())
            handler.send("busy", status)
            return True

    with serve(NAME, {FILE: body}, fault=fault) as hub:
        ended = from_hub(hub)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES * 20) and len(times) >= 2


def test_connection_that_is_cut_in_mid_file(from_hub, body, tmp_path):
    cuts = [0]

    def fault(method, path, handler):
        if method == "GET" and path.endswith(FILE) and not cuts[0]:
            cuts[0] += 1
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.send_header("Accept-Ranges", "bytes")
            handler.end_headers()
            handler.wfile.write(body[:len(body) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            return True

    with serve(NAME, {FILE: body}, fault=fault) as hub:
        ended = from_hub(hub)
        if ended.returncode:
            assert "Traceback" not in ended.stderr
            ended = from_hub(hub)
        asked = [span for method, path, span in hub.log if method == "GET" and path.endswith(FILE)]
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES * 20)
    assert cuts == [1] and len(asked) == 2 and int(asked[1].removeprefix("bytes=").strip("-")) >= 10 << 20


def test_body_that_is_not_the_one_announced(from_hub, body, tmp_path):
    def fault(method, path, handler):
        if method == "GET" and path.endswith(FILE):
            handler.send(body[:-1000])
            return True

    with serve(NAME, {FILE: body}, fault=fault) as hub:
        ended = from_hub(hub)
    assert "--source=PATH" in error_line(ended) and not (tmp_path / "out" / "train.bin").exists()


@pytest.mark.parametrize("status, code, message", [
    (401, "GatedRepo", "gated"), (401, "", "401"), (403, "", "on the Hugging Face Hub either"), (404, "RepoNotFound", "doesn't exist")])
def test_hub_that_refuses(from_hub, body, status, code, message):
    def fault(method, path, handler):
        handler.send("{}", status, **({"X_Error_Code": code} if code else {}))
        return True

    with serve(NAME, {FILE: body}, fault=fault) as hub:
        line = error_line(from_hub(hub))
    assert "--source=PATH" in line and message in line


def test_hub_that_is_not_there(from_hub, tmp_path):
    with serve(NAME, {}) as hub:
        pass  # nobody listens at its address any more
    began = time.monotonic()
    line = error_line(from_hub(hub))
    assert time.monotonic() - began < 60 and "--source=PATH" in line


NO_ROOM = """
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(10 ** 9, 10 ** 9, 5000)
"""


def test_disk_without_room(prepare, refused, tmp_path):
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}").returncode == 0
    before = bins(tmp_path)
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}", before=NO_ROOM)
    needed = 1.2 * sum(len(row.encode()) for row in SENTENCES)
    assert "5,000 bytes free in" in line and f"{needed:,.0f} needed" in line and bins(tmp_path) == before


def test_full_disk_of_the_cache_is_said_to_be_that(from_hub, body):
    with serve(NAME, {FILE: body}) as hub:
        line = error_line(from_hub(hub, before=(
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))")))
    assert "File too large" in line


def test_disk_that_fills_up(prepare, tmp_path):
    """A limit on a file's size stands for it: each stage that writes more than that fails."""
    source = write_jsonl(tmp_path / "rows.jsonl", nasty_rows(4000, seed=3))
    out = tmp_path / "out"
    assert prepare(f"--source={SAMPLE}", f"--out_dir={out}").returncode == 0
    assert prepare(f"--source={source}", f"--out_dir={tmp_path / 'other'}").returncode == 0  # now in the cache
    before, large = bins(out), (tmp_path / "other" / "train.bin").stat().st_size
    for limit in 1000, large // 2, large - 1:
        ended = prepare(f"--source={source}", f"--out_dir={out}", "--overwrite=True", "--num_proc=2", before=(
            "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"))
        assert "File too large" in error_line(ended)
        assert bins(out) == before and not (out / ".prepare").exists()


LACKING = """
import os, signal
for module, names in (os, "fork forkpty posix_fallocate register_at_fork sched_getaffinity"), (signal, "pthread_sigmask"):
    for name in names.split():
        delattr(module, name)
for name in dir(signal):
    if name.startswith("SIG") and name[3:].isalpha() and name not in ("SIGINT", "SIGTERM", "SIGKILL"):
        delattr(signal, name)
"""


def test_a_system_without_fork_and_most_signals(prepare, tmp_path):
    """As macOS and Windows are, in all processes: what they lack is taken away before anything else runs."""
    rows = nasty_rows(3000, seed=4)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    lacking = {"method": "spawn", "PYTHONPATH": str(tmp_path)}
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2", **lacking)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(rows)
    (tmp_path / "sitecustomize.py").write_text(LACKING.replace("register_at_fork", ""))  # torch asks for the system
    ended = prepare(f"--dataset={tmp_path / 'out'}", f"--out_dir={tmp_path / 'model'}", *SMALL,
                    "--max_iters=1", "--block_size=8", script=TRAIN, **lacking)
    assert ended.returncode == 0 and (tmp_path / "model" / "ckpt.pt").exists(), ended.stderr


def test_paths_of_all_kinds(prepare, tmp_path):
    """White space, quotes, a newline, signs that mean something to patterns and shells, other scripts."""
    folder = tmp_path / "it's \"a\"\n[1]*? {rank} 100% \u00e9\u4e2d"
    out = folder / "$HOME"  # which datasets would replace by its value in the path of a source
    folder.mkdir()
    ended = prepare(f"--source={shutil.copy(SAMPLE, folder)}", f"--out_dir={out}", "--test_size=0.1", "--num_proc=2",
                    HF_HOME=str(folder / "hf"))
    assert ended.returncode == 0, ended.stderr
    assert bins(out) == oracle(SENTENCES, test_size=0.1)
    words = shlex.split(ended.stdout.partition("Train on it: python train.py ")[2])
    ended = prepare(*words, f"--out_dir={folder / 'model'}", *SMALL, "--max_iters=1", script=TRAIN)
    assert ended.returncode == 0 and (folder / "model" / "ckpt.pt").exists(), ended.stderr


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_out_dir_on_another_file_system(prepare, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tmp_path.stat().st_dev
        for out, rest in (tmp_path, other), (pathlib.Path(other), str(tmp_path)):
            ended = prepare(f"--source={SAMPLE}", f"--out_dir={out / 'out'}", TMPDIR=rest, HF_HOME=f"{rest}/hf")
            assert ended.returncode == 0, ended.stderr
            assert bins(out / "out") == oracle(SENTENCES)


def test_no_two_names_differ_in_case_alone(prepare, tmp_path):
    """Neither in the repository nor in what a run has written at the moment when all of it is there."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", HF_HOME=str(tmp_path / "hf"), before=(
        "import os, shutil; remove = shutil.rmtree\n"
        "def look(path, *arguments, **options):\n"
        f"    print(*(os.path.join(*entry) for top in os.walk({str(tmp_path)!r}) for entry in\n"
        "            [(top[0], name) for name in top[1] + top[2]]), sep='\\n', flush=True)\n"
        "    return remove(path, *arguments, **options)\n"
        "shutil.rmtree = look"))
    assert ended.returncode == 0 and str(tmp_path / "out" / ".prepare" / "work" / "tokens") in ended.stdout, ended.stderr
    names += {line for line in ended.stdout.splitlines() if line.startswith(str(tmp_path))}
    assert len({name.casefold() for name in names}) == len(names) > 20


def test_one_folder_by_two_names(prepare, refused, tmp_path):
    """As `Out` and `out` are on a file system that does not tell upper from lower case; here by a link."""
    (tmp_path / "out").mkdir()
    (tmp_path / "Out").symlink_to(tmp_path / "out")
    with filelock.FileLock(tmp_path / "out" / ".prepare" / "lock"):
        assert "another run is writing to" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'Out'}")
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'Out'}").returncode == 0
    assert bins(tmp_path / "out") == oracle(SENTENCES)


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
def test_stopped_while_it_forks(prepare, tmp_path, moment):
    """Python passes over what a callback of a fork raises."""
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2", before=(
        "import os, signal\n"
        f"os.register_at_fork({moment}=lambda: os.kill(os.getpid(), signal.SIGTERM))"))
    assert ended.returncode == 143 and ended.stdout == "", ended.stderr
    assert "Traceback" not in ended.stderr and "prepare.py:" not in ended.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_stopped_while_it_moves_the_files(prepare, command, tmp_path):
    """That is done as a whole, or the old files would be gone and the new ones too."""
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}").returncode == 0
    arguments, environment = command(
        f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", "--seed=1", "--overwrite=True",
        before="import os, time; replace = os.replace\nos.replace = lambda *names: (time.sleep(0.5), replace(*names))")
    process = subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for((tmp_path / "out" / ".prepare" / "work" / "old").exists, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode in (0, 130) and "Traceback" not in errors, errors  # 0 where it was done before it noticed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.bin", "val.bin", "stats.json"}
    assert bins(tmp_path / "out") == oracle(SENTENCES, seed=1)


def test_ctrl_c_with_spawned_workers(command, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", nasty_rows(300_000, seed=5))
    arguments, environment = command(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2",
                                     method="spawn")
    process = subprocess.Popen(arguments, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work = tmp_path / "out" / ".prepare" / "work"
    wait_for(lambda: any(work.glob("tmp*")), process)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and output == "" and "Traceback" not in errors, errors
    assert not work.parent.exists()


def run_with_pool(folder, lines):
    """Run `lines` in a process that has been set up as prepare.py sets itself up."""
    (folder / ".prepare").mkdir()
    code = ("import os, pathlib, signal, sys, time; sys.path.insert(0, sys.argv[1])\n"
            "import prepare, multiprocess\n"
            "multiprocess.util.register_after_fork(prepare.start_worker, prepare.start_worker)\n"
            "prepare.set_up_processes(pathlib.Path(sys.argv[2]))\n") + lines
    ended = subprocess.run([sys.executable, "-c", code, SAMPLE.parent, folder / ".prepare"],
                           capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_pools_of_workers_that_have_hardly_begun_end(tmp_path):
    """A pool that is done at once sends SIGTERM to workers that are still being forked."""
    run_with_pool(tmp_path, "for _ in range(100):\n"
                            "    with multiprocess.Pool(4) as pool: pool.map(abs, [1])")


def test_a_pool_that_is_done_when_its_workers_die(tmp_path):
    """One of them has the lock that the pool wants."""
    run_with_pool(tmp_path, (
        "with multiprocess.Pool(2) as pool:\n"
        "    assert pool.map(abs, [-1]) == [1]\n"
        "    time.sleep(0.5)\n"
        "    for worker in multiprocess.active_children(): os.kill(worker.pid, signal.SIGKILL)\n"
        "    time.sleep(0.5)\n"  # others take their place
        "    pool.close()\n"
        "    pool.join()"))


def children_of(process):
    """The process ids of its workers in the order of their start; the process that these report to is the last."""
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, listed.split()))


@pytest.mark.parametrize("number, whole_group", [
    (signal.SIGKILL, False), (signal.SIGINT, True), (signal.SIGTERM, True)])
def test_a_signal_to_a_worker_with_a_lock(command, tmp_path, number, whole_group):
    """One that has done its part waits for more with the lock of the pool's queue; another is still at work."""
    source = parquet(tmp_path / "rows.parquet", ["short"] * 3000 + [f"{i} " * 20_000 for i in range(3000)])
    arguments, environment = command(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2")
    process = subprocess.Popen(arguments, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for((tmp_path / "out" / ".prepare" / "work" / "tokens_00000_of_00002.arrow").exists, process)
    time.sleep(0.3)
    idle = [pid for pid in children_of(process)[:2]
            if pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "S"]
    began = time.monotonic()
    try:
        os.killpg(process.pid, number) if whole_group else os.kill(idle[0], number)
        output, errors = process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert time.monotonic() - began < 20 and "Traceback" not in errors
    if whole_group:
        assert process.returncode == 128 + number and "prepare.py:" not in errors
    else:
        assert "abruptly died" in error_line(subprocess.CompletedProcess(arguments, process.returncode, output, errors))
    assert group_is_gone(process.pid) and not (tmp_path / "out" / ".prepare").exists()


def test_a_download_starts_no_processes(command, tmp_path):
    """So none of them can be killed; of several files, one after the other is fetched."""
    asked, done = [], threading.Event()

    def fault(method, path, handler):
        if method == "GET" and path.endswith(".parquet"):
            asked.append(path)
            done.wait(60)
            return True

    files = {f"data/train-0000{i}-of-00002.parquet": b"never sent, number %d" % i for i in range(2)}
    with serve(NAME, files, fault=fault) as hub:
        arguments, environment = command(
            f"--out_dir={tmp_path / 'out'}", "--num_proc=2", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path / "hf"))
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(lambda: asked, process)
        try:
            assert len(asked) == 1 and children_of(process) == []
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=20)[0] == b"" and process.returncode == 143
        finally:
            done.set()
            process.kill()
    assert not (tmp_path / "out" / ".prepare").exists()


@pytest.mark.parametrize("row", ["a" * 4_000_000, " " * 4_000_000, "ab " * 1_300_000, "\u4e2d" * 1_300_000],
                         ids=["letters", "spaces", "words", "ideographs"])
def test_a_row_of_four_megabytes(prepare, tmp_path, row):
    source = parquet(tmp_path / "rows.parquet", ["first", row, "last"])
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--shuffle=False", "--num_proc=1")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(["first", row, "last"], shuffle=False)
