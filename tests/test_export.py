"""Models, checkpoints and prompts that other programs read or write."""
import io
import json
import re
import shutil

import pytest
import torch
import train_faults as faults
from common import TRAIN, gpt2, run_script
from test_train import MODEL_ARGS, reference_logits, with_large_weights
from train import GPT, GPTConfig, UserError, load_checkpoint

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def save_checkpoint(folder, change=None, activation="gelu", **args):
    """Write ckpt.pt with large weights, after change(model). Returns the GPT."""
    args = MODEL_ARGS | args
    model = with_large_weights(GPT(GPTConfig(**args, activation_function=activation)))
    with torch.no_grad():
        if change:
            change(model)
    torch.save({"model": model.state_dict(), "model_args": args, "activation_function": activation},
               folder / "ckpt.pt")
    return model


def export(folder, **options):
    """Export the checkpoint in `folder` to folder/gpt. Returns a CompletedProcess."""
    return run_script(TRAIN, f"--out_dir={folder}", f"--export={folder / 'gpt'}", **options)


def assert_same_logits(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


# export ----------------------------------------------------------------------


@pytest.mark.parametrize("bias, activation, dropout", [(True, "gelu_new", 0.25),
                                                       (False, "gelu", 0.0)])
def test_export(tmp_path, bias, activation, dropout):
    model = save_checkpoint(tmp_path, activation=activation, bias=bias, dropout=dropout, n_embd=32)
    ended = export(tmp_path, before=faults.exit_after_weights)
    folder = tmp_path / "gpt"
    assert ended.returncode == 9 and not folder.exists(), "a killed export left a folder"
    left, = tmp_path.glob("gpt.new-*")
    shutil.rmtree(left)
    ended = export(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "gpt"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "not readable by others"

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    idx = torch.randint(50257, (2, 16))
    expected = model(idx)[0][..., :50257].detach()
    assert_same_logits(theirs.eval()(idx).logits.detach(), expected)
    rates = {part.p for part in theirs.modules() if isinstance(part, torch.nn.Dropout)}
    assert rates == {dropout}, "fine-tuning needs the dropout of the model"

    loaded = GPT.from_pretrained(str(folder)).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor[:len(loaded[name])])
    assert all((loaded[name] == 0).all() for name in loaded.keys() - model.state_dict().keys())
    assert loaded["lm_head.weight"].shape == (50257, 32)
    ended = run_script(TRAIN, "--sample=True", f"--init_from={folder}", "--block_size=8",
                       "--num_samples=1", "--max_new_tokens=12", "--device=cpu")
    assert ended.returncode == 0 and ended.stdout.endswith("---------------\n"), ended.stderr


def test_exported_names_are_those_on_the_hub(tmp_path):
    """llama.cpp and mlx-lm read these keys of config.json, and tensors without a prefix."""
    save_checkpoint(tmp_path)
    assert export(tmp_path).returncode == 0
    config = json.loads((tmp_path / "gpt" / "config.json").read_text())
    expected = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=50257,
                    n_ctx=16, n_positions=16, n_embd=8, n_head=2, n_layer=2,
                    layer_norm_epsilon=1e-5, bos_token_id=50256, eos_token_id=50256)
    assert expected.items() <= config.items()
    names = {"wte.weight", "wpe.weight"} | {
        f"{part}.{kind}" for kind in ("weight", "bias") for part in (
            "ln_f", *(f"h.{i}.{name}" for i in range(2) for name in (
                "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")))}
    tensors = safetensors.load_file(tmp_path / "gpt" / "model.safetensors")
    assert tensors.keys() == names and tensors["h.0.mlp.c_fc.weight"].shape == (8, 32)


