"""`BinaryMapper` with the signature and results of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._helpers import default, exists, pack_with_inverse  # noqa: F401

NAT = log(2)  # one bit


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of independent bits with these logits, summed over the last axis."""
    prob = logits.sigmoid()
    return -(prob * F.logsigmoid(logits) + (1.0 - prob) * F.logsigmoid(-logits)).sum(-1)


class BinaryMapper(nn.Module):
    """Sample bits from logits and return the one-hot vector of the number they spell; a stable alternative to a VAE.

    State dict: empty. Source: Fleuret 2025 (arXiv 2510.17558).
    """

    def __init__(self, bits: int = 1, kl_loss_threshold: float = NAT, deterministic_on_eval: bool = False):
        super().__init__()
        self.bits, self.num_codes = bits, 2**bits
        self.kl_loss_threshold, self.deterministic_on_eval = kl_loss_threshold, deterministic_on_eval
        power_two = 2 ** torch.arange(bits)
        self.register_buffer("power_two", power_two, persistent=False)
        self.register_buffer("codes", (torch.arange(self.num_codes)[:, None] & power_two) != 0, persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    def binary_entropy(self, logits: Tensor) -> Tensor:
        """See the function of this name."""
        return binary_entropy(logits)

    def calc_aux_loss(self, logits: Tensor, reduce_aux_kl_loss: bool = True) -> Tensor:
        """Divergence from fair bits above the threshold, logits [..., bits] -> [] or [...]."""
        loss = F.relu(self.bits * NAT - binary_entropy(logits) - self.kl_loss_threshold)
        return loss.mean() if reduce_aux_kl_loss else loss

    def log_prob(
        self, logits: Tensor, *, indices: Tensor | None = None, one_hot: Tensor | None = None, sum_bits: bool = True
    ) -> Tensor:
        """Log probability of indices [...] or one-hot rows [..., codes] under logits [..., bits]; of each bit without sum_bits."""
        require((indices is None) != (one_hot is None), "pass indices or one_hot.")
        sampled = self.codes[one_hot.argmax(-1) if indices is None else indices]
        log_probs = torch.where(sampled, F.logsigmoid(logits), F.logsigmoid(-logits))
        return log_probs.sum(-1) if sum_bits else log_probs

    def forward(
        self,
        logits: Tensor,
        temperature: float = 1.0,
        straight_through: bool | None = None,
        calc_aux_loss: bool | None = None,
        deterministic: bool | None = None,
        return_indices: bool = False,
        reduce_aux_kl_loss: bool = True,
    ):
        """logits [..., bits] -> (one-hot [..., 2^bits], loss []), with indices [...] between them if asked.

        By default bits are drawn, and training adds the straight-through gradient of the codes' probabilities and the loss.
        """
        require(logits.shape[-1] == self.bits, f"logits are {list(logits.shape)}; the last axis must hold {self.bits} bits.")
        if deterministic is None:
            deterministic = self.deterministic_on_eval and not self.training
        prob = (logits / temperature).sigmoid()
        bits = (prob > 0.5 if deterministic else prob.bernoulli()).long()
        indices = (self.power_two * bits).sum(-1)
        one_hot = F.one_hot(indices, self.num_codes).float()
        if self.training if straight_through is None else straight_through:
            on = self.codes.to(logits.dtype)
            soft = (F.logsigmoid(logits) @ on.T + F.logsigmoid(-logits) @ (1 - on).T).exp()
            one_hot = one_hot + (soft - soft.detach())
        loss = self.zero
        if self.training if calc_aux_loss is None else calc_aux_loss:
            loss = self.calc_aux_loss(logits, reduce_aux_kl_loss)
        return (one_hot, indices, loss) if return_indices else (one_hot, loss)
