"""MinkowskiEngine as a backend: `build` makes it, `engine` imports it, `encoder` is ConvNeXt V2 in its modules."""
