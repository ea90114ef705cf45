"""Compare three formats of the same training text by bits per byte: sentences shuffled, sentences
in order, and documents of many rows.

    python tests/tools/order.py --source=NOVELS.parquet        # two CPU cores: about 35 minutes
    python tests/tools/order.py --source=NOVELS.parquet --vocabulary=50257 --n_layer=12 \\
        --n_head=12 --n_embd=768 --block_size=1024 --megabytes=300   # larger, for a GPU

The last --held_out rows of --source are the validation text, all others the training text. The
formats:

    shuffled    each row is followed by the end-of-text token; the rows are shuffled for each seed
    ordered     the same rows in order
    documents   --rows_per_document consecutive rows, joined with one space, are one document, which
                is followed by the end-of-text token; the documents stay in order

For each seed and format, train.py trains a model with the same flags on --megabytes of text. The
formats differ in bytes per token, so each has its own number of iterations. A context is a
sequence of tokens at a random position and can contain the ends of rows or documents.

Each model is evaluated on the validation text in order, in the format that it was trained on. The
losses of all tokens count, those of end-of-text tokens too; an end-of-text token precedes the
first. Their sum in bits is divided by the number of UTF-8 bytes of the held-out rows (without
separators), which is the same for all formats. The evaluations:

    windows of N tokens   N tokens are predicted; each window begins with the last token of the one
                          before it
    single sentences      each row on its own, after an end-of-text token and followed by one. For
                          "documents" this is a document of one row, which its training text does
                          not contain. Therefore also without the losses of the end-of-text tokens

Prints a Markdown table and a sample of each format's first model, and plots the bits per byte to
--picture. Unknown flags are passed to train.py.

A small GPT spends most of its time in the output layer. Therefore the tokenizer has only the first
--vocabulary - 1 tokens of GPT-2's, as if BPE training had stopped there, and the end-of-text token.
This makes training several times as fast. With 50257, it is GPT-2's tokenizer. prepare.py writes
the same formats with GPT-2's tokens.
"""
import argparse
import concurrent.futures
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq
import tiktoken
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, ROOT, TRAIN, gpt2, run_script  # noqa: E402

sys.path.insert(0, str(ROOT))
from train import GPT, GPTConfig, load_checkpoint, read_log  # noqa: E402

FORMATS = "shuffled", "ordered", "documents"
EVALUATIONS = 8  # per run, at the same number of bytes in all formats
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256, "batch_size": 16,
         "gradient_accumulation_steps": 1, "optimizer": "muon", "learning_rate": 1e-2,
         "min_lr": 1e-3, "warmup_iters": 50, "eval_iters": 16, "log_interval": 10}


def tokenizer(vocab_size):
    """A tiktoken.Encoding: GPT-2's first vocab_size - 1 tokens, then the end-of-text token."""
    end = vocab_size - 1
    ranks = {token: id for token, id in gpt2()._mergeable_ranks.items() if id < end}
    return tiktoken.Encoding("first tokens of gpt2", pat_str=gpt2()._pat_str,
                             mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end})


def tokenize(rows, encoding, rows_per_document=1):
    """A list with a uint16 array for each document: its tokens, then the end-of-text token."""
    texts = (" ".join(rows[i:i + rows_per_document])
             for i in range(0, len(rows), rows_per_document))
    return [np.array([*encoding.encode_ordinary(text), encoding.eot_token], np.uint16)
            for text in texts]


def shuffle(documents, seed):
    """The list `documents` in the order in which prepare.py shuffles them."""
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def text_bytes(rows):
    """The number of UTF-8 bytes of the strings `rows`, without separators."""
    return sum(len(row.encode()) for row in rows)


def windows(documents, width):
    """Split the tokens of all `documents` into windows that predict `width` tokens, the last one
    up to `width`. Each begins with the token before those; the first, with the end-of-text token.
    """
    ids = np.concatenate([documents[0][-1:], *documents])
    return [ids[first:first + width + 1] for first in range(0, len(ids) - 1, width)]


