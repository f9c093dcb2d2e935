"""Wrong input raises ValueError or TypeError that names both tensors, the rule and the remedy (contract 5, 7)."""

import re

import cases
import pytest
import torch

import vqfast

pytestmark = pytest.mark.quick
X, CODEBOOK = cases.normal(5, 7), cases.normal(4, 7, seed=1)
SPARSE = torch.eye(7)[:4].to_sparse()


# name: x, codebook, words that the message must hold besides the names of both tensors
MISFITS = {
    "d_mismatch": (X, cases.normal(4, 8), ["7", "8"]),
    "d_mismatch_transposed": (X, CODEBOOK.T.contiguous(), ["7", "4"]),
    "k_zero": (X, torch.empty(0, 7), ["0"]),
    "d_zero": (torch.empty(5, 0), torch.empty(4, 0), ["0"]),
    "x_scalar": (torch.tensor(1.0), CODEBOOK, []),
    "codebook_vector": (X, torch.ones(7), []),
    "codebook_scalar": (X, torch.tensor(1.0), []),
    "codebook_rank_4": (X, cases.normal(1, 1, 4, 7), []),
    "groups_without_axis": (X, cases.normal(3, 4, 7), ["3"]),
    "groups_mismatch": (cases.normal(2, 5, 7), cases.normal(3, 4, 7), ["2", "3"]),
    "devices": (X, CODEBOOK.to("meta"), ["cpu", "meta"]),
    "devices_swapped": (X.to("meta"), CODEBOOK, ["cpu", "meta"]),
}
# name: x, codebook, words that the message must hold; one tensor alone is wrong and must be named
UNSUPPORTED = {
    "x_int64": (X.long(), CODEBOOK, ["int64"]),
    "x_bool": (X > 0, CODEBOOK, ["bool"]),
    "x_complex": (X.to(torch.complex64), CODEBOOK, ["complex64"]),
    "x_float8": (X.to(torch.float8_e4m3fn), CODEBOOK, ["float8_e4m3fn"]),
    "codebook_int32": (X, CODEBOOK.int(), ["int32"]),
    "codebook_uint8": (X, CODEBOOK.to(torch.uint8), ["uint8"]),
    "codebook_complex": (X, CODEBOOK.to(torch.complex128), ["complex128"]),
    "codebook_float8": (X, CODEBOOK.to(torch.float8_e5m2), ["float8_e5m2"]),
    "x_list": ([[1.0] * 7], CODEBOOK, ["list"]),
    "x_numpy": (X.numpy(), CODEBOOK, ["ndarray"]),
    "codebook_none": (X, None, ["None"]),
    "x_sparse": (SPARSE, CODEBOOK, ["sparse"]),
    "codebook_sparse": (X, SPARSE, ["sparse"]),
}


FUNCTIONS = pytest.mark.parametrize("function", [vqfast.nearest, vqfast.vector_quantize], ids=lambda f: f.__name__)


