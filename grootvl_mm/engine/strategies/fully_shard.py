"""FSDP2 (fully sharded data parallel) for mmengine's FlexibleRunner.

mmengine's own ``FSDPStrategy`` wraps FSDP1, which needs a GPU and flattens all parameters into one vector, so that
``flat_decay_mult`` turns off weight decay for all of them. FSDP2 preserves names and shapes of the parameters, so that
the optimizer is built as without sharding.
"""

from collections.abc import Sequence
from typing import Any

from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import is_main_process
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.utils._pytree import tree_map

from grootvl_mm.registry import STRATEGIES


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Shards every parameter, its gradient and its optimizer state across the ranks.

    The parameters of a unit are all-gathered while it computes, then freed; those outside any unit (stem, heads) stay
    gathered during the whole iteration. Checkpoints are not sharded: a training can be resumed with or without this
    strategy, and ``tools/test.py`` reads them.

    Example::

        runner_type = "FlexibleRunner"
        strategy = dict(type="grootvl_mm.FullyShardStrategy")

    Args:
        units: Class names of the modules to shard as units; ``Block`` is GrootV's.
        kwargs: Arguments of mmengine's ``DDPStrategy``.

    Raises:
        ValueError: When the model is wrapped: there is only one process, or the model has no unit.
    """

    def __init__(self, *, units: Sequence[str] = ("Block",), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = tuple(units)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not self.distributed:
            raise ValueError("FullyShardStrategy needs more than one process; start them with tools/dist_train.sh")
        model = self.convert_model(model.to(get_device()))
        units = [module for module in model.modules() if type(module).__name__ in self.units]
        if not units:
            raise ValueError(f"the model has no module of class {' or '.join(self.units)}; set units to its blocks")
        for unit in units:
            fully_shard(unit)
        fully_shard(model)
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        self.logger.info(f"Sharded the model in {len(units)} units: this rank holds {own:,} of {total:,} parameters.")
        return model

    def model_state_dict(self) -> dict[str, Any]:
        """The full state dict, on rank 0; all ranks must call it."""
        state_dict = self.model.state_dict()
        for name, value in state_dict.items():
            state_dict[name] = _whole(value)
        return state_dict

    def optim_state_dict(self) -> dict[str, Any]:
        """The full optimizer state, on rank 0; all ranks must call it."""
        return tree_map(_whole, super().optim_state_dict())

    def load_model_state_dict(self, state_dict: dict, **kwargs: Any) -> None:
        """Load a full state dict, of which each rank keeps its shard."""
        with implicit_replication():
            super().load_model_state_dict(state_dict, **kwargs)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load a full optimizer state, of which each rank keeps its shard."""
        groups = zip(self.optim_wrapper.optimizer.param_groups, state_dict["param_groups"], strict=True)
        parameters = {
            number: parameter
            for group, saved in groups
            for parameter, number in zip(group["params"], saved["params"], strict=True)
        }
        state = {
            number: {name: _part(value, parameters[number]) for name, value in values.items()}
            for number, values in state_dict["state"].items()
        }
        super().load_optim_state_dict({**state_dict, "state": state})

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        """Write a checkpoint, as ``DDPStrategy`` does; all ranks must call it."""
        if is_main_process():
            super().save_checkpoint(filename, **kwargs)
            return
        # Rank 0 gathers the shards of all ranks.
        self.model_state_dict()
        if kwargs.get("save_optimizer", True):
            self.optim_state_dict()


def _whole(value: Any) -> Any:
    """Gather a tensor to the CPU of rank 0, None on other ranks; return any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if is_main_process() else None


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """Shard an optimizer state as its parameter is sharded; scalars such as step counters are not sharded."""
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
