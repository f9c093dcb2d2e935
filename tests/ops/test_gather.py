"""gather: exact copies, zeros at -1, IndexError elsewhere, and a gradient that is an ordered sum (contract 7, 10)."""

import cases
import oracle
import pytest
import torch
from check import ULP, close, device_of, op, put, same, same_bits

import vqfast

FAMILY = "gather"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.quick


def some_indices(*shape, k, seed=0, holes=True):
    """Every code now and then, the first and the last for sure, and -1 in some places."""
    indices = torch.randint(-1 if holes else 0, k, shape, generator=cases.generator(seed))
    if indices.numel() > 2:
        indices.view(-1)[0], indices.view(-1)[-1] = 0, k - 1
    return indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", cases.DIMS, ids="D{}".format)
def test_rows_are_copied_bit_for_bit(backend, dim, dtype):
    codebook = cases.normal(37, dim, seed=1).to(dtype)
    codebook[3, 0], codebook[4, -1], codebook[5, 0] = torch.nan, -torch.inf, -0.0
    indices = some_indices(5, 13, k=37, seed=dim)
    got = vqfast.gather(*put(backend, codebook, indices), backend=backend)
    expected = oracle.gather(codebook, indices)
    same(got, expected)
    same_bits(got.nan_to_num(7), expected.nan_to_num(7), "signs of zero")  # which NaN it is may change
    assert got.is_contiguous()


@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_groups(backend, groups, lead):
    codebook, indices = cases.normal(groups, 11, 5, seed=2), some_indices(*lead, groups, 7, k=11, seed=3)
    got = vqfast.gather(*put(backend, codebook, indices), backend=backend)
    same_bits(got, oracle.gather(codebook, indices))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (4, 0, 2), (2, 3, 4)], ids=str)
def test_leading_axes_and_empty(backend, shape):
    codebook, indices = cases.normal(9, 4, seed=4), some_indices(*shape, k=9)
    got = vqfast.gather(*put(backend, codebook, indices), backend=backend)
    same_bits(got, oracle.gather(codebook, indices))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_strides(backend, view, dtype):
    codebook = cases.views(cases.normal(2, 24, 9, seed=5).to(dtype))[view]
    indices = some_indices(30, 4, 2, k=24).permute(1, 2, 0)  # [4, 2, 30], innermost stride 8
    got = vqfast.gather(*put(backend, codebook, indices), backend=backend)
    same_bits(got, oracle.gather(codebook, indices))


def test_expanded_indices_and_codes(backend):
    codebook, indices = cases.normal(1, 6, seed=6).expand(8, 6), torch.tensor(5).expand(10, 3)
    got = vqfast.gather(*put(backend, codebook, indices), backend=backend)
    same_bits(got, codebook[0].expand(10, 3, 6).contiguous())


def test_every_hole(backend):
    codebook = torch.full((4, 3), torch.nan)
    got = vqfast.gather(*put(backend, codebook, torch.full((7,), -1)), backend=backend)
    same_bits(got, torch.zeros(7, 3), "index -1 gives zeros even where the codes are NaN")


@pytest.mark.parametrize("wrong", [-2, 9, 10, 2**31, 2**32, 2**40, 2**62, -(2**63), -(2**32) - 1], ids=str)
@pytest.mark.parametrize("place", [0, 17, 40])
def test_any_other_index_raises(backend, wrong, place):
    """2^32 and -(2^32) - 1 are 0 and -1 to whoever keeps only the low half."""
    indices = some_indices(41, k=9)
    indices[place] = wrong
    on_cpu = device_of(backend).type == "cpu"
    with pytest.raises(IndexError, match=r"-?\d"):
        vqfast.gather(*put(backend, cases.normal(9, 3), indices), backend=backend, validate=None if on_cpu else True)


def test_out_of_range_in_the_first_and_last_group(backend):
    """Group 0's index K would land in group 1: a check of the flat offset alone misses it."""
    indices = some_indices(3, 5, k=4, holes=False)
    indices[0, 2] = 4
    with pytest.raises(IndexError):
        vqfast.gather(*put(backend, cases.normal(3, 4, 2), indices), backend=backend, validate=True)


@pytest.mark.parametrize("wrong", [-2, 9, 2**32], ids=str)
def test_the_op_itself_refuses_wrong_indices(backend, wrong):
    """Compiled and exported graphs call the op without the public function's check. Native code cannot raise IndexError
    through the stable ABI; it raises RuntimeError and names it."""
    if backend in ("triton", "cuda"):
        pytest.skip("a GPU's op reads nothing out of bounds and does not wait to say so")
    with pytest.raises((IndexError, RuntimeError), match=r"index|indices"):
        op("gather", backend)(cases.normal(1, 9, 3), torch.tensor([[[0, wrong, 1]]]))


