# Shards the model, its gradients and its optimizer over the processes (PyTorch's FSDP2), block by block, for models
# that are too large for one GPU. Add this file as the last of a training config's `_base_`.
runner_type = "FlexibleRunner"
strategy = dict(type="grootvl_mm.FullyShardStrategy", units=["Block"])
