"""The output of the programs in tests/tools."""
import re
import sys

import numpy as np
import pytest
import torch
from common import ROOT, SAMPLE, SENTENCES, gpt2, oracle, row_bytes, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

TOOLS = ROOT / "tests" / "tools"
sys.path.insert(0, str(TOOLS))
import order  # noqa: E402

IDS = np.frombuffer(b"".join(map(row_bytes, SENTENCES)), "<u2")
PNG = b"\x89PNG"


def run_tool(name, *flags):
    """Run a program in tests/tools, which must succeed. Returns its stdout."""
    ended = run_script(TOOLS / name, *flags)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def table_rows(output):
    """The cells of each row of the Markdown tables in `output`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in output.splitlines() if line.startswith("| ")]


@settings(deadline=None)
@given(st.text(max_size=50), st.sampled_from([256, 300, 4096, 50256]))
def test_reencoding_with_a_smaller_vocabulary(text, vocab_size):
    ids = np.frombuffer(row_bytes(text) + row_bytes("end"), "<u2")
    found = order.reencode(ids, vocab_size)
    assert found.max() <= vocab_size and np.count_nonzero(found == vocab_size) == 2
    rows = np.split(found, np.flatnonzero(found == vocab_size) + 1)
    assert [gpt2().decode(row[:-1].tolist()) for row in rows[:2]] == [text, "end"]
    if vocab_size == 50256:
        assert (found == ids).all()


def test_order_shuffles_like_prepare():
    train, val = oracle(SENTENCES, test_size=0.3, seed=7)
    assert order.shuffle(IDS, 50256, 7).tobytes() == val + train


def test_token_losses_equal_those_of_single_sequences():
    torch.manual_seed(0)
    model = order.GPT(order.GPTConfig(
        block_size=16, vocab_size=50304, n_layer=1, n_head=2, n_embd=8)).eval()
    sequences = [IDS[first:first + length] for first, length in
                 ((0, 17), (5, 2), (9, 9), (20, 17), (40, 3), *((i, 9) for i in range(30)))]
    losses = order.token_losses(model, sequences)
    for found, ids in zip(losses, sequences, strict=True):
        ids = torch.from_numpy(ids.astype(np.int64))
        logits = model(ids[None, :-1])[0][0]
        expected = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


def test_windows_predict_each_token_once():
    for width in 1, 7, len(IDS) - 1, len(IDS):
        windows = order.windows(IDS, width)
        assert all(len(window) <= width + 1 for window in windows)
        assert np.concatenate([window[1:] for window in windows]).tobytes() == IDS[1:].tobytes()


def test_spread_is_mean_and_largest_distance():
    assert order.spread(np.array([1.0, 2.0, 6.0])) == "3.000 ± 3.000"


def test_order_experiment(tmp_path):
    output = run_tool("order.py", f"--source={SAMPLE}", "--seeds=1", "--iters=1",
                      "--test_size=0.2", "--vocabulary=300", "--block_size=64", "--n_layer=1",
                      "--n_embd=16", "--warmup_iters=1", "--eval_iters=1",
                      f"--picture={tmp_path / 'order.png'}")
    rows = [row for row in table_rows(output) if "±" in row[1]]
    assert [row[0] for row in rows] == [
        *(f"windows of {length} tokens" for length in (1, 4, 16, 64)), "single sentences",
        "2,048", "4,096", "1 to 1", "2 to 2", "3 to 4", "5 to 8", "9 to 16", "17 to 32", "33 to 64"]
    for _, *cells in rows:
        shuffled, ordered, difference = (float(cell.split(" ± ")[0]) for cell in cells)
        assert 0 < ordered < np.log(300) + 0.5
        assert shuffled - ordered == pytest.approx(difference, abs=0.002)
    assert (tmp_path / "order.png").read_bytes().startswith(PNG)


def test_optimizer_experiment(tmp_path):
    picture = tmp_path / "optimizers.png"
    output = run_tool("optimizers.py", f"--source={SAMPLE}", "--test_size=0.2", "--iters=2",
                      "--rates", "1e-2", "--seeds", "1", "--n_layer=1", "--n_embd=16",
                      "--block_size=32", "--eval_iters=1", f"--picture={picture}")
    rows = table_rows(output)
    final = [row for row in rows if row[0] in ("adamw", "muon")]
    assert [row[:2] for row in final] == [["adamw", "0.01"], ["muon", "0.01"]]
    curve = [row for row in rows if row[0].replace(",", "").isdigit()]
    assert [row[0] for row in curve] == ["0", "256", "512"]
    for (_, _, loss, _), i in zip(final, (1, 3)):
        assert float(curve[-1][i]) == float(loss) < float(curve[0][i])
        seconds = [float(row[i + 1]) for row in curve]
        assert sorted(seconds) == seconds
    # the same initial weights, then different updates
    assert curve[0][1] == curve[0][3] and curve[1][1] != curve[1][3]
    assert picture.read_bytes().startswith(PNG)


def test_plot(dataset, tmp_path):
    run_tool("plot_tokens.py", dataset, f"--picture={tmp_path / 'tokens.png'}")
    assert (tmp_path / "tokens.png").read_bytes().startswith(PNG)


def test_benchmark_of_prepare():
    output = run_tool("bench_prepare.py", "--rows=3000", "--num_proc=1")
    assert "3,000 rows compared with the oracle: equal" in output
    assert [row[0] for row in table_rows(output)][-6:] == [
        "start", "load", "split and tokenize", "write", "total", "tiktoken alone"]
    assert re.search(r"^time: [\d.]+ times that of tiktoken alone$", output, re.MULTILINE)
    assert re.search(r"^disk space: [\d.]+ times the size of train.bin and val.bin at the peak",
                     output, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains GPT-2 124M on a GPU")
def test_benchmark_of_train():
    output = run_tool("bench_train.py", "--iters=2", "--repeats=1")
    assert re.fullmatch(r"train.py +[\d,]+ tokens/s, final loss [\d.]+; iter 2: .*\n", output)


def test_faults():
    output = run_tool("faults.py", "--seed=3", "--count=1", "--rows=1000")
    assert table_rows(output)[2:] == [
        ["adversarial rows compared with the oracle", "1,000"],
        ["prepare.py, start: SIGKILL to the process group", "1"],
        ["row of 0.1 MB compared with the oracle", "1"], ["failed checks", "0"]]
