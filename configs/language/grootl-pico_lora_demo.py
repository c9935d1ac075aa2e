# LoRA for the small model that `make demo STACK=language` pretrains, on the sentences that it writes.
model = dict(pretrained="work_dirs/demo-language/base/final", tree_scale=0.3, tree_reach=3)
lora = dict(targets="default", r=8, lora_alpha=16)
data = dict(
    train="work_dirs/demo-language/data/train.json",
    val="work_dirs/demo-language/data/val.json",
    max_length=256,
    template=dict(without_input="{instruction}"),  # the answer simply continues the text
)
trainer = dict(
    num_train_epochs=1,
    per_device_train_batch_size=16,
    learning_rate=4e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    train_sampling_strategy="group_by_length",
    logging_steps=10,
    eval_strategy="epoch",
    save_steps=20,
    save_total_limit=2,
    seed=0,
)
