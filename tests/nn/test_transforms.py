"""Layers under checkpointing, torch.compile, export, and without host synchronisation (contract 6, 14; house rule 6)."""

import io
import math

import cases
import pytest
import torch
import torch._dynamo.testing
from check import ULP, close, same, same_bits
from layers import CODES, DIM, KINDS, make, state_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

EVERY_KIND = pytest.mark.parametrize("kind", [*KINDS, "residual"])


def layer_for(kind, **options):
    if kind == "residual":
        options.setdefault("num_quantizers", 3)
    return make(kind, **options)


def same_state(layer, other, what=""):
    expected = state_of(other)
    for name, tensor in state_of(layer).items():
        same_bits(tensor, expected[name], f"{what} {name}")


# ---- activation checkpointing -------------------------------------------------------------------------------------


class Checkpointed(torch.nn.Module):
    """An encoder and a quantizer whose activations are recomputed in backward."""

    def __init__(self, kind, reentrant, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.quantizer, self.reentrant = torch.nn.Linear(DIM, DIM), layer_for(kind, **options), reentrant

    def inner(self, z):
        out = self.quantizer(self.encoder(z).tanh())
        return out.quantized, out.loss

    def forward(self, z):
        if self.reentrant is None:
            return self.inner(z)
        return checkpoint(self.inner, z, use_reentrant=self.reentrant)


def backward(model, seed):
    quantized, loss = model(cases.normal(30, DIM, seed=seed).requires_grad_())
    (quantized.square().mean() + loss).backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@EVERY_KIND
def test_recomputation_adds_nothing(kind, reentrant):
    """The forward that runs again inside backward leaves the pending statistics as they are."""
    plain, again = Checkpointed(kind, None, auto_update=False), Checkpointed(kind, reentrant, auto_update=False)
    for model in (plain, again):
        for seed in range(3):
            backward(model, seed)
            model.quantizer.update_()
    same_state(again, plain)
    for a, b in zip(again.parameters(), plain.parameters()):
        same_bits(a.grad, b.grad)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("kind", ["ema", "residual"])
def test_recomputation_with_auto_update_raises_and_names_the_option(kind, reentrant):
    """The codes have moved since the first forward: a recomputation would find others."""
    with pytest.raises(RuntimeError, match="auto_update"):
        backward(Checkpointed(kind, reentrant), 0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@EVERY_KIND
def test_recomputation_in_evaluation_is_free(kind, reentrant):
    plain, again = Checkpointed(kind, None).eval(), Checkpointed(kind, reentrant).eval()
    backward(plain, 0), backward(again, 0)
    for a, b in zip(again.parameters(), plain.parameters()):
        same_bits(a.grad, b.grad)


# ---- compiled -----------------------------------------------------------------------------------------------------


def train(call, layer, steps=3, update=False):
    """Outputs and gradients of a few steps, with one masked and one short batch among them."""
    results = []
    for step in range(steps):
        z = cases.normal(2, 20 if step < 2 else 13, DIM, seed=step).requires_grad_()
        mask = (torch.arange(z.shape[0] * z.shape[1]).view(z.shape[:2]) % 3 > 0) if step else torch.ones(z.shape[:2], dtype=torch.bool)
        out = call(z, mask)
        if z.requires_grad:
            (out.loss + out.quantized.square().mean()).backward()
            results += [z.grad]
        if update:
            layer.update_()
        results += list(out)
    return results + [p.grad for p in layer.parameters()]


MODES = {"train": {}, "train_collecting": {"auto_update": False}, "train_reviving": {"revive_below": 0.5}, "eval": {}}


@pytest.mark.parametrize("mode", MODES)
@EVERY_KIND
def test_compile_fullgraph_keeps_every_bit(kind, mode):
    """Traced by AOT autograd and run op by op: the same ops, so the same bits, state included."""
    eager, traced = (layer_for(kind, **MODES[mode]).train(mode != "eval") for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    wanted = train(eager, eager, update=mode == "train_collecting")
    torch.manual_seed(3)
    got = train(compiled, traced, update=mode == "train_collecting")
    for at, (a, b) in enumerate(zip(got, wanted)):
        same_bits(a, b, f"value {at}")
    same_state(traced, eager)


@pytest.mark.slow
@pytest.mark.parametrize("kind, mode", [("parameter", "train"), ("ema", "train"), ("residual", "train"), ("ema", "eval")])
def test_compile_with_inductor(kind, mode):
    """The compiled object itself, generated code and all; floats may be fused, codes may not change.

    decay 0.5 moves the codes far in a step: a backward that reads the codebook after the update is seen at once.
    """
    options = {} if kind == "parameter" else {"decay": 0.5}
    eager, traced = (layer_for(kind, **options).train(mode != "eval") for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(traced, fullgraph=True)
    for at, (a, b) in enumerate(zip(train(compiled, traced), train(eager, eager))):
        if b.dtype == torch.int64:
            same(a, b, f"value {at}")
        else:
            close(a, b, 256 * ULP * (1 + b.abs()), f"value {at}")
    expected = state_of(eager)
    for name, tensor in state_of(traced).items():
        if tensor.is_floating_point():
            close(tensor, expected[name], 256 * ULP * (1 + expected[name].abs()), name)


def test_one_graph_serves_many_batch_sizes():
    """Marked dynamic, a layer compiles once; data never decides about the graph."""
    layer = layer_for("ema")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    compiled(cases.normal(16, DIM))
    first = counter.frame_count
    for n in (17, 18, 40, 33):
        z = cases.normal(n, DIM, seed=n)
        compiled(z), compiled(torch.full_like(z, math.nan)), compiled(torch.zeros_like(z))
    assert counter.frame_count == first


# ---- exported -----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.quantizer = torch.nn.Linear(DIM, DIM), layer_for(kind, **options)

    def forward(self, z, mask):
        out = self.quantizer(self.encoder(z), mask)
        return out.quantized, out.loss, out.indices


def gradients(model, n=20):
    z, mask = cases.normal(2, n, DIM, seed=n), torch.arange(2 * n).view(2, n) % 3 > 0
    quantized, loss, indices = model(z, mask)
    (quantized.square().mean() + loss).backward()
    return [quantized, loss, indices, *(p.grad for p in model.parameters())]


def exported(model):
    """The program, for any number of rows; exporting is not training."""
    rows = torch.export.Dim("rows", min=2, max=4096)
    inputs = cases.normal(2, 20, DIM), torch.ones(2, 20, dtype=torch.bool)
    before = state_of(model)
    program = torch.export.export(model, inputs, dynamic_shapes=({1: rows}, {1: rows}))
    for name, tensor in state_of(model).items():
        same_bits(tensor, before[name], f"exporting is not training: {name}")
    return program


def agree(program, model, mode):
    """Outputs, gradients and, in training, the state after two steps, bit for bit."""
    for n in (20, 31):
        for at, (a, b) in enumerate(zip(gradients(program, n), gradients(model, n))):
            same_bits(a, b, f"{n} rows, value {at}")
    wanted = dict(model.named_buffers())
    for name, buffer in program.named_buffers():
        if mode == "train" and name in wanted and wanted[name].is_floating_point():
            same_bits(buffer, wanted[name], name)


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_KIND
def test_exported_programs_keep_codes_gradients_and_state(kind, mode):
    model, twin = (Model(kind).train(mode == "train") for _ in range(2))  # a program shares its module's state
    agree(exported(twin).module(), model, mode)


@pytest.mark.parametrize("mode", ["train", "eval"])
@EVERY_KIND
def test_exported_programs_survive_a_file(kind, mode):
    model, buffer = Model(kind).train(mode == "train"), io.BytesIO()
    torch.export.save(exported(model), buffer)
    buffer.seek(0)
    agree(torch.export.load(buffer).module(), model, mode)


@EVERY_KIND
def test_exported_layers_give_their_named_tuple(kind):
    """The layer itself, whose result is no plain tuple; a file of the program must know what it is."""
    layer, z, buffer = layer_for(kind).eval(), cases.normal(20, DIM), io.BytesIO()
    torch.export.save(torch.export.export(layer, (z,)), buffer)
    buffer.seek(0)
    found, expected = torch.export.load(buffer).module()(z), layer(z)
    assert type(found) is type(expected)
    for name in ("quantized", "indices", "loss"):
        same(getattr(found, name), getattr(expected, name), name)


def test_encode_and_decode_can_be_exported():
    class Codec(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = layer_for("ema", channel_dim=1).eval()

        def forward(self, z):
            indices = self.quantizer.encode(z)
            return indices, self.quantizer.decode(indices)

    codec, z = Codec(), cases.normal(2, DIM, 4, 5)
    for a, b in zip(torch.export.export(codec, (z,)).module()(z), codec(z)):
        same(a, b)


# ---- no host synchronisation --------------------------------------------------------------------------------------


class Synchronisations(TorchDispatchMode):
    """Collects calls whose Python value or result shape depends on device data: on a GPU each would wait for the device.

    Device data are the given tensors and all that is computed from them; a number that the host draws by itself is
    not. What happens inside a vqfast op is that op's business and not seen here.
    """

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}

    def __init__(self, *device_data):
        super().__init__()
        self.seen, self.kept, self.tainted = [], [], set()
        self.taint(device_data)

    def taint(self, tensors):
        for t in tensors:
            if isinstance(t, torch.Tensor):
                self.kept.append(t)  # alive, so that its address stays its own
                self.tainted.add(t.untyped_storage().data_ptr())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        touched = any(t.untyped_storage().data_ptr() in self.tainted for t in leaves)
        namespace, name = function._schema.name.split("::")
        waits = name in self.WAITS or (name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]))  # fmt: skip
        if touched and waits and namespace == "aten":
            self.seen.append(str(function))
        result = function(*args, **(kwargs or {}))
        if touched:
            self.taint(tree_leaves(result))
        return result


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("mode", MODES)
@EVERY_KIND
def test_a_step_waits_for_nothing(kind, mode, masked):
    layer = layer_for(kind, **MODES[mode]).train(mode != "eval")
    z, mask = cases.normal(2, 20, DIM).requires_grad_(), torch.arange(40).view(2, 20) % 3 > 0
    with Synchronisations(z, mask, *layer.parameters(), *layer.buffers()) as watch:
        for _ in range(2):
            out = layer(z, mask if masked else None)
            (out.loss + out.quantized.sum()).backward()
            layer.update_()
    assert not watch.seen, watch.seen


def test_the_watch_sees_what_it_should():
    x = torch.ones(3)
    with Synchronisations(x) as watch:
        x.sum().item(), x[x > 0], bool(x[0] > 0), x[1:].mul(2).nonzero()
    assert len(watch.seen) == 4, watch.seen
    with Synchronisations(x) as watch:
        int(torch.randint(1, 5, ())), x + 1, x[1:], torch.where(x > 0, x, 0.0)
    assert not watch.seen


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_quantizer_dropout_draws_without_waiting(masked):
    """The number of levels is drawn on the host, from the host's generator, the same for the whole batch."""
    layer = layer_for("residual", quantizer_dropout=0.9)
    z, mask = cases.normal(2, 20, DIM), torch.arange(40).view(2, 20) % 3 > 0
    with Synchronisations(z, mask, *layer.parameters(), *layer.buffers()) as watch:
        for _ in range(8):
            layer(z, mask if masked else None)
    assert not watch.seen, watch.seen


@pytest.mark.parametrize("amount", [CODES + 1])
def test_compiled_layers_refuse_wrong_input_like_eager_ones(amount):
    torch._dynamo.reset()
    compiled = torch.compile(layer_for("ema"), backend="aot_eager")
    with pytest.raises((ValueError, TypeError, torch._dynamo.exc.TorchDynamoException)):
        compiled(torch.zeros(3, amount))
