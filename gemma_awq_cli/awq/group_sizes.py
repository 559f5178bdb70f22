"""The group sizes that artifacts are written with. Imports nothing, so that the command line may read it too."""

# Weights that share one scale and zero point, the default first. Kernels may read more sizes than these.
GROUP_SIZES = (128, 64, 32)
