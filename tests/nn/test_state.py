"""What a training step does to a layer, in which order, and what it leaves alone (contract 4, 5, 6, 7)."""

import copy
import math

import cases
import oracle
import pytest
import torch
from check import ULP, close, device_of, no_interpreter, put, same, same_bits
from layers import CODES, DIM, KINDS, codes_of, learned, make, state_of

import vqfast
from vqfast.nn import VectorQuantizerEMA, _revival

FAMILY = "quantize"
KIND = pytest.mark.parametrize("kind", KINDS)
EVERY_KIND = pytest.mark.parametrize("kind", [*KINDS, "residual"])


@pytest.fixture(autouse=True)
def on_backend(backend):
    no_interpreter(backend)
    with vqfast.use_backend(backend):
        yield


def layer_for(backend, kind, codebook=None, **options):
    if kind == "residual":
        options.setdefault("num_quantizers", 3)
    return make(kind, codebook, **options).to(device_of(backend))


def same_state(layer, expected, what=""):
    for name, tensor in state_of(layer).items():
        if tensor.is_floating_point():
            same_bits(tensor, expected[name], f"{what} {name}")


def lattice(n, seed):
    """Rows whose sums are exact in float32, in any order."""
    return cases.integers(n, DIM, seed=seed)


# ---- the moving average -------------------------------------------------------------------------------------------


def test_sizes_start_at_one_and_sums_at_the_codebook(backend):
    layer = VectorQuantizerEMA(DIM, CODES).to(device_of(backend))
    assert (layer.cluster_size == 1).all()
    same_bits(layer.cluster_sum, layer.codebook)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_looks_up_first_and_updates_after(backend, groups):
    """Indices are those of the old codebook; the new one follows the formula from the old one's statistics."""
    z = cases.normal(40, DIM, seed=1)
    layer = layer_for(backend, "ema", groups=groups, decay=0.7)
    before = oracle.Ema(codes_of(layer).cpu(), torch.ones(groups, CODES), codes_of(layer).cpu())
    rows = z[:, None].unflatten(-1, (groups, -1)).transpose(1, 2)
    found = oracle.step(rows, before.codebook)
    out = layer(put(backend, z))
    same(out.indices.reshape(found.indices.shape), found.indices)
    after = oracle.ema_update(before, found.sums, found.counts, 0.7)
    size = 0.7 + 0.3 * found.counts
    spread = (0.7 * before.codebook.abs() + 0.3 * oracle.code_stats(rows.abs(), found.indices, CODES)[0]) / size[..., None]
    close(layer.cluster_size.reshape(size.shape), after.cluster_size, 6 * ULP * size)
    close(codes_of(layer), after.codebook, (40 + 16) * ULP * spread)


def test_several_steps_follow_the_formula(backend):
    layer = layer_for(backend, "ema", decay=0.8)
    state = oracle.Ema(codes_of(layer).cpu()[0], torch.ones(CODES), codes_of(layer).cpu()[0])
    for step in range(10):
        z = cases.normal(30, DIM, seed=10 + step)
        # Looked up by the layer's own codes, so that a last-bit difference cannot send a row elsewhere.
        indices = oracle.nearest(z, codes_of(layer).cpu()[0]).indices
        layer(put(backend, z))
        sums, counts = oracle.code_stats(z[None, None], indices[None, None], CODES)
        state = oracle.ema_update(state, sums[0], counts[0], 0.8)
        # A step adds at most 30 + 16 roundings of values below 4; earlier steps' errors are damped by 0.8: 1 / (1 - 0.8).
        close(layer.codebook, state.codebook, 5 * (30 + 16) * 4 * ULP)


