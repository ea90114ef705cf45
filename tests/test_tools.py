"""The output of the programs in tests/tools."""
import collections
import functools
import importlib
import json
import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from common import ROOT, SAMPLE, SENTENCES, gpt2, oracle, row_bytes, run_script, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st
from train_faults import fork_workers

TOOLS = ROOT / "tests" / "tools"
sys.path.insert(0, str(TOOLS))
import bench_train  # noqa: E402
import order  # noqa: E402
import repeats  # noqa: E402

IDS = np.frombuffer(b"".join(map(row_bytes, SENTENCES)), "<u2")
PNG = b"\x89PNG"


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """run_tool(name, *flags) runs main() of a program in tests/tools in this process, so that its
    runs are forked from a fork server. It must succeed. Returns its stdout."""
    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        with mock.patch.dict(os.environ):
            try:
                importlib.import_module(name).main()
            except SystemExit as end:
                assert not end.code, end.code
        return capsys.readouterr().out

    return run


def table_rows(output):
    """The cells of each row of the Markdown tables in `output`."""
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in output.splitlines() if line.startswith("| ")]


cached_tokenizer = functools.cache(order.tokenizer)


@settings(deadline=None)
@given(st.text(max_size=50), st.sampled_from([257, 300, 4096, 50257]))
def test_tokenizer_with_a_smaller_vocabulary(text, vocab_size):
    encoding = cached_tokenizer(vocab_size)
    *ids, end = order.tokenize([text], encoding)[0].tolist()
    assert end == encoding.eot_token == vocab_size - 1 and all(id < end for id in ids)
    assert gpt2().decode(ids) == text  # the ids are GPT-2's
    if vocab_size == 257:
        assert len(ids) == len(text.encode())
    if vocab_size == 50257:
        assert ids == gpt2().encode_ordinary(text)


def test_formats_have_the_bytes_of_prepare():
    encoding = order.tokenizer(50257)
    sentences = order.tokenize(SENTENCES, encoding)
    documents = order.tokenize(SENTENCES, encoding, rows_per_document=100)
    joined = [" ".join(SENTENCES[i:i + 100]) for i in (0, 100, 200, 300, 400)]
    for tokens, expected in [
            (sentences, oracle(SENTENCES, test_size=0, shuffle=False)),
            (order.shuffle(sentences, 7), oracle(SENTENCES, test_size=0, seed=7)),
            (documents, oracle(joined, test_size=0, shuffle=False))]:
        assert np.concatenate(tokens).tobytes() == expected[0]


def small_gpt(vocab_size):
    torch.manual_seed(0)
    return order.GPT(order.GPTConfig(
        block_size=16, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=8)).eval()


def test_token_losses_equal_those_of_single_sequences():
    model = small_gpt(50304)
    sequences = [IDS[first:first + length] for first, length in
                 ((0, 17), (5, 2), (9, 9), (20, 17), (40, 3), *((i, 9) for i in range(30)))]
    losses = order.token_losses(model, sequences)
    for found, ids in zip(losses, sequences, strict=True):
        ids = torch.from_numpy(ids.astype(np.int64))
        logits = model(ids[None, :-1])[0][0]
        expected = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)


def test_windows_predict_each_token_once():
    documents = order.tokenize(SENTENCES, order.tokenizer(50257))
    for width in 1, 7, len(IDS) - 1, len(IDS), len(IDS) + 1:
        windows = order.windows(documents, width)
        assert all(len(window) == width + 1 for window in windows[:-1])
        assert np.concatenate([window[1:] for window in windows]).tobytes() == IDS.tobytes()
        assert [window[0] for window in windows] == [50256, *(ids[-1] for ids in windows[:-1])]


