"""Draw the lengths of the rows and the frequencies of the tokens of a train.bin and val.bin.

    python tests/draw.py data/novels --picture=data/bookcorpus/tokens.png
"""
import argparse
import pathlib

import matplotlib
import numpy as np
from conftest import ROOT, gpt2

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

END_OF_TEXT = 50256


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path, default=ROOT / "data" / "bookcorpus" / "tokens.png")
    flags = parser.parse_args()
    ids = np.concatenate([np.fromfile(flags.folder / f"{name}.bin", "<u2") for name in ("train", "val")])
    lengths = np.diff(np.flatnonzero(ids == END_OF_TEXT), prepend=-1)
    counts = np.bincount(ids, minlength=END_OF_TEXT + 1)
    counts[END_OF_TEXT] = 0  # once in each row
    order = np.argsort(counts)[::-1][:np.count_nonzero(counts)]

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4))
    longest = int(np.percentile(lengths, 99.5))
    left.bar(np.arange(1, longest + 1), 100 * np.bincount(lengths, minlength=longest + 1)[1:longest + 1] / len(lengths), 1)
    left.axvline(lengths.mean(), color="C1", label=f"mean {lengths.mean():.1f}")
    left.axvline(np.median(lengths), color="C2", label=f"median {np.median(lengths):.0f}")
    left.set(xlabel="tokens per row, with end of text", ylabel="% of rows")
    left.legend()
    top = order[:20]
    middle.barh(np.arange(20), 100 * counts[top] / len(ids))
    middle.set_yticks(np.arange(20), [repr(gpt2().decode([id])) for id in top], family="monospace")
    middle.invert_yaxis()
    middle.set(xlabel="% of tokens", title="the 20 most frequent tokens")
    right.loglog(np.arange(1, len(order) + 1), counts[order])
    right.set(xlabel="rank of the token", ylabel="occurrences", title=f"{len(order):,} different tokens")
    figure.suptitle(f"{len(lengths):,} rows, {len(ids):,} tokens")
    figure.tight_layout()
    figure.savefig(flags.picture, dpi=80)


if __name__ == "__main__":
    main()
