"""Networks: normalised images in, logits at the network's own stride out."""

from aicsd_deploy.models.registry import MODEL_NAMES, backbone_parameters, build_model, command_for

__all__ = ["MODEL_NAMES", "backbone_parameters", "build_model", "command_for"]
