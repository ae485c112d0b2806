"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fcmae.kernels, not a top-level module: import fcmae.kernels instead "
        "(after `pip install -e .`)"
    )
