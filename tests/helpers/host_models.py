"""The hosts' own model configs with GrootV-pico as their backbone, and random batches for them."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import get_installed_path
from torch import Tensor, nn

from tests.helpers.config_cases import detection_batch, random_images, segmentation_batch

CHANNELS = (24, 48, 96, 192)  # of GrootV-pico
BACKBONE = ConfigDict(type="grootvl_mm.GrootV", arch="pico")
IMAGE_SIZE = 128
# Deformable convolutions take no map that is smaller than their kernel, and the last of a pyramid has 1/128 of it.
LARGE_IMAGE_SIZE = 384
DEFORMABLE = ("ddod", "vfnet")
CLASSES = 5  # of the ground truth; every config has more

DETECTORS = (
    "atss/atss_r50_fpn_1x_coco",
    "autoassign/autoassign_r50-caffe_fpn_1x_coco",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco",
    "centernet/centernet-update_r50-caffe_fpn_ms-1x_coco",
    "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance",
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco",
    "crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman",
    "dab_detr/dab-detr_r50_8xb2-50e_coco",
    "ddod/ddod_r50_fpn_1x_coco",
    "ddq/ddq-detr-4scale_r50_8xb2-12e_coco",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
    "detr/detr_r50_8xb2-150e_coco",
    "dino/dino-4scale_r50_8xb2-12e_coco",
    "double_heads/dh-faster-rcnn_r50_fpn_1x_coco",
    "dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "foveabox/fovea_r50_fpn_4xb4-1x_coco",
    "free_anchor/freeanchor_r50_fpn_1x_coco",
    "fsaf/fsaf_r50_fpn_1x_coco",
    "gfl/gfl_r50_fpn_1x_coco",
    "ghm/retinanet_r50_fpn_ghm-1x_coco",
    "grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco",
    "htc/htc-without-semantic_r50_fpn_1x_coco",
    "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "maskformer/maskformer_r50_ms-16xb1-75e_coco",
    "ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco",
    "paa/paa_r50_fpn_1x_coco",
    "pafpn/faster-rcnn_r50_pafpn_1x_coco",
    "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco",
    "pisa/faster-rcnn_r50_fpn_pisa_1x_coco",
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco",
    "retinanet/retinanet_r50_fpn_1x_coco",
    "rpn/rpn_r50_fpn_1x_coco",
    "rtmdet/rtmdet_s_8xb32-300e_coco",
    "sabl/sabl-retinanet_r50_fpn_1x_coco",
    "scnet/scnet_r50_fpn_1x_coco",
    "solo/solo_r50_fpn_1x_coco",
    "solov2/solov2_r50_fpn_1x_coco",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
    "vfnet/vfnet_r50_fpn_1x_coco",
    "yolact/yolact_r50_1xb8-55e_coco",
    "yolof/yolof_r50-c5_8xb8-1x_coco",
    "yolox/yolox_s_8xb8-300e_coco",
)
SEGMENTERS = (
    "ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024",
    "apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "ccnet/ccnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024",
    "deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024",
    "dmnet/dmnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024",
    "emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024",
    "encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024",
    "gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512",
    "mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024",
    "maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512",
    "nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024",
    "point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024",
    "pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024",
    "segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024",
    "segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512",
    "sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024",
    "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512",
    "upernet/upernet_r50_4xb2-40k_cityscapes-512x1024",
)
CLASSIFIERS = (
    "byol/byol_resnet50_16xb256-coslr-200e_in1k",
    "convnext/convnext-tiny_32xb128_in1k",
    "csra/resnet101-csra_1xb16_voc07-448px",
    "densecl/densecl_resnet50_8xb32-coslr-200e_in1k",
    "densenet/densenet121_4xb256_in1k",
    "mobilenet_v3/mobilenet-v3-large_8xb128_in1k",
    "mocov2/mocov2_resnet50_8xb32-coslr-200e_in1k",
    "mocov3/mocov3_resnet50_8xb512-amp-coslr-100e_in1k",
    "resnet/resnet50_8xb32_in1k",
    "simclr/simclr_resnet50_16xb256-coslr-200e_in1k",
    "simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k",
    "swav/swav_resnet50_8xb32-mcrop-coslr-200e_in1k-224px-96px",
    "swin_transformer/swin-tiny_16xb64_in1k",
)
MODELS_OF = {"mmdet": DETECTORS, "mmseg": SEGMENTERS, "mmpretrain": CLASSIFIERS}


def swapped_model(host: str, name: str) -> nn.Module:
    """A host's own model with GrootV-pico in the place of its backbone, and weights as its config starts them."""
    cfg = Config.fromfile(Path(get_installed_path(host), ".mim", "configs", f"{name}.py"))
    model = cfg.model
    {"mmdet": _swap_in_detector, "mmseg": _swap_in_segmenter, "mmpretrain": _swap_in_classifier}[host](model)
    if "data_preprocessor" in cfg:
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model.get("data_preprocessor", {}).pop("batch_augments", None)  # such as padding to 1024 x 1024
    _reduce(model)
    with DefaultScope.overwrite_default_scope(host):
        built = revert_sync_batchnorm(MODELS.build(model))
        built.init_weights()
    return built


