"""The faces beside what they stand for: same results, gradients, state and checkpoints over training steps."""

import cases
import numpy as np
import pytest
import stand_ins
import swaps
import torch

from vqfast.compat import dac, diffusers, encodec, rosinality, sonnet, taming

D, K, SIDE = 8, 64, 8


def images(steps=4):
    return [cases.normal(2, D, SIDE, SIDE, seed=step) for step in range(steps)]


def rows(steps=4):
    return [cases.normal(2, SIDE * SIDE, D, seed=step) for step in range(steps)]


def diffusers_peer(*args, **options):
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
    from diffusers.models.autoencoders.vae import VectorQuantizer

    return VectorQuantizer(*args, **options)


PAIRS = {
    "rosinality": (lambda: rosinality.Quantize(D, K), lambda: stand_ins.Quantize(D, K), rows),
    "taming": (lambda: taming.VectorQuantizer2(K, D, 0.25), lambda: stand_ins.VectorQuantizer2(K, D, 0.25), images),
    "taming, not legacy": (
        lambda: taming.VectorQuantizer2(K, D, 0.25, legacy=False, sane_index_shape=True),
        lambda: stand_ins.VectorQuantizer2(K, D, 0.25, legacy=False, sane_index_shape=True),
        images,
    ),
    "diffusers": (lambda: diffusers.VectorQuantizer(K, D, 0.25), lambda: diffusers_peer(K, D, 0.25), images),
    "encodec codebook": (
        lambda: encodec.EuclideanCodebook(D, K, threshold_ema_dead_code=0),
        lambda: stand_ins.EuclideanCodebook(D, K, threshold_ema_dead_code=0),
        rows,
    ),
    "encodec codebook, k-means start": (
        lambda: encodec.EuclideanCodebook(D, 32, kmeans_init=True, threshold_ema_dead_code=0),
        lambda: stand_ins.EuclideanCodebook(D, 32, kmeans_init=True, threshold_ema_dead_code=0),
        rows,
    ),
    "dac": (
        lambda: dac.VectorQuantize(D, K, 4),
        lambda: stand_ins.VectorQuantize(D, K, 4),
        lambda: [batch.transpose(1, 2) for batch in rows()],
    ),
}


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("name", PAIRS)
def test_faces_agree_with_what_they_stand_for(name, mode):
    """State loads strictly in both directions, and stays the same over the steps."""
    make_face, make_peer, batches = PAIRS[name]
    torch.manual_seed(0)
    face, peer = make_face(), make_peer()
    if "k-means" not in name:
        swaps.randomise(peer)
    elif mode == "evaluation":
        peer.train()(batches()[0])
    face.load_state_dict(peer.state_dict(), strict=True)
    peer.load_state_dict(face.state_dict(), strict=True)
    swaps.train_both(face.train(mode == "training"), peer.train(mode == "training"), batches())


def used_codes(tmp_path):
    path = tmp_path / "used.npy"
    np.save(path, np.array([5, 3, 40, 17, 60]))
    return str(path)


@pytest.mark.parametrize("unknown", ["extra", 2])
def test_remapping_agrees_with_diffusers(tmp_path, unknown):
    options = {"remap": used_codes(tmp_path), "unknown_index": unknown}
    face, peer = diffusers.VectorQuantizer(K, D, 0.25, **options), diffusers_peer(K, D, 0.25, **options)
    peer.load_state_dict(swaps.randomise(face).state_dict(), strict=True)
    z = images(1)[0]
    swaps.close(face(z), peer(z))
    indices = face(z)[2][2]
    shape = (2, SIDE, SIDE, D)
    swaps.close(face.get_codebook_entry(indices.clone(), shape), peer.get_codebook_entry(indices.clone(), shape))
    assert face.re_embed == peer.re_embed


def test_remapping_unknown_codes_at_random(tmp_path):
    face = taming.VectorQuantizer2(K, D, 0.25, remap=used_codes(tmp_path))
    indices = torch.arange(K)[None]
    new = face.remap_to_used(indices)
    assert ((0 <= new) & (new < 5)).all()
    assert torch.equal(face.unmap_to_all(new)[0, [5, 3, 40, 17, 60]], torch.tensor([5, 3, 40, 17, 60]))


