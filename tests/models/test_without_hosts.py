"""The package needs torch and mmengine only."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from grootvl_mm.models import GrootV, GrootVNeck
from tests.helpers.published import publish

BLOCKED = ("mmcv", "mmdet", "mmseg", "mmpretrain", "cv2", "sklearn", "skimage", "matplotlib.pyplot")


def test_builds_and_trains_without_mmcv_and_the_hosts() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import torch
import grootvl_mm.apis.zoo
from mmengine.registry import MODELS
backbone = MODELS.build(dict(type="grootvl_mm.GrootV", arch="pico"))
neck = MODELS.build(dict(type="grootvl_mm.GrootVNeck", in_channels=192, out_channels=288))
neck(backbone(torch.randn(2, 3, 32, 32)))[0].sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_feature_maps_of_a_picture_with_published_weights(tmp_path: Path) -> None:
    """The lines of the documentation for use outside OpenMMLab, in the smallest size."""
    published = publish(GrootV("pico"), GrootVNeck(192, 288))
    torch.save({"model": published, "model_ema": published, "epoch": 300}, tmp_path / "published.pth")
    Image.fromarray(np.zeros((60, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import numpy as np
import torch
from PIL import Image
from grootvl_mm.models import GrootV

backbone = GrootV("pico").eval()
backbone.load_state_dict(torch.load("published.pth"))
picture = np.asarray(Image.open("photo.jpg").convert("RGB"), dtype=np.float32)
mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
image = torch.from_numpy((picture - mean) / std).float().permute(2, 0, 1)[None]
with torch.no_grad():
    maps = backbone(image)
assert [tuple(m.shape) for m in maps] == [(1, 24, 15, 23), (1, 48, 8, 12), (1, 96, 4, 6), (1, 192, 2, 3)]
assert torch.equal(backbone.stem.conv1.bias, torch.load("published.pth")["model"]["patch_embed.conv1.bias"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