def test_a_gpu_op_reads_nothing_out_of_bounds(backend):
    """Without validate, a wrong index gives zeros there."""
    if backend not in ("triton", "cuda"):
        pytest.skip("the CPU raises")
    codebook, indices = cases.normal(2, 9, 3), torch.tensor([0, 9, -2, 2**40, -(2**62), 2**32, 1]).expand(1, 2, 7)
    got = op("gather", backend)(*put(backend, codebook, indices))
    same(got, oracle.gather(codebook, torch.tensor([0, -1, -1, -1, -1, -1, 1]).expand(1, 2, 7)))


# ---- gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_gradient_matches_float64_autograd(backend, groups):
    codebook, indices = cases.normal(groups, 17, 6, seed=7), some_indices(4, groups, 50, k=17, seed=8)
    weight = cases.normal(4, groups, 50, 6, seed=9)
    ours, picks, factor = put(backend, codebook.clone(), indices, weight)
    (vqfast.gather(ours.requires_grad_(), picks, backend=backend) * factor).sum().backward()

    exact = codebook.double().requires_grad_()
    picked = exact[torch.arange(groups)[:, None].expand(indices.shape), indices.clamp(min=0)]
    ((indices >= 0)[..., None] * picked * weight.double()).sum().backward()
    assert ours.grad.dtype == torch.float32
    close(ours.grad, exact.grad, oracle.sums_bound(weight, indices, 17) + ULP * exact.grad.abs())


@pytest.mark.parametrize("dtype", cases.LOW, ids=str)
def test_gradient_of_low_precision_codes_is_rounded_once(backend, dtype):
    """1000 ones summed in bfloat16 stop at 256; the gradient must not."""
    codebook = put(backend, torch.zeros(3, 2, dtype=dtype)).requires_grad_()
    vqfast.gather(codebook, put(backend, torch.zeros(1000, dtype=torch.int64)), backend=backend).sum().backward()
    same(codebook.grad[0], torch.full((2,), 1000.0).to(dtype))
    assert (codebook.grad[1:] == 0).all()


def test_gradient_has_the_same_bits_for_any_thread_count(backend, set_threads):
    codebook, indices = put(backend, cases.normal(5, 7, seed=10), some_indices(20000, k=5, seed=11))
    weight = put(backend, cases.normal(20000, 7, seed=12))

    def gradient(count):
        set_threads(count)
        leaf = codebook.clone().requires_grad_()
        (vqfast.gather(leaf, indices, backend=backend) * weight).sum().backward()
        return leaf.grad

    first = gradient(1)
    for count in (1, 2, 3, 4):
        same_bits(gradient(count), first, f"{count} threads")


def test_gradient_of_expanded_upstream(backend):
    """sum().backward() hands over a stride-0 gradient."""
    codebook = put(backend, cases.normal(6, 4)).requires_grad_()
    indices = some_indices(90, k=6, holes=False)
    vqfast.gather(codebook, put(backend, indices), backend=backend).sum().backward()
    same(codebook.grad, torch.bincount(indices, minlength=6).float()[:, None].expand(6, 4).contiguous())


@pytest.mark.parametrize("through", ["public", "op"])
def test_gradcheck(through):
    """float64 runs on the reference backend; the other backends share its autograd formula."""
    codebook = cases.normal(2, 5, 3, seed=13).double().requires_grad_()
    indices = some_indices(2, 2, 9, k=5, seed=14)
    function = vqfast.gather if through == "public" else op("gather", "reference")
    assert torch.autograd.gradcheck(lambda c: function(c, indices), (codebook,))


@pytest.mark.parametrize("through", ["public", "op"])
def test_double_backward_is_right_or_refused(through):
    """The backward is linear in the upstream gradient; a silent zero would spoil a gradient penalty."""
    codebook = cases.normal(2, 5, 3, seed=13).double().requires_grad_()
    indices = some_indices(2, 2, 9, k=5, seed=14)
    upstream = cases.normal(2, 2, 9, 3, seed=15).double().requires_grad_()
    function = vqfast.gather if through == "public" else op("gather", "reference")
    try:
        (first,) = torch.autograd.grad(function(codebook, indices), codebook, upstream, create_graph=True)
        (second,) = torch.autograd.grad(first.sum() + 0 * upstream.sum(), upstream)  # as one term of a larger loss
    except RuntimeError:
        return
    same(second, (indices >= 0)[..., None].expand(2, 2, 9, 3).double().contiguous())