def test_gumbel_arguments_are_refused():
    with pytest.raises(ValueError, match="GumbelQuantize"):
        taming.VectorQuantizer2(K, D, 0.25)(images(1)[0], temp=0.5)


# ---- taming's moving average, which the peer cannot build ------------------------------------------------------------------


def test_tamings_moving_average():
    """By its formula in float64: sizes from 0, sums from the codes, Laplace smoothing."""
    torch.manual_seed(0)
    layer = taming.EMAVectorQuantizer(K, D, 0.25, decay=0.9, eps=1e-5).train()
    codes, sizes, sums = layer.embedding.weight.double().clone(), torch.zeros(K).double(), layer.embedding.weight.double().clone()
    for z in images():
        flat = z.permute(0, 2, 3, 1).reshape(-1, D).double()
        found = torch.cdist(flat, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        counts, moved = stand_ins.one_hot_stats(flat, found, K)
        q, loss, (perplexity, encodings, indices) = layer(z)
        assert torch.equal(indices, found) and encodings is None
        torch.testing.assert_close(q.permute(0, 2, 3, 1).reshape(-1, D).double(), codes[found], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss.double(), 0.25 * (codes[found] - flat).square().mean(), rtol=1e-4, atol=0)
        share = counts / len(flat)
        torch.testing.assert_close(perplexity.double(), torch.special.entr(share).sum().exp(), rtol=1e-4, atol=0)
        sizes, sums = 0.9 * sizes + 0.1 * counts, 0.9 * sums + 0.1 * moved
        codes = sums / stand_ins.smoothed(sizes, 1e-5)[:, None]
        torch.testing.assert_close(layer.embedding.weight.double(), codes, rtol=1e-3, atol=1e-4)
    assert set(layer.state_dict()) == {"embedding.weight", "embedding.cluster_size", "embedding.embed_avg"}
    assert not any(p.requires_grad for p in layer.parameters())


# ---- EnCodec ---------------------------------------------------------------------------------------------------------------


def residual(**options):
    torch.manual_seed(0)
    return encodec.ResidualVectorQuantizer(dimension=D, n_q=4, bins=K, **options)


def signal(seed=0):
    return cases.normal(2, D, 50, seed=seed)


def test_encodec_state_keys_and_bandwidth():
    layer = residual()
    keys = {f"vq.layers.{i}._codebook.{name}" for i in range(4) for name in ("inited", "cluster_size", "embed", "embed_avg")}
    assert set(layer.state_dict()) == keys
    # 6 bits a frame and level: at 75 Hz a level takes 450 bits per second.
    assert layer.get_bandwidth_per_quantizer(75) == 450
    assert [layer.get_num_quantizers_for_bandwidth(75, kbps) for kbps in (None, 0.1, 0.45, 1.0, 1.8)] == [4, 1, 1, 2, 4]
    out = layer.eval()(signal(), 75, 1.0)
    assert out.codes.shape == (2, 2, 50) and float(out.bandwidth) == 900 and out.metrics == {}


def test_encodec_encode_decode_and_forward_agree():
    layer = residual().train()
    layer(signal(), 75)
    layer.eval()
    out = layer(signal(1), 75)
    codes = layer.encode(signal(1), 75)
    assert torch.equal(codes, out.codes) and float(out.penalty) == 0
    torch.testing.assert_close(layer.decode(codes), out.quantized, rtol=1e-5, atol=1e-5)


def test_encodec_gradients_are_the_peers():
    """The identity through all levels; a commitment loss in the first level only (https://github.com/facebookresearch/encodec/issues/25)."""
    layer = residual(kmeans_init=False).train()
    z = signal().requires_grad_()
    out = layer.vq(z)
    (gradient,) = torch.autograd.grad(out[0].sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, torch.ones_like(z), rtol=0, atol=0)
    losses = [torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)[0] for loss in out[2].flatten()]
    assert losses[0].abs().max() > 0 and all(g is None or g.abs().max() == 0 for g in losses[1:])