def test_generation_stops_at_the_end_of_text(tmp_path):
    prompt = torch.tensor([[318, 257, 3797]])

    def end_after_prompt(model):
        model.lm_head.weight[50256] = 100 * model.hidden(prompt)[0, -1]

    save_checkpoint(tmp_path, end_after_prompt)
    assert export(tmp_path).returncode == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt")
    found = theirs.generate(prompt, max_new_tokens=5, do_sample=False)
    assert found.tolist() == [[318, 257, 3797, 50256]]


def test_exported_tokenizer(tmp_path):
    save_checkpoint(tmp_path)
    assert export(tmp_path).returncode == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt")
    text = " it's a lamp ,\n\n and\tthe 11 stairs do n't . \u00e9\u4e2d<|endoftext|>"
    expected = gpt2().encode(text, allowed_special="all")
    assert tokenizer(text)["input_ids"] == expected and tokenizer.decode(expected) == text
    assert tokenizer(text, truncation=True)["input_ids"] == expected[:16]
    settings = json.loads((tmp_path / "gpt" / "tokenizer_config.json").read_text())
    assert settings["clean_up_tokenization_spaces"] is False  # True in transformers 4


def test_folder_of_an_export(refused, tmp_path):
    """It may be empty, also on Windows, where os.replace does not replace folders."""
    save_checkpoint(tmp_path)
    folder, other = tmp_path / "gpt", tmp_path / "gpt.new"
    folder.mkdir()
    other.mkdir()  # not a temporary folder of train.py
    ended = export(tmp_path, before=faults.folders_are_not_replaced)
    assert (ended.returncode, ended.stderr) == (0, "")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    line = refused(f"--out_dir={tmp_path}", f"--export={folder}", script=TRAIN)
    assert f"--export={folder}: not a new or empty folder" in line
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "gpt", "gpt.new"}
    assert not any(other.iterdir())


# GPT-2 in transformers' format -----------------------------------------------


def test_gpt2_weights_against_transformers(tmp_path):
    """In the format of OpenAI's file on the Hub: no prefix, with the causal masks."""
    torch.manual_seed(0)
    theirs = with_large_weights(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=4)))
    theirs.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(50257, (2, 32))
    assert_same_logits(ours(idx)[0], theirs(idx).logits.detach())
    ours.crop_block_size(16)
    assert_same_logits(ours(idx[:, :16])[0], theirs(idx[:, :16]).logits.detach())


def gpt2_folder(folder, prefix="", change=None, **settings):
    """Write a small GPT-2 in transformers' format. Returns its state dict with nanoGPT's layout."""
    model = with_large_weights(GPT(GPTConfig(
        block_size=16, vocab_size=50257, n_layer=2, n_head=2, n_embd=16, bias=True)))
    state = {}
    for name, tensor in model.state_dict().items():
        is_matrix = ".h." in name and tensor.dim() == 2
        state[prefix + name.removeprefix("transformer.")] = (
            tensor.T.contiguous() if is_matrix else tensor.clone())
    del state[prefix + "lm_head.weight"]
    if change:
        change(state)
    folder.mkdir()
    safetensors.save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = dict(model_type="gpt2", vocab_size=50257, n_positions=16, n_embd=16, n_layer=2,
                  n_head=2, activation_function="gelu_new", n_inner=None) | settings
    (folder / "config.json").write_bytes(json.dumps(config, ensure_ascii=False).encode())
    return model.state_dict()


def add_masks(state):
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def add_tied_head(state):
    state["lm_head.weight"] = state["wte.weight"].clone()


@pytest.mark.parametrize("prefix, change, settings", [
    ("transformer.", add_masks, {"n_inner": 64}),
    ("", add_tied_head, {"tie_word_embeddings": True}),
    ("", None, {"activation_function": "gelu_pytorch_tanh", "author": "\u0141ukasz"}),
    ("", None, {"activation_function": "gelu", "scale_attn_weights": True})])