def test_debiased_rule_is_sonnets(backend):
    """Averages start at zero and are divided by 1 - decay^t; sizes are Laplace-smoothed with eps (Sonnet v2)."""
    layer = layer_for(backend, "ema", rule="debiased", decay=0.9, eps=1e-5)
    hidden_size, hidden_sum = torch.zeros(CODES, dtype=torch.float64), torch.zeros(CODES, DIM, dtype=torch.float64)
    for step in range(1, 8):
        z = cases.normal(64, DIM, seed=20 + step)
        indices = oracle.nearest(z, codes_of(layer).cpu()[0]).indices
        sums, counts = oracle.code_stats(z[None, None], indices[None, None], CODES)
        hidden_size += (counts[0].double() - hidden_size) * (1 - 0.9)
        hidden_sum += (sums[0] - hidden_sum) * (1 - 0.9)
        debias = 1 - 0.9**step
        size, total = hidden_size / debias, hidden_sum / debias
        n = size.sum()
        size = (size + 1e-5) / (n + CODES * 1e-5) * n
        layer(put(backend, z))
        seen = hidden_size > 0  # a code that nobody ever chose has no average to compare
        wanted = (total / size[:, None])[seen]
        # (64 + 16) roundings of terms whose mean magnitude is below 4, over steps damped by 0.9.
        close(codes_of(layer)[0].cpu()[seen], wanted, 80 * ULP * 4 * min(step, 10))
    assert torch.isfinite(layer.codebook).all()


def test_codes_nobody_chooses_keep_their_value(backend):
    """1000 steps fade their size below eps; their value stays, up to a rounding per step until then."""
    codebook = torch.cat([lattice(4, 2), torch.full((CODES - 4, DIM), 1000.0) + lattice(CODES - 4, 3)])
    layer = layer_for(backend, "ema", codebook, decay=0.9)
    z = put(backend, lattice(8, 4))
    for _ in range(300):
        layer(z)
    steps = math.log(1e-5) / math.log(0.9)
    close(layer.codebook[4:], codebook[4:], 3 * (steps + 2) * ULP * 1010)


@EVERY_KIND
def test_evaluation_changes_nothing(backend, kind):
    layer = layer_for(backend, kind).eval()
    before = state_of(layer)
    for mask in (None, torch.arange(40)[None] % 2 == 0):
        layer(put(backend, cases.normal(1, 40, DIM)), put(backend, mask))
    layer.encode(put(backend, cases.normal(40, DIM)))
    layer.train()
    layer.encode(put(backend, cases.normal(40, DIM)))
    layer.update_()
    for name, tensor in state_of(layer).items():
        same_bits(tensor, before[name], name)


@EVERY_KIND
def test_training_and_evaluation_find_the_same_codes(backend, kind):
    z = put(backend, cases.normal(50, DIM, seed=5))
    same(layer_for(backend, kind)(z).indices, layer_for(backend, kind).eval()(z).indices)


EMPTY = {
    "no_rows": (torch.empty(0, 5, DIM), None),
    "all_masked": (cases.normal(2, 5, DIM), torch.zeros(2, 5, dtype=torch.bool)),
    "all_nonfinite": (torch.full((2, 5, DIM), math.nan), None),
}


@EVERY_KIND
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["ema", "debiased"])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_step_does_not_decay(backend, kind, name, rule, revive_below):
    if kind == "parameter" and rule == "debiased":
        pytest.skip("a trained codebook has no moving-average rule")
    options = {"revive_below": revive_below} if kind == "parameter" else {"revive_below": revive_below, "rule": rule}
    layer = layer_for(backend, kind, **options)
    layer(put(backend, cases.normal(40, DIM)))
    before = learned(layer)
    for _ in range(3):
        layer(*put(backend, *EMPTY[name]))
    same_state(layer, before, name)


# ---- the one writer -----------------------------------------------------------------------------------------------


@EVERY_KIND
def test_without_auto_update_forward_only_collects(backend, kind):
    layer = layer_for(backend, kind, auto_update=False)
    before = learned(layer)
    for seed in range(3):
        layer(put(backend, cases.normal(20, DIM, seed=seed)))
    same_state(layer, before)


