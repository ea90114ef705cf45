# Train GPT-2 124M on BookCorpus on a GPU with 24 GB or more. Time: 1.7 hours on an H200, at the
# speed of its first 40 iterations (522,000 tokens per second, PyTorch 2.11), and an estimated 10
# hours on an RTX 4090.
#
#     python train.py data/bookcorpus/train_gpt2.py
#
# After --drop_repeated=16, BookCorpus has an estimated 0.8 billion tokens: an epoch is 1,630
# iterations of 480 * 1,024 tokens. This trains for four epochs, as more than four passes over the
# same text bring little (Muennighoff et al., 2023, https://arxiv.org/abs/2305.16264). For all of
# BookCorpus, an estimated 1.24 billion tokens, four epochs are 10,000 iterations.

dataset = "bookcorpus"
out_dir = "out-gpt2"

# 480 sequences per iteration, as in nanoGPT. 30 * 16 needs 14.8 GiB of GPU memory; 12 * 40 needs
# 7.2 GiB and is 6% slower. gradient_accumulation_steps must be a multiple of the number of GPUs.
batch_size = 30
gradient_accumulation_steps = 16

max_iters = 6500
lr_decay_iters = 6500
warmup_iters = 500

eval_interval = 500
eval_iters = 0  # all of val.bin, an estimated 0.4 to 0.6 million tokens, and as much of train.bin
log_interval = 10
