# The published fine-tuning of GrootL: mamba-130m with trees over the prompt, LoRA on Alpaca's 52,002 instructions,
# about 3,250 steps. We have not run it, because neither checkpoint nor data come with a package. It expects
#   - the checkpoint state-spaces/mamba-130m-hf, from the hub or, with model.pretrained=FOLDER, from a folder
#   - data/alpaca/alpaca_data.json, Alpaca's own file
#
# From the paper and the authors' scripts: model, LoRA, learning rate and schedule, batch size, precision, template,
# length. Two differences: the embedding gets no row for [PAD] (the attention mask tells padding from tokens), and the
# batch size is for one device without DeepSpeed: divide gradient_accumulation_steps by the number of devices.
model = dict(pretrained="state-spaces/mamba-130m-hf", tree_scale=0.3, tree_reach=3, edge_decay="next")
lora = dict(targets="published", r=8, lora_alpha=16, lora_dropout=0.0)
data = dict(train="data/alpaca/alpaca_data.json", max_length=2048)
trainer = dict(
    num_train_epochs=1,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    learning_rate=2e-5,
    weight_decay=0.0,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=20,
    bf16=True,
    gradient_checkpointing=True,
    logging_steps=10,
    save_steps=500,
    save_total_limit=2,
    seed=42,
)
