"""`EvoLFQ` with the signature and results of vector_quantize_pytorch 1.32: a genetic search over an autoencoder's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqfast import _border
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._helpers import default, exists  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ


@_border.exportable
class Return(NamedTuple):
    """Result of EvoLFQ's forward."""

    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class Result(NamedTuple):
    """One generation: the population, and the best so far with its fitness and, if asked, what it decodes to."""

    pop_bits: Tensor
    best_gene: Tensor | None
    best_fitness: float
    best_decoded: Tensor | None


@contextmanager
def _in_eval(module: nn.Module):
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


class EvoLFQ(nn.Module):
    """An autoencoder through LFQ, whose bits a genetic algorithm can evolve towards a fitness.

    encoder maps to latents [B, D] or [B, N, D], decoder back; bits are 0 and 1, or -1 and 1 with is_sign. State dict:
    `encoder.*`, `decoder.*`, `lfq.*`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs,
    ):
        super().__init__()
        require(pop_size > elitism_count, f"pop_size={pop_size} must be greater than elitism_count={elitism_count}.")
        given = lfq is not None or dim is not None or codebook_size is not None
        require(given, "pass lfq, or dim or codebook_size to make one.")
        self.encoder, self.decoder = encoder, decoder
        if lfq is None:
            lfq = LFQ(dim=dim, codebook_size=codebook_size, num_codebooks=num_codebooks, **lfq_kwargs)
        self.lfq = lfq
        self.pop_size, self.mutation_rate, self.tournament_size = pop_size, mutation_rate, tournament_size
        self.elitism_count, self.generations = elitism_count, generations
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.zero.device

    def _quantized(self, x: Tensor, **kwargs):
        """Latents of x through LFQ: (quantized, indices, loss); latents [B, D] count as one token."""
        latents = self.encoder(x)
        if latents.dim() > 2:
            return self.lfq(latents, **kwargs)
        quantized, indices, loss = self.lfq(latents[:, None], **kwargs)
        return quantized[:, 0], indices[:, 0], loss

    def forward(self, x: Tensor, **kwargs) -> Return:
        """Reconstruct x; keyword arguments go to LFQ."""
        quantized, indices, loss = self._quantized(x, **kwargs)
        return Return(self.decoder(quantized), indices, loss)

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """Bits of x's latents, in their shape."""
        with _in_eval(self):
            positive = self._quantized(x)[0] > 0
        return torch.where(positive, 1.0, -1.0) if return_signs else positive.float()

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """What bits [B, D] or [B, N, D] decode to; anything above 0 is a 1."""
        lfq = self.lfq
        groups = bits.shape[-1] // lfq.codebook_dim
        spelled = (bits > 0).long().unflatten(-1, (groups, lfq.codebook_dim))
        indices = (spelled * 2 ** torch.arange(lfq.codebook_dim - 1, -1, -1, device=bits.device)).sum(-1)
        with _in_eval(self):
            codes = lfq.project_out(lfq._inner_codes(indices).flatten(-2))
            return self.decoder(codes)

    # -- populations -------------------------------------------------------------------------------------------------------

    def init_random_population(self, pop_size=None, shape=None, device=None, is_sign: bool = False) -> Tensor:
        """Fair bits [pop_size, *shape]."""
        size, device = pop_size or self.pop_size, device or self.device
        bits = torch.randint(0, 2, (size, *shape), device=device).float()
        return bits * 2 - 1 if is_sign else bits

    def init_population_from_data(self, x: Tensor, pop_size=None, mutation_rate=None, is_sign: bool = False) -> Tensor:
        """Bits of x's rows, repeated or cut to pop_size and mutated."""
        size = pop_size or self.pop_size
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        bits = bits[torch.arange(size, device=bits.device) % len(bits)]
        return self.mutate(bits, rate, is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Each bit from either parent."""
        return torch.where(torch.rand_like(parent1.float()) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Flip each bit with probability mutation_rate."""
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flip = torch.rand_like(population.float()) < rate
        return torch.where(flip, -population if is_sign else 1.0 - population, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """As many winners as there are rows, each the fittest of a few drawn at random."""
        contenders = torch.randint(0, len(population), (len(population), tournament_size or self.tournament_size), device=self.device)
        return population[contenders.gather(1, fitnesses[contenders].argmax(-1, keepdim=True))[:, 0]]

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Callable,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """One generation: (the next population, the fitness of this one); further keyword arguments have no effect.

        fitness_fn maps (decoded, bits) to one number per row. The elite stays as it is; two tournaments choose the parents of
        each other child.
        """
        elite = self.elitism_count if elitism_count is None else elitism_count
        decoded = torch.cat([self.decode_bits(part) for part in pop_bits.split(batch_size or len(pop_bits))])
        fitnesses = fitness_fn(decoded, pop_bits)
        if not isinstance(fitnesses, Tensor):
            fitnesses = torch.tensor(fitnesses, device=self.device, dtype=torch.float32)
        kept = pop_bits[fitnesses.argsort(descending=True)[:elite]].clone()
        size = (len(pop_bits) - elite, 2, tournament_size or self.tournament_size)
        contenders = torch.randint(0, len(pop_bits), size, device=self.device)
        parents = contenders.gather(-1, fitnesses[contenders].argmax(-1, keepdim=True))[..., 0]
        children = self.uniform_crossover(pop_bits[parents[:, 0]], pop_bits[parents[:, 1]])
        return torch.cat([kept, self.mutate(children, mutation_rate, is_sign)]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Callable,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs,
    ) -> Iterator[Result]:
        """Yield a Result per generation; the best gene is the fittest of all populations evaluated so far."""
        if pop_bits is None:
            require(shape is not None, "pass pop_bits, or the shape of one row of them.")
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best, best_gene = float("-inf"), None
        for _ in range(self.generations if generations is None else generations):
            evaluated = pop_bits
            pop_bits, fitnesses = self.step(evaluated, fitness_fn, is_sign=is_sign, **step_kwargs)
            top = int(fitnesses.argmax())
            if float(fitnesses[top]) > best:
                best, best_gene = float(fitnesses[top]), evaluated[top].clone()
            decoded = self.decode_bits(best_gene[None])[0] if return_best_decoded and best_gene is not None else None
            yield Result(pop_bits, best_gene, best, decoded)
