"""Images in: a source of decoded images, the transform, the dataset keyed by (epoch, index), the loader."""

from fcmae.data.dataset import MaskedImages
from fcmae.data.loader import SampleStream, make_loader
from fcmae.data.sources import open_source

__all__ = ["MaskedImages", "SampleStream", "make_loader", "open_source"]