@pytest.mark.parametrize("rows_per_document", [1, 25])
def test_bits_per_byte(rows_per_document):
    rows = SENTENCES[:30] + ["\u4e2d\u6587"]  # more bytes than characters
    n_bytes = sum(len(row.encode()) for row in rows)
    assert order.text_bytes(rows) == n_bytes
    joined = [" ".join(rows[i:i + rows_per_document])
              for i in range(0, len(rows), rows_per_document)]
    n_tokens = len(b"".join(map(row_bytes, joined))) // 2
    n_single = len(b"".join(map(row_bytes, rows))) // 2
    encoding = order.tokenizer(50257)
    documents = order.tokenize(rows, encoding, rows_per_document)
    sentences = order.tokenize(rows, encoding)

    # all logits are 0, so each token has 1 / 50257 of the probability: log2(50257) bits
    model = small_gpt(50257)
    torch.nn.init.zeros_(model.lm_head.weight)
    found, positions = order.evaluate(model, documents, sentences, n_bytes)
    bits = np.log2(50257)
    expected = {**{f"windows of {width} tokens": n_tokens * bits / n_bytes for width in (1, 4, 16)},
                "single sentences": n_single * bits / n_bytes,
                "single sentences without end-of-text": (n_single - len(rows)) * bits / n_bytes}
    assert found == pytest.approx(expected, rel=1e-6)
    assert positions == pytest.approx(np.full(16, n_tokens * bits / n_bytes), rel=1e-6)

    # unequal probabilities, which depend on the context
    model = small_gpt(50257)
    with torch.no_grad():
        model.lm_head.weight *= 50
    found, positions = order.evaluate(model, documents, sentences, n_bytes)
    ids = torch.from_numpy(np.concatenate([[50256], *documents]).astype(np.int64))
    nats = 0.0
    for first in range(0, n_tokens, 16):
        x, y = ids[first:first + 16], ids[first + 1:first + 17]
        logits = model(x[None, :len(y)])[0][0]
        nats -= logits.log_softmax(-1).gather(1, y[:, None]).sum().item()
    assert found["windows of 16 tokens"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    assert positions.mean() == pytest.approx(found["windows of 16 tokens"], rel=0.05)
    assert positions.std() > 0 and len(set(found.values())) == 5


def test_spread_is_mean_and_largest_distance():
    assert order.spread(np.array([1.0, 2.0, 6.0])) == "3.000 ± 3.000"


def test_order_experiment(run_tool, tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", SENTENCES)
    output = run_tool(
        "order", f"--source={source}", "--held_out=100", "--rows_per_document=30", "--seeds=1",
        "--megabytes=0.02", "--vocabulary=300", "--block_size=64", "--batch_size=4", "--n_layer=1",
        "--n_embd=16", "--warmup_iters=1", "--eval_iters=1", "--prompt=mara looked",
        "--sample_tokens=5", f"--picture={tmp_path / 'order.png'}")
    val_bytes = len("".join(SENTENCES[-100:]).encode())
    assert f"100 rows of validation text with {val_bytes:,} bytes" in output
    header, _, tokens, n_bytes, val_tokens, *rows = table_rows(output)
    assert header[1:] == ["shuffled sentences", "sentences in order", "documents of 30 rows"]
    tokens, n_bytes, val_tokens = (
        [int(cell.replace(",", "")) for cell in row[1:]] for row in (tokens, n_bytes, val_tokens))
    assert all(n % (8 * 4 * 64) == 0 for n in tokens)  # eight evaluations
    assert n_bytes == pytest.approx([20000] * 3, rel=0.2)
    assert val_tokens[0] == val_tokens[1] > val_tokens[2]  # which joins words and spaces
    assert [row[0] for row in rows] == [
        *(f"windows of {length} tokens" for length in (4, 16, 64)),
        "single sentences", "single sentences without end-of-text"]
    for row in rows[:3]:
        for cell, n in zip(row[1:], val_tokens):
            assert 0 < float(cell.split(" ± ")[0]) < np.log2(300) * n / val_bytes + 0.5
    samples = re.findall("(?m)^mara looked", output)
    assert len(samples) == 3
    assert (tmp_path / "order.png").read_bytes().startswith(PNG)


def test_optimizer_experiment(run_tool, tmp_path):
    picture = tmp_path / "optimizers.png"
    output = run_tool("optimizers", f"--source={SAMPLE}", "--test_size=0.2", "--iters=2",
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


def test_plot(run_tool, dataset, tmp_path):
    run_tool("plot_tokens", dataset, f"--picture={tmp_path / 'tokens.png'}")
    assert (tmp_path / "tokens.png").read_bytes().startswith(PNG)


def test_benchmark_of_prepare(run_tool):
    output = run_tool("bench_prepare", "--rows=3000", "--num_proc=1", "--rows_per_document=2")
    assert "1,500 rows or documents compared with the oracle: equal" in output
    assert [row[0] for row in table_rows(output)][-6:] == [
        "start", "load", "split and tokenize", "write", "total", "tiktoken alone"]
    assert re.search(r"^time: [\d.]+ times that of tiktoken alone$", output, re.MULTILINE)
    assert re.search(r"^disk space: [\d.]+ GB at the peak, [\d.]+ times the size of train.bin and",
                     output, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains GPT-2 124M on a GPU")
def test_benchmark_of_train_without_a_gpu(run_tool):
    assert run_tool("bench_train").startswith("no GPU here;")


@pytest.fixture
def fork_programs(monkeypatch):
    """run_program() of bench_train.py forks the programs from a fork server."""
    def run_forked(arguments, folder, seconds):
        monkeypatch.chdir(folder)
        if arguments[0] == "-m":
            (folder / "torchrun.py").write_text(f"import {arguments[1]} as run; run.main()")
            arguments = ["torchrun.py", *arguments[2:]]
        ended = run_script(*arguments, timeout=seconds,
                           before=functools.partial(fork_workers, folder))
        return ended.returncode, ended.stdout, ended.stderr

    monkeypatch.setattr(bench_train, "run_program", run_forked)


def test_benchmark_of_train(run_tool, fork_programs, tmp_path):
    # a stand-in for nanoGPT: 4 iterations, 100 ms each after the first half
    nanogpt = tmp_path / "nanoGPT"
    nanogpt.mkdir()
    for name in "model.py", "configurator.py":
        (nanogpt / name).touch()
    (nanogpt / "train.py").write_text(
        "for i, ms in enumerate([900, 800, 100, 100]):\n"
        "    print(f'iter {i}: loss {9 - i}.0000, time {ms}.00ms, mfu 50.00%')\n"
        "raise ValueError('a reason')\n")
    output = run_tool(
        "bench_train", "--device=cpu", "--iters=4", f"--nanogpt={nanogpt}", "--n_layer=1",
        "--n_embd=16", "--block_size=16", "--batch_size=2", "--gradient_accumulation_steps=3",
        "--learning_rate=1e-2", f"--json={tmp_path / 'bench.json'}")
    _, *cells = table_rows(output)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert (results["torch"], results["iters"]) == (torch.__version__, 4)
    rows = {row["run"]: row for row in results["rows"]}
    assert list(rows) == [row[0] for row in cells[1:]] == [
        "adamw, float32", "nanoGPT, float32", "muon, float32", "sampling, float32", "repeated",
        "resumed", "torchrun"]
    assert not any("failed" in row for row in rows.values()), output
    ours, theirs, muon, sampling, repeated, resumed, torchrun = rows.values()
    assert theirs["tokens_per_second"] == pytest.approx(2 * 16 * 3 / 0.1)
    assert theirs["loss"] == 7.5 and "mfu" not in theirs
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    assert theirs["note"] == (f"ValueError: a reason; train.py processes {ratio:.2f} times as many"
                              " tokens per second")
    for row in ours, muon, repeated, resumed, torchrun:
        assert row["note"] == "" and 0.1 < row["peak_gib"] < 4
        assert 9 < row["loss"] < 11 and 9 < row["val_loss"] < 11
    assert ours["loss"] != muon["loss"] and "graphs" not in ours
    assert torchrun["graphs"] >= 1
    assert repeated["difference"] == resumed["difference"] == 0  # exact on a CPU
    assert torchrun["difference"] < 1e-3
    assert min(sampling["tokens_per_second"], sampling["tokens_per_second_16"]) > 0


def test_faults(run_tool):
    output = run_tool("faults", "--seed=3", "--count=1", "--rows=1000")
    rows, (fault, count), *others = table_rows(output)[2:]
    assert rows == ["adversarial rows compared with the oracle", "1,000"]
    # a random time after the start, in any stage
    assert re.fullmatch(r"prepare.py, \w+: SIGKILL to the process group", fault) and count == "1"
    assert others == [["row of 0.1 MB compared with the oracle", "1"], ["failed checks", "0"]]


def test_repeats_experiment(run_tool, tmp_path):
    rows = [f"{SENTENCES[i % len(SENTENCES)]} {i}" for i in range(2000)]
    books = [rows[i:i + 18] for i in range(0, 2000, 20)]
    corpus, held_out = repeats.make_corpus(rows, 18, seed=1)
    assert held_out == [row for book in books[90:] for row in book]
    copies = [corpus.count(book[0]) for book in books[:90]]
    assert collections.Counter(copies) == {1: 54, 2: 26, 3: 8, 4: 1, 5: 1}
    firsts = range(0, len(corpus), 18)
    assert len(firsts) == sum(copies) == 139
    assert all(corpus[first:first + 18] in books[:90] for first in firsts)

    source = write_parquet(tmp_path / "rows.parquet", rows)
    output = run_tool(
        "repeats", f"--source={source}", "--rows_per_book=18", "--seeds=1", "--iters=2",
        "--vocabulary=300", "--block_size=64", "--batch_size=4", "--n_layer=1", "--n_embd=16",
        "--warmup_iters=1", "--eval_iters=1")
    header, _, *cells = table_rows(output)
    assert header == ["", "with repeats", "--drop_repeated=16", "difference"]
    table = {name: [float(cell.split(" ± ")[0]) for cell in values] for name, *values in cells}
    assert table["rows, in thousands"] == [2.502, 1.62, -0.882]  # 139, 90 and 49 books
    repeated, dropped, _ = table["validation rows that also occur in the training split, percent"]
    assert repeated > dropped == 0
    tokens = 1000 * table["tokens of the training split, in thousands"][1]
    assert table["passes over the training split"][1] == pytest.approx(2 * 256 / tokens, abs=1e-3)
    encoding = order.tokenizer(300)
    n_tokens, n_held_out = (sum(map(len, order.tokenize(part, encoding)))
                            for part in (sum(books[:90], []), held_out))
    assert tokens == pytest.approx(0.95 * n_tokens, rel=0.02)
    bits = np.log2(300) * n_held_out / order.text_bytes(held_out)
    assert table["held-out books, bits per byte"][:2] == pytest.approx([bits] * 2, abs=0.3)
    assert table["own validation split, bits per byte"][:2] == pytest.approx([bits] * 2, abs=0.5)
