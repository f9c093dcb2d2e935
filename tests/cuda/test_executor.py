"""The executor itself: right kernels give right results, and every planted fault is caught."""

import pytest

ORDERS = ("ascending", "descending")
RIGHT = ("transpose", "sum", "collectives", "copies", "mma_f16", "mma_bf16", "wgmma", "conversions")
WRONG_RESULT = (
    "missing_barrier",
    "missing_second_barrier",
    "missing_copy_wait",
    "missing_copy_barrier",
    "missing_wgmma_wait",
)
OUT_OF_BOUNDS = {
    "off_by_one": "heap-buffer-overflow",
    "shared_off_by_one": "out of bounds for type 'int [8]'",
    "dynamic_off_by_one": "heap-buffer-overflow",
}
ABORTS = {
    "divergent_barrier": "divergent barrier",
    "two_barriers": "divergent barrier",
    "divergent_shuffle": "on: shfl_xor",
    "lost_barrier": "on: mbarrier",
    "wrong_mask": "a mask that leaves it out",
}


@pytest.mark.parametrize("flavour", ["plain", "sanitized", "ucontext"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right(drills, name, order, flavour):
    done = drills(name, order, flavour)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("flavour", ["plain", "ucontext"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WRONG_RESULT)
def test_missing_synchronisation_gives_wrong_results(drills, name, order, flavour):
    assert drills(name, order, flavour).stdout.startswith("wrong: ")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_one_past_the_end_stops_the_sanitized_run(drills, name, order):
    done = drills(name, order, "sanitized")
    assert done.returncode != 0 and OUT_OF_BOUNDS[name] in done.stderr


@pytest.mark.parametrize("flavour", ["plain", "sanitized", "ucontext"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ABORTS)
def test_divergence_aborts_with_a_message(drills, name, order, flavour):
    done = drills(name, order, flavour)
    assert done.returncode != 0 and ABORTS[name] in done.stderr
