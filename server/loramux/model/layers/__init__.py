"""What a decoder layer is made of that is not a kernel of loramux_kernels."""
