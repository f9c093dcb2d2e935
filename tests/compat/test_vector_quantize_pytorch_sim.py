"""SimVQ, ResidualSimVQ and RandomProjectionQuantizer of vqfast.compat.vector_quantize_pytorch beside the other library's."""

import oracle
import pytest
import torch
from side_by_side import Fresh, assert_same, pair, tensors
from torch import nn

BASE = {"dim": 16, "codebook_size": 32}
TOKENS = (2, 64, 16)

SIM = {
    "default": ({}, TOKENS),
    "straight-through": ({"rotation_trick": False}, TOKENS),
    "image": ({"channel_first": True}, (2, 16, 5, 7)),
    "other frozen dimension": ({"frozen_codebook_dim": 5}, TOKENS),
    "weights": ({"input_to_quantize_commit_loss_weight": 0.7, "commitment_weight": 3.0}, TOKENS),
    "network": ({"codebook_transform": Fresh(lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)))}, TOKENS),
    "start": ({"init_fn": lambda codes: codes * 2}, TOKENS),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", SIM)
def test_sim_vq(case, train):
    kwargs, shape = SIM[case]
    peer, ours = pair("SimVQ", **BASE, **kwargs)
    assert_same(peer, ours, shape, train=train, steps=10)
    x = torch.randn(shape)
    quantized, indices, _ = ours(x)
    torch.testing.assert_close(ours.indices_to_codes(indices), quantized)
    torch.testing.assert_close(ours.indices_to_codes(indices), peer.indices_to_codes(indices))


def test_sim_vq_in_double_precision():
    peer, ours = pair("SimVQ", **BASE)
    assert_same(peer.double(), ours.double(), TOKENS, steps=3, dtype=torch.float64)


def test_sim_vq_finds_the_codes_of_float64():
    _, ours = pair("SimVQ", dim=8, codebook_size=300)
    x = torch.randn(1, 1000, 8)
    assert torch.equal(ours(x)[1], oracle.nearest(x, ours.codebook).indices)


RESIDUAL = {
    "default": ({}, TOKENS),
    "straight-through": ({"rotation_trick": False}, TOKENS),
    "image": ({"channel_first": True}, (2, 16, 5, 7)),
    "dropout": ({"quantize_dropout": True, "quantize_dropout_multiple_of": 2}, TOKENS),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", RESIDUAL)
def test_residual_sim_vq(case, train):
    kwargs, shape = RESIDUAL[case]
    peer, ours = pair("ResidualSimVQ", **BASE, num_quantizers=4, **kwargs)
    assert_same(peer, ours, shape, train=train, steps=10, return_all_codes=True)
    quantized, indices, _ = ours(torch.randn(shape))
    torch.testing.assert_close(ours.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(ours.get_output_from_indices(indices), peer.get_output_from_indices(indices))
    assert ours.codebook_dim == 16 and ours.codebook_size == 32


@pytest.mark.parametrize("kwargs", [{}, {"num_codebooks": 3}, {"norm": False}], ids=str)
def test_random_projections(kwargs):
    peer, ours = pair("RandomProjectionQuantizer", dim=16, codebook_size=32, codebook_dim=6, **kwargs)
    x = torch.randn(2, 50, 16)
    indices = peer(x)
    assert torch.equal(ours(x), indices)
    torch.testing.assert_close(ours(x, indices=indices), peer(x, indices=indices))
    assert not any(t.requires_grad for t in tensors(ours(x)))
