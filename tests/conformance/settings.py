"""Settings of single folders of transformers that no rule on names gives."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {}
"""Folder → fields of its config."""
WITHOUT: dict[str, tuple[str, ...]] = {}
"""Folder → parts of its config that are left out."""
CLASSES: dict[str, str] = {
    "align": "AlignModel", "altclip": "AltCLIPModel", "chinese_clip": "ChineseCLIPModel", "clap": "ClapModel",
    "clip": "CLIPModel", "clipseg": "CLIPSegForImageSegmentation", "groupvit": "GroupViTModel", "metaclip_2": "MetaClip2Model",
    "owlv2": "Owlv2ForObjectDetection", "owlvit": "OwlViTForObjectDetection", "siglip": "SiglipModel",
    "siglip2": "Siglip2Model", "x_clip": "XCLIPModel", "blip": "BlipForConditionalGeneration", "flava": "FlavaModel",
}  # fmt: skip
"""Folder → the class that is taken, where the first one is not the one to look at."""