def _reduce(node: Any) -> None:
    """Fewer boxes and queries than in images of a thousand pixels."""
    if isinstance(node, list | tuple):
        for child in node:
            _reduce(child)
    elif isinstance(node, dict):
        limits = {"max_per_img": 20, "nms_pre": 100, "num_queries": 30}
        if "pos_fraction" in node:
            limits["num"] = 32
        for key, limit in limits.items():
            if isinstance(node.get(key), int):
                node[key] = min(node[key], limit)
        for child in node.values():
            _reduce(child)


def _swap_in_detector(model: ConfigDict) -> None:
    model.pop("pretrained", None)
    head = model.get("panoptic_head")
    neck = model.get("neck")
    taker = head if neck is None else (neck[0] if isinstance(neck, list) else neck)
    wanted = taker.in_channels
    count = 1 if isinstance(wanted, int) else len(wanted)
    model.backbone = ConfigDict(BACKBONE, out_indices=tuple(range(4 - count, 4)))
    taker.in_channels = CHANNELS[-1] if isinstance(wanted, int) else list(CHANNELS[-count:])


def _swap_in_segmenter(model: ConfigDict) -> None:
    model.backbone = ConfigDict(BACKBONE)
    model.pop("pretrained", None)
    model.data_preprocessor.size = (IMAGE_SIZE, IMAGE_SIZE)
    model.data_preprocessor.pop("size_divisor", None)
    model.test_cfg.mode = "whole"
    if "neck" in model:
        model.neck.in_channels = list(CHANNELS)
        return
    heads = [model.get("decode_head"), model.get("auxiliary_head")]
    for head in [part for item in heads for part in (item if isinstance(item, list) else [item]) if part]:
        for taker in (head, head.get("kernel_generate_head")):
            if taker is not None and "in_channels" in taker:
                _take_channels(taker)


def _take_channels(head: ConfigDict) -> None:
    index = head.get("in_index", range(len(head.in_channels)) if not isinstance(head.in_channels, int) else -1)
    head.in_channels = CHANNELS[index] if isinstance(index, int) else [CHANNELS[i] for i in index]
    if "c1_in_channels" in head:
        head.c1_in_channels = CHANNELS[0]


def _swap_in_classifier(model: ConfigDict) -> None:
    model.backbone = ConfigDict(BACKBONE, out_indices=(3,))
    model.pop("pretrained", None)
    neck = model.get("neck")
    if neck is not None and "in_channels" in neck:
        neck.in_channels = CHANNELS[-1]
    elif "in_channels" in model.get("head", {}):
        model.head.in_channels = CHANNELS[-1]
        if neck is None and model.head.type == "LinearClsHead":  # ConvNeXt takes the mean in its backbone
            model.neck = ConfigDict(type="GlobalAveragePooling")
    if neck is not None and neck.type == "SwAVNeck":
        model.head.loss.num_crops = [2, 2]


def random_batch(host: str, name: str, model: nn.Module) -> dict[str, Any]:
    """Two random images with ground truth; of a self-supervised model several views of them."""
    if host == "mmdet":
        size = LARGE_IMAGE_SIZE if name.startswith(DEFORMABLE) else IMAGE_SIZE
        # RTMDet takes masks for instance segmentation only.
        return detection_batch(CLASSES, size, with_mask=not name.startswith("rtmdet"), with_semantic=True)
    return segmentation_batch(CLASSES, IMAGE_SIZE) if host == "mmseg" else _classification_batch(model)


def _classification_batch(model: nn.Module) -> dict[str, Any]:
    from mmpretrain.models import BaseSelfSupervisor, ImageClassifier
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(label) for label in (0, CLASSES - 1)]
    if isinstance(model, BaseSelfSupervisor):
        views = 4 if type(model).__name__ == "SwAV" else 2
        images = random_images(2 * views, IMAGE_SIZE)
        pairs = [torch.stack(images[2 * view : 2 * view + 2]) for view in range(views)]
        return {"inputs": pairs, "data_samples": samples}
    if type(model.head).__name__ == "CSRAClsHead":
        samples = [DataSample().set_gt_score(torch.eye(20)[index]) for index in range(2)]
    assert isinstance(model, ImageClassifier)
    return {"inputs": random_images(2, IMAGE_SIZE), "data_samples": samples}


def train_step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """One step of SGD; the losses."""
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1e-4))
    return model.train().train_step(batch, wrapper)


def predict(model: nn.Module, batch: dict[str, Any]) -> Any:
    """The predictions for a batch; of a self-supervised model its features."""
    model.eval()
    with torch.no_grad():
        if hasattr(model, "test_step") and not _is_self_supervised(model):
            return model.test_step(batch)
        data = model.data_preprocessor(batch, training=False)
        return model.extract_feat(data["inputs"][0])


def _is_self_supervised(model: nn.Module) -> bool:
    return any(base.__name__ == "BaseSelfSupervisor" for base in type(model).__mro__)