@pytest.mark.parametrize("kind", ["ema", "residual"])
def test_accumulated_forwards_equal_one_large_batch(backend, kind):
    """Three micro-batches and one update_() give the bits of one forward on all rows (sums are exact here)."""
    codebook = cases.integers(3 * CODES if kind == "residual" else CODES, DIM, seed=6)
    z = lattice(60, 7)
    whole, parts = (layer_for(backend, kind, codebook, auto_update=False) for _ in range(2))
    automatic = layer_for(backend, kind, codebook)
    whole(put(backend, z)), automatic(put(backend, z))
    for part in z.split((10, 1, 49)):
        parts(put(backend, part))
    whole.update_(), parts.update_()
    same_state(parts, state_of(whole), "micro-batches"), same_state(automatic, state_of(whole), "auto_update")
    assert not torch.equal(whole.codebook.cpu().reshape(-1, DIM), codebook)


@EVERY_KIND
def test_a_second_update_has_nothing_to_do(backend, kind):
    layer = layer_for(backend, kind, auto_update=False)
    layer(put(backend, cases.normal(20, DIM)))
    layer.update_()
    before = learned(layer)
    layer.update_(), layer.update_()
    same_state(layer, before)


@pytest.mark.parametrize("kind", ["ema", "residual"])
def test_set_codebook_resets_sizes_sums_and_pending(backend, kind):
    layer = layer_for(backend, kind, auto_update=False)
    layer(put(backend, cases.normal(20, DIM)))
    layer.update_()
    layer(put(backend, cases.normal(20, DIM, seed=1)))  # pending
    fresh = cases.normal(*layer.codebook.shape, seed=8)
    layer.set_codebook_(put(backend, fresh))
    same_bits(layer.codebook, fresh), same_bits(layer.cluster_sum, fresh)
    assert (layer.cluster_size == 1).all()
    before = learned(layer)
    layer.update_()
    same_state(layer, before, "pending rows belonged to the old codebook")


@EVERY_KIND
@pytest.mark.parametrize("wrong", ["nan", "shape", "int"])
def test_set_codebook_refuses(backend, kind, wrong):
    layer = layer_for(backend, kind)
    before = state_of(layer)
    good = torch.zeros_like(layer.codebook)
    bad = {"nan": torch.full_like(good, math.nan), "shape": good[..., :-1], "int": good.long()}[wrong]
    with pytest.raises((ValueError, TypeError)):
        layer.set_codebook_(bad)
    for name, tensor in state_of(layer).items():
        same_bits(tensor, before[name], name)


@EVERY_KIND
def test_init_codebook_is_kmeans_of_the_batch(backend, kind):
    """The codes lie on the data, every row is near one, and the same seed gives the same bits."""
    z = put(backend, 50 + cases.normal(200, DIM, seed=9))
    first, second = layer_for(backend, kind), layer_for(backend, kind)
    first.init_codebook_(z, seed=3), second.init_codebook_(z, seed=3)
    same_state(second, state_of(first))
    assert torch.isfinite(first.codebook).all()
    error = (z - first.eval()(z).quantized).square().mean()
    assert error < 1, "one code per row's neighbourhood leaves less than the data's own variance"


@EVERY_KIND
def test_init_codebook_needs_enough_rows(backend, kind):
    with pytest.raises(ValueError):
        layer_for(backend, kind).init_codebook_(put(backend, cases.normal(CODES - 1, DIM)))


# ---- dead codes and frozen codes ----------------------------------------------------------------------------------


