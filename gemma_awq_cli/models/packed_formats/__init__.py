"""How files store 4-bit linears: every layout that is read, brought to AutoAWQ's GEMM layout without loss."""
