# Train GPT-2 124M on BookCorpus with a GPU of 24 GB or more. An H200 needs 2.7 hours, at the speed
# of its first 40 iterations (522,000 tokens per second, PyTorch 2.11), an RTX 4090 an estimated 16.
#
#     python train.py data/bookcorpus/train_gpt2.py
#
# BookCorpus has an estimated 1.24 billion tokens: 2,520 iterations of 480 * 1,024 tokens. This
# trains for four epochs of it, or for six of the 0.8 billion tokens (estimated) that
# --drop_repeated=16 leaves. More than four passes over the same text bring little (Muennighoff et
# al., 2023, https://arxiv.org/abs/2305.16264).

dataset = "bookcorpus"
out_dir = "out-gpt2"

# 480 sequences per iteration, as in nanoGPT. 30 and 16 need 14.8 GiB of GPU memory; 12 and 40 need
# 7.2 GiB and are 6% slower. The second number must be a multiple of the number of GPUs.
batch_size = 30
gradient_accumulation_steps = 16

max_iters = 10000
lr_decay_iters = 10000
warmup_iters = 500

eval_interval = 500
eval_iters = 0  # evaluate on all of val.bin, an estimated 0.4 to 0.6 million tokens
log_interval = 10