def test_encodec_revives_dead_codes():
    """Where the peer's replacement is overwritten in the same step, ours stays: a code far from all rows comes back."""
    for cls, revives in ((encodec.EuclideanCodebook, True), (stand_ins.EuclideanCodebook, False)):
        torch.manual_seed(0)
        layer = cls(D, K, threshold_ema_dead_code=2).train()
        layer.cluster_size.fill_(5.0)
        layer.embed_avg.copy_(layer.embed * 5)
        layer.embed[0], layer.embed_avg[0], layer.cluster_size[0] = 1000.0, 1900.0, 1.9
        for seed in range(3):
            layer(rows(1)[0] + 0.01 * seed)
        assert (layer.embed[0].abs().max() < 100) == revives, cls


# ---- DAC -------------------------------------------------------------------------------------------------------------------


def descript(dropout=0.0):
    torch.manual_seed(0)
    return dac.ResidualVectorQuantize(input_dim=16, n_codebooks=3, codebook_size=K, codebook_dim=[4, 4, 6], quantizer_dropout=dropout)


def test_dac_results_and_state_keys():
    layer, z = descript().eval(), cases.normal(2, 16, 20)
    keys = {"in_proj.bias", "in_proj.weight_g", "in_proj.weight_v", "out_proj.bias", "out_proj.weight_g", "out_proj.weight_v"}
    assert set(layer.state_dict()) == {f"quantizers.{i}.{key}" for i in range(3) for key in keys | {"codebook.weight"}}
    out, codes, latents, commitment, codebook = layer(z)
    assert out.shape == z.shape and codes.shape == (2, 3, 20) and latents.shape == (2, 14, 20)
    assert commitment.shape == codebook.shape == () and torch.equal(commitment, codebook)  # one error, two gradients
    torch.testing.assert_close(layer.from_codes(codes)[0], out, rtol=1e-4, atol=1e-5)
    z_again, _, codes_again = layer.from_latents(latents)
    assert torch.equal(codes_again, codes)
    torch.testing.assert_close(z_again, out, rtol=1e-4, atol=1e-5)
    assert layer.from_latents(latents[:, :9])[2].shape == (2, 2, 20), "a rest that fills no level is left out"
    assert layer(z, n_quantizers=2)[1].shape == (2, 2, 20)


def test_dac_weight_norm_is_torchs():
    """The state of a weight-normalised convolution loads, and gives the same results."""
    face, peer = dac.VectorQuantize(16, K, 4), stand_ins.VectorQuantize(16, K, 4)
    assert set(face.state_dict()) == set(peer.state_dict())
    assert [t.shape for _, t in sorted(face.state_dict().items())] == [t.shape for _, t in sorted(peer.state_dict().items())]


def test_dac_drops_levels_per_sample():
    layer = descript(dropout=0.5).train()
    z = cases.normal(8, 16, 20)
    torch.manual_seed(3)
    drawn = torch.randint(1, 4, (8,))
    torch.manual_seed(3)
    out, codes, *_ = layer(z)
    levels = [layer.quantizers[i].out_proj(layer.quantizers[i].decode_code(codes[:, i])) for i in range(3)]
    for sample in range(8):
        used = int(drawn[sample]) if sample < 4 else 3
        torch.testing.assert_close(out[sample], sum(levels[:used])[sample], rtol=1e-4, atol=1e-4)


# ---- Sonnet ----------------------------------------------------------------------------------------------------------------


