"""The programs beside the tests: they run, and what they print is true."""
import re
import subprocess

import numpy as np
import order
import pytest
import torch
from conftest import ROOT, SAMPLE, gpt2, oracle, row_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import SENTENCES

IDS = np.frombuffer(b"".join(map(row_bytes, SENTENCES)), "<u2")


@pytest.fixture
def program(command):
    """program(name, *flags) runs a program of tests/ and returns what it prints."""
    def run(name, *flags):
        arguments, environment = command(*flags, script=ROOT / "tests" / name)
        ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
    return run


@settings(deadline=None)
@given(st.text(max_size=50), st.sampled_from([256, 300, 4096, 50256]))
def test_ids_are_spelled_with_smaller_ones(text, size):
    ids = np.frombuffer(row_bytes(text) + row_bytes("end"), "<u2")
    found = order.spelled(ids, size)
    assert found.max() <= size and np.count_nonzero(found == size) == 2
    parts = np.split(found, np.flatnonzero(found == size) + 1)
    assert [gpt2().decode(part[:-1].tolist()) for part in parts[:2]] == [text, "end"]
    if size == 50256:
        assert (found == ids).all()


def test_rows_are_shuffled_as_prepare_shuffles_them():
    train, val = oracle(SENTENCES, test_size=0.3, seed=7)
    assert order.shuffled(IDS, 50256, 7).tobytes() == val + train


def test_losses_are_those_of_each_sequence_alone():
    torch.manual_seed(0)
    model = order.GPT(order.GPTConfig(block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=8)).eval()
    sequences = [IDS[first:first + length] for first, length in ((0, 17), (5, 2), (9, 9), (20, 17), (40, 3))]
    for found, ids in zip(order.losses(model, sequences, "cpu"), sequences, strict=True):
        ids = torch.from_numpy(ids.astype(np.int64))
        wanted = -model(ids[None, :-1])[0][0].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=0)


def test_windows_predict_each_token_once():
    for width in 1, 7, len(IDS) - 1, len(IDS):
        parts = order.windows(IDS, width)
        assert all(len(part) <= width + 1 for part in parts)
        assert np.concatenate([part[1:] for part in parts]).tobytes() == IDS[1:].tobytes()


def test_the_experiment_on_order(program, tmp_path):
    printed = program("order.py", f"--source={SAMPLE}", "--seeds=2", "--iters=3", "--test_size=0.2", "--vocabulary=300",
                      "--block_size=64", "--n_layer=1", "--n_embd=16", "--warmup_iters=1",
                      f"--picture={tmp_path / 'order.png'}")
    lines = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ") and "±" in line]
    assert len(lines) == 5 + 4 + 7 and "alone, a sentence at a time" in lines[4][0]  # readings, evaluations, places
    for _, *cells in lines:
        shuffled, ordered, gain = (float(re.match(r" *(-?[\d.]+) ±", cell)[1]) for cell in cells)
        assert 0 < ordered < np.log(300) + 0.5 and shuffled - ordered == pytest.approx(gain, abs=0.002)
    assert (tmp_path / "order.png").read_bytes().startswith(b"\x89PNG")


def test_the_experiment_on_optimizers(program, tmp_path):
    printed = program("optimizers.py", f"--source={SAMPLE}", "--test_size=0.2", "--iters=4",
                      "--rates", "1e-2", "--seeds", "1", "--n_layer=1", "--n_embd=16",
                      "--block_size=32", f"--picture={tmp_path / 'optimizers.png'}")
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    sweep = [row for row in rows if row[0].strip() in ("adamw", "muon")]
    assert [[cell.strip() for cell in row[:2]] for row in sweep] == [
        ["adamw", "0.01"], ["muon", "0.01"]]
    curve = [row for row in rows if row[0].strip().replace(",", "").isdigit()]
    assert [row[0].strip() for row in curve] == ["0", "256", "512", "768", "1,024"]
    for i, row in enumerate(sweep):
        assert float(curve[-1][1 + 2 * i]) == float(row[2]) < float(curve[0][1 + 2 * i])
        assert sorted(seconds := [float(row[2 + 2 * i]) for row in curve]) == seconds
    assert curve[0][1] == curve[0][3] and curve[1][1] != curve[1][3]
    assert (tmp_path / "optimizers.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture(program, prepare, tmp_path):
    prepare(f"--source={SAMPLE}", f"--out_dir={tmp_path}")
    program("draw.py", tmp_path, f"--picture={tmp_path / 'tokens.png'}")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmarks(program):
    printed = program("bench_prepare.py", "--rows=3000", "--num_proc=1")
    assert "3,000 rows equal the oracle's" in printed and "| tiktoken alone |" in printed
    assert re.search(r"^ratio [\d.]+; disk [\d.]+ times the two files at the peak", printed, re.MULTILINE)
    if not torch.cuda.is_available():
        assert len(re.findall(r"train.py +[\d,]+ tokens/s", program("bench_train.py", "--iters=12", "--repeats=1"))) == 1


def test_faults(program):
    """With few tries; those are counted, and nothing is lost."""
    printed = program("faults.py", "--seed=3", "--count=0", "--rows=1000")
    assert "| rows made to break a tokenizer, against the oracle | 1,000 |" in printed and "| lost | 0 |" in printed
