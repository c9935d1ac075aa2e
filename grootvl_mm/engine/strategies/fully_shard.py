"""Shards a model, its gradients and its optimizer over the processes: PyTorch's FSDP2 for mmengine's FlexibleRunner.

mmengine's own ``FSDPStrategy`` wraps FSDP1, in which every parameter is a piece of a flat vector: ``flat_decay_mult``
takes them all for one-dimensional and turns their weight decay off, and on the CPU it asks for a GPU. FSDP2 keeps each
parameter's name and shape, so that the optimizer is built as without sharding.
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
    """Gives each process a part of every parameter, of its gradient and of its optimizer state.

    The parameters of a unit are all-gathered while it computes, then freed; those in no unit (stem, heads) stay
    gathered during the whole step. Checkpoints are the same as without sharding: a training can continue either way,
    and ``tools/test.py`` takes them.

    Example::

        runner_type = "FlexibleRunner"
        strategy = dict(type="grootvl_mm.FullyShardStrategy")

    Args:
        units: names of the module classes that are units; ``Block`` is GrootV's.
        kwargs: those of mmengine's ``DDPStrategy``.

    Raises:
        ValueError: when the model is prepared, there is only one process, or no part of the model is a unit.
    """

    def __init__(self, *, units: Sequence[str] = ("Block",), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = tuple(units)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not self.distributed:
            raise ValueError("FullyShardStrategy needs several processes; start them with tools/dist_train.sh")
        model = self.convert_model(model.to(get_device()))
        units = [module for module in model.modules() if type(module).__name__ in self.units]
        if not units:
            raise ValueError(f"the model has no module of the classes {', '.join(self.units)}, which units names")
        for unit in units:
            fully_shard(unit)
        fully_shard(model)
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        self.logger.info(
            f"The model is sharded in {len(units)} units: this process has {own:,} of {total:,} parameters."
        )
        return model

    def model_state_dict(self) -> dict[str, Any]:
        """The whole weights for the main process; all processes must call it."""
        state_dict = self.model.state_dict()
        for name, value in state_dict.items():
            state_dict[name] = _whole(value)
        return state_dict

    def optim_state_dict(self) -> dict[str, Any]:
        """The whole state of the optimizer for the main process; all processes must call it."""
        return tree_map(_whole, super().optim_state_dict())

    def load_model_state_dict(self, state_dict: dict, **kwargs: Any) -> None:
        """Load whole weights, of which each process keeps its part."""
        with implicit_replication():
            super().load_model_state_dict(state_dict, **kwargs)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the whole state of the optimizer, of which each process keeps its part."""
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
        """Write a checkpoint, as ``DDPStrategy`` does; all processes must call it."""
        if is_main_process():
            super().save_checkpoint(filename, **kwargs)
            return
        # The main process needs their parts.
        self.model_state_dict()
        if kwargs.get("save_optimizer", True):
            self.optim_state_dict()


def _whole(value: Any) -> Any:
    """A tensor with all its parts, on the CPU of the main process; elsewhere None. Anything else stays as it is."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if is_main_process() else None


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """This process's part of an optimizer's state, sharded as its parameter; counters and the like stay whole."""
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
