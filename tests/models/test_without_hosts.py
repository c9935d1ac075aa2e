"""The package needs torch and mmengine only."""

import subprocess
import sys

BLOCKED = ("mmcv", "mmdet", "mmseg", "mmpretrain", "cv2", "sklearn", "skimage", "matplotlib.pyplot")


def test_builds_and_trains_without_mmcv_and_the_hosts() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import torch
from mmengine.registry import MODELS
backbone = MODELS.build(dict(type="grootvl_mm.GrootV", arch="pico"))
neck = MODELS.build(dict(type="grootvl_mm.GrootVNeck", in_channels=192, out_channels=288))
neck(backbone(torch.randn(2, 3, 32, 32)))[0].sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
