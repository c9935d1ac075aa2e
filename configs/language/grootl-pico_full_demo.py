_base_ = "grootl-pico_lora_demo.py"
lora = None  # all parameters
trainer = dict(learning_rate=1e-3)
