"""What pretrained weights are good for: labelled images, timm models that begin from them, their accuracy."""
