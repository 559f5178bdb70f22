"""C++ kernels for CPUs, compiled once with the compiler of the machine. Without one everything works, more slowly."""
