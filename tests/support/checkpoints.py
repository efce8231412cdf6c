"""Small checkpoints: the shipped one with other settings, and RT-DETR's relatives with random weights."""

import json
import shutil
from pathlib import Path

import shapes
import torch
from transformers import (
    AutoModelForObjectDetection,
    Deimv2Config,
    DFineConfig,
    DINOv3ViTConfig,
    HGNetV2Config,
    PreTrainedConfig,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
)

KINDS = ("RT-DETRv2", "D-FINE", "DEIMv2", "DEIMv2 with the lite encoder", "DEIMv2 with DINOv3")
INPUT_SIZE = 64
STAGES = {"hidden_sizes": [16, 32, 64, 96], "depths": [1] * 4}
HGNET = {
    **STAGES,
    "embedding_size": 8,
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 32, 64],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": STAGES["hidden_sizes"],
    "stage_num_blocks": [1] * 4,
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3] * 4,
    "stage_numb_of_layers": [1] * 4,
    "use_learnable_affine_block": True,
}
COMMON = {
    "id2label": {0: "cat", 1: "dog"},
    "num_queries": 64 + 16 + 4,  # all that there are: no rounding can choose between them
    "d_model": 64,
    "encoder_hidden_dim": 64,
    "encoder_in_channels": [32, 64, 96],
    "decoder_in_channels": [64] * 3,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_layers": 2,
    "num_denoising": 0,
    "freeze_backbone_batch_norms": False,
}
LITE = {
    "encoder_type": "lite",
    "encoder_layers": 0,
    "encoder_in_channels": [64],
    "decoder_in_channels": [64] * 2,
    "num_feature_levels": 2,
    "num_queries": 16 + 4,
    "use_gateway": False,
    "share_bbox_head": True,
}


def changed_checkpoint(folder: Path, name: str, **changes: object) -> str:
    """Writes the shipped checkpoint with settings changed in one of its JSON files. Returns the folder."""
    shutil.copytree(shapes.MODEL_DIR, folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def renamed_checkpoint(folder: Path) -> str:
    """The same detector with other names for all classes but the star."""
    return changed_checkpoint(folder, "config.json", id2label=dict(enumerate(["ring", "box", "wedge", "star", "plus"])))


def configuration(kind: str) -> PreTrainedConfig:
    """Of one of `KINDS`: of DEIMv2, the plain one is like N, the lite encoder is in Pico to Atto, DINOv3 in S to X."""
    if kind == "RT-DETRv2":
        resnet = RTDetrResNetConfig(layer_type="basic", embedding_size=16, out_indices=[2, 3, 4], **STAGES)
        return RTDetrV2Config(backbone_config=resnet, **COMMON)
    if kind == "DEIMv2 with the lite encoder":
        return Deimv2Config(backbone_config=HGNetV2Config(**HGNET, out_indices=[3]), **COMMON | LITE)
    if kind == "DEIMv2 with DINOv3":
        backbone = DINOv3ViTConfig(
            hidden_size=48, num_attention_heads=3, num_hidden_layers=3, intermediate_size=96, layerscale_value=1.0,
            out_indices=[1, 2, 3], apply_layernorm=False, reshape_hidden_states=True,
        )  # fmt: skip
        return Deimv2Config(backbone_config=backbone, encoder_has_trailing_conv=False, **COMMON)
    backbone = HGNetV2Config(**HGNET, out_indices=[2, 3, 4])
    return {"D-FINE": DFineConfig, "DEIMv2": Deimv2Config}[kind](backbone_config=backbone, **COMMON)


@torch.no_grad()
def save_checkpoint(kind: str, folder: Path) -> Path:
    """Writes the checkpoint of a kind, always the same one. Returns the folder.

    Its batch norms have the statistics of rendered scenes, so they make a difference.
    """
    scenes = torch.stack([shapes.training_scene(0, index, INPUT_SIZE)[0] for index in range(16)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForObjectDetection.from_config(configuration(kind))
        for name, value in model.named_parameters():
            if value.requires_grad and "bbox" not in name:
                value += 0.02 * torch.randn_like(value)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean of all
        model.train()(pixel_values=scenes / 255)
    model.save_pretrained(folder)
    size = {"height": INPUT_SIZE, "width": INPUT_SIZE}
    RTDetrImageProcessorPil(size=size, do_normalize="DINOv3" in kind).save_pretrained(folder)
    return folder
