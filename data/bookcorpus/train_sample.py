# Train a small GPT on the sample, which prepare.py has tokenized to data/sample (see the README).
# It memorizes the story (overfits), so the validation loss eventually increases.
#
#     python train.py data/bookcorpus/train_sample.py
#     python train.py data/bookcorpus/train_sample.py --sample=True

dataset = "sample"
out_dir = "out-sample"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 20
max_iters = 400
lr_decay_iters = 400

eval_interval = 100
eval_iters = 0  # evaluate on all of val.bin
log_interval = 10

start = "mara looked"
num_samples = 2
max_new_tokens = 100
