"""Stand-ins for quantizers of projects that no package registry has, so that `convert` and the faces have something to meet.

Each is a minimal re-implementation, in our own words, of what its docstring names: arguments, results, state keys and the plain
search over an N x K matrix. They carry the project's module name, by which `convert` recognises them.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn


def distances(rows, codes):
    """[N, K] squared, by the expanded formula that all these projects use."""
    return rows.square().sum(1, keepdim=True) - 2 * rows @ codes.T + codes.square().sum(1)


def plain_lookup(rows, codes):
    return distances(rows, codes).argmin(1)


def one_hot_stats(rows, found, codebook_size):
    one_hot = F.one_hot(found, codebook_size).to(rows.dtype)
    return one_hot.sum(0), one_hot.T @ rows.detach()


def smoothed(sizes, eps):
    return (sizes + eps) / (sizes.sum() + len(sizes) * eps) * sizes.sum()


def of(module):
    """Marks a stand-in as a class of `module`."""

    def mark(cls):
        cls.__module__ = module
        return cls

    return mark


@of("vqvae")
class Quantize(nn.Module):
    """rosinality/vq-vae-2-pytorch, vqvae.Quantize."""

    def __init__(self, dim, n_embed, decay=0.99, eps=1e-5):
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input):
        rows = input.reshape(-1, self.dim)
        found = plain_lookup(rows, self.embed.T)
        codes = self.embed_code(found.view(input.shape[:-1]))
        if self.training:
            counts, sums = one_hot_stats(rows, found, self.n_embed)
            self.cluster_size.data.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(sums.T, alpha=1 - self.decay)
            self.embed.data.copy_(self.embed_avg / smoothed(self.cluster_size, self.eps))
        return input + (codes - input).detach(), (codes.detach() - input).pow(2).mean(), found.view(input.shape[:-1])

    def embed_code(self, embed_id):
        return F.embedding(embed_id, self.embed.T)


@of("taming.modules.vqvae.quantize")
class VectorQuantizer2(nn.Module):
    """taming-transformers, without remapping (diffusers' own class is tested with it)."""

    def __init__(self, n_e, e_dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed, self.sane_index_shape = remap, n_e, sane_index_shape

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        z = z.permute(0, 2, 3, 1).contiguous()
        found = plain_lookup(z.view(-1, self.e_dim), self.embedding.weight)
        codes = self.embedding(found).view(z.shape)
        commitment, codebook = ((codes.detach() - z) ** 2).mean(), ((codes - z.detach()) ** 2).mean()
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        quantized = (z + (codes - z).detach()).permute(0, 3, 1, 2).contiguous()
        return quantized, loss, (None, None, found.view(z.shape[:3]) if self.sane_index_shape else found)


@of("taming.modules.vqvae.quantize")
class VectorQuantizer(nn.Module):
    """taming-transformers' first quantizer: it returns the one-hot matrix."""

    def __init__(self, n_e, e_dim, beta):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        found = plain_lookup(z.permute(0, 2, 3, 1).flatten(0, 2), self.embedding.weight)
        return F.one_hot(found, self.embedding.num_embeddings)


@of("encodec.quantization.core_vq")
class EuclideanCodebook(nn.Module):
    """encodec; audiocraft's differs in defaults only."""

    def __init__(
        self, dim, codebook_size, kmeans_init=False, kmeans_iters=10, decay=0.99, epsilon=1e-5, threshold_ema_dead_code=2
    ):
        super().__init__()
        self.decay, self.codebook_size, self.kmeans_iters = decay, codebook_size, kmeans_iters
        self.epsilon, self.threshold_ema_dead_code = epsilon, threshold_ema_dead_code
        embed = torch.zeros(codebook_size, dim) if kmeans_init else nn.init.kaiming_uniform_(torch.empty(codebook_size, dim))
        self.register_buffer("inited", torch.Tensor([not kmeans_init]))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def sample(self, rows):
        n, k = len(rows), self.codebook_size
        return rows[torch.randperm(n)[:k] if n >= k else torch.randint(0, n, (k,))]

    def init_embed_(self, data):
        if self.inited:
            return
        codes = self.sample(data)
        for _ in range(self.kmeans_iters):
            found = (data[:, None] - codes[None]).square().sum(-1).argmin(1)
            counts, sums = one_hot_stats(data, found, self.codebook_size)
            codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
        self.embed.data.copy_(codes)
        self.embed_avg.data.copy_(codes)
        self.cluster_size.data.copy_(counts)
        self.inited.data.fill_(1)

    def expire_codes_(self, batch_samples):
        dead = self.cluster_size < self.threshold_ema_dead_code
        if self.threshold_ema_dead_code and dead.any():
            self.embed.data.copy_(torch.where(dead[:, None], self.sample(batch_samples.flatten(0, -2)), self.embed))

    def quantize(self, x):
        return plain_lookup(x, self.embed)

    def encode(self, x):
        return self.quantize(x.flatten(0, -2)).view(x.shape[:-1])

    def decode(self, embed_ind):
        return F.embedding(embed_ind, self.embed)

    def forward(self, x):
        rows = x.flatten(0, -2)
        self.init_embed_(rows)
        found = self.quantize(rows)
        quantized = self.decode(found.view(x.shape[:-1]))
        if self.training:
            counts, sums = one_hot_stats(rows, found, self.codebook_size)
            self.expire_codes_(rows)
            self.cluster_size.data.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            self.embed.data.copy_(self.embed_avg / smoothed(self.cluster_size, self.epsilon)[:, None])
        return quantized, found.view(x.shape[:-1])


@of("audiocraft.quantization.core_vq")
class AudiocraftCodebook(EuclideanCodebook):
    """audiocraft; the class is renamed below, since both projects call it alike."""


AudiocraftCodebook.__qualname__ = AudiocraftCodebook.__name__ = "EuclideanCodebook"


@of("moshi.quantization.core_vq")
class MoshiCodebook(nn.Module):
    """moshi: codes are sums over sizes, kept in a buffer that is not saved."""

    def __init__(self, dim, codebook_size, epsilon=1e-5):
        super().__init__()
        self.dim, self.codebook_size, self.epsilon = dim, codebook_size, epsilon
        self.register_buffer("_initialized", torch.ones(1))
        self.register_buffer("cluster_usage", torch.ones(codebook_size))
        self.register_buffer("embedding_sum", torch.randn(codebook_size, dim))
        self.register_buffer("_embedding", None, persistent=False)

    @property
    def embedding(self):
        if self._embedding is None:
            self._embedding = self.embedding_sum / self.cluster_usage.clamp(min=self.epsilon)[:, None]
        return self._embedding

    def _quantize(self, x):
        return torch.cdist(x[None], self.embedding[None])[0].argmin(-1)

    def forward(self, x):
        found = self._quantize(x.flatten(0, -2)).view(x.shape[:-1])
        return F.embedding(found, self.embedding), found


MoshiCodebook.__qualname__ = MoshiCodebook.__name__ = "EuclideanCodebook"


@of("dac.nn.quantize")
class VectorQuantize(nn.Module):
    """descript-audio-codec, with torch's old weight_norm, which keeps a tensor that is no leaf."""

    def __init__(self, input_dim, codebook_size, codebook_dim):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.in_proj = nn.utils.weight_norm(nn.Conv1d(input_dim, codebook_dim, 1))
            self.out_proj = nn.utils.weight_norm(nn.Conv1d(codebook_dim, input_dim, 1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z):
        z_e = self.in_proj(z)
        codes, found = self.decode_latents(z_e)
        commitment = F.mse_loss(z_e, codes.detach(), reduction="none").mean([1, 2])
        codebook = F.mse_loss(codes, z_e.detach(), reduction="none").mean([1, 2])
        return self.out_proj(z_e + (codes - z_e).detach()), commitment, codebook, found, z_e

    def decode_code(self, embed_id):
        return self.codebook(embed_id).transpose(1, 2)

    def decode_latents(self, latents):
        rows = F.normalize(latents.transpose(1, 2).flatten(0, 1))
        found = plain_lookup(rows, F.normalize(self.codebook.weight)).view(latents.shape[0], -1)
        return self.decode_code(found), found


@of("tokenizer.tokenizer_image.vq_model")
class LlamaGenQuantizer(nn.Module):
    """LlamaGen; the entropy term is any function of all distances."""

    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio, l2_norm, show_usage):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.entropy_loss_ratio = n_e, e_dim, beta, entropy_loss_ratio
        self.l2_norm, self.show_usage = l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z):
        z, codes = z.permute(0, 2, 3, 1).contiguous(), self.embedding.weight
        if self.l2_norm:
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        all_distances = distances(z.view(-1, self.e_dim), codes)
        found = all_distances.argmin(1)
        z_q, losses, usage = codes[found].view(z.shape), (None, None, None), 0
        if self.training:
            if self.show_usage:
                self.codebook_used[: -len(found)] = self.codebook_used[len(found) :].clone()
                self.codebook_used[-len(found) :] = found
                usage = len(self.codebook_used.unique()) / self.n_e
            entropy = self.entropy_loss_ratio * torch.logsumexp(-all_distances, 1).mean()
            losses = ((z_q - z.detach()) ** 2).mean(), self.beta * ((z_q.detach() - z) ** 2).mean(), entropy
        return (z + (z_q - z).detach()).permute(0, 3, 1, 2), (*losses, usage), (None, None, found)


LlamaGenQuantizer.__qualname__ = LlamaGenQuantizer.__name__ = "VectorQuantizer"


@of("modeling.quantizer.quantizer")
class TiTokQuantizer(nn.Module):
    """1d-tokenizer, clustering_vq left out."""

    def __init__(self, codebook_size=1024, token_size=256, commitment_cost=0.25, use_l2_norm=False, clustering_vq=False):
        super().__init__()
        self.codebook_size, self.token_size, self.commitment_cost = codebook_size, token_size, commitment_cost
        self.use_l2_norm, self.clustering_vq = use_l2_norm, clustering_vq
        self.embedding = nn.Embedding(codebook_size, token_size)

    def forward(self, z):
        z, codes = z.float().permute(0, 2, 3, 1).contiguous(), self.embedding.weight
        if self.use_l2_norm:
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        found = plain_lookup(z.flatten(0, 2), codes)
        z_q = self.get_codebook_entry(found).view(z.shape)
        commitment, codebook = self.commitment_cost * ((z_q.detach() - z) ** 2).mean(), ((z_q - z.detach()) ** 2).mean()
        result = {"quantizer_loss": commitment + codebook, "commitment_loss": commitment, "codebook_loss": codebook}
        result["min_encoding_indices"] = found.view(z.shape[:3])
        return (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous(), result

    def get_codebook_entry(self, indices):
        codes = self.embedding(indices)
        return F.normalize(codes, dim=-1) if self.use_l2_norm else codes


TiTokQuantizer.__qualname__ = TiTokQuantizer.__name__ = "VectorQuantizer"


@of("models.quant")
class VARQuantizer(nn.Module):
    """VAR's multi-scale quantizer with one shared convolution."""

    class Shared(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.qresi = nn.Conv2d(channels, channels, 3, padding=1)

        def __getitem__(self, _):
            return lambda h: 0.5 * h + 0.5 * self.qresi(h)

    def __init__(self, vocab_size, Cvae, using_znorm, beta=0.25, v_patch_nums=(1, 2, 4)):
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta, self.v_patch_nums = vocab_size, Cvae, using_znorm, beta, v_patch_nums
        self.quant_resi = self.Shared(Cvae)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(v_patch_nums), vocab_size))
        self.record_hit, self.prog_si = 0, -1
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def search(self, rows):
        if self.using_znorm:
            return (F.normalize(rows, dim=-1) @ F.normalize(self.embedding.weight.data, dim=-1).T).argmax(1)
        return plain_lookup(rows, self.embedding.weight.data)

    def scales(self, f, sizes):
        rest, total = f.clone(), torch.zeros_like(f)
        for size in sizes:
            rows = F.interpolate(rest, size=size, mode="area").permute(0, 2, 3, 1)
            found = self.search(rows.flatten(0, 2)).view(len(f), *size)
            codes = F.interpolate(self.embedding(found).permute(0, 3, 1, 2), size=f.shape[-2:], mode="bicubic").contiguous()
            step = self.quant_resi[0](codes)
            total, rest = total + step, rest - step.detach()
            yield found, total

    def forward(self, f_BChw, ret_usages=False):
        fixed, loss = f_BChw.detach(), 0.0
        for _, total in self.scales(fixed, [(n, n) for n in self.v_patch_nums]):
            loss = loss + F.mse_loss(total.detach(), f_BChw) * self.beta + F.mse_loss(total, fixed)
        return (total.detach() - fixed) + f_BChw, None, loss / len(self.v_patch_nums)

    def f_to_idxBl_or_fhat(self, f_BChw, to_fhat, v_patch_nums=None):
        sizes = [(n, n) for n in (v_patch_nums or self.v_patch_nums)]
        return [total if to_fhat else found.flatten(1) for found, total in self.scales(f_BChw.detach(), sizes)]


VARQuantizer.__qualname__ = VARQuantizer.__name__ = "VectorQuantizer2"