def test_candidates_are_rows_that_count():
    """Not those under a mask, not those that are not finite, nor a rest that has overflowed."""
    rows = torch.arange(24.0).view(2, 1, 4, 3)
    indices = torch.zeros(2, 1, 4, dtype=torch.int64)
    quantized = torch.zeros(2, 1, 4, 3)
    indices[0, 0, 1], quantized[1, 0, 2], rows[1, 0, 2, 1], rows[1, 0, 3, 0] = -1, torch.nan, torch.nan, torch.inf
    pool = _revival.candidates(rows, indices, quantized, torch.tensor(7), 64)
    assert pool.shape == (1, 8, 4)
    real = pool[0, pool[0, :, 3] == 1, :3]
    expected = rows.view(8, 3)[[0, 2, 3, 4, 5]]
    assert torch.equal(real.sort(0).values, expected) and (pool[0, pool[0, :, 3] == 0] == 0).all()


def test_nothing_is_done_while_no_code_is_dead(backend, monkeypatch):
    if torch.device(device_of(backend)).type != "cpu":
        pytest.skip("a GPU would have to be waited for")
    layer = make("ema", revive_below=0.5)
    done = []
    monkeypatch.setattr(_revival, "replace_dead_", lambda *args: done.append(args) or torch.zeros_like(args[1]))
    layer(cases.normal(64, DIM, seed=1))
    assert not done
    layer.cluster_size[3] = 0.0
    layer(layer.codebook[:1].repeat(4, 1))
    assert done


