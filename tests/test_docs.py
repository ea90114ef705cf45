"""The commands in the README's shell blocks, with small data, a small model and a local Hub."""
import re
import shlex

import pytest
from common import (ONE_NODE, PREPARE, ROOT, SENTENCES, TINY, TRAIN, TWO_NODES, run_script,
                    write_parquet)
from hub import ONLINE, serve

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"(?ms)^```sh\n(.*?)^```", README)]
COMMANDS = [shlex.split(line, comments=True) for block in BLOCKS for line in block]
PREPARE_COMMANDS = [words[2:] for words in COMMANDS if words[1] == "data/bookcorpus/prepare.py"]
TRAIN_COMMANDS = [words[2:] for words in COMMANDS if words[1] == "train.py"]
TORCHRUN_COMMANDS = [words[1:] for words in COMMANDS if words[0] == "torchrun"]
FEW = ["--max_iters=1", "--eval_interval=2", "--batch_size=1", "--gradient_accumulation_steps=2",
       "--eval_iters=1", "--max_new_tokens=3", "--device=cpu"]


def test_all_commands_are_tested():
    n_tested = len(PREPARE_COMMANDS) + len(TRAIN_COMMANDS) + len(TORCHRUN_COMMANDS)
    # CI runs the other two, which install packages and run the tests
    assert [words[:3] for words in COMMANDS if words[0] not in ("python", "torchrun")] == [
        ["python3", "-m", "venv"], ["pip", "install", "-r"]]
    assert n_tested == len(COMMANDS) - 2 > 8
    ci = (ROOT / ".ci" / "run").read_text()
    assert BLOCKS[0][0].startswith("python3 -m venv") and "block 1" in ci
    assert BLOCKS[3][0].startswith("pip install") and "block 4" in ci


def test_prepare_commands(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    sample, real = PREPARE_COMMANDS
    ended = run_script(PREPARE, *sample, f"--out_dir={tmp_path / 'sample'}")
    assert ended.returncode == 0, ended.stderr
    n_tokens = [(tmp_path / "sample" / f"{name}.bin").stat().st_size // 2
                for name in ("train", "val")]
    assert f"`| tokens | {n_tokens[0]:,} | {n_tokens[1]:,} |`" in README
    summary = re.search(r"(?s)```text\n(.*?)```", README)[1]
    assert ended.stdout.startswith(summary), "the README shows another summary"
    body = write_parquet(tmp_path / "rows.parquet", SENTENCES).read_bytes()
    with serve({"data/train-00000-of-00001.parquet": body}):
        ended = run_script(PREPARE, *real, f"--out_dir={tmp_path / 'real'}",
                           before=ONLINE)
    assert ended.returncode == 0 and (tmp_path / "real" / "train.bin").exists(), ended.stderr


def small(words, dataset, out):
    """The flags `words` of train.py, changed to small data, a small model and few iterations."""
    model = () if any(word.startswith("--init_from=/") for word in words) else TINY[:4]
    iters = ["--max_iters=3"] * ("--init_from=resume" in words)
    kept = [word for word in words if not word.startswith(("--dataset", "--out_dir"))]
    return [*kept, f"--dataset={dataset}", f"--out_dir={out}", *model, *FEW, *iters]


@pytest.mark.parametrize("words", TRAIN_COMMANDS, ids=" ".join)
def test_train_commands(monkeypatch, words, dataset, tmp_path):
    monkeypatch.chdir(tmp_path)
    out, words = tmp_path / "out", list(words)
    if not words[0].startswith("--"):
        words[0] = str(ROOT / words[0])
    if "--init_from=gpt2" in words:
        for flags in [], [f"--export={tmp_path / 'gpt2'}"]:  # in place of OpenAI's weights
            ended = run_script(TRAIN, *small([], dataset, out), *flags)
            assert ended.returncode == 0, ended.stderr
        words[words.index("--init_from=gpt2")] = f"--init_from={tmp_path / 'gpt2'}"
    exports = [word.partition("=")[2] for word in words if word.startswith("--export=")]
    if "--sample=True" in words or "--init_from=resume" in words or exports:
        ended = run_script(TRAIN, *small([], dataset, out))
        assert ended.returncode == 0, ended.stderr
    (tmp_path / "prompt.txt").write_text("the ")
    ended = run_script(TRAIN, *small(words, dataset, out))
    assert ended.returncode == 0, ended.stderr
    if exports:
        assert (tmp_path / exports[0] / "model.safetensors").exists()
    else:
        expected = "---------------" if "--sample=True" in words else "step "
        assert expected in ended.stdout


def test_torchrun_commands():
    """test_train.py runs them with two processes."""
    assert [" ".join(words) for words in TORCHRUN_COMMANDS] == [
        f"{flags} train.py data/bookcorpus/train_gpt2.py" for flags in (ONE_NODE, TWO_NODES)]
