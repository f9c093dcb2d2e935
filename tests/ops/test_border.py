"""The border: opcheck, one gradient in eager, compiled and exported graphs, true fakes, vmap (contract 14)."""

import io
import weakref

import cases
import oracle
import pytest
import torch
from check import ULP, close, device_of, op, put, same, same_bits
from torch.library import opcheck

import vqfast

BACKENDS = ("cpu", "cuda", "triton", "reference")
OPS = ("nearest", "search_hints", "gather", "code_stats", "quantize", "ema_update_")


def inputs(groups=2, n=13, k=9, dim=5, dtype=torch.float32):
    x = cases.normal(2, groups, n, dim, seed=1).to(dtype)
    return x, cases.normal(groups, k, dim, seed=2), torch.arange(2 * n).view(2, n) % 3 > 0


def hints(groups=2, n=13, k=9, dim=5):
    return torch.arange(k).flip(0).repeat(groups, 1), torch.eye(dim)[:2].repeat(groups, 1, 1), torch.zeros(2, groups, n).long()


def nearest_samples():
    x, codebook, _ = inputs()
    yield x, codebook, 0, None, None, None
    yield x, codebook, 2, *hints()
    yield x.transpose(2, 3).contiguous().transpose(2, 3), codebook.bfloat16(), 1, None, None, None
    yield x[:, :, :0], codebook, 0, None, None, None
    yield x.bfloat16().requires_grad_(), codebook.clone().requires_grad_(), 0, None, None, None


def search_hints_samples():
    _, codebook, _ = inputs()
    yield codebook, 0
    yield codebook.mT.contiguous().mT.half(), 1
    yield codebook.clone().requires_grad_(), 2


def gather_samples():
    _, codebook, _ = inputs()
    indices = torch.randint(-1, 9, (3, 2, 7), generator=cases.generator(3))
    yield codebook, indices
    yield codebook.clone().requires_grad_(), indices
    yield codebook.mT.contiguous().mT.half(), indices.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    yield codebook.clone().requires_grad_(), indices[..., :0]


def code_stats_samples():
    x, _, _ = inputs()
    indices = torch.randint(-1, 9, (2, 2, 13), generator=cases.generator(4))
    yield x, indices, 9
    yield x.transpose(1, 2).contiguous().transpose(1, 2).bfloat16(), indices, 20
    yield x[:, :, :0], indices[..., :0], 9


def quantize_samples():
    x, codebook, mask = inputs()
    yield x, codebook, None, 0, True, None, None, None
    yield x, codebook, mask, 1, False, *hints()
    yield x.clone().requires_grad_(), codebook.clone().requires_grad_(), mask, 0, True, None, None, None
    yield x.clone().requires_grad_(), codebook, None, 0, False, None, None, None
    yield x, codebook.clone().requires_grad_(), None, 2, True, None, None, None
    yield x.transpose(2, 3).contiguous().transpose(2, 3).half().requires_grad_(), codebook, mask, 0, True, None, None, None
    yield x[:, :, :0], codebook, mask[:, :0], 0, True, None, None, None


def ema_update__samples():
    _, codebook, _ = inputs()
    for frozen in (None, torch.arange(18).view(2, 9) % 2 == 0):
        yield codebook.clone(), torch.ones(2, 9), codebook.clone(), torch.ones(2, 9, 5), torch.arange(18).view(2, 9), frozen, 0.9, 1e-5


FAMILY_OF = {"code_stats": "ema", "ema_update_": "ema"}


def moved(backend, sample):
    """A sample on the backend's device; leaves stay leaves."""
    return [v.detach().to(device_of(backend)).requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
            for v in sample]  # fmt: skip


def check_op(backend, name):
    for at, sample in enumerate(globals()[f"{name}_samples"]()):
        opcheck(op(name, backend), moved(backend, sample)), f"{name}, sample {at}"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_every_op_is_defined_for_every_backend(name, backend_name):
    """One schema for all four, so that a graph made with one backend reads like that of another."""
    schema, model = op(name, backend_name).default._schema, op(name, "reference").default._schema
    assert [(a.name, str(a.type)) for a in schema.arguments] == [(a.name, str(a.type)) for a in model.arguments]
    assert [str(r.type) for r in schema.returns] == [str(r.type) for r in model.returns]
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == (
        ["codebook", "cluster_size", "cluster_sum"] if name == "ema_update_" else [])  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("nearest", marks=pytest.mark.family("nearest"))])
def test_opcheck_nearest(backend, name):
    check_op(backend, name)


def test_results_carry_no_tangent(backend):
    x, codebook, _ = inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.to(device_of(backend)), torch.ones_like(x, device=device_of(backend)))
        distance, _ = op("nearest", backend)(dual, codebook.to(device_of(backend)), 0, None, None, None)
        assert torch.autograd.forward_ad.unpack_dual(distance).tangent is None