@FUNCTIONS
@pytest.mark.parametrize("name", MISFITS)
def test_tensors_that_do_not_fit(name, function):
    """The message names both tensors and says enough to hold what was wrong, the rule and the remedy."""
    x, codebook, words = MISFITS[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        function(x, codebook)
    message = str(caught.value)
    assert re.search(r"\bx\b", message) and "codebook" in message, f"both tensors must be named in: {message}"
    assert all(word in message for word in words) and len(message.split()) >= 10, message


@FUNCTIONS
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_types(name, function):
    x, codebook, words = UNSUPPORTED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        function(x, codebook)
    message = str(caught.value)
    assert message.startswith("x ") or "codebook" in message, f"the wrong tensor must be named in: {message}"
    assert all(word in message for word in words), message
    assert isinstance(caught.value, TypeError) or "sparse" in name


@FUNCTIONS
@pytest.mark.parametrize("metric", ["euclid", "", "L2", None, 0])
def test_unknown_metric_names_the_known_ones(metric, function):
    with pytest.raises((ValueError, TypeError)) as caught:
        function(X, CODEBOOK, metric=metric)
    assert all(word in str(caught.value) for word in ("l2", "cosine", "dot"))


@pytest.mark.parametrize("backend", ["gpu", "", "CPU", 3])
def test_unknown_backend_names_the_known_ones(backend):
    with pytest.raises((ValueError, TypeError)) as caught:
        vqfast.nearest(X, CODEBOOK, backend=backend)
    assert all(word in str(caught.value) for word in ("cpu", "cuda", "triton", "reference"))
    with pytest.raises((ValueError, TypeError)), vqfast.use_backend(backend):
        pass


def test_a_forced_backend_that_cannot_run_says_why():
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        vqfast.nearest(X.double(), CODEBOOK, backend="cpu")
    assert "cpu" in str(caught.value) and "float64" in str(caught.value)


def test_an_automatic_backend_moves_on_for_float64():
    assert vqfast.nearest(X.double(), CODEBOOK).distance.dtype == torch.float64
    assert "reference" in vqfast.explain("nearest", X.double(), CODEBOOK)


def test_use_backend_restores_what_was_before():
    with pytest.raises(KeyError), vqfast.use_backend("reference"):
        with vqfast.use_backend("cpu"):
            pass
        raise KeyError
    vqfast.nearest(X, CODEBOOK)
    with vqfast.use_backend("reference"):
        vqfast.nearest(X.double(), CODEBOOK)


MASKS = {
    "float": torch.ones(5),
    "uint8": torch.ones(5, dtype=torch.uint8),
    "too_long": torch.ones(6, dtype=torch.bool),
    "with_channels": torch.ones(5, 7, dtype=torch.bool),
    "scalar": torch.tensor(True),
    "elsewhere": torch.ones(5, dtype=torch.bool, device="meta"),
    "list": [True] * 5,
}


@pytest.mark.parametrize("name", MASKS)
def test_wrong_masks(name):
    with pytest.raises((ValueError, TypeError), match="mask"):
        vqfast.vector_quantize(X, CODEBOOK, mask=MASKS[name])


INDICES = {
    "float": torch.zeros(5),
    "bool": torch.zeros(5, dtype=torch.bool),
    "uint64": torch.tensor([2**64 - 1] * 5, dtype=torch.uint64),  # would turn to -1, a masked position
    "elsewhere": torch.zeros(5, dtype=torch.int64, device="meta"),
    "list": [0] * 5,
}


@pytest.mark.parametrize("name", INDICES)
def test_wrong_indices(name):
    with pytest.raises((ValueError, TypeError), match="indices"):
        vqfast.gather(CODEBOOK, INDICES[name])
    with pytest.raises((ValueError, TypeError), match="indices"):
        vqfast.code_stats(X, INDICES[name], 4)


@pytest.mark.parametrize("codebook", [torch.ones(7), torch.tensor(1.0), torch.ones(1, 1, 4, 7), torch.ones(4, 7).long()],
                         ids=["vector", "scalar", "rank_4", "int64"])  # fmt: skip
def test_wrong_codebooks_of_gather(codebook):
    with pytest.raises((ValueError, TypeError), match="codebook"):
        vqfast.gather(codebook, torch.zeros(5, dtype=torch.int64))


def test_gather_names_both_tensors_when_groups_differ():
    with pytest.raises(ValueError) as caught:
        vqfast.gather(cases.normal(3, 4, 7), torch.zeros(2, 5, dtype=torch.int64))
    assert "codebook" in str(caught.value) and "indices" in str(caught.value)


@pytest.mark.parametrize("x, indices, size", [
    (torch.ones(5, 7), torch.zeros(4, dtype=torch.int64), 3),
    (torch.ones(5, 7), torch.zeros(5, 1, dtype=torch.int64), 3),
    (torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), 0),
    (torch.ones(5, 7), torch.zeros(5, dtype=torch.int64), -1),
    (torch.ones(5, 7).long(), torch.zeros(5, dtype=torch.int64), 3),
], ids=["length", "rank", "k_zero", "k_negative", "int64"])  # fmt: skip
def test_wrong_code_stats(x, indices, size):
    with pytest.raises((ValueError, TypeError)):
        vqfast.code_stats(x, indices, size)


def ema_arguments(**changes):
    good = dict(codebook=CODEBOOK.clone(), cluster_size=torch.ones(4), cluster_sum=CODEBOOK.clone(),
                sums=torch.zeros(4, 7), counts=torch.ones(4, dtype=torch.int64), decay=0.9)  # fmt: skip
    return {**good, **changes}


@pytest.mark.parametrize("changes", [
    {"codebook": torch.zeros(5, 7)}, {"cluster_size": torch.ones(5)}, {"cluster_sum": torch.zeros(4, 6)},
    {"sums": torch.zeros(4, 6)}, {"counts": torch.ones(5, dtype=torch.int64)}, {"counts": torch.ones(4)},
    {"codebook": torch.zeros(4, 7).half()}, {"cluster_size": torch.ones(4).bfloat16()}, {"frozen": torch.ones(4)},
    {"frozen": torch.ones(5, dtype=torch.bool)}, {"sums": torch.zeros(4, 7, device="meta")}, {"decay": 1.1}, {"eps": -1.0},
], ids=lambda c: "-".join(c))  # fmt: skip
def test_wrong_ema_updates_leave_the_state_alone(changes):
    arguments = ema_arguments(**changes)
    before = arguments["codebook"].clone()
    with pytest.raises((ValueError, TypeError)):
        vqfast.ema_update_(*(arguments.pop(n) for n in ("codebook", "cluster_size", "cluster_sum", "sums", "counts")), **arguments)
    assert torch.equal(before, ema_arguments(**changes)["codebook"])