def sonnet_formula(x, codes, beta, ema):
    distances = torch.cdist(x, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    found = distances.argmin(1)
    error = (codes[found] - x).square().mean()
    share = torch.bincount(found, minlength=len(codes)).double() / len(x)
    return found, (beta if ema else 1 + beta) * error, torch.exp(-(share * (share + 1e-10).log()).sum()), distances


@pytest.mark.parametrize("ema", [False, True], ids=["gradient", "moving average"])
def test_sonnet_results(ema):
    torch.manual_seed(0)
    layer = sonnet.VectorQuantizerEMA(D, K, 0.25, 0.9) if ema else sonnet.VectorQuantizer(D, K, 0.25)
    x = rows(1)[0]
    codes = layer.embeddings.detach().double().t().clone()
    out = layer(x, is_training=True)
    found, loss, perplexity, distances = sonnet_formula(x.flatten(0, 1).double(), codes, 0.25, ema)
    assert set(out) == {"quantize", "loss", "perplexity", "encodings", "encoding_indices", "distances"}
    assert torch.equal(out["encoding_indices"], found.view(x.shape[:-1]))
    torch.testing.assert_close(out["quantize"].flatten(0, 1).double(), codes[found], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["loss"].double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out["perplexity"].double(), perplexity, rtol=1e-5, atol=0)
    torch.testing.assert_close(out["distances"].double(), distances, rtol=1e-4, atol=1e-4)
    assert torch.equal(out["encodings"].argmax(1), found) and torch.equal(out["encodings"].sum(1), torch.ones(len(found)))
    assert torch.equal(dict(out.items())["distances"], out["distances"]) and out.get("distances") is out["distances"]


def test_sonnet_makes_its_matrices_on_demand_only():
    layer, x = sonnet.VectorQuantizerEMA(D, 512, 0.25, 0.9), cases.normal(512, D)
    assert swaps.largest(lambda: layer(x, True)) <= 512 * D * 2
    assert swaps.largest(lambda: layer(x, True)["distances"]) == 512 * 512


def test_sonnet_moving_average_is_debiased():
    """By its formula in float64 over steps; a code that no row chose goes to zero."""
    torch.manual_seed(0)
    layer = sonnet.VectorQuantizerEMA(D, K, 0.25, 0.9)
    codes, sizes, sums = layer.embeddings.double().t().clone(), torch.zeros(K).double(), torch.zeros(K, D).double()
    for step, batch in enumerate(rows(), start=1):
        x = batch.flatten(0, 1).double()
        found = sonnet_formula(x, codes, 0.25, True)[0]
        assert torch.equal(layer(batch, True)["encoding_indices"].flatten(), found)
        counts, moved = stand_ins.one_hot_stats(x, found, K)
        sizes, sums = 0.9 * sizes + 0.1 * counts, 0.9 * sums + 0.1 * moved
        bias = 1 - 0.9**step
        codes = (sums / bias) / stand_ins.smoothed(sizes / bias, 1e-5)[:, None]
        # A row of sums is a mean over few rows: float32 keeps it to a few roundings of the largest.
        torch.testing.assert_close(layer.embeddings.double().t(), codes, rtol=1e-4, atol=1e-5)
        # The next step's codes must be the same to the last bit, or near-ties would tell the two apart.
        codes = layer.embeddings.double().t().clone()
    keys = {f"{name}.{part}" for name in ("ema_cluster_size", "ema_dw") for part in ("_counter", "_hidden", "average")}
    assert set(layer.state_dict()) == keys | {"embeddings"} and layer.embeddings.shape == (D, K)
    layer(batch, is_training=False)
    assert torch.equal(layer.embeddings.double().t(), codes), "evaluation changes nothing"


def test_sonnet_gradients():
    layer, x = sonnet.VectorQuantizer(D, K, 0.25), rows(1)[0].requires_grad_()
    out = layer(x, True)
    (gradient,) = torch.autograd.grad(out["quantize"].sum(), x, retain_graph=True)
    torch.testing.assert_close(gradient, torch.ones_like(x), rtol=0, atol=0)
    into_x, into_codes = torch.autograd.grad(out["loss"], (x, layer.embeddings))
    rest = (x - out["quantize"]).detach()
    torch.testing.assert_close(into_x, 0.25 * 2 * rest / x.numel(), rtol=1e-4, atol=1e-8)
    _, sums = stand_ins.one_hot_stats(rest.flatten(0, 1), out["encoding_indices"].flatten(), K)
    torch.testing.assert_close(into_codes.t(), -2 * sums / x.numel(), rtol=1e-4, atol=1e-7)


def test_sonnet_checks_its_arguments():
    with pytest.raises(ValueError, match="embedding_dim"):
        sonnet.VectorQuantizer(D, K, 0.25)(cases.normal(4, D + 1), True)
    with pytest.raises(ValueError, match="decay"):
        sonnet.VectorQuantizerEMA(D, K, 0.25, decay=1.5)