@torch.no_grad()
def token_losses(model, sequences):
    """For each array of ids in `sequences`: the loss of each token but the first, in nats."""
    losses, lengths = [None] * len(sequences), np.array(list(map(len, sequences)))
    for length in np.unique(lengths):  # batches without padding
        same = np.flatnonzero(lengths == length)
        n_batches = -(-len(same) * length // (8 * model.config.block_size))
        for batch in np.array_split(same, n_batches):
            ids = torch.from_numpy(np.stack([sequences[i] for i in batch]).astype(np.int64))
            ids = ids.to(next(model.parameters()).device)
            logits = model(ids[:, :-1])[0].flatten(0, 1).float()
            found = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            for i, row in zip(batch, found.view(len(batch), -1).cpu().numpy()):
                losses[i] = row
    return losses


def evaluate(model, documents, sentences, n_bytes):
    """Evaluate on the held-out text: `documents` in the format of the training text, and
    `sentences`, with `n_bytes` bytes in both. Returns {evaluation: bits per byte} and an array of
    the bits per byte at each position in the context."""
    def bits_per_byte(nats):
        return float(np.sum(nats, dtype=np.float64) / np.log(2) / n_bytes)

    block_size, found = model.config.block_size, {}
    for width in (block_size >> shift for shift in (4, 2, 0)):
        losses = token_losses(model, windows(documents, width))
        found[f"windows of {width} tokens"] = bits_per_byte(np.concatenate(losses))
    n_tokens = sum(map(len, documents))
    full = [loss for loss in losses if len(loss) == block_size]
    positions = np.mean(full, axis=0) * n_tokens / np.log(2) / n_bytes

    single = [window for sentence in sentences for window in windows([sentence], block_size)]
    losses = np.concatenate(token_losses(model, single))
    is_text = np.concatenate([window[1:] for window in single]) != sentences[0][-1]
    found["single sentences"] = bits_per_byte(losses)
    found["single sentences without end-of-text"] = bits_per_byte(losses[is_text])
    return found, positions


def initial_checkpoint(shape, vocab_size, seed):
    """A checkpoint of iteration 0. It sets the vocabulary size, for which train.py has no flag."""
    args = {name: int(shape[name]) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    args |= {"vocab_size": vocab_size, "bias": False, "dropout": 0.0}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**args))
    optimizers = model.configure_optimizers(0.1, 0.0, (0.9, 0.95), "cpu",
                                            shape["optimizer"] == "muon")
    return {"model": model.state_dict(), "model_args": args, "iter_num": 0,
            "best_val_loss": float("inf"), "config": {},
            **{name: optimizer.state_dict() for name, optimizer in optimizers.items()}}


def train_model(folder, train, val, initial, settings, threads, bar):
    """Run train.py in the new folder `folder`, on the lists of documents `train` and `val`, from
    the checkpoint `initial`, with the flags `settings`. `bar` counts the iterations. Returns the
    records of the log and the model."""
    folder.mkdir()
    np.concatenate(train).tofile(folder / "train.bin")
    np.concatenate(val).tofile(folder / "val.bin")
    torch.save(initial, folder / "ckpt.pt")
    ended = run_script(
        TRAIN, f"--dataset={folder}", f"--out_dir={folder}", "--init_from=resume",
        *(f"--{flag}={value}" for flag, value in settings.items()),
        before=f"import torch; torch.set_num_threads({threads})", timeout=None)
    if ended.returncode:
        sys.exit(ended.stderr)
    bar.update(int(settings["max_iters"]) + 1)
    model = load_checkpoint(folder / "ckpt.pt")[0].to(DEVICE).eval()
    return read_log(folder / "log.jsonl"), model


def sample(model, encoding, prompt, n_tokens, seed):
    """`prompt`, which begins a document, and `n_tokens` sampled tokens as text."""
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]
    torch.manual_seed(seed)
    ids = model.generate(torch.tensor([ids], device=DEVICE), n_tokens, temperature=0.8, top_k=200)
    return encoding.decode(ids[0, 1:].tolist())


def spread(values):
    """The mean of the array `values`, one per seed, and the largest distance from it."""
    return f"{values.mean():.3f} ± {np.abs(values - values.mean()).max():.3f}"


