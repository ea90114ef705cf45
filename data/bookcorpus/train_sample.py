# Train a small GPT on the sample, a story of 444 sentences: about two minutes on two CPU cores.
# It memorizes the story (overfits), so the validation loss increases after a while.
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
eval_iters = 0  # all of val.bin
log_interval = 10

start = "mara looked"
num_samples = 2
max_new_tokens = 100
