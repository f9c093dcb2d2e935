"""Triton kernels of vqfast, installed as `vqfast.kernels`. Importing this package imports no Triton."""

if __name__ != "vqfast.kernels":
    # A repository root on sys.path would otherwise hide other packages of the name `kernels`, and load our ops twice.
    raise ImportError(
        f"this folder is vqfast.kernels and was imported as {__name__!r}. Run from another directory, or with `python -P`; "
        "if vqfast.kernels itself is missing, reinstall with `pip install --no-build-isolation -e .`."
    )