def plot(path, results):
    """Plot the bits per byte by bytes of training text and by position in the context."""
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for color, name in zip(("C1", "C0", "C2"), FORMATS):
        for i, result in enumerate(results[name]):
            style = {"color": color, "label": name if i == 0 else None, "alpha": 0.8}
            n_bytes, bits = zip(*result["curve"][1:])
            left.plot(np.array(n_bytes) / 1e6, bits, **style)
            positions = result["positions"]
            edges = np.unique(np.geomspace(1, len(positions) + 1, 17).astype(int))
            means = [positions[low - 1:high - 1].mean() for low, high in zip(edges, edges[1:])]
            right.plot(np.sqrt(edges[:-1] * (edges[1:] - 1)), means, **style)
    left.set(xlabel="training text, MB", ylabel="bits per byte of the validation text")
    right.set(xlabel="position in the context, tokens", xscale="log")
    left.legend(title="training text")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True,
                        help="Parquet file: books in order, one sentence per row of `text`")
    parser.add_argument("--held_out", type=int, default=12000, help="rows for validation")
    parser.add_argument("--rows_per_document", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--megabytes", type=float, default=8, help="text per run, in 10**6 bytes")
    parser.add_argument("--vocabulary", type=int, default=4096, help="size of the vocabulary")
    parser.add_argument("--prompt", default="she opened the door and", help="for the samples")
    parser.add_argument("--sample_tokens", type=int, default=200, help="tokens of each sample")
    parser.add_argument("--jobs", type=int, default=1 if DEVICE == "cuda" else 2,
                        help="number of runs at the same time")
    parser.add_argument("--picture", type=pathlib.Path, default=PREPARE.with_name("order.png"),
                        help="output file of the plot")
    flags, others = parser.parse_known_args()
    shape = SHAPE | dict(flag.removeprefix("--").split("=", 1) for flag in others)
    tokens_per_iter = int(shape["batch_size"]) * int(shape["block_size"]) * int(
        shape["gradient_accumulation_steps"])
    start, threads = time.monotonic(), max(1, os.cpu_count() // flags.jobs)
    torch.set_num_threads(threads)

    encoding = tokenizer(flags.vocabulary)
    rows = pq.read_table(flags.source, columns=["text"])["text"].to_pylist()
    train_rows, val_rows = rows[:-flags.held_out], rows[-flags.held_out:]
    train_bytes, val_bytes = text_bytes(train_rows), text_bytes(val_rows)
    sentences = [tokenize(part, encoding) for part in (train_rows, val_rows)]
    documents = [tokenize(part, encoding, flags.rows_per_document)
                 for part in (train_rows, val_rows)]
    data = {"shuffled": sentences, "ordered": sentences, "documents": documents}
    bytes_per_iter = {name: tokens_per_iter * train_bytes / sum(map(len, train))
                      for name, (train, _) in data.items()}
    iters = {name: EVALUATIONS * max(1, round(flags.megabytes * 1e6 / per_iter / EVALUATIONS))
             for name, per_iter in bytes_per_iter.items()}
    seeds = range(1, flags.seeds + 1)
    # not in the threads, which share torch's random number generator
    initial = {seed: initial_checkpoint(shape, flags.vocabulary, seed) for seed in seeds}

    def run(name, seed):
        """Train and evaluate. Returns a dict with the bits per byte and the model."""
        train, val = data[name]
        if name == "shuffled":
            train = shuffle(train, seed)
        settings = shape | {"seed": seed, "max_iters": iters[name] - 1,
                            "lr_decay_iters": iters[name],
                            "eval_interval": iters[name] // EVALUATIONS}
        records, model = train_model(work / f"{name} {seed}", train, val, initial[seed], settings,
                                     threads, bar)
        bits_per_nat = sum(map(len, val)) / np.log(2) / val_bytes  # from nats per token
        curve = [(record["iter"] * bytes_per_iter[name], record["val/loss"] * bits_per_nat)
                 for record in records if "val/loss" in record]
        found, positions = evaluate(model, val, sentences[1], val_bytes)
        bar.write(f"{name}, seed {seed}, bits per byte: " + ", ".join(
            f"{evaluation} {bits:.3f}" for evaluation, bits in found.items()), file=sys.stderr)
        return {"found": found, "positions": positions, "curve": curve, "model": model}

    jobs = [(name, seed) for seed in seeds for name in FORMATS]
    with tempfile.TemporaryDirectory() as folder, \
            tqdm(total=flags.seeds * sum(iters.values()), unit="iter", desc="Training") as bar, \
            concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        work = pathlib.Path(folder)
        runs = list(pool.map(run, *zip(*jobs)))
    results = {name: runs[i::len(FORMATS)] for i, name in enumerate(FORMATS)}
    plot(flags.picture, results)

    print(f"{flags.seeds} seeds; {shape['n_layer']} layers of {shape['n_embd']}, context of"
          f" {shape['block_size']} tokens, vocabulary of {flags.vocabulary:,};"
          f" {len(train_rows):,} rows of training text with {train_bytes:,} bytes,"
          f" {len(val_rows):,} rows of validation text with {val_bytes:,} bytes (UTF-8, without"
          f" separators); {(time.monotonic() - start) / 60:.0f} min\n\n"
          "Bits per byte of the validation text: mean ± largest distance of a seed from it\n")
    titles = {"shuffled": "shuffled sentences", "ordered": "sentences in order",
              "documents": f"documents of {flags.rows_per_document:,} rows"}
    table = [["", *titles.values()],
             ["---", *("---:" for _ in FORMATS)],
             ["tokens of training, per run", *(f"{iters[name] * tokens_per_iter:,}"
                                               for name in FORMATS)],
             ["bytes of training text, per run", *(f"{iters[name] * bytes_per_iter[name]:,.0f}"
                                                   for name in FORMATS)],
             ["validation tokens", *(f"{sum(map(len, data[name][1])):,}" for name in FORMATS)]]
    for evaluation in runs[0]["found"]:
        table.append([evaluation, *(
            spread(np.array([result["found"][evaluation] for result in results[name]]))
            for name in FORMATS)])
    for cells in table:
        print(f"| {' | '.join(cells)} |")
    for name in FORMATS:
        text = sample(results[name][0]["model"], encoding, flags.prompt, flags.sample_tokens, 1)
        print(f"\n{titles[name]}, a sample of {flags.sample_tokens} tokens:\n\n{text}")


if __name__ == "__main__":
    main()