def near_and_far():
    """Half of the codes among the data, half where nobody goes."""
    return torch.cat([lattice(CODES // 2, 30), 1000.0 + lattice(CODES // 2, 31)])


@KIND
@pytest.mark.parametrize("bad_rows", [False, True], ids=["clean", "with bad rows"])
def test_dead_codes_become_rows_of_the_batch(backend, kind, bad_rows):
    """Parameter: moving counts with 0.99 need 70 steps to fall under 0.5; ema: decay 0.5 needs two."""
    options, steps = ({"revive_below": 0.5}, 80) if kind == "parameter" else ({"revive_below": 0.5, "decay": 0.5}, 4)
    layer = layer_for(backend, kind, near_and_far(), **options)
    far = torch.arange(CODES) >= CODES // 2
    revived = torch.zeros(CODES, dtype=torch.bool)
    for step in range(steps):
        z, mask = cases.normal(1, 40, DIM, seed=100 + step), torch.arange(40)[None] % 2 == 0
        if bad_rows:
            z[0, ::4] = math.nan  # valid positions, bad values
            z[0, 1::2] = 77.0  # masked positions
        before = layer.codebook.detach().cpu().clone()
        layer(*put(backend, z, mask if bad_rows else None))
        after = layer.codebook.detach().cpu()
        moved = ((after - before).abs() > 100).any(-1)
        revived |= moved
        usable = z[0][mask[0] & torch.isfinite(z[0]).all(-1)] if bad_rows else z[0]
        for code in after[moved]:
            assert (usable == code).all(-1).any(), "a revived code is a valid row of this batch, bit for bit"
    assert revived[far].all() and not revived[~far].any()
    assert torch.isfinite(layer.codebook).all() and (layer.codebook.abs() < 50).all()


@KIND
def test_revival_is_reproducible_and_differs_between_codes(backend, kind):
    def train():
        torch.manual_seed(5)
        options = {"revive_below": 0.5} if kind == "parameter" else {"revive_below": 0.5, "decay": 0.5}
        layer = layer_for(backend, kind, near_and_far(), **options)
        torch.manual_seed(5)
        for step in range(80 if kind == "parameter" else 4):
            layer(put(backend, cases.normal(40, DIM, seed=step)))
        return layer

    first, second = train(), train()
    same_state(second, state_of(first))
    revived = first.codebook.detach().cpu()[CODES // 2 :]
    assert len({tuple(r) for r in revived.tolist()}) > 1, "dead codes do not all become the same row"


@KIND
def test_no_revival_by_default(backend, kind):
    layer = layer_for(backend, kind, near_and_far(), **({} if kind == "parameter" else {"decay": 0.5}))
    for step in range(10):
        layer(put(backend, cases.normal(40, DIM, seed=step)))
    assert (layer.codebook[CODES // 2 :] > 900).all()


@KIND
@pytest.mark.parametrize("which", ["all", "some"])
def test_frozen_codes_keep_every_bit(backend, kind, which):
    """Neither the moving average, nor the optimiser, nor revival moves a frozen code; the others learn on."""
    options = {"revive_below": 0.5} if kind == "parameter" else {"revive_below": 0.5, "decay": 0.5}
    layer = layer_for(backend, kind, near_and_far(), **options)
    frozen = torch.ones(CODES, dtype=torch.bool) if which == "all" else torch.arange(CODES) % 2 == 0
    layer.freeze_() if which == "all" else layer.freeze_(put(backend, frozen))
    before = layer.codebook.detach().cpu().clone()
    optimizer = torch.optim.SGD([layer.codebook], lr=0.5, momentum=0.9) if kind == "parameter" else None
    for step in range(80 if kind == "parameter" else 6):
        out = layer(put(backend, cases.normal(40, DIM, seed=step)).requires_grad_())
        if optimizer:
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
    after = layer.codebook.detach().cpu()
    same_bits(after[frozen], before[frozen])
    if which == "some":
        assert (after[~frozen] != before[~frozen]).any(-1).all()
        layer.unfreeze_()
        layer(put(backend, cases.normal(40, DIM, seed=99)))


@EVERY_KIND
def test_frozen_codes_of_unit_length_keep_every_bit(backend, kind):
    """Normalising is not idempotent: a frozen code is not normalised again."""
    layer = layer_for(backend, kind, metric="cosine", codebook_size=64)
    layer.freeze_()
    before = layer.codebook.detach().clone()
    layer(put(backend, cases.normal(200, DIM, seed=1)))
    same_bits(layer.codebook, before)


@pytest.mark.parametrize("which", ["all", "some"])
def test_momentum_moves_no_frozen_code(backend, which):
    """Adam goes on moving a parameter whose gradient has become 0; what it did to frozen codes is undone before anybody sees it."""
    layer = layer_for(backend, "parameter")
    optimizer = torch.optim.AdamW([layer.codebook], lr=0.01, weight_decay=0.1)
    for step in range(9):
        if step == 4:
            layer.freeze_(None if which == "all" else put(backend, torch.arange(CODES) % 2 == 0))
            frozen, held = layer.frozen.clone(), layer.codebook.detach().clone()
        optimizer.zero_grad()
        out = layer(put(backend, cases.normal(40, DIM, seed=step)).requires_grad_())
        if step >= 4:
            same_bits(out.quantized.detach()[frozen[out.indices]], held[out.indices][frozen[out.indices]])
        out.loss.backward()
        optimizer.step()
    saved = layer.state_dict()["codebook"]
    same_bits(saved[frozen], held[frozen])
    if which == "some":
        assert (saved[~frozen] != held[~frozen]).any(-1).all()
    fresh = layer_for(backend, "parameter")
    fresh.load_state_dict(layer.state_dict())
    fresh.codebook.data += 1.0
    same_bits(fresh.decode(torch.arange(CODES, device=held.device))[frozen].detach(), held[frozen])
    layer.unfreeze_()
    layer.codebook.data += 1.0
    assert (layer.decode(torch.arange(CODES, device=held.device)) > held).any(-1).all()


@pytest.mark.parametrize("kind", ["ema", "residual"])
@pytest.mark.parametrize("rule", ["ema", "debiased"])
def test_a_batch_whose_sums_overflow_is_forgotten(backend, kind, rule):
    """Finite rows may add up to more than float32 holds: the codes that they chose stay as they are, and learn from the next batch."""
    layer = layer_for(backend, kind, rule=rule, decay=0.5)
    layer(put(backend, cases.normal(40, DIM, seed=1)))
    layer(put(backend, torch.full((300, DIM), 3e38)))
    assert all(t.isfinite().all() for t in learned(layer).values())
    before = codes_of(layer)
    out = layer(put(backend, cases.normal(40, DIM, seed=2)))
    chosen = out.indices[..., 0] if kind == "residual" else out.indices
    assert (codes_of(layer)[0] != before[0])[chosen].any(-1).all()
    assert all(t.isfinite().all() for t in learned(layer).values())


@EVERY_KIND
def test_an_empty_step_leaves_codes_of_unit_length_alone(backend, kind):
    layer = layer_for(backend, kind, metric="cosine", codebook_size=64)
    before = state_of(layer)
    layer(put(backend, torch.full((5, DIM), torch.nan)))
    same_state(layer, before)


def test_an_empty_step_is_no_step(backend):
    """The debiased rule divides by 1 - decay^t, where t counts steps that had rows."""
    layer, other = (layer_for(backend, "ema", rule="debiased", decay=0.9) for _ in range(2))
    layer(put(backend, torch.full((5, DIM), torch.nan)))
    for one in (layer, other):
        one(put(backend, cases.normal(40, DIM, seed=1)))
    same_state(layer, state_of(other))
    same(layer.updates, other.updates)


@pytest.mark.parametrize("kind", ["ema", "residual"])
@pytest.mark.parametrize("move", ["half", "bfloat16"])
def test_pending_statistics_stay_float32(backend, kind, move):
    layer = layer_for(backend, kind, auto_update=False, revive_below=0.1, decay=0.5)
    getattr(layer, move)()
    dtype = torch.float16 if move == "half" else torch.bfloat16
    for _ in range(2):
        layer(put(backend, torch.full((20_000, DIM), 10.0, dtype=dtype)))
    assert layer.pending_sums.dtype == layer.pending_pool.dtype == torch.float32
    assert layer.pending_sums[0].max() == 400_000
    layer.update_()
    assert all(t.isfinite().all() for t in learned(layer).values())


def test_gradients_follow_the_parameter_that_stays_float32():
    layer = make("parameter")
    layer(cases.normal(9, DIM)).loss.backward()
    grad = layer.codebook.grad.clone()
    layer.bfloat16()
    same_bits(layer.codebook.grad, grad)
    torch.optim.Adam(layer.parameters()).step()


def test_the_gradient_is_that_of_the_codes_before_revival(backend):
    """With cosine the codes are normalised, and what that saves for its gradient must not be the codebook that revival writes to."""
    plain, reviving = (layer_for(backend, "parameter", metric="cosine", revive_below=share) for share in (0.0, 1.5))
    z = put(backend, cases.normal(20, DIM, seed=1))
    for layer in (plain, reviving):
        layer(z).loss.backward()
    assert (plain.codebook != reviving.codebook).any()
    same_bits(reviving.codebook.grad, plain.codebook.grad)


# ---- same bits, saved and restored --------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("revive_below", [0.0, 0.5])
def test_training_has_the_same_bits_for_any_thread_count(backend, kind, revive_below, set_threads):
    def train(count):
        set_threads(count)
        layer = layer_for(backend, kind, revive_below=revive_below)
        torch.manual_seed(1)
        results = []
        for step in range(3):
            z = put(backend, cases.normal(4000, DIM, seed=step)).requires_grad_()
            out = layer(z)
            out.loss.backward()
            results += [*out, z.grad]
        return results + list(state_of(layer).values())

    first = train(1)
    for count in (1, 2, 4):
        for at, (again, before) in enumerate(zip(train(count), first)):
            same_bits(again, before, f"{count} threads, value {at}")


@EVERY_KIND
@pytest.mark.parametrize("rule", ["ema", "debiased"])
def test_state_dict_resumes_to_the_same_bits(backend, kind, rule, tmp_path):
    """Through a safetensors file, which also refuses tensors that share memory or have gaps."""
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"revive_below": 0.3} if kind == "parameter" else {"revive_below": 0.3, "decay": 0.5, "rule": rule}

    def steps(layer, first, last):
        for step in range(first, last):
            torch.manual_seed(step)
            layer(put(backend, cases.normal(30, DIM, seed=step)))

    through, left = layer_for(backend, kind, **options), layer_for(backend, kind, **options)
    steps(through, 0, 8), steps(left, 0, 4)
    safetensors.save_file(left.state_dict(), tmp_path / "layer.safetensors")
    resumed = layer_for(backend, kind, cases.normal(*left.codebook.shape, seed=77), **options)
    resumed.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"), strict=True)
    steps(resumed, 4, 8)
    for name, tensor in state_of(resumed).items():
        same_bits(tensor, state_of(through)[name], name)


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@EVERY_KIND
@pytest.mark.parametrize("options", [{}, {"auto_update": False}, {"metric": "cosine"}], ids=["auto", "pending", "cosine"])
def test_codes_and_statistics_are_wide_whatever_the_default_dtype(backend, kind, options, half_by_default):
    layer = layer_for(backend, kind, revive_below=0.5, **options).train()
    for _ in range(2):
        out = layer(put(backend, cases.normal(3 * CODES, DIM).bfloat16()))
        out.loss.backward() if out.loss.requires_grad else None
    if not layer.auto_update:
        layer.update_()
    assert out.quantized.dtype == torch.bfloat16
    assert {t.dtype for t in state_of(layer).values() if t.is_floating_point()} == {torch.float32}
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {torch.float32}


@EVERY_KIND
def test_a_half_precision_state_dict_is_widened(backend, kind):
    layer = layer_for(backend, kind)
    half = {name: t.half() if t.is_floating_point() else t for name, t in layer.state_dict().items()}
    for assign in (False, True):
        layer.load_state_dict(half, assign=assign)
        assert layer.codebook.dtype == torch.float32 and isinstance(layer.codebook, torch.nn.Parameter) == (kind == "parameter")
        same(layer.codebook.detach(), half["codebook"].float())
        layer(put(backend, cases.normal(20, DIM)))


@EVERY_KIND
def test_state_dict_holds_no_hints_and_no_pending_rows(backend, kind):
    """Its names do not depend on what was called before, so strict loading works between any two moments."""
    fresh, used = layer_for(backend, kind, auto_update=False), layer_for(backend, kind, auto_update=False)
    used(put(backend, cases.normal(30, DIM)))
    used.eval()(put(backend, cases.normal(30, DIM)))
    assert {k: v.shape for k, v in used.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}


@EVERY_KIND
def test_load_state_dict_is_an_error_for_other_sizes(backend, kind):
    with pytest.raises(RuntimeError, match="codebook"):
        layer_for(backend, kind).load_state_dict(layer_for(backend, kind, codebook_size=CODES + 1).state_dict())


@EVERY_KIND
def test_deep_copies_live_on_their_own(backend, kind):
    layer = layer_for(backend, kind)
    layer(put(backend, cases.normal(30, DIM)))
    twin = copy.deepcopy(layer)
    before = state_of(twin)
    layer(put(backend, cases.normal(30, DIM, seed=1)))
    for name, tensor in state_of(twin).items():
        same_bits(tensor, before[name], name)
    twin(put(backend, cases.normal(30, DIM, seed=1)))
    same_state(twin, state_of(layer))


@EVERY_KIND
def test_built_on_the_meta_device(backend, kind):
    """Large models are built without memory, then filled."""
    source = layer_for(backend, kind)
    with torch.device("meta"):
        hollow = KINDS[kind](DIM, CODES) if kind != "residual" else type(source)(DIM, CODES, num_quantizers=3)
    filled = hollow.to_empty(device=device_of(backend))
    filled.load_state_dict(source.state_dict())
    z = put(backend, cases.normal(20, DIM))
    same(filled.eval()(z).indices, source.eval()(z).indices)
