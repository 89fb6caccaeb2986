"""Numbers and tensors in and out: boxes, images, value ranges, random streams, lungs, activation maps, sealed files."""