@pytest.mark.family("hints", backends=("reference", "cpu"))
def test_opcheck_search_hints(backend):
    check_op(backend, "search_hints")


@pytest.mark.family("gather")
def test_opcheck_gather(backend):
    check_op(backend, "gather")


@pytest.mark.family("ema")
@pytest.mark.parametrize("name", ["code_stats", "ema_update_"])
def test_opcheck_ema(backend, name):
    check_op(backend, name)


@pytest.mark.family("quantize")
def test_opcheck_quantize(backend):
    check_op(backend, "quantize")


def test_float64_opcheck():
    x, codebook, mask = inputs(dtype=torch.float64)
    opcheck(op("nearest", "reference"), (x, codebook.double(), 0, None, None, None))
    opcheck(op("quantize", "reference"), (x.requires_grad_(), codebook.double().requires_grad_(), mask, 0, True, None, None, None))


def layout(t):
    """What a reader of memory relies on: strides of axes that are longer than 1."""
    return t.shape, tuple(s for s, n in zip(t.stride(), t.shape) if n > 1), t.dtype


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.family(n)) for n in ("nearest", "gather", "quantize")])
@pytest.mark.parametrize("view", tuple(cases.views(torch.zeros(2, 24, 5))))
def test_fakes_return_the_true_strides(backend, name, view):
    """Inductor trusts the fake's strides; a wrong one reads memory in the wrong order."""
    x = cases.views(cases.normal(2, 24, 6, seed=5))[view].unsqueeze(1)
    codebook, indices = cases.normal(1, 8, 6, seed=6), torch.zeros(30, 1, 2).long().permute(2, 1, 0)
    arguments = {"nearest": (x, codebook, 0, None, None, None), "gather": (codebook, indices),
                 "quantize": (x, codebook, None, 0, True, None, None, None)}[name]  # fmt: skip
    arguments = moved(backend, arguments)
    real = op(name, backend)(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(name, backend)(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, f in zip((real,) if name == "gather" else real, (fake,) if name == "gather" else fake):
        assert layout(r) == layout(f)


# ---- compiled and exported ----------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """A network around the public functions, as a model would hold them."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.weight = torch.nn.Parameter(torch.eye(6) + 0.1 * cases.normal(6, 6, seed=7))
        self.codebook = torch.nn.Parameter(cases.normal(11, 6, seed=8))

    def forward(self, z, mask):
        out = vqfast.vector_quantize(z @ self.weight, self.codebook, mask=mask, backend=self.backend)
        again = vqfast.gather(self.codebook, out.indices, backend=self.backend)
        distance = vqfast.nearest(z, self.codebook, backend=self.backend).distance
        return out.quantized * again.tanh(), out.loss, out.indices, out.perplexity, distance


def run(step, z, mask):
    leaf = z.clone().requires_grad_()
    outputs = step(leaf, mask)
    (outputs[0].square().sum() + outputs[1]).backward()
    result = [*(o.detach() for o in outputs), leaf.grad, *(p.grad.clone() for p in step.parameters())]
    for p in step.parameters():
        p.grad = None
    return result


def batch(backend, n=13):
    return put(backend, cases.normal(2, n, 6, seed=9), torch.arange(2 * n).view(2, n) % 4 > 0)


def agree(compiled, eager):
    """Codes are the same; floats pass through matmul and tanh, which a compiler may round in another order."""
    for at, (a, b) in enumerate(zip(compiled, eager)):
        if b.dtype == torch.int64:
            same(a, b, f"value {at}")
        else:
            close(a, b, 256 * ULP * (1 + b.abs().cpu()), f"value {at}")


@pytest.mark.family("quantize")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend, compiler):
    if compiler == "inductor" and backend == "reference":
        pytest.skip("inductor sees the reference as the same opaque op; one generated program is enough")
    step, (z, mask) = Step(backend).to(device_of(backend)), batch(backend)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    agree(run(compiled, z, mask), run(step, z, mask))
    longer = batch(backend, 17)  # a second size makes the graph dynamic
    agree(run(compiled, *longer), run(step, *longer))
    with torch.no_grad():
        for a, b in zip(compiled(z, mask), step(z, mask)):
            close(a, b, 256 * ULP * (1 + b.abs().cpu()))


@pytest.mark.family("ema")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_of_the_update(backend, compiler):
    """A mutating op inside a graph: functionalised, then written back to the very same tensors."""

    def update(codebook, size, total, x, indices):
        sums, counts = vqfast.code_stats(x, indices, 9, backend=backend)
        vqfast.ema_update_(codebook, size, total, sums, counts, decay=0.9, backend=backend)
        return codebook * 2

    def state():
        return put(backend, cases.normal(9, 5), torch.ones(9), cases.normal(9, 5), cases.normal(40, 5, seed=1), torch.arange(40) % 8)

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True, backend=compiler)
    ours, plain = state(), state()
    same_bits(compiled(*ours), update(*plain))
    for a, b in zip(ours, plain):
        same_bits(a, b)


