"""Products with packed INT4 weights, dense and 2:4 sparse: layouts, kernels, dispatch, operators."""
