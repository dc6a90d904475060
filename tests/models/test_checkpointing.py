"""Activation checkpointing changes the memory that a network takes, and nothing that it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aicsd_deploy.errors import InputError
from aicsd_deploy.models import build_model
from aicsd_deploy.models.checkpointing import checkpoint_activations
from aicsd_deploy.models.deeplab import ASPP


@pytest.mark.parametrize(("name", "blocks"), [("lraspp_resnet18", 8), ("lraspp_mobilenetv2", 17)])
def test_gradients_and_statistics_are_the_same_and_less_is_kept(name: str, blocks: int) -> None:
    torch.manual_seed(0)
    plain = build_model(name, num_classes=3)
    thrifty = copy.deepcopy(plain)
    assert checkpoint_activations(thrifty) == blocks
    images = torch.randn(2, 3, 64, 64)
    kept = []
    for network in (plain, thrifty):
        torch.manual_seed(1)
        bytes_kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = network.train()(images)
        kept.append(bytes_kept)
        logits.square().mean().backward()
    assert kept[1] < 0.5 * kept[0]
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_several_passes_backward_go_through_a_block_and_its_statistics_count_once() -> None:
    torch.manual_seed(0)
    plain = ASPP(8, 4).train()
    thrifty = copy.deepcopy(plain)
    checkpoint_activations(thrifty)
    features = torch.randn(2, 8, 16, 16, requires_grad=True)
    gradients = []
    for block in (plain, thrifty):
        torch.manual_seed(1)
        total = block(features).square().mean()
        alone = [torch.autograd.grad(total, features, retain_graph=True)[0] for _ in range(2)]
        total.backward()
        gradients.append([*alone, *(p.grad for p in block.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    for (key, a), b in zip(plain.state_dict().items(), thrifty.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_network_without_known_blocks_is_refused() -> None:
    with pytest.raises(InputError, match="BasicBlock"):
        checkpoint_activations(nn.Sequential(nn.Conv2d(3, 3, 1)))