@pytest.mark.family("quantize")
def test_exported_programs_keep_codes_and_gradients(backend):
    step, (z, mask) = Step(backend).to(device_of(backend)), batch(backend)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(step, (z, mask), dynamic_shapes=({1: rows}, {1: rows}))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for n in (13, 29):
        agree(run(loaded, *batch(backend, n)), run(step, *batch(backend, n)))


@pytest.mark.family("quantize")
def test_a_graph_holds_the_choice_of_backend(backend):
    """The public function picks before the call, so that a loaded program finds its kernel."""
    step = Step(backend).to(device_of(backend))
    program = torch.export.export(step, batch(backend))
    targets = {str(node.target) for node in program.graph.nodes if "vqfast" in str(node.target)}
    assert targets and all(f"_{backend}" in t for t in targets), targets


# ---- vmap ---------------------------------------------------------------------------------------------------------


def test_vmap_nearest(backend):
    x, codebook = cases.normal(4, 10, 6, seed=10), cases.normal(4, 7, 6, seed=11)
    rows, codes = put(backend, x, codebook)

    def find(a, b):
        return vqfast.nearest(a, b, backend=backend).indices

    same(torch.vmap(find, in_dims=(0, None))(rows, codes[0]), oracle.nearest(x, codebook[0]).indices)
    same(torch.vmap(find)(rows, codes), torch.stack([oracle.nearest(a, b).indices for a, b in zip(x, codebook)]))
    same(torch.vmap(find, in_dims=(None, 0))(rows[0], codes), torch.stack([oracle.nearest(x[0], b).indices for b in codebook]))
    same(torch.vmap(find, in_dims=(1, None))(rows, codes[0]), oracle.nearest(x.transpose(0, 1), codebook[0]).indices)


@pytest.mark.family("gather")
def test_vmap_gather(backend):
    codebook, indices = cases.normal(4, 7, 6, seed=12), torch.randint(-1, 7, (4, 10), generator=cases.generator(13))
    codes, picks = put(backend, codebook, indices)

    def look_up(c, i):
        return vqfast.gather(c, i, backend=backend, validate=False)

    same(torch.vmap(look_up, in_dims=(None, 0))(codes[0], picks), oracle.gather(codebook[0], indices))
    same(torch.vmap(look_up)(codes, picks), torch.stack([oracle.gather(c, i) for c, i in zip(codebook, indices)]))


@pytest.mark.family("gather")
@pytest.mark.parametrize("again", [False, True])
def test_vmap_gather_out_of_range(backend, again):
    """An error inside a batched op is one of torch's own making; the range is checked before."""
    codes, picks, wrong = put(backend, cases.normal(2, 7, 4, seed=16), torch.tensor([0, 6]), torch.tensor([0, 7]))
    if again:  # what torch says the first time only may stand in the way of an error
        torch.vmap(lambda c: vqfast.gather(c, picks, backend=backend))(codes)
    with pytest.raises(IndexError, match="from 0 to 7"):
        torch.vmap(lambda c: vqfast.gather(c, wrong, backend=backend, validate=True))(codes)
    same(torch.vmap(lambda i: vqfast.gather(codes[0], i, backend=backend))(picks[None])[0], codes[0, picks])


@pytest.mark.family("gather")
def test_a_refused_call_holds_nothing(backend):
    codes = put(backend, cases.normal(7, 4, seed=17)).clone()
    held = weakref.ref(codes)
    with pytest.raises(IndexError):
        vqfast.gather(codes, put(backend, torch.tensor([7])), backend=backend, validate=True)
    del codes
    assert held() is None


@pytest.mark.family("quantize")
@pytest.mark.parametrize("op", ["vector_quantize", "residual_quantize"])
def test_functional_gradient_of_the_codes(backend, op):
    """torch.func.grad records backward as well, which must not end at an op that it cannot record."""
    x, codebook = put(backend, cases.normal(20, 8, seed=14), cases.normal(2, 5, 8, seed=15))
    codes = codebook if op == "residual_quantize" else codebook[0]

    def loss(codes):
        return getattr(vqfast, op)(x, codes, backend=backend).loss

    leaf = codes.clone().requires_grad_()
    same(torch.func.grad(loss)(codes), torch.autograd.grad(loss(leaf), leaf)[0])


# ---- in words -----------------------------------------------------------------------------------------------------


def test_explain_needs_tensors():
    with pytest.raises(ValueError, match="needs the op's tensors"):
        vqfast.explain("nearest")


def test_explain_names_what_runs_and_why_the_others_do_not(backend):
    x, codebook = put(backend, *cases.gaussian())
    with vqfast.use_backend(backend):
        text = vqfast.explain("nearest", x, codebook)
    assert all(name in text for name in BACKENDS), text
