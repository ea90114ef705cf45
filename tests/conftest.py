"""Fixtures: an environment without the network or the user's caches, and runs of the scripts."""
import gc
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before a test imports torch; the tests run in parallel

import pytest  # noqa: E402
from common import (  # noqa: E402
    PREPARE, PREPARE_MODULES, SENTENCES, TINY, TRAIN, TRAIN_MODULES, discard, fork_server,
    row_bytes, run_script, start_script)
from hub import HUB  # noqa: E402


# as in a terminal: nohup and a shell's background ignore these, and child processes inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_finish():
    """From now on, garbage collections skip what is loaded; they took 3% of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """Set the environment of all runs. The fork servers start now, with this environment and early
    enough to import their modules before the first run."""
    for name in list(os.environ):
        if name.startswith(("HF_", "TIKTOKEN_")):
            del os.environ[name]
    folder = tmp_path_factory.mktemp("caches")
    os.environ |= {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": HUB.url, "HF_HUB_OFFLINE": "1",
                   "MPLCONFIGDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    for modules in PREPARE_MODULES, TRAIN_MODULES:
        fork_server(modules)


@pytest.fixture
def prepare():
    """prepare(*flags, ...) runs prepare.py, or `script`, and returns its CompletedProcess."""
    return lambda *flags, script=PREPARE, **options: run_script(script, *flags, **options)


@pytest.fixture
def refused():
    """refused(*flags, script=PREPARE, status=1) checks that a run fails with one line on stderr
    and returns that line."""
    def run(*flags, script=PREPARE, status=1, **options):
        ended = run_script(script, *flags, **options)
        assert (ended.returncode, ended.stdout) == (status, ""), ended
        progress_bar = "/s]"
        lines = [line for line in ended.stderr.split("\n") if line and progress_bar not in line]
        assert len(lines) == 1 and lines[0].startswith(f"{script.name}: "), ended.stderr
        return lines[0]
    return run


@pytest.fixture
def start():
    """start(script, *flags, ...) calls start_script; the process group is ended after the test."""
    started = []

    def run(*arguments, **options):
        started.append(start_script(*arguments, **options))
        return started[-1]

    yield run
    for process in started:
        discard(process)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder with train.bin and val.bin: the tokens of the sample, 45 sentences in val.bin."""
    folder = tmp_path_factory.mktemp("dataset")
    for name, rows in ("val", SENTENCES[:45]), ("train", SENTENCES[45:]):
        (folder / f"{name}.bin").write_bytes(b"".join(map(row_bytes, rows)))
    return folder


@pytest.fixture
def train(dataset, tmp_path):
    """train(*flags, ...) trains a very small GPT into tmp_path/out. Returns a CompletedProcess."""
    return lambda *flags, **options: run_script(
        TRAIN, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", *TINY, *flags, **options)
