import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from grootvl_mm.apis.cpu import adapt_to_cpu
from grootvl_mm.engine.optimizers import CPUAmpOptimWrapper


@pytest.fixture
def wrapper() -> CPUAmpOptimWrapper:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return OPTIM_WRAPPERS.build({"type": "CPUAmpOptimWrapper", "optimizer": optimizer})


def test_autocast_covers_the_whole_model(wrapper: CPUAmpOptimWrapper):
    model = nn.Linear(3, 2)
    with wrapper.optim_context(model):
        assert model(torch.ones(1, 3)).dtype == torch.bfloat16
    assert model(torch.ones(1, 3)).dtype == torch.float32


class Detector(nn.Module):
    with_bbox = True

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)
        self.seen = None

    def extract_feat(self, batch_inputs):
        feature = self.backbone(batch_inputs)
        self.seen = feature.dtype
        return (feature,)

    def forward(self, batch_inputs):
        (feature,) = self.extract_feat(batch_inputs)
        return self.head(feature)


def test_autocast_covers_the_features_of_a_detector(wrapper: CPUAmpOptimWrapper):
    detector = Detector()
    with wrapper.optim_context(detector):
        assert detector(torch.ones(1, 3)).dtype == torch.float32
        assert detector.seen == torch.bfloat16
    detector(torch.ones(1, 3))
    assert detector.seen == torch.float32
    assert "extract_feat" not in vars(detector)


def test_amp_wrapper_is_exchanged():
    optim_wrapper = {
        "type": "AmpOptimWrapper",
        "loss_scale": "dynamic",
        "dtype": "float16",
        "clip_grad": {"max_norm": 1},
    }
    cfg = Config({"launcher": "none", "optim_wrapper": optim_wrapper})
    adapt_to_cpu(cfg)
    assert cfg.optim_wrapper.to_dict() == {"type": "grootvl_mm.CPUAmpOptimWrapper", "clip_grad": {"max_norm": 1}}


def test_single_process_is_left_alone():
    cfg = Config({"launcher": "none", "model": {"norm_cfg": {"type": "SyncBN"}}})
    adapt_to_cpu(cfg)
    assert cfg.to_dict() == {"launcher": "none", "model": {"norm_cfg": {"type": "SyncBN"}}}


@pytest.mark.parametrize("launcher", ["slurm", "mpi"])
def test_launchers_that_need_gpus(launcher: str):
    with pytest.raises(ValueError, match=f"--launcher {launcher} needs GPUs"):
        adapt_to_cpu(Config({"launcher": launcher}))


def test_gloo_and_plain_batch_norm(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    cfg = Config(
        {
            "launcher": "pytorch",
            "env_cfg": {"dist_cfg": {"backend": "nccl", "timeout": 60}},
            "find_unused_parameters": True,
            "model": {"norm_cfg": {"type": "SyncBN"}, "heads": [{"norm_cfg": {"type": "SyncBN", "eps": 1.0}}]},
        }
    )
    try:
        adapt_to_cpu(cfg)
        assert torch.distributed.get_backend() == "gloo"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert cfg.env_cfg.dist_cfg.backend == "gloo"
    assert cfg.model.to_dict() == {"norm_cfg": {"type": "BN"}, "heads": [{"norm_cfg": {"type": "BN", "eps": 1.0}}]}
    assert cfg.model_wrapper_cfg.device_ids is None
    assert cfg.model_wrapper_cfg.find_unused_parameters is True
