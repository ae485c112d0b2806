"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package fcmae.kernels, not a top-level module: import fcmae.kernels instead "
        "(after `pip install -e .`)"
    )


def backends() -> dict[str, str]:
    """What the `native` backend runs on each device that is here: a fallback is never silent."""
    import torch

    from fcmae.kernels.devices import active

    devices = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    return {name: active(torch.device(name)) for name in devices}
