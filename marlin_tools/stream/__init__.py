"""A model of any size as a stream of decoder blocks, with the calibration activations that flow through them."""
