"""Several processes on one model, with the same bytes in the end; and which device each computes on."""
