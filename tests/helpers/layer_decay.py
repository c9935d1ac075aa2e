"""What layer-wise learning rate decay must do with the demo models."""

from mmengine.optim import OptimWrapper
from torch import nn

RATE = 0.5
# Stem, five blocks in stages of 1, 1, 2 and 1, and everything after them.
NUM_LAYERS = 7
# Some parameters of each layer, written down by hand.
LAYERS = {
    "backbone.stem.conv1.weight": 0,
    "backbone.stem.norm2.bias": 0,
    "backbone.stages.0.blocks.0.mixer.A_log": 1,
    "backbone.stages.0.norm.weight": 1,
    "backbone.stages.0.downsample.conv.weight": 1,
    "backbone.stages.1.blocks.0.mlp.fc1.bias": 2,
    "backbone.stages.2.blocks.0.mixer.in_proj.weight": 3,
    "backbone.stages.2.blocks.1.mixer.dt_proj.bias": 4,
    "backbone.stages.2.downsample.norm.weight": 4,
    "backbone.stages.3.blocks.0.mixer.Ds": 5,
    "backbone.stages.3.norm.bias": 5,
}


def groups_of(model: nn.Module, optim_wrapper: OptimWrapper) -> dict[str, dict]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group for group in optim_wrapper.optimizer.param_groups for parameter in group["params"]}