def test_gpt2_folder(monkeypatch, tmp_path, prefix, change, settings):
    """config.json is UTF-8, whatever the encoding of the system is."""
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    state = gpt2_folder(tmp_path / "gpt2", prefix, change, **settings)
    loaded = GPT.from_pretrained(str(tmp_path / "gpt2")).eval()
    idx = torch.randint(50257, (2, 16))
    activation = settings.get("activation_function", "gelu_new")
    assert_same_logits(loaded(idx)[0], reference_logits(state, idx, 2, activation))


@pytest.mark.parametrize("settings", [
    {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True},
    {"scale_attn_weights": False}, {"n_inner": 32}, {"layer_norm_epsilon": 1e-6},
    {"activation_function": "relu"}, {"tie_word_embeddings": False}, {"model_type": "gptj"},
    {"add_cross_attention": True}], ids=str)
def test_gpt2_settings_that_are_not_supported(tmp_path, settings):
    gpt2_folder(tmp_path / "gpt2", **settings)
    (name, value), = settings.items()
    with pytest.raises(UserError, match=f"config.json: {name}={value} is not supported"):
        GPT.from_pretrained(str(tmp_path / "gpt2"))


def test_gpt2_with_an_untied_head(refused, tmp_path):
    def change(state):
        add_tied_head(state)
        state["lm_head.weight"][5] += 1

    gpt2_folder(tmp_path / "gpt2", change=change)
    assert "lm_head.weight is not tied to wte.weight" in refused(
        "--sample=True", f"--init_from={tmp_path / 'gpt2'}", "--device=cpu", script=TRAIN)


# checkpoints and prompts -----------------------------------------------------


@pytest.mark.parametrize("vocab_size", [65, 100277])
def test_other_vocabularies_are_refused(refused, tmp_path, vocab_size):
    """For example a checkpoint of nanoGPT whose tokens are characters."""
    save_checkpoint(tmp_path, vocab_size=vocab_size)
    for flags in ("--sample=True", "--device=cpu"), (f"--export={tmp_path / 'gpt'}",):
        line = refused(f"--out_dir={tmp_path}", *flags, script=TRAIN)
        assert f"the model's vocabulary has {vocab_size} tokens" in line
    assert not (tmp_path / "gpt").exists()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weight_that_is_not_finite(refused, tmp_path, value):
    def change(model):
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = value

    save_checkpoint(tmp_path, change)
    for flags in ("--sample=True", "--device=cpu"), (f"--export={tmp_path / 'gpt'}",):
        line = refused(f"--out_dir={tmp_path}", *flags, script=TRAIN)
        assert "transformer.h.1.mlp.c_fc.weight has values that are not finite" in line
    assert not (tmp_path / "gpt").exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "", "_orig_mod.",
                                    "_orig_mod.", ""])
def test_prefixes_of_a_checkpoint(tmp_path, prefix):
    expected = save_checkpoint(tmp_path).state_dict()
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved["model"] = {prefix + name: tensor for name, tensor in expected.items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    found = load_checkpoint(tmp_path / "ckpt.pt")[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_prompt_files(refused, tmp_path):
    """UTF-8 with or without a byte order mark; other encodings are refused."""
    save_checkpoint(tmp_path)
    path, text = tmp_path / "prompt.txt", "caf\u00e9 \u4e2d\n"
    flags = (f"--out_dir={tmp_path}", "--sample=True", f"--start=FILE:{path}", "--device=cpu",
             "--num_samples=1", "--max_new_tokens=3")
    outputs = []
    for encoding in "utf-8", "utf-8-sig":
        path.write_bytes(text.encode(encoding))
        outputs.append(run_script(TRAIN, *flags).stdout)
    assert outputs[0].startswith(text) and outputs[0] == outputs[1]
    for content in text.encode("utf-16"), "caf\u00e9".encode("latin-1"), None:
        path.unlink() if content is None else path.write_bytes(content)
        line = refused(*flags, script=TRAIN)
        assert re.search(rf"--start=FILE:{path}: not a text file in UTF-8 \(\w+Error: ", line)
