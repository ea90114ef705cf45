"""Plot the row lengths and the token frequencies of train.bin and val.bin.

    python tests/tools/plot_tokens.py data/novels --picture=tokens.png
"""
import argparse
import pathlib
import sys

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from common import PREPARE, bins, gpt2  # noqa: E402

END_OF_TEXT = 50256


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder with train.bin and val.bin")
    parser.add_argument("--picture", type=pathlib.Path, default=PREPARE.with_name("tokens.png"),
                        help="output file")
    flags = parser.parse_args()
    ids = np.frombuffer(b"".join(bins(flags.folder)), "<u2")
    lengths = np.diff(np.flatnonzero(ids == END_OF_TEXT), prepend=-1)
    counts = np.bincount(ids, minlength=END_OF_TEXT + 1)
    counts[END_OF_TEXT] = 0  # one per row
    by_rank = np.argsort(counts)[::-1][:np.count_nonzero(counts)]

    figure = Figure(figsize=(13, 4))
    left, middle, right = figure.subplots(1, 3)
    longest = int(np.percentile(lengths, 99.5))
    left.bar(np.arange(longest + 1),
             100 * np.bincount(lengths, minlength=longest + 1)[:longest + 1] / len(lengths), 1)
    left.axvline(lengths.mean(), color="C1", label=f"mean {lengths.mean():.1f}")
    left.axvline(np.median(lengths), color="C2", label=f"median {np.median(lengths):.0f}")
    left.set(xlabel="tokens per row, including end of text", ylabel="% of rows")
    left.legend()
    top = by_rank[:20]
    middle.barh(np.arange(len(top)), 100 * counts[top] / len(ids))
    middle.set_yticks(np.arange(len(top)), [repr(gpt2().decode([id])) for id in top],
                      family="monospace")
    middle.invert_yaxis()
    middle.set(xlabel="% of tokens", title=f"the {len(top)} most frequent tokens")
    right.loglog(np.arange(1, len(by_rank) + 1), counts[by_rank])
    right.set(xlabel="rank of the token", ylabel="occurrences",
              title=f"{len(by_rank):,} different tokens")
    figure.suptitle(f"{len(lengths):,} rows, {len(ids):,} tokens")
    figure.tight_layout()
    figure.savefig(flags.picture, dpi=80)


if __name__ == "__main__":
    main()
