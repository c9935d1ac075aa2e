# Shares the model, its gradients and its optimizer among the processes (PyTorch's FSDP2), block by block, for models
# that are too large for one GPU. Add this file to `_base_` of a training config, behind the others.
runner_type = "FlexibleRunner"
strategy = dict(type="grootvl_mm.FullyShardStrategy", units=["Block"])
