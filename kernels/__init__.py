"""Kernels on packed visible tiles. Not public API: the models call these through `fcmae.models.support`."""

if __name__ == "kernels":
    # From a checkout this folder hides the PyPI package of that name, for which others look, such as transformers:
    # they shall find nothing in it, and whoever means it the right name.
    __path__: list[str] = []

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("this folder is the package fcmae.kernels: import that (after `pip install -e .`)")


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
